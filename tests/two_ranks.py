"""What test_resume.py runs under torchrun, on two ranks; writes what it found as JSON.

arguments: shards, an empty folder.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    call_instead_of_replay,
    leaves,
    make_trainer,
    poison,
    step,
    steps,
    tiny_config,
)
from torch.nn.parallel import DistributedDataParallel

from common.distributed import (
    DistributedContext,
    gather,
    init_distributed,
    shutdown_distributed,
)
from pipelines.opencv_loader import RawBatch
from training import train_step
from training.metrics import Totals
from training.trainer import Trainer


def main() -> None:
    shards, folder = Path(sys.argv[1]), Path(sys.argv[2])
    dist = init_distributed("cpu", "fp16")
    found: dict[str, Any] = {
        loader: differences(loader, shards, folder / loader, dist) for loader in ("opencv", "dali")
    }
    mine = b"x" * 5 if dist.rank else b""
    found["gathered"] = [len(part) for part in gather(mine, dist)]
    plain = dist._replace(dtype=torch.float32)
    for loader in ("opencv", "dali"):
        found[f"{loader} goes on"] = on_two_ranks(loader, shards, folder / f"{loader}2", plain)
    found["poisoned"] = poisoned_on_the_second(shards, folder / "poisoned", plain)
    found["graph"] = graph_beside_ddp(shards, folder / "graph", plain)
    (folder / f"rank{dist.rank}.json").write_text(json.dumps(found))
    shutdown_distributed()


def recorded(trainer: Trainer, batches: list[RawBatch]) -> Trainer:
    """The same trainer, which keeps a copy of each batch of its loader."""
    hand_out = trainer.loader.next

    def next_kept() -> RawBatch:
        raw = hand_out()
        batches.append(RawBatch(*(tensor.cpu().clone() for tensor in raw)))
        return raw

    trainer.loader.next = next_kept  # type: ignore[method-assign]
    return trainer


def content(tensors: Iterable[torch.Tensor]) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in tensors)


def step_with_random(trainer: Trainer) -> list[float]:
    """A step that draws a number, as dropout would: a generator must be restored too."""
    sums = step(trainer).sums.tolist()
    torch.rand(1)
    return sums


def differences(
    loader: str, shards: Path, folder: Path, dist: DistributedContext, workers: int = 0
) -> list[str]:
    """What differs between four steps on end and four, each in a run resumed from the one before.

    Everything that a checkpoint holds is compared, on the rank that writes it, and the batches,
    losses and weights of both.
    """
    config = tiny_config(
        shards,
        data={"loader": loader, "preset": "princeton", "batch_size": 2, "workers": workers},
        optim={"ema_decay": 0.9, "accumulate": 2, "schedule": "cosine", "warmup_steps": 2},
        train={"precision": "fp16"},
    )
    batches, batches_of_parts = list[RawBatch](), list[RawBatch]()
    whole = recorded(make_trainer(config, folder, dist=dist), batches)
    expected = [step_with_random(whole) for _ in range(4)]
    whole.save(["last.pt"])  # now: the generator is this process's, which the parts change
    last = folder / "parts" / "last.pt"
    part, losses = recorded(make_trainer(config, last.parent, dist=dist), batches_of_parts), []
    for _ in range(4):
        losses.append(step_with_random(part))
        part.save(["last.pt"])
        part = recorded(make_trainer(config, last.parent, last, dist), batches_of_parts)
    differing = [] if losses == expected and losses[0] != losses[1] else ["losses"]
    given = [content(batch) for batch in batches]
    if [content(batch) for batch in batches_of_parts] != given or len(set(given)) != 8:
        differing.append("batches")
    weights = dict(part.network.named_parameters())
    for name, tensor in whole.network.named_parameters():
        if not torch.equal(tensor, weights[name]):
            differing.append(name)
    if dist.is_first:
        state, resumed = leaves_of(folder / "last.pt"), leaves_of(last)
        assert len(state) > 100 and any(name.startswith("scaler/") for name in state)
        differing += [n for n in state.keys() | resumed.keys() if state.get(n) != resumed.get(n)]
    return differing


def leaves_of(path: Path) -> dict[str, Any]:
    """Everything that a checkpoint's file holds."""
    return leaves(torch.load(path, weights_only=True))


def on_two_ranks(
    loader: str, shards: Path, folder: Path, dist: DistributedContext
) -> dict[str, Any]:
    """Save at the end of an epoch of two steps, go on, and report rows and loss of each step."""
    config = tiny_config(
        shards, data={"loader": loader, "preset": "newell"}, train={"steps_per_epoch": 2}
    )
    trainer = make_trainer(config, folder, dist=dist)
    for _ in range(2):
        step(trainer)
    trainer.save(["last.pt"])
    after = [step(trainer) for _ in range(2)]
    return {
        "rows": [rows_of(totals) for totals in after],
        "losses": [totals.sums[0].item() for totals in after],
    }


def poisoned_on_the_second(shards: Path, folder: Path, dist: DistributedContext) -> dict[str, Any]:
    """One step in which the second rank's loss alone is not finite: what is left on this rank."""
    trainer = make_trainer(tiny_config(shards), folder, dist=dist)
    before = {name: tensor.clone() for name, tensor in trainer.network.named_parameters()}
    trainer.log = trainer.open_log()
    with pytest.MonkeyPatch.context() as patch:
        if dist.rank == 1:
            poison(patch, [0])
        totals = step(trainer)
    trainer.report(totals)
    trainer.log.close()
    after = dict(trainer.network.named_parameters())
    return {
        "skipped": float(totals.skipped[0]),
        "weights stay": all(torch.equal(tensor, after[name]) for name, tensor in before.items()),
        "statistics are finite": all(b.isfinite().all().item() for b in trainer.network.buffers()),
    }


def graph_beside_ddp(shards: Path, folder: Path, dist: DistributedContext) -> dict[str, Any]:
    """Three steps as train.cuda_graph makes them, and three with DDP.

    Returns the losses of both, and the names of weights, statistics and moments that differ.
    """
    config = tiny_config(shards, data={"worker_kind": "processes"}, optim={"clip_norm": 0.1})
    losses, states = [], []
    for graphed in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            call_instead_of_replay(patch)
            patch.setattr(train_step, "choose_fast_step", lambda *_, used=graphed: (used, False))
            trainer = make_trainer(config, folder / str(graphed), dist=dist)
            losses.append(steps(trainer, 3))
        optimizer = leaves(trainer.train_step.optimizer.state_dict()["state"])
        states.append(leaves(trainer.evaluation_network().state_dict()) | optimizer)
        uses_ddp = isinstance(trainer.train_step.forward, DistributedDataParallel)
        assert uses_ddp is not graphed and len(states[-1]) > 100
    differing = [name for name, value in states[0].items() if value != states[1][name]]
    return {"losses": losses, "differing": differing}


def rows_of(totals: Totals) -> list[int]:
    return [row for rows in totals.rows for row in rows.tolist()]


if __name__ == "__main__":
    main()
