"""Check that a refactor changes no result: run the programs of two checkouts, compare their files.

    .venv/bin/python tests/check_refactor.py --before ../old --after . --work ../refactor

Each case runs the same commands in both checkouts, on the CPU with one thread, and compares what
they write. All numbers must be equal. The results of `before` stay in WORK/before and are reused;
`after` runs anew. Use one machine for both: processors and versions of torch round differently.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch

# Measured times and memory; remarks are sentences for people.
IGNORED = {"time", "people_per_s", "wait_share", "memory_mb", "left_s", "seconds", "remarks"}
STEPS, STOPPED_AT = 40, 20
SMALL = (
    "--model.stacks 2 --model.width 32 --model.depth 3 --model.stem [16,32,32] --data.input_px 96 "
    "--data.batch_size 4 --data.workers 1 --data.shuffle_buffer 16 --eval.batch_size 8 "
    f"--train.steps {STEPS} --train.steps_per_epoch {STOPPED_AT} --train.log_every 1 "
    "--train.keep_last 3 --train.device cpu --train.out {out} --train.name run"
)
# The shards of each preset, and settings that together use most options of the optimizer.
PRESETS = {
    "princeton": ("original", "--config configs/2hg.yaml"),
    "newell": ("original", "--optim.name rmsprop --optim.milestones [20]"),
    "hrnet": ("crop", "--heatmaps.rule hrnet --heatmaps.sigma 2 --optim.ema_decay 0.9"),
    "mild": ("crop", "--config configs/demo.yaml --train.max_minutes 0 --optim.clip_norm 1"),
    "none": ("original", "--loss.unmarked ignore --optim.accumulate 2 --optim.weight_decay 1e-4"),
}
TWO_RANKS = "-m torch.distributed.run --standalone --nproc-per-node 2 "
PEOPLE = "--train 64 --valid 12 --max-width 640 --workers 1"
OUTPUTS = " --batch-size 8 --workers 1 --device cpu --json {out}/result.json "
OUTPUTS += "--save-predictions {out}/predictions.json"


class Case(NamedTuple):
    """Commands to run, with {out} for the case's folder, and the files to compare."""

    commands: list[str]
    files: list[str]
    """Glob patterns. Checkpoints, metrics and results are compared by value, others by SHA-256."""
    reference: str = ""
    """The case of `before` to compare with, from step STOPPED_AT + 1 on; empty: the same case."""


def data_cases(before: Path) -> dict[str, Case]:
    """Synthetic people, and shards of them; those of `before` are the input of the other cases."""
    people = before / "synthetic" / "people"
    pack = f"tools/make_shards.py --annotations {people}/annot --images {people}/images "
    pack += "--people-per-shard 16 --workers 1 --output {out}/shards --packing "
    draw = Case([f"tools/make_synthetic.py {PEOPLE} --output {{out}}/people"], ["people/**/*"])
    packed = {f"packed-{kind}": Case([pack + kind], ["shards/**/*"]) for kind in ("original", "crop")}
    return {"synthetic": draw, **packed}


def training_cases(before: Path) -> dict[str, Case]:
    """Short runs, and runs that continue from a checkpoint of `before`."""
    cases, files = {}, ["run/metrics.jsonl", "run/last.pt"]
    for loader in ("opencv", "dali"):
        for preset, (kind, settings) in PRESETS.items():
            name = f"losses-{preset}-{loader}"
            command = f"train.py {settings} {SMALL} --data.shards {before}/packed-{kind}/shards "
            command += f"--data.preset {preset} --data.loader {loader} --train.precision "
            cases[name] = Case([command + "fp32"], files)
            if preset in ("princeton", "hrnet"):
                cases[f"{name}-2ranks"] = Case([TWO_RANKS + command + "fp32"], files)
            if name == "losses-hrnet-opencv":
                cases[f"{name}-bf16"] = Case([command + "bf16"], files)
        reference = f"losses-princeton-{loader}"
        run = before / reference / "run"
        command = f"train.py --config {run}/config.yaml --train.out {{out}} --resume "
        command += f"{run}/step_{STOPPED_AT:08d}.pt"
        cases[f"resume-{loader}"] = Case([command], files, reference)
    return cases


