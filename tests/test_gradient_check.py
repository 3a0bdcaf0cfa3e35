"""Gradients that are computed twice reveal a flipped bit, and change nothing."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from helpers import ENVIRONMENT, make_trainer, step, steps, tiny_config, train_options

from common.errors import InputError


def config_with(tiny_shards, every: int):
    optim = {"accumulate": 2, "schedule": "constant", "lr": 1e-3}
    return tiny_config(tiny_shards, optim=optim, train={"verify_every": every})


def test_checked_steps_train_as_unchecked_ones(tiny_shards, tmp_path):
    checked, plain = (
        make_trainer(config_with(tiny_shards, every), tmp_path / str(every)) for every in (2, 0)
    )
    assert steps(checked, 4) == steps(plain, 4)
    for name, tensor in plain.network.state_dict().items():
        assert torch.equal(checked.network.state_dict()[name], tensor), name


@pytest.mark.parametrize("bit", [24, 30, 31])  # of the exponent, and the sign
def test_a_flipped_bit_of_a_gradient_stops_before_the_optimizer_uses_it(tiny_shards, tmp_path, bit):
    trainer = make_trainer(config_with(tiny_shards, 3), tmp_path)
    steps(trainer, 3)
    weight = trainer.network.heads[0].weight
    before, calls = weight.clone(), []

    def flip(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        changed = gradient.clone()
        if len(calls) == 1:
            largest = changed.abs().flatten().argmax()
            changed.view(-1).view(torch.int32)[largest] ^= -(2**31) if bit == 31 else 2**bit
        return changed

    weight.register_hook(flip)
    with pytest.raises(InputError, match=r"rank 0 on .*step 4") as caught:
        step(trainer)
    assert "in 1 tensor(s), first heads.0.weight" in caught.value.found
    assert torch.equal(weight, before)


FLIPPED = """
import sys, train
from training import train_step

real = train_step.check_gradients
def check(network, backward, step, dist):
    if dist.rank == 1 and step == 2:
        network.heads[0].weight.grad.view(-1)[0] *= -1
    real(network, backward, step, dist)
train_step.check_gradients = check
sys.exit(train.main())
"""


@pytest.mark.slow
def test_the_rank_with_the_flipped_bit_is_named(tiny_shards, tmp_path):
    (tmp_path / "flipped.py").write_text(FLIPPED)
    options = train_options(tiny_shards, tmp_path, "run", "--train.verify_every 1")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [sys.executable, *launch, str(tmp_path / "flipped.py"), *options],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 1
    assert "rank 1 on" in result.stderr and "step 3" in result.stderr
    assert "first heads.0.weight" in result.stderr and "rank 0 on" not in result.stderr
