"""Check that a refactor changes no result: run the programs of two checkouts, compare their files.

    .venv/bin/python tests/check_refactor.py --before ../old --after . --work ../refactor

Each case runs the same commands in both checkouts, on the CPU with one thread, and compares what
they write. All values must be equal. The results of `before` stay in WORK/before and are reused;
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
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

# Measured times and memory, the folder of runs, sentences for people, and newer settings.
IGNORED = {"time", "people_per_s", "wait_share", "memory_mb", "left_s", "seconds", "out", "remarks"}
IGNORED |= {"threads", "validation_share", "save_share", "save_minutes"}
# What is compared, by the first word of a case's name.
FILES = {
    "synthetic": ["people/**/*"],
    "packed": ["shards/**/*"],
    "losses": ["run/metrics.jsonl", "run/last.pt"],
    "resume": ["run/metrics.jsonl", "run/last.pt"],
    "evaluation": ["*.json"],
    "convert": ["*.pt"],
}
SMALL = (
    "--model.stacks 2 --model.width 32 --model.depth 3 --model.stem [16,32,32] --data.input_px 96 "
    "--data.batch_size 4 --data.workers 1 --eval.batch_size 8 "
    "--train.steps 40 --train.steps_per_epoch 20 --train.log_every 1 --train.keep_last 3 "
    "--train.device cpu --train.out {out} --train.name run"
)
# The shards of each preset, and settings that together use most options of the optimizer.
PRESETS = {
    "princeton": ("original", "--config {configs}/2hg.yaml"),
    "newell": ("original", "--optim.name rmsprop --optim.milestones [20]"),
    "hrnet": ("crop", "--heatmaps.rule hrnet --heatmaps.sigma 2 --optim.ema_decay 0.9"),
    "mild": ("crop", "--config {configs}/demo.yaml --train.max_minutes 0 --optim.clip_norm 1"),
    "none": ("original", "--loss.unmarked ignore --optim.accumulate 2 --optim.weight_decay 1e-4"),
}
TWO_RANKS = "-m torch.distributed.run --standalone --nproc-per-node 2 "
PEOPLE = "--train 64 --valid 12 --max-width 640 --workers 1 --output {out}/people"
RESULTS = "--json {out}/result.json --save-predictions {out}/predictions.json"


def training_cases(before: Path, configs: Path) -> dict[str, list[str]]:
    """The commands of each case: people, shards, short runs. {out} stands for the case's folder."""
    people = before / "synthetic" / "people"
    pack = f"tools/make_shards.py --annotations {people}/annot --images {people}/images "
    pack += "--people-per-shard 16 --workers 1 --output {out}/shards --packing "
    cases = {"synthetic": [f"tools/make_synthetic.py {PEOPLE}"]}
    cases |= {f"packed-{kind}": [pack + kind] for kind in ("original", "crop")}
    for loader in ("opencv", "dali"):
        for preset, (kind, settings) in PRESETS.items():
            name = f"losses-{preset}-{loader}"
            command = f"train.py {settings.format(configs=configs)} {SMALL} "
            command += f"--data.shards {before}/packed-{kind}/shards --data.preset {preset} "
            command += f"--data.loader {loader} --train.precision "
            cases[name] = [command + "fp32"]
            if preset in ("princeton", "hrnet"):
                cases[f"{name}-2ranks"] = [TWO_RANKS + command + "fp32"]
            if name == "losses-hrnet-opencv":
                cases[f"{name}-bf16"] = [command + "bf16"]
        run = before / f"losses-princeton-{loader}" / "run"
        command = f"train.py --config {run}/config.yaml --train.out {{out}} "
        cases[f"resume-{loader}"] = [f"{command} --resume {run}/step_00000020.pt"]
    return cases


def checkpoint_cases(demo: Path, golden: Path, data: Path) -> dict[str, list[str]]:
    """Evaluation and conversion of two checkpoints, where they are at hand."""
    cases = {}
    # A fixed batch size, because other sizes round differently.
    evaluate = f"evaluate.py --batch-size 8 --workers 1 --device cpu {RESULTS} --checkpoint "
    convert = "tools/convert_checkpoint.py {} {{out}}/{}.pt --to {}"
    for path in (demo, golden):
        if not path.is_file():
            print(f"skipped: evaluation and conversion of {path}, which is not there")
    if demo.is_file():
        command = f"{evaluate}{demo} --shards {demo.parents[2]}/data/shards/synthetic"
        cases["evaluation-demo"] = [f"{command} --compare-loaders"]
        cases["evaluation-demo-2ranks"] = [TWO_RANKS + command]
        cases["convert-demo"] = [convert.format(demo, "native", "native")]
    if golden.is_file():
        for name in ("mpii_sample", "lspet"):
            command = f"{evaluate}{golden} --crop princeton --images {data}/{name}/images"
            command += f" --annotations {golden.parent}/annot_{name}.h5"
            cases[f"evaluation-golden-{name}"] = [command]
        native = convert.format(golden, "native", "native")
        cases["convert-golden"] = [native, convert.format("{out}/native.pt", *["princeton"] * 2)]
    return cases


