"""What a resumed run takes over from its checkpoint if it has another number of ranks.

docs/decisions/011.
"""

import dataclasses
from pathlib import Path

from common.errors import InputError
from configs.schema import Config
from model import checkpoint
from model.checkpoint import Checkpoint
from training.checkpoint_manager import numbered


def people_a_step(config: Config, ranks: int) -> int:
    """The global batch, over all ranks and all batches of a step."""
    return config.data.batch_size * config.optim.accumulate * ranks


def fit_to_ranks(config: Config, start: Checkpoint, ranks: int) -> tuple[Config, list[str]]:
    """The config with the run's global batch shared among so many ranks, and what to say of it.

    Raises InputError if the run cannot go on so, or if settings were changed that make it another
    run.
    """
    if not start.run:  # a checkpoint of others' code: no place in our data
        return config, []
    saved = start.config
    before = start.run.ranks
    people = start.run.people_a_step or people_a_step(saved, before)
    if before != ranks:
        _check_boundary(start, before, ranks)
    sizes = (saved.data.batch_size, saved.optim.accumulate)
    if before != ranks and people_a_step(config, ranks) == people:
        # The same global batch, shared out by hand.
        remarks = checkpoint.compare_settings(start, _with_sizes(config, *sizes))
    else:
        remarks = checkpoint.compare_settings(start, config)
        config = _share(config, people, ranks, start.path)
    if before != ranks:
        size, parts = config.data.batch_size, config.optim.accumulate
        remarks.append(
            f"changed on resuming: the run had {before} rank(s) and has {ranks}; "
            f"a step takes {people} people as before, {size} per rank x {ranks} rank(s) x {parts}"
        )
    return config, remarks


def _check_boundary(start: Checkpoint, before: int, ranks: int) -> None:
    """Raise InputError in mid-epoch: there each rank has its own place in the data."""
    epoch, source = start.config.train.steps_per_epoch, start.path
    if start.step % epoch:
        numbers = {path: int(path.stem.removeprefix("step_")) for path in numbered(source.parent)}
        ended = [path for path, step in numbers.items() if step % epoch == 0]
        or_from = f", or go back to its end: --resume {ended[0]}" if ended else ""
        raise InputError(
            source,
            f"a run of {before} rank(s), now {ranks}, in mid-epoch "
            f"(step {start.step}, {epoch} an epoch)",
            "the same number of ranks, for each has its own place in the data; "
            "another one at the end of an epoch",
            f"start {before}{or_from}",
        )


def _share(config: Config, people: int, ranks: int, source: Path) -> Config:
    """The largest batches, of no more than data.batch_size, that make up the global batch."""
    if people_a_step(config, ranks) == people:
        return config
    per_rank, rest = divmod(people, ranks)
    if rest:
        raise InputError(
            source,
            f"a run of {people} people a step, now on {ranks} ranks",
            "a number of ranks that divides the people of a step",
            "start another number of ranks, or begin a new run with --init_from",
        )
    sizes = range(1, config.data.batch_size + 1)
    size = max(size for size in sizes if per_rank % size == 0)
    return _with_sizes(config, size, per_rank // size)


def _with_sizes(config: Config, batch_size: int, accumulate: int) -> Config:
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch_size=batch_size),
        optim=dataclasses.replace(config.optim, accumulate=accumulate),
    )
