"""People of the training split whose pictures turned out to be damaged, and who stands in for them.

The stand-in is the next good person of the same tar, so that the order of the others, and their
draws, stay. Who stands in for whom follows from the set of damaged people alone: what one rank
learns later than another changes no batch.
"""

import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.files import parse_json, read_bytes, write_atomic
from pipelines.jpeg import BadSamplesError
from pipelines.loader import Loader
from pipelines.opencv_loader import RawBatch
from pipelines.shards import ShardSet

LIST = "bad_samples.jsonl"
"""Is in the folder of a run that left people out, a line each."""
_LARGEST_LIST = 16 << 20


class BadSamples:
    """The damaged people that one rank knows of."""

    def __init__(self, shards: ShardSet, folder: Path, limit: int, rank: int = 0):
        """Read what an earlier start of the run has found. Raises InputError.

        folder: of the run. limit: of damaged people, data.max_bad_samples.
        """
        self.shards, self.folder, self.limit, self.rank = shards, folder, limit, rank
        self.faults = self._read()
        self.told = set(self.faults)
        """Samples that were said."""
        self.is_written = True

    def patched(self) -> ShardSet:
        """The split with everybody's stand-ins. Raises InputError where a tar has none."""
        if not self.faults:
            return self.shards
        bad = set(self.faults)
        try:
            return self.shards.with_replacements(bad, self.folder / f"indices_{self.rank}")
        except OSError:  # a full disk
            return self.shards.with_replacements(bad, Path(tempfile.mkdtemp(prefix="indices_")))

    def add(self, error: BadSamplesError) -> None:
        """Take in what a loader met. Raises InputError beyond the limit, or if nothing is new."""
        if not error.faults or error.faults.keys() <= self.faults.keys():
            raise error
        self.faults |= error.faults
        if self.rank == 0:
            with suppress(OSError):  # `learn` writes it again, and says why it cannot
                self.write()
        self.check(len(self.faults))

    def check(self, count: int) -> None:
        """Raise InputError if so many are too many."""
        if count > self.limit:
            raise InputError(
                self.folder / LIST,
                f"{count} people with damaged pictures",
                f"{self.limit} at most (data.max_bad_samples)",
                "run tools/check_shards.py --decode on the training shards, restore them or pack "
                "again, and remove this list; then --resume",
            )

    def learn(self, others: list[bytes]) -> list[str]:
        """Take in every rank's `report` for the file, and return a sentence for each new fault.

        A file that cannot be written is one more: who is left out is found again without it.
        Raises InputError beyond the limit; with the same reports, on every rank.
        """
        known = {int(s): text for part in others for s, text in json.loads(part).items()}
        new = sorted(known.keys() - self.told)
        self.told |= known.keys()
        lines = [
            f"{self.shards.where(sample)} is left out, a neighbour stands in: {known[sample]}"
            for sample in new
        ]
        if self.rank == 0 and (new or not self.is_written):
            lines += self._keep(known)
        self.check(len(known.keys() | self.faults.keys()))
        return lines

    def _keep(self, known: dict[int, str]) -> list[str]:
        """Write the file; a sentence if that fails, the first time."""
        was_written, self.is_written = self.is_written, True
        try:
            self.write(known)
        except OSError as error:
            self.is_written = False
            if was_written:
                return [f"the list of them cannot be written: {error}; training goes on"]
        return []

    def report(self) -> bytes:
        """What this rank knows, for `learn`."""
        return json.dumps(self.faults).encode()

    def write(self, others: dict[int, str] | None = None) -> None:
        """Write the file whole or not at all. others: faults that other ranks have met."""
        faults = {**(others or {}), **self.faults}
        lines = [
            {
                "sample": sample,
                "key": self.shards.key(sample),
                "where": self.shards.where(sample),
                "fault": fault,
            }
            for sample, fault in sorted(faults.items())
        ]
        write_atomic(
            self.folder / LIST, "".join(json.dumps(line) + "\n" for line in lines).encode()
        )

    def _read(self) -> dict[int, str]:
        """People of these shards in the file; those of others, packed anew since, do not count."""
        path = self.folder / LIST
        if not path.is_file():
            return {}
        faults = {}
        try:
            for line in read_bytes(path, _LARGEST_LIST).splitlines():
                entry: dict[str, Any] = parse_json(line)
                sample = int(entry["sample"])
                if 0 <= sample < len(self.shards) and self.shards.key(sample) == entry["key"]:
                    faults[sample] = str(entry["fault"])
        except (ValueError, LookupError, TypeError, OverflowError) as error:
            raise InputError(
                path, f"damaged ({error})", "a line for each person that is left out",
                "remove the file: they are found again",
            ) from error  # fmt: skip
        return faults


class SkippingLoader:
    """A loader that goes on where another fails, with a neighbour in each damaged one's place."""

    def __init__(
        self,
        make: Callable[[ShardSet, int, bytes], Loader],
        bad_samples: BadSamples,
        batches: int,
        state: bytes,
    ):
        """make: a loader of (a split, batches handed out before, a loader's state)."""
        self.make, self.bad_samples, self.batches = make, bad_samples, batches
        self.loader = make(bad_samples.patched(), batches, state)

    def next(self) -> RawBatch:
        """The next batch. Raises InputError beyond the bad_samples's limit."""
        while True:
            try:
                batch = self.loader.next()
            except BadSamplesError as error:
                self.bad_samples.add(error)
                state = self.loader.state()
                self.loader = self.make(self.bad_samples.patched(), self.batches, state)
            else:
                self.batches += 1
                return batch

    def state(self) -> bytes:
        """The loader's own."""
        return self.loader.state()
