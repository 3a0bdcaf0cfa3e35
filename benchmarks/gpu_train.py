"""The training step on a GPU, in at most nine minutes: python benchmarks/gpu_train.py --out OUT

Steps of 2 and 8 stacks against princeton-vl's, how much of the GPU they use, memory, batch sizes,
targets, and whole steps with their loaders. JSON and bars go to OUT.
"""

import sys
from pathlib import Path

# `python benchmarks/gpu_train.py` puts benchmarks/ on the path, and not the folder above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import functools
import gc
import tempfile
import traceback
from typing import Any

import torch

from benchmarks.gpu_steps import (
    OURS,
    Network,
    Way,
    card,
    flops_of_a_person,
    heatmap_facts,
    memory_facts,
    step_case,
    utilisation,
    ways,
)
from benchmarks.loading import Load
from benchmarks.made_people import make_crops, make_originals
from benchmarks.network import end_to_end_cases
from benchmarks.pieces import (
    Deadline,
    Piece,
    Report,
    add_common_options,
    require_device,
    run_pieces,
)
from benchmarks.timing import Result, table, take_turns
from common.cli import Parser, at_least
from common.errors import run_main
from common.system import usable_cores

LARGEST_BATCH = 4096
END_TO_END_SECONDS = 70.0
STEPS_SECONDS = {2: 60.0, 8: 90.0}
COMPILE_SECONDS = 120.0


def main() -> int:
    """Measure and write."""
    options = make_parser().parse_args()
    device = require_device(options.device)
    deadline = Deadline(options.minutes)
    load = Load(options.people, options.batch_size, options.workers, options.input_px, device)
    report: Report = {
        "options": vars(options),
        "tf32": {
            "convolutions": torch.backends.cudnn.allow_tf32,
            "matrix products": torch.backends.cuda.matmul.allow_tf32,
            "note": "torch's defaults, left alone in every case",
        },
    }
    pieces = pieces_of(load, options, report)
    return run_pieces(pieces, report, Path(options.out) / "gpu_train.json", device, deadline)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="gpu_train.py",
        description="Times the training step on a GPU.",
        epilog="example: python benchmarks/gpu_train.py --out runs/gpu",
    )
    add_common_options(parser, 8.3)
    # fmt: off
    add = parser.add_argument_group("how much").add_argument
    add("--stacks", type=at_least(1), nargs="+", default=[2, 8], help="default: 2 8")
    add("--width", type=at_least(2), default=256, help="default: %(default)s")
    add("--depth", type=at_least(1), default=4, help="default: %(default)s")
    add("--input-px", type=at_least(64), default=256, help="default: %(default)s")
    add("--batch-size", type=at_least(1), default=64, help="of all cases (default: %(default)s)")
    add("--small-batch", type=at_least(1), default=16,
        help="princeton-vl's, timed besides (default: %(default)s)")
    add("--largest-batch", type=at_least(1), default=LARGEST_BATCH,
        help="that is tried (default: %(default)s)")
    add("--people", type=at_least(2), default=512,
        help="people in the made data of the whole steps (default: %(default)s)")
    add("--workers", type=at_least(1), default=max(1, usable_cores() - 2),
        help="worker processes, or DALI's threads (default here: %(default)s)")
    # fmt: on
    return parser


def pieces_of(load: Load, options: Any, report: Report) -> list[Piece]:
    """Everything that is measured, the most important first; what compiles comes last."""
    sizes = [
        Network(stacks, options.width, options.depth, load.input_px) for stacks in options.stacks
    ]
    eager = [way for way in ways(load.device) if not way.compiles]
    compiled = [way for way in ways(load.device) if way.compiles]
    timed = functools.partial(steps, load=load, rounds=options.rounds, report=report)
    pieces = [Piece("card", lambda: card(load.device))]
    for size in sizes:
        seconds = STEPS_SECONDS.get(size.stacks, 60.0)
        for batch in dict.fromkeys([load.batch_size, options.small_batch]):
            name = f"{size.stacks} stacks, batch {batch}"
            pieces.append(Piece(name, functools.partial(timed, name, size, batch, eager), seconds))
    pieces.append(Piece("heatmaps", lambda: heatmap_facts(load, options.rounds, report)))
    pieces.append(Piece("whole steps", lambda: whole_steps(load, options), END_TO_END_SECONDS))
    for size in sizes:
        pieces.append(
            Piece(
                f"memory, {size.stacks} stacks",
                functools.partial(memory_facts, size, load, options.largest_batch),
                30.0,
            )
        )
    for size in sizes:
        name = f"{size.stacks} stacks, batch {load.batch_size}, compiled"
        # A whole network of many stacks takes minutes to compile; its residuals do not.
        fitting = [way for way in compiled if size.stacks <= 2 or way.compiles == "residuals"]
        run = functools.partial(timed, name, size, load.batch_size, [OURS, *fitting])
        pieces.append(Piece(name, run, COMPILE_SECONDS))
    return pieces


def steps(
    name: str, size: Network, batch: int, chosen: list[Way], load: Load, rounds: int, report: Report
) -> list[Result]:
    """Rates of the ways to make one step; what of the card they use goes into the report."""
    cases = []
    for way in chosen:
        case = step_case(way, size, batch, load.device)
        try:
            case.prepare()
            case.run()  # compiles, and chooses algorithms
            cases.append(case)
        except Exception as error:  # the other ways are worth knowing
            traceback.print_exc()
            report["failed"][f"{name}: {way.name}"] = f"{type(error).__name__}: {error}"[:500]
    results = take_turns(cases, rounds, load.device)
    share = utilisation(results, flops_of_a_person(size), report)
    report.setdefault("flops utilisation", {})[name] = share
    gc.collect()
    return results


def whole_steps(load: Load, options: Any) -> dict[str, Any]:
    """Steps of 2 stacks with each loader; the time that data cost, as a share."""
    torch.backends.cudnn.benchmark = False  # as train.py has it
    with tempfile.TemporaryDirectory(prefix="gpu-train-") as folder:
        originals = make_originals(Path(folder) / "originals", load.people)
        crops = make_crops(Path(folder) / "crops", originals)
        cases = end_to_end_cases(originals, crops, load)
        results = take_turns(cases, options.rounds, load.device)
    print(table("whole steps", "people", results), flush=True)
    return {
        "people_per_s": {result.name: result.median for result in results},
        "share of time lost to data": {r.name: max(0.0, 1 - r.ratio) for r in results},
    }


if __name__ == "__main__":
    run_main(main)
