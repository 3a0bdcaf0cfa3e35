"""Trains for a long time with a fault every minute: python tests/soak.py --minutes 30

The network and the people of `make demo`, by two ranks under torchrun on a CPU; two pictures are
rotten from the start, and a third rots as the run goes on. In the first half processes are stopped,
killed and started again; in the second half they live, the disk fills up each minute, and memory,
threads and open files of the ranks and of their loaders' workers are watched. Then the same number
of steps is trained without a fault (on the same shards: who stands in for a rotten picture is the
same), and losses and weights must be the same to the bit.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
for place in (ROOT, ROOT / "tests"):
    sys.path.insert(0, str(place))

from test_bad_samples import damage, damaged  # noqa: E402
from test_elastic import assert_same_weights, children, last_step, started  # noqa: E402

from pipelines.bad_samples import LIST  # noqa: E402
from pipelines.opencv_loader import endless_batches  # noqa: E402

INSIDE = "SOAK_INSIDE"
"""Set in the process that may mount a small disk."""
DISK_MB = 256
"""Half an hour, twice, leaves a hundred of them at most."""
PEOPLE = {"train": 1500, "valid": 300}
"""Pictures, as `make demo` draws them."""
ROTTEN = (20, 700)
ROTS_BEFORE = 80
"""A step of the first pass (of 94), long after those that are loaded when the run's first ends."""
PEOPLE_A_STEP = 16
WATCHED = ("ranks", "workers")
GROWTH = 1.05
IN_FLIGHT = 8
"""Files of one batch more of each rank on its way from worker to rank: its tensors."""
JUDGED_FROM_S = 180
PATIENCE_S = 180


class Sample(NamedTuple):
    """What some processes take, together."""

    rss_mb: float
    threads: int
    files: int


class Moment(NamedTuple):
    """What a run takes at one time."""

    second: float
    ranks: Sample
    workers: Sample
    """Of the loaders: training's, and for seconds validation's."""


