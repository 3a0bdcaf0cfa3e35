"""Compares the speed of this project with princeton-vl's loader and step, re-created here.

Prints a table for each group of cases, and writes everything as JSON after each. On a GPU each
group runs in a child process with a time limit. The people are synthetic, as large as in MPII, in
pictures of 1280 x 720 px.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of configs/

import argparse
import json
import tempfile
import time
from dataclasses import fields
from functools import partial
from typing import Any

from benchmarks import accuracy_suite, loader_suites, step_suites
from benchmarks.loader_suites import Options, make_shards, pack_people
from benchmarks.timing import Group, environment, run_here, run_isolated, table
from common.cli import Parser, at_least
from common.distributed import choose_device
from common.errors import InputError, run_main
from common.files import write_atomic
from common.system import usable_cores
from pipelines.loader import dali_is_installed
from pipelines.shard_format import PICTURE_EXTENSIONS

SUITES = ("operators", "loader", "workers", "step", "training")
LIMIT_S = {"step": 240.0, "accuracy": 600.0}
"""Time limit of a group in a child process; 180 s for other suites."""


def main(argv: list[str] | None = None) -> int:
    """Run the suites in order. Returns 1 if something failed."""
    args = make_parser().parse_args(argv)
    device = choose_device(args.device)
    if "accuracy" in args.suites and not (args.data and (args.data / "annot").is_dir()):
        expected = "a folder with annot/ and images/, for the suite accuracy"
        raise InputError("--data", str(args.data), expected, "give it, or leave the suite out")
    deadline = time.monotonic() + 60 * args.budget
    report: dict[str, Any] = {"world": environment(device), "failed": {}, "not_measured": []}
    report["options"] = {name: str(value) for name, value in vars(args).items()}
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        shared = {f.name: getattr(args, f.name) for f in fields(Options) if f.name in args}
        options = Options(**(shared | {"device": device, "folder": Path(folder)}))
        make_shards(options.folder, args.people, packings=PICTURE_EXTENSIONS)
        if "accuracy" in args.suites:
            pack_people(args.data, options.folder / "real")
        for name, group in groups_to_run(args, options).items():
            run_group(name, group, args, deadline, report)
            if args.json:
                write_atomic(args.json, (json.dumps(report, indent=1) + "\n").encode())
    print(json.dumps(report))
    return 1 if report["failed"] else 0


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        description="Compares the speed of loaders and training steps with princeton-vl's.",
        epilog="example: python benchmarks/throughput.py --suites loader step --json new.json",
    )
    # fmt: off
    add = parser.add_argument_group("what to time").add_argument
    add("--suites", nargs="+", choices=(*SUITES, "accuracy"), default=SUITES,
        help="accuracy needs --data (default: all others)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: %(default)s")
    add("--batch-sizes", type=at_least(1), nargs="+", default=[64, 16],
        help="people per batch; training steps on a CPU use 2 (default: 64 16)")
    add("--input-px", type=at_least(64), default=256, help="of the input (default: %(default)s)")
    add("--width", type=at_least(2), default=256, help="of the networks (default: %(default)s)")
    add("--people", type=at_least(1), default=320,
        help="synthetic people, and people in a timed run of a loader (default: %(default)s)")
    add("--workers", type=at_least(0), default=max(2, usable_cores() - 2),
        help="workers of OpenCV, or DALI's threads (default: %(default)s)")
    add("--data", type=Path, metavar="FOLDER",
        help="real people, annot/ and images/, for the suite accuracy")
    add("--people-to-train", type=at_least(1), default=40_000,
        help="people that its networks are trained on (default: %(default)s)")
    add = parser.add_argument_group("how long, and what to write").add_argument
    add("--rounds", type=at_least(1), default=5, help="timed runs per case (default: %(default)s)")
    add("--budget", type=float, metavar="MINUTES", default=60.0,
        help="groups that have not started in this time are skipped (default: %(default)s)")
    add("--json", type=Path, metavar="OUT", help="write the results after each group")
    # fmt: on
    return parser


def groups_to_run(args: argparse.Namespace, options: Options) -> dict[str, Group]:
    """The groups of the suites by their names in the report; a name begins with its suite."""
    on_gpu, groups = options.device.type == "cuda", dict[str, Group]()
    for batch_size in args.batch_sizes:
        n = batch_size if on_gpu else min(2, batch_size)
        for stacks in (2, 8) if on_gpu else (2,):
            group = partial(step_suites.step_group, options, stacks, n)
            groups[f"step, {stacks} stacks, batch {n}"] = group
        groups[f"training, batch {n}"] = partial(step_suites.training_group, options, n)
        group = partial(loader_suites.loader_group, options, batch_size)
        groups[f"loader, batch {batch_size}"] = group
        if dali_is_installed():
            group = partial(loader_suites.operators_group, options, batch_size)
            groups[f"operators, batch {batch_size}"] = group
    last = args.batch_sizes[-1]
    groups["workers"] = partial(loader_suites.workers_group, options, last)
    groups["workers, small"] = partial(loader_suites.small_pictures_group, options, last)
    for way in accuracy_suite.WAYS:
        groups[f"accuracy, {way}"] = partial(accuracy_suite.accuracy_group, options, way, last)
    return {name: group for name, group in groups.items() if suite_of(name) in args.suites}


def suite_of(name: str) -> str:
    """The suite of a group."""
    return name.split(",")[0]


def run_group(
    name: str, group: Group, args: argparse.Namespace, deadline: float, report: dict[str, Any]
) -> None:
    """Run a group, print what it found, and add it to the report."""
    left, device = deadline - time.monotonic(), choose_device(args.device)
    if left <= 0:
        report["not_measured"].append(name)
        print(f"{name}: not measured, the budget is spent")
        return
    print(f"timing {name} ...", file=sys.stderr, flush=True)
    failed: dict[str, str] = {}
    if device.type == "cuda":
        limit_s = min(left, LIMIT_S.get(suite_of(name), 180.0))
        found, failed = run_isolated(group, args.rounds, device, limit_s)
    else:
        found = run_here(group, args.rounds, device)
    report[name] = found
    if found:
        text = table(name, found) if isinstance(found, list) else f"{name}: {found}"
        print(text, end="\n\n", flush=True)
    for case, reason in failed.items():
        report["failed"][f"{name}: {case}"] = reason
        print(f"FAILED {name}: {case}: {reason}", flush=True)
    if suite_of(name) == "accuracy":
        curves = {n: curve for n, curve in report.items() if n.startswith("accuracy, ") and curve}
        report["time_to_same_pck"] = accuracy_suite.time_to_same_pck(curves)
        print(f"time to the same PCK: {report['time_to_same_pck']}", flush=True)


if __name__ == "__main__":
    run_main(main)
