"""Finds the checkpoint to start from, and adapts a resumed run to the number of ranks."""

import dataclasses
from pathlib import Path

from common.errors import InputError
from configs.schema import Config
from model.checkpoint import Checkpoint, compare_settings, load_checkpoint
from training.checkpoint_manager import LAST, LOCK, has_checkpoint, newest_undamaged
from training.metrics import METRICS

AUTO = "auto"


def find_start(folder: Path, resume: str | None, restarted: bool) -> tuple[str, list[str]]:
    """The checkpoint to continue from, empty for a new run; and remarks for the log.

    folder: of the run. resume: None for a new run, empty for the newest undamaged checkpoint,
    "auto" for that if there is one, or a path. restarted: by torchrun; then resume acts as "auto".
    Raises InputError.
    """
    given = resume if resume not in (None, "", AUTO) else ""
    if given and not restarted:
        is_own = Path(given).resolve().parent == folder.resolve()
        if Path(given).is_file() and has_checkpoint(folder) and not is_own:
            found = f"a run of this name, and --resume {given} of another run"
            advice = "use --resume without a path, or another --train.name"
            raise InputError(folder, found, "a new folder, or a checkpoint of this run", advice)
        return given, []
    if resume is None and not restarted:
        log = folder / METRICS
        has_results = has_checkpoint(folder) or (log.exists() and log.stat().st_size > 0)
        is_empty_run = (folder / LOCK).exists() and not has_results
        if folder.exists() and not is_empty_run:
            other = "continue it with --resume" if has_checkpoint(folder) else "remove this folder"
            advice = f"choose another --train.name, or {other}"
            raise InputError(folder, "a run of this name", "a new folder", advice)
        return "", []
    source, remarks = newest_undamaged(folder)
    if resume == "" and source is None and not restarted:
        advice = "begin it without --resume, or correct --train.out and --train.name"
        raise InputError(folder / LAST, "no such file", "a checkpoint of the run", advice)
    start = str(source or given)
    why = "torchrun restarted the ranks: " if restarted else ""
    how = f"continuing from {start}" if start else "no checkpoint yet, so the run starts at step 0"
    return start, [*remarks, why + how]


def load_resumable(path: Path) -> Checkpoint:
    """A checkpoint with an optimizer's state, which a run can continue. Raises InputError."""
    checkpoint = load_checkpoint(path)
    if checkpoint.optimizer is None:
        expected = "a checkpoint of a run, with the state of its optimizer"
        raise InputError(path, "only weights", expected, "begin a new run with --init_from")
    return checkpoint


def global_batch_size(config: Config, world_size: int) -> int:
    """People per step, over all ranks and all accumulated batches."""
    return config.data.batch_size * config.optim.accumulate * world_size


def fit_to_ranks(
    config: Config, checkpoint: Checkpoint, world_size: int
) -> tuple[Config, list[str]]:
    """The config with the checkpoint's global batch shared among the ranks, and remarks.

    Raises InputError if the ranks cannot share it, or if settings were changed that would make it
    another run (docs/decisions/011).
    """
    if not checkpoint.run:  # of other code
        return config, []
    saved, before = checkpoint.config, checkpoint.run.ranks
    people, compared = checkpoint.run.people_a_step, config
    if before != world_size and global_batch_size(config, world_size) == people:
        # The user's settings already divide this global batch among the ranks.
        compared = _with_sizes(config, saved.data.batch_size, saved.optim.accumulate)
    remarks = compare_settings(checkpoint, compared)
    config = _share(config, people, world_size, checkpoint.path)
    if before == world_size:
        return config, remarks
    remarks.append(
        f"changed on resuming: the run had {before} rank(s) and has {world_size}; "
        f"a step takes {people} people as before, {config.data.batch_size} per rank "
        f"x {world_size} rank(s) x {config.optim.accumulate}"
    )
    return config, remarks


def _share(config: Config, people: int, world_size: int, path: Path) -> Config:
    """The config with the largest batches, up to data.batch_size, that give the global batch."""
    if global_batch_size(config, world_size) == people:
        return config
    per_rank, rest = divmod(people, world_size)
    if rest:
        found = f"a run of {people} people a step, now on {world_size} ranks"
        advice = "change it, or begin a new run with --init_from"
        raise InputError(path, found, "a number of ranks that divides the people", advice)
    sizes = range(1, config.data.batch_size + 1)
    size = max(size for size in sizes if per_rank % size == 0)
    return _with_sizes(config, size, per_rank // size)


def _with_sizes(config: Config, batch_size: int, accumulate: int) -> Config:
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch_size=batch_size),
        optim=dataclasses.replace(config.optim, accumulate=accumulate),
    )
