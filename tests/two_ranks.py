"""What test_resume.py runs under torchrun, on two ranks; writes what it found as JSON.

arguments: shards, an empty folder.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from test_training import poison, tiny_config

from common.distributed import (
    DistributedContext,
    gather_bytes,
    init_distributed,
    shutdown_distributed,
)
from model import checkpoint
from pipelines.opencv_loader import RawBatch
from training.metrics import Totals
from training.trainer import Run


def main() -> None:
    shards, folder = Path(sys.argv[1]), Path(sys.argv[2])
    dist = init_distributed("cpu", "fp16")
    found: dict[str, Any] = {
        loader: differences(loader, shards, folder / loader, dist) for loader in ("opencv", "dali")
    }
    mine = b"x" * 5 if dist.rank else b""
    found["gathered"] = [len(part) for part in gather_bytes(mine, dist)]
    plain = dist._replace(dtype=torch.float32)
    for loader in ("opencv", "dali"):
        found[f"{loader} goes on"] = on_two_ranks(loader, shards, folder / f"{loader}2", plain)
    found["poisoned"] = poisoned_on_the_second(shards, folder / "poisoned", plain)
    (folder / f"rank{dist.rank}.json").write_text(json.dumps(found))
    shutdown_distributed()


def step(run: Run) -> Totals:
    totals = Totals(run.dist.device)
    run.network.train()
    run._train_step(totals)
    run.step += 1
    torch.rand(1)  # as dropout would: a generator that is not restored is found out
    return totals


def watched(run: Run, batches: list[RawBatch]) -> Run:
    """The same run, which keeps a copy of each batch that its loader hands out."""
    hand_out = run.loader.next

    def next_kept() -> RawBatch:
        raw = hand_out()
        batches.append(RawBatch(*(tensor.cpu().clone() for tensor in raw)))
        return raw

    run.loader.next = next_kept  # type: ignore[method-assign]
    return run


def content(tensors: Iterable[torch.Tensor]) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in tensors)


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
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    batches, batches_of_parts = list[RawBatch](), list[RawBatch]()
    whole = watched(Run(config, dist, folder), batches)
    expected = [step(whole).sums.tolist() for _ in range(4)]
    whole.save(["last.pt"])  # now: the generator is this process's, which the parts change
    part, losses = watched(Run(config, dist, folder / "parts"), batches_of_parts), []
    for _ in range(4):
        losses.append(step(part).sums.tolist())
        part.save(["last.pt"])
        state = checkpoint.load_checkpoint(folder / "parts" / "last.pt")
        part = watched(Run(config, dist, folder / "parts", state), batches_of_parts)
    differing = [] if losses == expected and losses[0] != losses[1] else ["losses"]
    given = [content(batch) for batch in batches]
    if [content(batch) for batch in batches_of_parts] != given or len(set(given)) != 8:
        differing.append("batches")
    weights = dict(part.network.named_parameters())
    for name, tensor in whole.network.named_parameters():
        if not torch.equal(tensor, weights[name]):
            differing.append(name)
    if dist.is_first:
        state = leaves(torch.load(folder / "last.pt", weights_only=True))
        resumed = leaves(torch.load(folder / "parts" / "last.pt", weights_only=True))
        assert len(state) > 100 and any(name.startswith("scaler/") for name in state)
        differing += [n for n in state.keys() | resumed.keys() if state.get(n) != resumed.get(n)]
    return differing


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Every plain value and every tensor's bytes, by path."""
    if isinstance(value, torch.Tensor):
        return {name: (str(value.dtype), tuple(value.shape), value.numpy().tobytes())}
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in pairs for k, v in leaves(item, f"{name}{key}/").items()}
    return {name: value}


def on_two_ranks(
    loader: str, shards: Path, folder: Path, dist: DistributedContext
) -> dict[str, Any]:
    """Save at the end of an epoch of two steps, go on, and tell of each step its rows and loss."""
    config = tiny_config(
        shards, data={"loader": loader, "preset": "newell"}, train={"steps_per_epoch": 2}
    )
    folder.mkdir(exist_ok=True)
    run = Run(config, dist, folder)
    begun = [rows_of(step(run)) for _ in range(2)]
    run.save(["last.pt"])
    after = [step(run) for _ in range(2)]
    return {
        "first rows": begun,
        "rows": [rows_of(totals) for totals in after],
        "losses": [totals.sums[0].item() for totals in after],
    }


def poisoned_on_the_second(shards: Path, folder: Path, dist: DistributedContext) -> dict[str, Any]:
    """One step in which the second rank's loss alone is not finite: what is left on this rank."""
    folder.mkdir(exist_ok=True)
    run = Run(tiny_config(shards), dist, folder)
    before = {name: tensor.clone() for name, tensor in run.network.named_parameters()}
    run.log = run._open_log()
    if dist.rank == 1:
        poison(run, {0})
    totals = step(run)
    run._report(totals)
    run.log.close()
    return {
        "skipped": totals.bad_steps.item(),
        "weights stay": all(torch.equal(t, before[n]) for n, t in run.network.named_parameters()),
        "statistics are finite": all(b.isfinite().all().item() for b in run.network.buffers()),
    }


def rows_of(totals: Totals) -> list[int]:
    return [row for rows, _ in totals.rows for row in rows.tolist()]


if __name__ == "__main__":
    main()
