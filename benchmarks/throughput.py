"""Times loaders, heatmaps and training steps: python benchmarks/throughput.py

Prints a table for each, then everything as one JSON line. The data are made here: 1280 x 720
pictures with people as large as in MPII.
"""

import sys
from pathlib import Path

# `python benchmarks/throughput.py` puts benchmarks/ on the path, and not the folder above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import tempfile
from typing import Any

import torch

from benchmarks import evaluation, loading, network
from benchmarks.comparing import compare, draw_chart, read_report
from benchmarks.loading import Load
from benchmarks.made_people import make_crops, make_originals
from benchmarks.timing import Case, Result, table, take_turns, world
from common.cli import Parser, at_least
from common.distributed import choose_device
from common.errors import InputError, run_main

SUITES = ("loader", "scaling", "heatmaps", "train", "end_to_end", "decode", "evaluate")


def main() -> None:
    """Run the suites that were asked for."""
    options = make_parser().parse_args()
    check(options)
    older = read_report(Path(options.compare)) if options.compare else None
    device = choose_device(options.device)
    load = Load(options.people, options.batch_size, options.workers, options.input_px, device)
    report: dict[str, Any] = {"world": world(device), "options": vars(options)}
    for suite in options.suites:
        print(f"timing {suite} ...", file=sys.stderr, flush=True)
        threads = torch.get_num_threads()
        report |= run_suite(suite, load, options.rounds)
        torch.set_num_threads(threads)
    if device.type == "cpu":
        print("not measured: everything on a GPU (no CUDA device is in use)\n")
    if older:
        print(compare(older, report), end="\n\n")
    line = json.dumps(report)
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(line + "\n")
    if options.chart:
        draw_chart(report, Path(options.chart))
    print(line)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="throughput.py",
        description="Times loaders, heatmaps and training steps of this machine.",
        epilog="example: python benchmarks/throughput.py --suites loader --workers 2",
    )
    # fmt: off
    add = parser.add_argument_group("what to time").add_argument
    add("--suites", nargs="+", choices=SUITES, default=list(SUITES), help="default: all of them")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto",
        help="auto: a GPU where there is one (default: %(default)s)")
    add("--people", type=at_least(1), default=320,
        help="people in the made data (default: %(default)s)")
    add("--batch-size", type=at_least(1), default=16, help="people a batch (default: %(default)s)")
    add("--workers", type=at_least(0), default=2,
        help="worker processes, or DALI's threads (default: %(default)s)")
    add("--input-px", type=at_least(64), default=256,
        help="side of the input, px (default: %(default)s)")
    add = parser.add_argument_group("how often, and what to write").add_argument
    add("--rounds", type=at_least(1), default=5,
        help="turns that each case takes (default: %(default)s)")
    add("--json", metavar="OUT", help="also write the JSON line to this file")
    add("--compare", metavar="OLD", help="say what moved since this JSON")
    add("--chart", metavar="OUT", help="also write bars to this PNG")
    # fmt: on
    return parser


def check(options: argparse.Namespace) -> None:
    """Raise InputError for what cannot be timed or written."""
    if options.rounds < 1 or options.batch_size < 1 or options.people < options.batch_size:
        raise InputError(
            "command line",
            f"{options.rounds} rounds, batch {options.batch_size}, {options.people} people",
            "at least 1 round, and at least a batch of people",
            "correct it",
        )
    if options.chart and Path(options.chart).suffix.lower() != ".png":
        raise InputError(options.chart, "another kind of file", "a .png", "rename it")


def run_suite(suite: str, load: Load, rounds: int) -> dict[str, Any]:
    """Print a suite's tables; returns its entries of the report."""
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        facts = None
        if suite == "scaling":
            results, facts = loading.scaling(Path(folder), load, rounds)
        else:
            results = take_turns(cases_of(suite, Path(folder), load), rounds, load.device)
    print(table(f"{suite} ({load.device})", "people", results), end="\n\n", flush=True)
    if facts is None:
        return {suite: as_dicts(results)}
    print(loading.scaling_table(facts), end="\n\n", flush=True)
    return {suite: as_dicts(results), "start_up": facts}


def cases_of(suite: str, folder: Path, load: Load) -> list[Case]:
    """What a suite times."""
    if suite == "heatmaps":
        return network.heatmap_cases(load.batch_size, load.device)
    if suite == "train":
        return network.train_cases(load)
    originals = make_originals(folder / "originals", load.people)
    if suite == "decode":
        return evaluation.decode_cases(originals, load.device)
    if suite == "evaluate":
        return evaluation.evaluate_cases(originals, load.workers, load.device)
    crops = make_crops(folder / "crops", originals)
    if suite == "loader":
        return loading.loader_cases(originals, crops, load)
    return network.end_to_end_cases(originals, crops, load)


def as_dicts(results: list[Result]) -> list[dict[str, Any]]:
    """Plain values for JSON."""
    return [result._asdict() for result in results]


if __name__ == "__main__":
    run_main(main)
