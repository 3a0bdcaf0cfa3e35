"""Options of the training step change its speed and memory, not its numbers, and nothing waits."""

import itertools
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import (
    CPU,
    call_instead_of_replay,
    make_codec,
    make_trainer,
    new_network,
    step,
    steps,
    tiny_config,
)
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from common.distributed import DistributedContext, average_gradients, choose_dtype
from common.errors import InputError
from configs.skeleton import MPII
from model import hourglass
from model.hourglass import StackedHourglass, compile_residuals
from model.loss import stack_losses
from pipelines.augment import Draw
from pipelines.loader import make_batch
from pipelines.opencv_loader import RawBatch
from pipelines.shard_format import HEADER_LENGTH
from training import step_graph
from training.metrics import Totals
from training.profiler import TRACE
from training.train_step import choose_fast_step

META = torch.device("meta")
COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")


def network(stacks: int, checkpoint_activations: bool = False, joints: int = 5) -> StackedHourglass:
    return new_network(
        stacks=stacks,
        width=16,
        joints=joints,
        depth=2,
        stem=(8, 8, 8),
        checkpoint_activations=checkpoint_activations,
    )


def raw_batch(people: int, device: torch.device) -> RawBatch:
    """Noise in the shapes that a loader gives."""
    draws = torch.tensor([Draw()] * people)
    draws[:, 2] = torch.arange(people) % 2
    return RawBatch(
        torch.randint(0, 255, (people, 64, 64, 3), dtype=torch.uint8).to(device),
        torch.randn(people, 2, 3).to(device),
        draws.to(device),
        torch.rand(people, HEADER_LENGTH + 4 * MPII.joint_count).to(device),
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
    tiny = network(2, joints=16).to(META)
    totals, raw = Totals(META), raw_batch(4, META)

    def one_step() -> None:
        batch = make_batch(raw, codec, META)
        heat = tiny(batch.images_N3HW)
        losses = stack_losses(heat, batch.heat_NJHW, batch.has_target_NJ)
        losses.mean().backward()
        totals.add(losses, heat[:, -1], batch, codec)
        norm = torch.nn.utils.get_total_norm([p.grad for p in tiny.parameters()])
        totals.skipped.append(~torch.isfinite(norm))

    one_step()  # copies its constants
    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, lambda *_, **__: pytest.fail("a tensor made on the host"))
    monkeypatch.setattr(torch.Tensor, "new_tensor", lambda *_, **__: pytest.fail("the same"))
    with Watch() as watch:
        one_step()
    assert not watch.found and len(totals.skipped) == 2


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("options", [{"ema_decay": 0.9, "clip_norm": 1.0}, {"accumulate": 2}])
def test_a_whole_step_of_a_run_reads_no_value(precision, options, tiny_shards, tmp_path):
    """With optimizer, scaler and average: on a GPU it would wait for the value."""
    config = tiny_config(tiny_shards, optim=options)
    dist = CPU._replace(dtype=choose_dtype(precision, CPU.device))
    trainer = make_trainer(config, tmp_path, dist=dist)
    trainer.network.train()
    totals = Totals(CPU.device)
    trainer.train_step.run(trainer.loader, 0, totals)
    with Watch() as watch:
        trainer.train_step.run(trainer.loader, 1, totals)
    assert not watch.found and len(totals.skipped) == 2


def test_time_in_the_loader_is_counted_as_waiting():
    totals = Totals(CPU.device)
    for _ in range(2):
        with totals.waiting():
            time.sleep(0.02)
    assert 0.04 <= totals.seconds_waited() < 1


@pytest.mark.gpu
def test_on_a_gpu_only_its_idle_time_is_counted_as_waiting():
    totals = Totals(torch.device("cuda"))
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)  # at least 0.4 s on the GPU; the host goes on
    with totals.waiting():
        time.sleep(0.1)
    torch.cuda.synchronize()
    while_busy = totals.seconds_waited()
    with totals.waiting():
        time.sleep(0.1)
    torch.cuda.synchronize()
    assert while_busy < 0.05 and 0.09 < totals.seconds_waited() - while_busy < 1


def test_the_watch_sees_a_value_that_is_read_and_one_that_is_brought():
    with Watch() as watch:
        torch.zeros(3).to(META)
        torch.zeros(()).item()
    assert len(watch.found) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("loader", ["opencv", "dali"])
