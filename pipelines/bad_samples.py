"""People of the training split with damaged pictures, each replaced by a neighbour.

The replacement is the next undamaged person of the same tar, so that the order and augmentation of
all others stay the same. It depends only on the set of damaged people, so ranks may learn of them
at different times.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from common.errors import InputError
from common.files import write_atomic
from pipelines.jpeg import BadSamplesError
from pipelines.loader import Loader, RawBatch
from pipelines.shards import ShardSet

FILE_NAME = "bad_samples.jsonl"
"""In the run's folder; one line for each person that is left out."""


class BadSamples:
    """The damaged people that one rank knows: sample number -> fault."""

    def __init__(self, shards: ShardSet, folder: Path, limit: int, rank: int = 0):
        """Read the file of earlier starts of the run.

        folder: of the run. limit: data.max_bad_samples.
        """
        self.shards, self.path, self.limit, self.rank = shards, folder / FILE_NAME, limit, rank
        self.faults = self._read()
        self._reported = self._written = set(self.faults)

    def patched_shards(self) -> ShardSet:
        """The split with damaged people replaced. Raises InputError if a whole tar is damaged."""
        return self.shards.with_replacements(set(self.faults))

    def add(self, error: BadSamplesError) -> None:
        """Add a loader's faults. Raises InputError above the limit, or `error` if none is new."""
        if error.faults.keys() <= self.faults.keys():
            raise error
        self.faults |= error.faults
        if self.rank == 0:
            self._write(self.faults)
        self._check(len(self.faults))

    def merge(self, faults_of_ranks: list[dict[int, str]]) -> list[str]:
        """Combine the faults of all ranks, write the file; returns a message per new person.

        Raises InputError above the limit, on every rank.
        """
        known = {s: text for faults in faults_of_ranks for s, text in faults.items()}
        known |= self.faults
        new = sorted(known.keys() - self._reported)
        self._reported = set(known)
        if self.rank == 0 and self._written != set(known):
            self._write(known)
        self._check(len(known))
        return [
            f"{self.shards.where(sample)} is left out, a neighbour replaces it: {known[sample]}"
            for sample in new
        ]

    def _check(self, count: int) -> None:
        if count > self.limit:
            found, expected = f"{count} people with damaged pictures", f"at most {self.limit}"
            advice = "restore the shards (tools/check_shards.py), remove this list, --resume"
            raise InputError(self.path, found, f"{expected} (data.max_bad_samples)", advice)

    def _write(self, faults: dict[int, str]) -> None:
        """Write the file. On a full disk the next call tries again."""
        text = ""
        for sample, fault in sorted(faults.items()):
            names = {"key": self.shards.keys[sample], "where": self.shards.where(sample)}
            text += json.dumps({"sample": sample, **names, "fault": fault}) + "\n"
        with suppress(OSError):
            write_atomic(self.path, text.encode())
            self._written = set(faults)

    def _read(self) -> dict[int, str]:
        """The faults in the file; entries that do not fit these shards are ignored."""
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        keys = dict(enumerate(self.shards.keys))
        return {
            entry["sample"]: entry["fault"]
            for entry in map(json.loads, lines)
            if keys.get(entry["sample"]) == entry["key"]
        }


class SkippingLoader:
    """Wraps a loader; when it fails, rebuilds it at the same position with people replaced."""

    def __init__(
        self,
        make: Callable[[ShardSet, int], Loader],
        bad_samples: BadSamples,
        batches: int = 0,
    ):
        """make: builds a loader from the split and the number of batches returned before."""
        self.make, self.bad_samples, self.batches = make, bad_samples, batches
        self.loader = make(bad_samples.patched_shards(), batches)

    def next(self) -> RawBatch:
        """The next batch. Raises InputError above the limit of damaged people."""
        while True:
            try:
                batch = self.loader.next()
            except BadSamplesError as error:
                self.bad_samples.add(error)
                self.loader = self.make(self.bad_samples.patched_shards(), self.batches)
            else:
                self.batches += 1
                return batch
