"""Evaluate a trained network: python evaluate.py [--checkpoint runs/NAME/best.pt]."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from common.cli import Parser, add_device_options, at_least
from common.distributed import (
    SummaryErrorHandler,
    init_distributed,
    report_error_once,
    shutdown_distributed,
)
from common.errors import run_main
from evaluation import evaluator

INPUTS = {
    "--checkpoint": "a checkpoint, also princeton-vl's, or a run's folder; default: newest in runs",
    "--shards": "a split, or the folder of splits, or the URL of either; default: as in training",
    "--annotations": "MPII's .h5 or .json(.gz), or COCO's, with pictures in a folder",
    "--skeleton": "YAML of its joints; default: a checkpoint's, or the annotation file's or MPII's",
    "--images": "the folder of its pictures; with --predictions only used by --report",
    "--predictions": "score a file of predictions (JSON, COCO results, .mat) with --annotations",
}
OUTPUTS = {
    "--json": "all numbers",
    "--calibrate": "the checkpoint with a table of what scores mean, measured on these people",
    "--report": "an HTML page of tables, curves and people: OUT/index.html or OUT.html",
    "--save-predictions": "JSON of the joints in px of the original pictures",
    "--save-coco": "the same as COCO keypoint results",
    "--save-mat": "the same as .mat with `preds`, as HRNet's",
    "--save-submission": "pred_keypoints_mpii.mat of MPII's test set, with --release",
    "--picture": "PNG or JPEG of predictions over white annotations",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate what the command line names, write files and print the table."""
    options = make_parser().parse_args(argv)
    evaluator.check_options(options)
    if options.oracle:
        evaluator.publish(evaluator.evaluate_oracle(options), options)
    elif options.predictions:
        evaluator.publish(evaluator.evaluate_file(options), options)
    else:
        dist = init_distributed(options.device, options.precision)
        try:
            evaluation = evaluator.evaluate_checkpoint(options, dist)
            if dist.is_first:
                evaluator.publish(evaluation, options)
        finally:
            shutdown_distributed()


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        description="Evaluate a trained network by PCKh, on one device or (torchrun) on several.",
        epilog="example: python evaluate.py --checkpoint runs/2hg/best.pt --json pckh.json",
    )
    what = parser.add_argument_group("what to evaluate")
    for name, text in INPUTS.items():
        kind = str if name == "--shards" else Path  # it may be a URL
        what.add_argument(name, type=kind, metavar="PATH", help=text)
    text = "truth for --predictions: the file's own if it has one (default), or --annotations"
    what.add_argument("--ground-truth", choices=("file", "annotations"), default="file", help=text)
    text = "score perfect heatmaps of --annotations with each heatmap rule: upper bounds"
    what.add_argument("--oracle", action="store_true", help=text)
    how = parser.add_argument_group("how")
    text = "average with the prediction for the mirrored picture; default: as in training"
    how.add_argument("--flip", action=argparse.BooleanOptionalAction, help=text)
    text = "princeton-vl's rounded crop, or one affine; default: as in training"
    how.add_argument("--crop", choices=("princeton", "affine"), help=text)
    text = "library that decodes and crops pictures (default: %(default)s, the reference)"
    how.add_argument("--loader", choices=("opencv", "dali"), default="opencv", help=text)
    text = "evaluate with both loaders, and print the gap"
    how.add_argument("--compare-loaders", action="store_true", help=text)
    text = "people per batch; default: 8 on a CPU, the run's eval.batch_size on a GPU"
    how.add_argument("--batch-size", type=at_least(1), help=text)
    text = "threads of OpenCV, or DALI's threads; default: as in training"
    how.add_argument("--workers", type=at_least(0), help=text)
    add_device_options(how)
    out = parser.add_argument_group("what to print and write")
    out.add_argument("--per-joint", action="store_true", help="print every joint and pair as well")
    text = "the --json of another run: print the gap, and show it in the report"
    out.add_argument("--compare", type=Path, metavar="FILE", help=text)
    for name, text in OUTPUTS.items():
        out.add_argument(name, type=Path, metavar="OUT", help=text)
    text = "MPII's annotation file mpii_human_pose_v1_u12_1.mat"
    out.add_argument("--release", type=Path, metavar="FILE", help=text)
    text = "people in --picture and in each gallery of --report (default: %(default)s)"
    out.add_argument("--people", type=at_least(1), default=24, help=text)
    return parser


if __name__ == "__main__":
    run_main(record(main, SummaryErrorHandler()), report_error_once)