def run_case(root: Path, python: str, work: Path, side: str, name: str, case: list[str]) -> None:
    """Run a case in WORK/running/NAME, and rename this folder to WORK/SIDE/NAME if it succeeds.

    Both sides run in the same folder because manifests contain its path.
    """
    folder = work / "running" / name
    for old in (folder, work / side / name):
        shutil.rmtree(old, ignore_errors=True)
    folder.mkdir(parents=True)
    (work / side).mkdir(exist_ok=True)
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    with (folder / "log.txt").open("w") as log:
        for command in case:
            words = [python, *command.format(out=folder).split()]
            if subprocess.run(words, cwd=root, env=env, stdout=log, stderr=log).returncode:
                return
    folder.rename(work / side / name)


def read(path: Path, resumed: bool) -> Any:
    """Values of checkpoints, results and metrics (resumed: of steps 21 on), hashes of others."""
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return {f"{x['kind']} {x['step']}": x for x in lines if x["step"] > 20 * resumed}
    if path.name in ("result.json", "predictions.json"):
        return json.loads(path.read_text())
    return hashlib.sha256(path.read_bytes()).hexdigest()


def differences(a: Any, b: Any, place: str = "") -> Iterator[tuple[float, str]]:
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


def compare(work: Path, name: str) -> str:
    """The verdict on a case: equal, or what differs. A resumed run equals one without a stop."""
    read_files = []
    for folder in (work / "before" / reference(name), work / "after" / name):
        if not folder.is_dir():
            return f"FAILED {folder.parent.name}: see running/{folder.name}/log.txt"
        paths = [p for pattern in FILES[name.split("-")[0]] for p in folder.glob(pattern)]
        resumed = name.startswith("resume")
        files = {p.relative_to(folder): read(p, resumed) for p in paths if p.is_file()}
        if not files:
            return f"FAILED {folder.parent.name}: none of its files is there"
        read_files.append(files)
    found = list(differences(*read_files))
    if not found:
        return f"equal ({len(read_files[0])} files)"
    largest = max((each for each in found if each[0] < math.inf), default=found[0])
    first, most = (f"{place} by {size:.3g}" for size, place in (found[0], largest))
    return f"DIFFERS in {len(found)} values: first {first}, most {most}"


def reference(name: str) -> str:
    """The case of `before` that a case is compared with."""
    return name.replace("resume", "losses-princeton")


def main() -> int:
    """Run what is missing of `before`, then `after`, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="checkout to compare with")
    parser.add_argument("--after", type=Path, required=True, help="checkout to check")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is written")
    parser.add_argument("--python-before", help="default: BEFORE/.venv/bin/python")
    parser.add_argument("--python-after", help="default: AFTER/.venv/bin/python")
    parser.add_argument("--demo-run", type=Path, help="of `make demo`; default: BEFORE/runs/demo")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="'losses-*', say")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time (default: 2)")
    args = parser.parse_args()
    work = args.work.resolve()
    shared = (args.after / os.environ.get("POSE_SHARED", "../shared")).resolve()
    demo = (args.demo_run or args.before / "runs" / "demo").resolve() / "best.pt"
    golden = shared / "golden" / "seed_2hg_dim48_checkpoint.pt"
    configs = args.before.resolve() / "configs"
    cases = training_cases(work / "before", configs) | checkpoint_cases(
        demo, golden, shared / "data"
    )
    chosen = [n for n in cases if any(fnmatch(n, pattern) for pattern in args.only)]
    if not chosen:
        parser.error(f"--only: choose among {', '.join(cases)}")

    def run(side: str, names: Iterable[str]) -> None:
        root = getattr(args, side).resolve()
        python = getattr(args, f"python_{side}") or str(root / ".venv" / "bin" / "python")
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda n: run_case(root, python, work, side, n, cases[n]), names))

    # The other cases read people and shards of `before`.
    inputs = ["synthetic", "packed-original", "packed-crop"]
    for stage in (inputs[:1], inputs[1:], dict.fromkeys(map(reference, chosen))):
        run("before", [name for name in stage if not (work / "before" / name).is_dir()])
    began = time.perf_counter()
    run("after", chosen)
    print(f"ran {len(chosen)} cases of {args.after} in {time.perf_counter() - began:.0f} s")
    verdicts = {name: compare(work, name) for name in chosen}
    for name, verdict in verdicts.items():
        print(f"{name:30}  {verdict}")
    return any(not verdict.startswith("equal") for verdict in verdicts.values())


if __name__ == "__main__":
    sys.exit(main())