class Soak:
    """One run and what is done to it."""

    def __init__(self, folder: Path, shards: Path, loader: str, minutes: float, every: float):
        """folder: on the disk that fills up. every: seconds from fault to fault."""
        self.folder, self.every, self.minutes = folder, every, minutes
        self.shards, self.loader, self.log = shards, loader, folder.parent / "log"
        self.run, self.done = folder / "run", list[str]()
        self.moments: list[Moment] = []
        self.rotten = list(ROTTEN)

    def command(self, name: str, steps: int) -> list[object]:
        return [
            "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
            "--max-restarts", 1000,
            "train.py", "--config", "configs/demo.yaml", "--data.shards", self.shards,
            "--train.out", self.folder, "--train.name", name, "--train.steps", steps,
            "--train.max_minutes", 0, "--optim.schedule", "constant", "--eval.people", 32,
            "--train.steps_per_epoch", 200, "--train.log_every", 1, "--train.keep_last", 1,
            "--data.on_bad_sample", "skip", "--data.loader", self.loader, "--resume", "auto",
        ]  # fmt: skip

    def soak(self) -> int:
        """Run and disturb; returns the step at which the run was stopped."""
        began = time.monotonic()
        ends = cycle([signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1])
        half = 30 * self.minutes
        while time.monotonic() - began < half:
            with self.started() as process:
                if not self.done and self.loader == "opencv":
                    self.rot()
                self.pause(process, self.every)
                self.end(process, next(ends))
        with self.started() as process:
            living = time.monotonic()
            while time.monotonic() - began < 2 * half:
                self.pause(process, self.every, watched_since=living)
                self.fill_the_disk(process)
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE_S)
        return last_checkpoint_step(self.run)

    def rot(self) -> None:
        """Overwrite a picture that no rank has met, so that it is rotten from its first use on.

        DALI has most people of the first pass in memory by now.
        """
        people = endless_batches(PEOPLE["train"], PEOPLE_A_STEP, 0, 0, 1)  # of all ranks together
        batch = next(islice(people, ROTS_BEFORE, None))
        stand_ins = {sample + 1 for sample in ROTTEN}  # these were met
        late = next(s for s, _ in batch if s not in stand_ins | set(ROTTEN))
        damage(self.shards / "train", late)
        assert last_step(self.run) < ROTS_BEFORE - 20, "too late to rot"
        tell(f"step {last_step(self.run)}: the picture of sample {late} rots")
        self.rotten = sorted([*ROTTEN, late])
        self.done.append("rotten picture")

    @contextlib.contextmanager
    def started(self) -> Iterator[subprocess.Popen]:
        stood = last_step(self.run)
        with started(self.log, *self.command("run", 10**8)) as process:
            self.wait_for(lambda: last_step(self.run) > stood, process)
            yield process

    def pause(self, process: subprocess.Popen, seconds: float, watched_since: float = 0.0) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert process.poll() is None, self.log.read_text()[-4000:]
            if watched_since:
                self.moments.append(moment(process.pid, time.monotonic() - watched_since))
            time.sleep(1)

    def end(self, process: subprocess.Popen, number: signal.Signals) -> None:
        """Stop the run by a signal to torchrun or a rank; or first kill a rank: it returns."""
        self.done.append(number.name)
        tell(f"step {last_step(self.run)}: {number.name}")
        ranks = children(process.pid)
        if number == signal.SIGKILL:
            again = self.log.read_text().count("torchrun started the ranks again")
            os.kill(ranks[1], number)
            self.wait_for(lambda: self.log.read_text().count("started the ranks again") > again,
                          process)  # fmt: skip
            stood = last_checkpoint_step(self.run)
            self.wait_for(lambda: last_step(self.run) > stood + 5, process)
            process.send_signal(signal.SIGTERM)
        else:
            os.kill(process.pid if number == signal.SIGTERM else ranks[0], number)
        process.wait(PATIENCE_S)
        assert (self.run / "resume_me").exists(), self.log.read_text()[-4000:]

    def fill_the_disk(self, process: subprocess.Popen) -> None:
        """Leave no byte, until a checkpoint could not be written."""
        self.done.append("full disk")
        tell(f"step {last_step(self.run)}: full disk")
        failed = self.log.read_text().count("training goes on")
        full = (self.folder / "full").open("wb", buffering=0)
        with full as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
        self.wait_for(
            lambda: (
                self.log.read_text().count("training goes on") > failed
                or os.environ.get(INSIDE) != "disk"
            ),
            process,
        )
        (self.folder / "full").unlink()

    def wait_for(self, true, process: subprocess.Popen) -> None:
        end = time.monotonic() + PATIENCE_S
        while not true():
            assert process.poll() is None and time.monotonic() < end, self.log.read_text()[-4000:]
            time.sleep(0.2)

    def compare(self, steps: int) -> int:
        """Train as many steps without a fault; the same losses and weights. Returns how many."""
        tell(f"training {steps} steps without a fault")
        with started(self.log, *self.command("quiet", steps)) as process:
            assert process.wait(3600 + 120 * self.minutes) == 0, self.log.read_text()[-4000:]
        found, expected = losses(self.run), losses(self.folder / "quiet")
        same = [step for step in found if step <= steps and found[step] == expected[step]]
        assert len(same) == len([step for step in found if step <= steps]), "losses differ"
        assert len(same) > 0.5 * steps, "too few lines outlived the full disk"
        assert_same_weights(self.run / "last.pt", self.folder / "quiet" / "last.pt")
        for name in ("run", "quiet"):
            lines = (self.folder / name / LIST).read_text().splitlines()
            assert [json.loads(line)["sample"] for line in lines] == self.rotten
        return len(same)

    def growth(self) -> dict[str, float]:
        """Of memory, threads and files from the settled beginning of the watch to its end."""
        last = self.moments[-1].second
        settled = min(120.0, last / 2)
        quarter = (last - settled) / 4
        parts = {
            "early": [m for m in self.moments if settled <= m.second < settled + quarter],
            "late": [m for m in self.moments if m.second >= last - quarter],
        }
        found = {"settled_s": settled, "watched_s": last}
        for name in WATCHED:
            for when, moments in parts.items():
                for number, field in enumerate(Sample._fields):
                    values = [getattr(m, name)[number] for m in moments]
                    found[f"{name}_{field}_{when}"] = usual(values)
        return {name: round(value, 1) for name, value in found.items()}


