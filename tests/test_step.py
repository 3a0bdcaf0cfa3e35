"""Options of the training step change its speed and memory, not its numbers, and nothing waits."""

import json
import shutil

import pytest
import torch
from helpers import make_codec
from test_training import make_run, steps, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from common.distributed import DistributedContext, choose_dtype
from common.errors import InputError
from configs.schema import Config, ModelConfig, TrainConfig, check_values
from configs.skeleton import MPII
from model.hourglass import StackedHourglass
from model.loss import stack_losses, stack_losses_of_joints
from pipelines import heatmaps
from pipelines.augment import Draw
from pipelines.loader import Batch, make_batch
from pipelines.opencv_loader import RawBatch
from pipelines.shard_format import record_length
from training import profiler as tracing
from training.metrics import Totals

META = torch.device("meta")
COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")


def raw_batch(people: int, device: torch.device) -> RawBatch:
    """Noise in the shapes that a loader gives."""
    draws = torch.tensor([Draw()] * people)
    draws[:, 2] = torch.arange(people) % 2
    return RawBatch(
        torch.randint(0, 255, (people, 64, 64, 3), dtype=torch.uint8).to(device),
        torch.randn(people, 2, 3).to(device),
        draws.to(device),
        torch.rand(people, record_length(MPII.joint_count)).to(device),
    )


class Watch(TorchDispatchMode):
    """Notes every operation that reads a value of the device, or brings one from the host."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [a for a in args if isinstance(a, torch.Tensor) and a.dim()]
        from_host = (kwargs or {}).get("device") == META and "_to_copy" in str(func)
        on_host = any(t.device.type == "cpu" for t in tensors)
        if (from_host and on_host) or "_local_scalar_dense" in str(func) or "nonzero" in str(func):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("preset", "rule"), [("princeton", "princeton"), ("newell", "exact"), ("hrnet", "hrnet")]
)
def test_a_step_reads_nothing_from_the_device_and_brings_nothing_to_it(preset, rule, monkeypatch):
    """On torch's meta device, which has shapes alone: whatever reads a value fails there."""
    codec = make_codec(preset, rule)
    network = StackedHourglass(2, 8, 16, 2, (8, 8, 8)).to(META)
    totals, raw = Totals(META), raw_batch(4, META)

    def step() -> None:
        batch = make_batch(raw, codec, META)
        heat = network(batch.images_N3HW)
        losses = stack_losses(heat, batch.heat_NJHW, batch.drawn_NJ, "ignore")
        losses.mean().backward()
        totals.add(losses, heat[:, -1], batch, rule)
        norm = torch.nn.utils.get_total_norm([p.grad for p in network.parameters()])
        totals.add_step(~torch.isfinite(norm))

    step()  # copies its constants
    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, lambda *_, **__: pytest.fail("a tensor made on the host"))
    monkeypatch.setattr(torch.Tensor, "new_tensor", lambda *_, **__: pytest.fail("the same"))
    with Watch() as watch:
        step()
    assert not watch.found and totals.steps == 2


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("options", [{"ema_decay": 0.9, "clip_norm": 1.0}, {"accumulate": 2}])
def test_a_step_of_a_run_reads_no_value(precision, options, tiny_shards, tmp_path):
    """The whole of it, with optimizer, scaler and average: on a GPU it would wait for the value."""
    config = tiny_config(tiny_shards, optim=options, train={"precision": precision})
    dist = DistributedContext(
        0, 1, torch.device("cpu"), choose_dtype(precision, torch.device("cpu"))
    )
    run = make_run(config, tmp_path / "run", dist=dist)
    run.network.train()
    totals = Totals(dist.device)
    run._train_step(totals)
    with Watch() as watch:
        run._train_step(totals)
    assert not watch.found and totals.steps == 2


def test_the_watch_sees_a_value_that_is_read_and_one_that_is_brought():
    with Watch() as watch:
        torch.zeros(3).to(META)
        torch.zeros(()).item()
    assert len(watch.found) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("loader", ["opencv", "dali"])
@pytest.mark.parametrize("preset", ["princeton", "hrnet"])
def test_the_host_never_waits_for_the_gpu_in_a_step(loader, preset, tiny_shards, tmp_path):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    config = tiny_config(
        tiny_shards, data={"loader": loader, "preset": preset}, optim={"ema_decay": 0.9}
    )
    dist = DistributedContext(0, 1, torch.device("cuda", 0), torch.bfloat16)
    run = make_run(config, tmp_path / "run", dist=dist)
    run.network.train()
    totals = Totals(dist.device)
    for _ in range(3):
        run._train_step(totals)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            run._train_step(totals)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert totals.steps == 6 and totals.bad_steps.item() == 0