@pytest.mark.parametrize("preset", ["princeton", "hrnet"])
@pytest.mark.parametrize("cuda_graph", ["auto", False])
def test_the_host_never_waits_for_the_gpu_in_a_step(
    loader, preset, cuda_graph, tiny_shards, tmp_path
):
    data, train = {"loader": loader, "preset": preset}, {"cuda_graph": cuda_graph}
    config = tiny_config(tiny_shards, data=data, train=train, optim={"ema_decay": 0.9})
    dist = DistributedContext(0, 1, torch.device("cuda", 0), torch.bfloat16)
    trainer = make_trainer(config, tmp_path, dist=dist)
    trainer.network.train()
    totals = Totals(dist.device)
    for number in range(3):
        trainer.train_step.run(trainer.loader, number, totals)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(3, 6):
            trainer.train_step.run(trainer.loader, number, totals)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(totals.skipped) == 6 and sum(totals.skipped).item() == 0


def test_activations_computed_twice_give_the_same_numbers():
    """Loss, gradients and running statistics of three steps, bit for bit."""
    torch.manual_seed(0)
    plain, twice = network(3), network(3, checkpoint_activations=True)
    twice.load_state_dict(plain.state_dict())
    images, target = torch.rand(3, 2, 3, 64, 64), torch.rand(2, 5, 16, 16)
    for batch in images:
        losses = [stack_losses(n(batch), target, torch.ones(2, 5)) for n in (plain, twice)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.mean().backward()
    for (name, a), b in zip(plain.named_parameters(), twice.parameters(), strict=True):
        assert a.grad is not None and torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(plain.named_buffers(), twice.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_fewer_activations_are_kept_for_the_gradient():
    """Bytes that autograd saves in the forward pass."""

    def saved(checkpointed: bool) -> int:
        tiny = network(4, checkpoint_activations=checkpointed)
        own = {p.data_ptr() for p in [*tiny.parameters(), *tiny.buffers()]}
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in own:
                kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            result = tiny(torch.rand(2, 3, 64, 64))
        del result
        return sum(kept.values())

    assert saved(True) < 0.5 * saved(False)


@pytest.mark.parametrize("checkpointed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_and_eight_stacks_compile_the_same_graphs(checkpointed):
    """Residual blocks have eight shapes at depth 4."""
    counts = []
    for stacks in (2, 8):
        torch._dynamo.reset()
        counters.clear()
        tiny = new_network(
            stacks, 16, 5, depth=4, stem=(8, 12, 14), checkpoint_activations=checkpointed
        )
        compile_residuals(tiny, backend="eager")
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=checkpointed):
                tiny(torch.rand(2, 3, 64, 64)).mean().backward()
        assert not counters["graph_break"] and not counters["recompile_limit"]
        counts.append(counters["stats"]["unique_graphs"])
    assert counts == [8, 8]


@pytest.fixture
def one_rank(request) -> Iterator[None]:
    """A process group of this process alone; nccl in tests that need a GPU."""
    backend = "nccl" if request.node.get_closest_marker("gpu") else "gloo"
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_compiled_residuals_in_ddp_give_the_same_gradients_and_statistics(one_rank):
    """Activations are computed twice but counted once; traced without generated code.

    In float64, because the gradients of a fork are added in another order.
    """
    torch.manual_seed(0)
    plain, compiled = network(2).double(), network(2, checkpoint_activations=True).double()
    compiled.load_state_dict(plain.state_dict())
    compile_residuals(compiled, backend="aot_eager")
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    for each in (plain, DistributedDataParallel(compiled)):
        each(images).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12, msg=name)
    for (name, a), b in zip(plain.named_buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


class WithNan:
    """A loader whose third batch is not finite."""

    def __init__(self, loader):
        self.loader, self.count = loader, itertools.count()

    def next(self) -> RawBatch:
        raw = self.loader.next()
        factor = math.nan if next(self.count) == 2 else 1.0
        return raw._replace(images_NHW3=raw.images_NHW3 * factor)


def graph_and_eager_runs(
    graph_on: DistributedContext, tiny_shards: Path, folder: Path, **train: object
) -> tuple[list[list[float]], list[torch.nn.Module]]:
    """Losses and networks of six steps, as train.cuda_graph makes them and step by step."""
    losses, networks = [], []
    for graphed in (False, True):
        data = {"worker_kind": "processes"}  # batches without jittered colours, as on a GPU
        config = tiny_config(tiny_shards, data=data, optim={"ema_decay": 0.9}, train=train)
        trainer = make_trainer(config, folder / str(graphed), dist=graph_on)
        trainer.train_step.uses_graph = graphed  # behind the check, which refuses a CPU
        trainer.loader = WithNan(trainer.loader)
        losses.append(steps(trainer, 2))
        bad = step(trainer)
        assert [each.item() for each in bad.skipped] == [True] and bad.good_batches == 0
        trainer.monitor.check(3, bad, trainer.open_log(), trainer.dist)  # restores statistics
        losses[-1] += steps(trainer, 3)
        networks += [trainer.network, trainer.train_step.averaged.module]
    return losses, networks


def test_a_step_on_fixed_buffers_gives_the_same_losses_and_weights(
    tiny_shards, tmp_path, monkeypatch
):
    call_instead_of_replay(monkeypatch)
    losses, networks = graph_and_eager_runs(CPU, tiny_shards, tmp_path)
    assert losses[0] == losses[1] and len(set(losses[0])) == 5
    for plain, graphed in (networks[::2], networks[1::2]):
        for (name, a), b in zip(
            plain.state_dict().items(), graphed.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), name


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_cuda_graph_gives_the_losses_of_separate_kernels(compiled, tiny_shards, tmp_path):
    """A step that is not finite among them; kernels of the gradient add in another order."""
    dist = DistributedContext(0, 1, torch.device("cuda", 0), torch.bfloat16)
    losses, networks = graph_and_eager_runs(dist, tiny_shards, tmp_path, compile=compiled)
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=0)
    assert all(torch.isfinite(t).all() for n in networks for t in n.state_dict().values())


@pytest.mark.gpu
def test_a_cuda_graph_averages_gradients_over_ranks(one_rank):
    """A sum over one rank, divided by two."""
    dist = DistributedContext(0, 2, torch.device("cuda", 0), torch.float32)
    conv = torch.nn.Conv2d(2, 3, 3).to(dist.device, memory_format=torch.channels_last)
    for parameter in conv.parameters():
        parameter.grad = torch.ones_like(parameter)
    gradients = [conv.weight.grad, conv.bias.grad]
    replay = step_graph.record_cuda_graph(lambda: average_gradients(conv, dist))
    for value in (4.0, 6.0):
        for gradient in gradients:
            gradient.fill_(value)
        replay()
        assert all((gradient == value / 2).all() for gradient in gradients)


@pytest.mark.parametrize(
    ("sections", "dist", "found"),
    [
        ({}, CPU, "a CPU"),
        ({}, CPU._replace(device=torch.device("cuda", 0), dtype=torch.float16), "fp16"),
        ({"optim": {"name": "rmsprop", "accumulate": 2}}, CPU._replace(device=torch.device("cuda")),
         "optim.name rmsprop, optim.accumulate 2"),
        ({"train": {"verify_every": 9}}, CPU._replace(device=torch.device("cuda")),
         "train.verify_every 9"),
    ],
)  # fmt: skip
def test_a_cuda_graph_is_refused_where_it_does_not_work(sections, dist, found, tiny_shards):
    sections["train"] = sections.get("train", {}) | {"cuda_graph": True}
    network = torch.nn.Conv2d(3, 3, 1)
    with pytest.raises(InputError) as caught:
        choose_fast_step(network, tiny_config(tiny_shards, **sections), dist)
    assert (caught.value.where, caught.value.found) == ("train.cuda_graph: true", found)


@pytest.mark.parametrize(
    ("device", "world_size", "train", "used"),
    [
        ("cuda", 1, {}, (True, True)),
        ("cuda", 1, {"cuda_graph": False}, (False, False)),
        ("cuda", 1, {"fused_kernels": False}, (True, False)),
        ("cuda", 1, {"compile": True}, (True, False)),
        ("cuda", 2, {}, (False, False)),
        ("cuda", 2, {"fused_kernels": True}, (False, True)),
        ("cuda", 2, {"cuda_graph": True}, (True, True)),
        ("cpu", 1, {}, (False, False)),
    ],
)
def test_the_fast_step_is_chosen_where_it_works(
    device, world_size, train, used, tiny_shards, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as if it were an H100
    monkeypatch.setattr(hourglass, "triton_works", lambda: True)
    dist = DistributedContext(0, world_size, torch.device(device), torch.bfloat16)
    assert choose_fast_step(network(3), tiny_config(tiny_shards, train=train), dist) == used


@pytest.mark.parametrize("count", [7, 2])
def test_a_profiled_run_writes_a_trace_unless_it_is_too_short(
    count, tiny_shards, tmp_path, capsys, monkeypatch
):
    options = {"profile_steps": 2, "steps": count, "steps_per_epoch": count}
    trainer = make_trainer(tiny_config(tiny_shards, train=options), tmp_path)
    monkeypatch.setattr(trainer, "_finish_epoch", dict)
    trainer.train()
    text = capsys.readouterr().err
    if count == 2:
        assert "ended within its first 5 steps" in text and not (tmp_path / TRACE).exists()
        return
    events = json.loads((tmp_path / TRACE).read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert sum(name.startswith("ProfilerStep#") for name in names) == 2
    assert any("convolution" in event.get("name", "") for event in events)
    assert "aten::" in text and f"wrote {tmp_path / TRACE}" in text