def checkpoint_cases(demo: Path, golden: Path, data: Path) -> dict[str, Case]:
    """Evaluation and conversion of two checkpoints, where they are at hand."""
    cases = {}
    convert = "tools/convert_checkpoint.py {} {{out}}/{}.pt --to {}"
    for path in (demo, golden):
        if not path.is_file():
            print(f"skipped: evaluation and conversion of {path}, which is not there")
    if demo.is_file():
        command = f"evaluate.py --checkpoint {demo} --shards {demo.parents[2]}/data/shards/synthetic"
        cases["evaluation-demo"] = Case([f"{command} --compare-loaders{OUTPUTS}"], ["*.json"])
        cases["evaluation-demo-2ranks"] = Case([TWO_RANKS + command + OUTPUTS], ["*.json"])
        cases["convert-demo"] = Case([convert.format(demo, "native", "native")], ["*.pt"])
    if golden.is_file():
        for name in ("mpii_sample", "lspet"):
            command = f"evaluate.py --checkpoint {golden} --crop princeton --annotations "
            command += f"{golden.parent}/annot_{name}.h5 --images {data}/{name}/images{OUTPUTS}"
            cases[f"evaluation-golden-{name}"] = Case([command], ["*.json"])
        native = convert.format(golden, "native", "native")
        princeton = convert.format("{out}/native.pt", "princeton", "princeton")
        cases["convert-golden"] = Case([native, princeton], ["*.pt"])
    return cases


def run_case(root: Path, python: str, work: Path, side: str, name: str, case: Case) -> None:
    """Run a case in WORK/running/NAME, and rename this folder to WORK/SIDE/NAME if it succeeds.

    Both sides run in the same folder because manifests and checkpoints contain its path.
    """
    folder = work / "running" / name
    for old in (folder, work / side / name):
        shutil.rmtree(old, ignore_errors=True)
    folder.mkdir(parents=True)
    (work / side).mkdir(exist_ok=True)
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    with (folder / "log.txt").open("w") as log:
        for command in case.commands:
            words = [python, *command.format(out=folder).split()]
            if subprocess.run(words, cwd=root, env=env, stdout=log, stderr=log).returncode:
                return
    folder.rename(work / side / name)


def read(path: Path, first_step: int) -> Any:
    """What is compared of a file. first_step: of metrics."""
    if not path.is_file():
        return "no file"
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return {f"{x['kind']} {x['step']}": x for x in lines if x["step"] >= first_step}
    if path.name in ("result.json", "predictions.json"):
        return json.loads(path.read_text())
    return hashlib.sha256(path.read_bytes()).hexdigest()


def differences(a: Any, b: Any, place: str) -> Iterator[tuple[float, str]]:
    """(size, place) of each value that differs; infinite if it is missing or not a number."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [key for key in {**a, **b} if key not in IGNORED]:
            yield from differences(a.get(key, "missing"), b.get(key, "missing"), f"{place}/{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{place}/{i}")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape:
        if a.dtype != b.dtype or not torch.equal(a, b):
            yield (a.double() - b.double()).abs().max().item(), place
    elif type(a) is not type(b) or a != b:
        numbers = isinstance(a, int | float) and isinstance(b, int | float)
        yield abs(a - b) if numbers else math.inf, place


def compare(before: Path, after: Path, case: Case) -> str:
    """The verdict on a case."""
    for folder in (before, after):
        if not folder.is_dir():
            return f"FAILED {folder.parent.name}: see running/{folder.name}/log.txt"
    files = [p for x in (before, after) for pattern in case.files for p in x.glob(pattern)]
    names = sorted({str(Path(*p.relative_to(p.parents[-len(before.parts)]).parts[1:])) for p in files})
    return ""