def test_activations_computed_twice_give_the_same_numbers():
    """Loss, gradients and running statistics of three steps, bit for bit."""
    torch.manual_seed(0)
    plain = StackedHourglass(3, 16, 5, 2, (8, 8, 8))
    twice = StackedHourglass(3, 16, 5, 2, (8, 8, 8), checkpoint_activations=True)
    twice.load_state_dict(plain.state_dict())
    images, target = torch.rand(3, 2, 3, 64, 64), torch.rand(2, 5, 16, 16)
    for batch in images:
        losses = [stack_losses(n(batch), target, torch.ones(2, 5), "empty") for n in (plain, twice)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.mean().backward()
    for (name, a), b in zip(plain.named_parameters(), twice.parameters(), strict=True):
        assert a.grad is not None and torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(plain.named_buffers(), twice.buffers(), strict=True):
        assert torch.equal(a, b), name
    assert all(m.momentum == 0.1 for m in twice.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_fewer_activations_are_kept_for_the_gradient():
    """Bytes that autograd saves in the forward pass."""

    def saved(checkpointed: bool) -> int:
        network = StackedHourglass(4, 16, 5, 2, (8, 8, 8), checkpoint_activations=checkpointed)
        own = {p.data_ptr() for p in [*network.parameters(), *network.buffers()]}
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in own:
                kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            result = network(torch.rand(2, 3, 64, 64))
        del result
        return sum(kept.values())

    assert saved(True) < 0.5 * saved(False)


def test_compiling_and_computing_twice_together_are_refused():
    with pytest.raises(InputError, match="checkpoint_activations"):
        check_values(
            Config(train=TrainConfig(compile=True), model=ModelConfig(checkpoint_activations=True))
        )


def joints_and_marks() -> tuple[torch.Tensor, torch.Tensor]:
    """Joints inside, at the border, far outside and not a number."""
    generator = torch.Generator().manual_seed(3)
    joints = torch.rand(4, 16, 2, generator=generator) * 24 - 4
    joints[0, 0] = float("nan")
    return joints, torch.rand(4, 16, generator=generator) > 0.2


@pytest.mark.slow
@COMPILER
@pytest.mark.parametrize("rule", ["exact", "princeton"])
def test_compiled_targets_are_the_plain_ones(rule):
    joints, drawn = joints_and_marks()
    expected = heatmaps.render(joints, drawn, 16, rule, 4.0)
    found = torch.compile(heatmaps.render)(joints, drawn, 16, rule, 4.0)
    assert expected.max() > 0.9 and (expected - found).abs().max() <= 1e-6


@pytest.mark.slow
@COMPILER
def test_a_loss_that_renders_its_targets_gives_the_plain_losses_and_gradients():
    joints, drawn = joints_and_marks()
    first = torch.randn(4, 2, 16, 16, 16, requires_grad=True)
    second = first.detach().clone().requires_grad_()
    target = heatmaps.render(joints, drawn, 16, "exact", 4.0)
    expected = stack_losses(first, target, drawn, "ignore")
    found = torch.compile(stack_losses_of_joints)(second, joints, drawn, "exact", 4.0, "ignore")
    for losses in (expected, found):
        losses.mean().backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(second.grad, first.grad, rtol=1e-6, atol=1e-6)


def test_a_run_with_targets_in_its_loss_makes_the_same_steps(tiny_shards, tmp_path, monkeypatch):
    """The way through the run; compiled or not is another test's matter."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    losses = [
        steps(make_run(tiny_config(tiny_shards, train={"fuse_targets": fused}), tmp_path / f), 3)
        for f, fused in (("plain", False), ("fused", True))
    ]
    assert losses[0] == losses[1]


def test_where_targets_are_rendered_by_the_loss_the_batch_has_none():
    codec = make_codec("hrnet", "exact")
    raw = raw_batch(2, torch.device("cpu"))
    batch: Batch = make_batch(raw, codec, torch.device("cpu"), render=False)
    assert batch.heat_NJHW.shape == (2, 16, 0, 0) and batch.joints_NJ2.shape == (2, 16, 2)


def test_a_profiled_run_writes_a_trace_and_prints_its_operators(tiny_shards, tmp_path, capsys):
    config = tiny_config(tiny_shards, train={"profile_steps": 2, "steps": 8, "steps_per_epoch": 8})
    run = make_run(config, tmp_path / "run")
    run.train()
    events = json.loads((run.folder / tracing.TRACE).read_text())["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert sum(name.startswith("ProfilerStep#") and event.get("cat") == "user_annotation"
               for name, event in zip(names, events, strict=True)) == 2  # fmt: skip
    assert any("convolution" in name for name in names)
    said = capsys.readouterr()
    assert "aten::" in said.err + said.out and "wrote" in said.err + said.out
    assert not list(run.folder.glob("writing_*"))


def test_a_run_too_short_to_be_profiled_says_so(tiny_shards, tmp_path, capsys):
    config = tiny_config(tiny_shards, train={"profile_steps": 2, "steps": 2, "steps_per_epoch": 2})
    make_run(config, tmp_path / "run").train()
    said = capsys.readouterr()
    assert "ended within its first 5 steps" in said.err + said.out
    assert not (tmp_path / "run" / tracing.TRACE).exists()
