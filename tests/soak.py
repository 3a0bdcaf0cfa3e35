"""Half an hour of training with a fault every minute: `make soak`, or tests/soak.py --minutes 5.

The demo's network is trained by two ranks under torchrun on a CPU; two pictures are damaged. In the
first half processes are stopped, killed and started again. In the second half they live, the disk
fills up each minute, and memory, threads and open files of ranks and loader workers are watched.
Then as many steps are trained without a fault, and losses and weights must be the same to the bit.
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
from collections import Counter
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from statistics import quantiles

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "tests"):
    sys.path.insert(0, str(folder))

from conftest import may_mount  # noqa: E402
from helpers import damage_picture  # noqa: E402
from test_elastic import (  # noqa: E402
    AGAIN,
    assert_same_weights,
    children,
    last_step,
    saved_step,
    started,
    wait_until,
)

from pipelines.bad_samples import FILE_NAME  # noqa: E402
from training.metrics import read_metrics  # noqa: E402

INSIDE = "SOAK_INSIDE"
"""Set in the process that may mount a small disk."""
DAMAGED = (20, 700)
WATCHED = ("rss_mb", "threads", "files")
SLACK = {"rss_mb": 1.05, "threads": 1.0, "files": 1.2}
"""How much more there may be at the end; the files include batches on their way to the ranks."""
PATIENCE_S = 180
UNSAVED = "WARNING: no checkpoint"


class Soak:
    """One run and what is done to it."""

    def __init__(self, folder: Path, shards: Path, options: argparse.Namespace):
        """folder: on the disk that fills up."""
        self.folder, self.shards, self.options = folder, shards, options
        self.run, self.log, self.faults = folder / "run", folder.parent / "log", list[str]()
        self.samples: list[dict[str, float]] = []
        """What ranks and workers used, once a second."""

    def command(self, name: str, steps: int) -> list[str]:
        return (
            "-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1000 "
            f"train.py --config configs/demo.yaml --data.shards {self.shards} "
            f"--train.out {self.folder} --train.name {name} --train.steps {steps} "
            "--train.max_minutes 0 --optim.schedule constant --eval.people 32 --train.device cpu "
            "--train.steps_per_epoch 200 --train.log_every 1 --train.keep_last 1 --resume auto "
            f"--data.on_bad_sample skip --data.loader {self.options.loader}"
        ).split()

    def soak(self) -> int:
        """Train and disturb; returns the step at which the run was stopped."""
        began, half = time.monotonic(), 30 * self.options.minutes
        faults = cycle([signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1])
        while time.monotonic() - began < half:
            with self.started() as process:
                self.pause(process)
                self.end(process, next(faults))
        with self.started() as process:
            while time.monotonic() - began < 2 * half:
                self.pause(process, watch=True)
                self.fill_the_disk(process)
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE_S)
        return self.saved()

    @contextlib.contextmanager
    def started(self) -> Iterator[subprocess.Popen]:
        before = last_step(self.run)
        with started(self.log, *self.command("run", 10**8)) as process:
            wait_until(lambda: last_step(self.run) > before, process, self.log)
            yield process

    def pause(self, process: subprocess.Popen, watch: bool = False) -> None:
        end = time.monotonic() + self.options.every
        while time.monotonic() < end:
            assert process.poll() is None, self.log.read_text()[-4000:]
            if watch:
                self.samples.append(usage(descendants(process.pid)))
            time.sleep(1)

    def end(self, process: subprocess.Popen, number: signal.Signals) -> None:
        """Stop the run by a signal to torchrun or a rank; or kill a rank first, which returns."""
        self.record(number.name)
        ranks = children(process.pid)
        if number == signal.SIGKILL:
            before = self.log.read_text().count(AGAIN)
            os.kill(ranks[1], number)
            wait_until(lambda: self.log.read_text().count(AGAIN) > before, process, self.log)
            stood = saved_step(self.run)
            wait_until(lambda: last_step(self.run) > stood + 5, process, self.log)
            process.send_signal(signal.SIGTERM)
        else:
            os.kill(process.pid if number == signal.SIGTERM else ranks[0], number)
        process.wait(PATIENCE_S)
        assert (self.run / "resume_me").exists(), self.log.read_text()[-4000:]
        self.saved()

    def saved(self) -> int:
        """The step of the checkpoint; a run that a signal ended has lost no step."""
        step = saved_step(self.run)
        assert step >= last_step(self.run), f"saved at {step}: {self.log.read_text()[-4000:]}"
        return step

    def fill_the_disk(self, process: subprocess.Popen) -> None:
        """Leave no byte until a checkpoint could not be written."""
        if os.environ[INSIDE] != "disk":
            return
        self.record("full disk")
        failed = self.log.read_text().count(UNSAVED)
        full = self.folder / "full"
        with full.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
        wait_until(lambda: self.log.read_text().count(UNSAVED) > failed, process, self.log)
        full.unlink()

    def record(self, fault: str) -> None:
        self.faults.append(fault)
        print(f"{time.strftime('%H:%M:%S')} step {last_step(self.run)}: {fault}", flush=True)

    def compare(self, steps: int) -> int:
        """Train as many steps without a fault; the same losses and weights. Returns how many."""
        with started(self.log, *self.command("quiet", steps)) as process:
            assert process.wait(20_000) == 0, self.log.read_text()[-4000:]
        quiet = self.folder / "quiet"
        losses, expected = (
            {x["step"]: x["loss"] for x in read_metrics(run / "metrics.jsonl") if "loss" in x}
            for run in (self.run, quiet)
        )
        assert all(loss == expected[step] for step, loss in losses.items() if step <= steps), (
            "losses differ"
        )
        assert len(losses) > 0.5 * steps, "too few lines outlived the full disk"
        assert_same_weights(self.run / "last.pt", quiet / "last.pt")
        for run in (self.run, quiet):
            found = [json.loads(x)["sample"] for x in (run / FILE_NAME).read_text().splitlines()]
            assert set(found) <= set(DAMAGED), "the others are whole"
        return len(losses)

    def growth(self) -> dict[str, list[float]]:
        """What was used in the first and the last quarter of the watch; its beginning is left out.

        Lower quartiles: workers of a validation come and go within seconds.
        """
        settled = self.samples[len(self.samples) // 5 :]
        quarter = max(2, len(settled) // 4)
        parts = settled[:quarter], settled[-quarter:]
        return {x: [quantiles([u[x] for u in part])[0] for part in parts] for x in WATCHED}


def descendants(pid: int) -> list[int]:
    """Processes that a process started, those that these started, and so on."""
    return [pid for child in children(pid) for pid in (child, *descendants(child))]


def usage(pids: list[int]) -> dict[str, float]:
    """Resident memory, threads and open files of these processes together."""
    total = dict.fromkeys(WATCHED, 0.0)
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            status = dict(line.split(":", 1) for line in lines)
            total["rss_mb"] += int(status.get("VmRSS", "0").split()[0]) / 1024
            total["threads"] += int(status["Threads"])
            total["files"] += len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return total


def make_shards(folder: Path) -> Path:
    """Draw synthetic people, pack them, and damage two pictures."""
    people, packed = folder / "people", folder / "packed"
    for command in (
        f"tools/make_synthetic.py --output {people} --train 1500 --valid 300 --max-width 640",
        f"tools/make_shards.py --annotations {people}/annot --images {people}/images "
        f"--output {packed}",
    ):
        subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=True)
    once = damage_picture(packed / "train", folder / "once", DAMAGED[0])
    shutil.rmtree(packed / "train")
    damage_picture(once, packed / "train", DAMAGED[1])
    return packed


def main() -> int:
    """Make the data, soak, compare, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=60.0, help="seconds from fault to fault")
    parser.add_argument("--loader", choices=["opencv", "dali"], default="opencv")
    options = parser.parse_args()
    if INSIDE not in os.environ:
        os.environ[INSIDE] = "disk" if may_mount() else "no disk"
        if may_mount():
            os.execvp("unshare", ["unshare", "-rm", sys.executable, *sys.argv])
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as at_end:
        disk = Path(name) / "disk"
        disk.mkdir()
        if os.environ[INSIDE] == "disk":
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "x", disk], check=True)
            at_end.callback(subprocess.run, ["umount", "--lazy", disk], check=True)
        soak = Soak(disk, make_shards(Path(name)), options)
        steps = soak.soak()
        compared, growth = soak.compare(steps), soak.growth()
    report = {"minutes": options.minutes, "steps": steps, "losses_compared": compared}
    print(json.dumps({**report, "faults": Counter(soak.faults), **growth}))
    if options.minutes >= 10:
        grown = [x for x, (early, late) in growth.items() if not 0 < late <= SLACK[x] * early]
        assert not grown, f"more at the end than at the beginning: {grown}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