def grown(growth: dict[str, float]) -> list[str]:
    """What was more at the end than it may be."""
    found = []
    for name in WATCHED:
        for field in Sample._fields:
            early, late = (growth[f"{name}_{field}_{when}"] for when in ("early", "late"))
            most = GROWTH * early if field == "rss_mb" else early + IN_FLIGHT * (field == "files")
            if not 0 < late <= most:
                found.append(f"{field} of the {name}, from {early} to {late}")
    return found


def usual(counts: list[float]) -> float:
    """The lower quartile: a validation's workers come, and a full disk's log goes, for seconds."""
    return quantiles(counts, n=4, method="inclusive")[0]


def moment(torchrun: int, second: float) -> Moment:
    ranks = children(torchrun)
    workers = [pid for rank in ranks for pid in descendants(rank)]
    return Moment(second, sample(ranks), sample(workers))


def descendants(pid: int) -> list[int]:
    """Processes that a process started, those that these started, and so on."""
    return [pid for child in children(pid) for pid in (child, *descendants(child))]


def sample(pids: list[int]) -> Sample:
    """Resident memory, threads and open files of these processes together."""
    rss, threads, files = 0.0, 0, 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            status = dict(
                line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            )
            rss += int(status.get("VmRSS", "0").split()[0]) / 1024  # one that has ended has none
            threads += int(status["Threads"])
            files += len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return Sample(rss, threads, files)


def losses(folder: Path) -> dict[int, float]:
    """The loss of each step that the log has; a line that a full disk cut is none."""
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if entry["kind"] == "train":
                found[entry["step"]] = entry["loss"]
    return found


def last_checkpoint_step(folder: Path) -> int:
    from model import checkpoint

    return checkpoint.load_checkpoint(folder / "last.pt").step


def tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def make_shards(folder: Path) -> None:
    """Draw the demo's people, pack them into folder/shards, and damage two."""
    drawn = folder / "drawn"
    counts = [word for split, count in PEOPLE.items() for word in (f"--{split}", count)]
    run("tools/make_synthetic.py", "--output", drawn, *counts, "--max-width", 640)
    run("tools/make_shards.py", "--annotations", drawn / "annot", "--images", drawn / "images",
        "--output", folder / "shards")  # fmt: skip
    shutil.rmtree(drawn)
    shutil.move(folder / "shards" / "train", folder / "whole")
    damaged(folder / "whole", folder / "shards" / "train", *ROTTEN)


def run(*words: object) -> None:
    """A Python program of this project, to its end."""
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)


def with_small_disk() -> None:
    """Start this program again where it may mount a disk, if this system allows that."""
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "x", "/mnt"]
    if shutil.which("unshare") and subprocess.run(probe, check=False).returncode == 0:
        os.environ[INSIDE] = "disk"
        os.execvp("unshare", ["unshare", "-rm", sys.executable, *sys.argv])
    os.environ[INSIDE] = "no disk"
    tell("no small disk can be mounted here: the disk does not fill up")


def main() -> int:
    """Make the data, soak, compare, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=60.0, help="seconds from fault to fault")
    parser.add_argument("--loader", choices=["opencv", "dali"], default="opencv")
    options = parser.parse_args()
    if INSIDE not in os.environ:
        with_small_disk()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as at_end:
        folder = Path(name)
        make_shards(folder)
        (folder / "disk").mkdir()
        if os.environ[INSIDE] == "disk":
            size = f"size={DISK_MB}m"
            subprocess.run(["mount", "-t", "tmpfs", "-o", size, "x", folder / "disk"], check=True)
            at_end.callback(subprocess.run, ["umount", "--lazy", folder / "disk"], check=True)
        soak = Soak(folder / "disk", folder / "shards", options.loader, options.minutes,
                    options.every)  # fmt: skip
        steps = soak.soak()
        compared, growth = soak.compare(steps), soak.growth()
    faults = {name: soak.done.count(name) for name in sorted(set(soak.done))}
    print(json.dumps({"minutes": options.minutes, "loader": options.loader, "steps": steps,
                      "losses_compared": compared, "faults": faults, **growth}))  # fmt: skip
    if growth["watched_s"] >= JUDGED_FROM_S:
        assert not grown(growth), f"it grows: {grown(growth)}"
    else:
        tell(f"watched for under {JUDGED_FROM_S} s: too short to tell growth from warming up")
    tell("all is well")
    return 0


if __name__ == "__main__":
    sys.exit(main())
