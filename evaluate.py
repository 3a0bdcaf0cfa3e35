"""Evaluate a trained network: python evaluate.py [--checkpoint runs/NAME/best.pt]."""

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import torch
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

from common.cli import Parser, add_device_options, at_least, progress
from common.distributed import (
    DistributedContext,
    init_distributed,
    report_error_once,
    set_cpu_threads,
    shutdown_distributed,
)
from common.errors import InputError, run_main
from common.files import write_atomic
from configs.schema import Config
from configs.skeleton import Skeleton, load_skeleton, require_same_joints
from evaluation import pckh, report, visualize
from evaluation.dataset import EvaluationDataset, open_pictures_dataset, open_shards_dataset
from evaluation.html_report import ReportData, html_report
from evaluation.inference import (
    FEW,
    Predictions,
    choose_batch_size,
    oracle_keypoints,
    predict_distributed,
)
from evaluation.predictions import (
    as_coco,
    as_entries,
    read_predictions,
    read_release,
    write_mat,
    write_submission,
)
from evaluation.report import ReferenceRun, data_mismatch, read_reference
from model import checkpoint
from model.checkpoint import Checkpoint
from pipelines.annotations import read_annotations
from pipelines.augment import without_augmentation
from pipelines.codec import Codec, codec_of
from pipelines.crop_packing import require_preset_fits
from pipelines.heatmaps import Rule
from pipelines.opencv_loader import LooseImages
from pipelines.shards import ShardSet
from training.checkpoint_manager import BEST, LAST

LoaderName = Literal["opencv", "dali"]

COMPARISON_LEGEND = (
    "{} in %; < and <= say whether an error equal to the threshold counts as found (groups: <=)"
)


class Question(NamedTuple):
    """What is to be evaluated, and how."""

    trained: Checkpoint
    codec: Codec
    subjects: EvaluationDataset
    flip: bool
    loaders: tuple[LoaderName, ...]
    """One, or both of them for the comparison."""
    remarks: list[str]
    """In what this differs from training."""


def main() -> None:
    """Predict everybody, print the table, write what was asked for."""
    options = make_parser().parse_args()
    check_options(options)
    if options.oracle:
        score_oracle(options)
    elif options.predictions:
        score_file(options)
    else:
        dist = init_distributed(options.device, options.precision)
        try:
            evaluate_network(options, dist)
        finally:
            shutdown_distributed()


def evaluate_network(options: argparse.Namespace, dist: DistributedContext) -> None:
    """The whole way for one checkpoint, over all ranks; the first one prints and writes."""
    question = find_question(options)
    subjects = question.subjects
    release = read_release(Path(options.release), subjects.people) if options.release else None
    other = read_reference(Path(options.compare), subjects.skeleton) if options.compare else None
    found = predict_everybody(options, question, dist)
    if not dist.is_first:
        return
    first = found[question.loaders[0]]
    if release:
        path = Path(options.save_submission)
        count = write_submission(path, release, subjects.people, first.keypoints_NJ2)
        say_written(f"{path}: {count:,} people of the test set")
    results = {
        "network" if len(found) == 1 else f"{name} crops": pckh.summary(
            keypoints, subjects.people, subjects.skeleton
        )
        for name, (keypoints, _) in found.items()
    }
    if subjects.train:
        mean = pckh.mean_pose(subjects.train, subjects.people)
        results["mean pose"] = pckh.summary(mean, subjects.people, subjects.skeleton)
    facts = {"checkpoint": str(question.trained.path), "step": question.trained.step}
    facts |= {"data": subjects.name, "flip": question.flip}
    facts |= {"loaders": list(question.loaders), "remarks": question.remarks}
    write_files(options, subjects, first, {**facts, **results})
    if options.report:
        people, source, samples, skeleton, *_ = subjects
        shown = ReportData(people, first.keypoints_NJ2, skeleton, source, samples)
        write_text(report_file(options), html_report(facts, results, other, shown, options.people))
    # After the files, so that `| head` cuts off the table alone.
    print_results(options, question, results)
    print_comparison(other, results)


def check_options(options: argparse.Namespace) -> None:
    """Refuse what cannot work, before any work is done. Raises InputError."""
    names = ("json", "save_predictions", "save_coco", "save_mat", "save_submission", "picture")
    paths = [Path(getattr(options, name)) for name in names if getattr(options, name)]
    paths += [report_file(options)] if options.report else []
    for path in paths:
        if path.is_dir() or any(p.is_file() for p in path.parents):
            raise InputError(path, "a folder, or in a file", "a file name", "name another file")
    if options.oracle and (options.report or options.compare):
        raise InputError("command line", "--oracle with --report or --compare",
                         "a network or predictions to report on", "leave one out")  # fmt: skip
    if options.picture and Path(options.picture).suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise InputError(options.picture, "another kind of file", ".png or .jpg", "rename it")
    if bool(options.save_submission) != bool(options.release):
        raise InputError(
            "command line",
            "one of --save-submission and --release",
            "both: the file to write, and MPII's mpii_human_pose_v1_u12_1.mat",
            "give both",
        )


def report_file(options: argparse.Namespace) -> Path:
    """The page of --report, which names its folder or an .html file."""
    path = Path(options.report)
    return path if path.suffix == ".html" else path / "index.html"


def score_oracle(options: argparse.Namespace) -> None:
    """Score perfect heatmaps by every rule: the ceiling of each. Raises InputError."""
    if not options.annotations:
        raise InputError(
            "command line", "--oracle alone", "--annotations FILE with it", "give both"
        )
    people, skeleton = read_annotations(Path(options.annotations), "valid", given_skeleton(options))
    rules: tuple[Rule, ...] = ("exact", "princeton", "hrnet")
    results: dict[str, dict[str, Any]] = {
        rule: pckh.summary(oracle_keypoints(people, skeleton, rule, 256), people, skeleton)
        for rule in progress(rules, "rules", "rules")
    }
    if options.json:
        write_text(Path(options.json), json.dumps(results, indent=1))
    print(f"\nperfect heatmaps at 256 px, decoded again: the ceiling on {options.annotations}")
    print(COMPARISON_LEGEND.format(skeleton.metric) + "\n")
    print(report.results_table(results, skeleton))


def given_skeleton(options: argparse.Namespace) -> Skeleton | None:
    """What --skeleton says, or None. Raises InputError."""
    if not options.skeleton:
        return None
    if not options.annotations:
        raise InputError("command line", "--skeleton without --annotations",
                         "both, for shards know their joints", "leave --skeleton out")  # fmt: skip
    return load_skeleton(Path(options.skeleton))


def score_file(options: argparse.Namespace) -> None:
    """Score predictions that somebody else made. Raises InputError."""
    if not options.annotations:
        raise InputError(
            "command line", "--predictions alone", "--annotations FILE with it", "give both"
        )
    people, skeleton = read_annotations(Path(options.annotations), "valid", given_skeleton(options))
    path = Path(options.predictions)
    other = read_reference(Path(options.compare), skeleton) if options.compare else None
    source = LooseImages(people, Path(options.images)) if options.images else None
    predicted = read_predictions(path, people)
    own = predicted.truth if options.ground_truth == "file" else None
    results = {"predictions": pckh.summary(predicted.keypoints_NJ2, own or people, skeleton)}
    facts = {"predictions_file": str(path), "data": options.annotations}
    facts |= {"ground_truth": "file" if own else "annotations"}
    if options.json:
        write_text(Path(options.json), json.dumps({**facts, **results}, indent=1))
    if options.report:
        keypoints = predicted.keypoints_NJ2
        shown = ReportData(own or people, keypoints, skeleton, source, np.arange(people.count))
        write_text(report_file(options), html_report(facts, results, other, shown, options.people))
    print(f"\n{path} against {'its own ground truth' if own else options.annotations}")
    print(COMPARISON_LEGEND.format(skeleton.metric) + "\n")
    print(report.results_table(results, skeleton))
    print()
    print(report.counts_text(results["predictions"]))
    if options.per_joint:
        print("\n" + report.details_table(results["predictions"]))
    print_comparison(other, results)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="evaluate.py",
        description="Evaluate a trained network by PCKh, on one device or (torchrun) on several.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python evaluate.py --checkpoint runs/2hg/best.pt --json pckh.json",
    )
    _add_what(parser.add_argument_group("what to evaluate"))
    _add_how(parser.add_argument_group("how"))
    _add_output(parser.add_argument_group("what to print and write"))
    return parser


def _add_what(what: argparse._ArgumentGroup) -> None:
    what.add_argument(
        "--checkpoint",
        help="ours, princeton-vl's, or the folder of a run; default: best.pt of the newest run",
    )
    what.add_argument("--runs", default="runs", help="folder of runs (default: %(default)s)")
    what.add_argument("--shards", help="a split, or the folder of splits; default: as in training")
    what.add_argument("--annotations", help="MPII's .h5 or .json(.gz), or COCO's: loose pictures")
    what.add_argument("--skeleton", help="YAML of its joints; default: the checkpoint's, or MPII's")
    what.add_argument(
        "--images",
        help="folder of the pictures, with --annotations; with --predictions for --report alone",
    )
    what.add_argument(
        "--predictions",
        metavar="FILE",
        help="score this file (.json of this program, COCO results, .mat) against --annotations",
    )
    what.add_argument(
        "--ground-truth",
        choices=("file", "annotations"),
        default="file",
        help="with --predictions: the file's own ground truth where it has one (default), or not",
    )
    what.add_argument(
        "--oracle",
        action="store_true",
        help="score perfect heatmaps of --annotations, by each rule of heatmaps.rule",
    )


def _add_how(how: argparse._ArgumentGroup) -> None:
    how.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="average with the prediction for the mirrored picture; default: as in training",
    )
    how.add_argument(
        "--crop",
        choices=("princeton", "affine"),
        help="cut people out by princeton-vl's two roundings, or by one affine; "
        "default: as in training",
    )
    how.add_argument(
        "--loader",
        choices=("opencv", "dali"),
        default="opencv",
        help="who decodes and crops (default: %(default)s, the one that numbers are quoted for)",
    )
    how.add_argument(
        "--compare-loaders", action="store_true", help="evaluate with both, and print the gap"
    )
    how.add_argument(
        "--batch-size", type=at_least(1), help="people at a time; default: the fastest, measured"
    )
    how.add_argument(
        "--workers",
        type=at_least(0),
        help="processes that crop, or DALI's threads; default: as in training",
    )
    add_device_options(how)


def _add_output(out: argparse._ArgumentGroup) -> None:
    out.add_argument("--per-joint", action="store_true", help="print every joint and pair as well")
    out.add_argument("--json", metavar="OUT", help="every number")
    out.add_argument(
        "--report",
        metavar="OUT",
        help="one HTML page of tables, curves and people, OUT/index.html or OUT.html",
    )
    out.add_argument(
        "--compare",
        metavar="FILE",
        help="the --json of another run: print the gap, and show it in the report",
    )
    out.add_argument(
        "--save-predictions", metavar="OUT", help="joints in px of the original pictures"
    )
    out.add_argument("--save-coco", metavar="OUT", help="the same as COCO keypoint results")
    out.add_argument("--save-mat", metavar="OUT", help="the same as .mat with `preds`, as HRNet's")
    out.add_argument(
        "--save-submission",
        metavar="OUT",
        help="pred_keypoints_mpii.mat of MPII's test set, with --release",
    )
    out.add_argument(
        "--release", metavar="FILE", help="MPII's own annotation, mpii_human_pose_v1_u12_1.mat"
    )
    out.add_argument("--picture", metavar="OUT", help="PNG or JPEG of predictions")
    out.add_argument(
        "--people",
        type=at_least(1),
        default=24,
        help="people in the picture, and in each gallery of the report (default: %(default)s)",
    )


def newest_checkpoint(runs: Path) -> Path:
    """best.pt of the run that wrote one last. Raises InputError."""
    best, last = (
        sorted(runs.glob(f"*/{name}"), key=lambda path: path.stat().st_mtime)
        for name in (BEST, LAST)
    )
    if best:
        return best[-1]
    if last:
        advice = f"python evaluate.py --checkpoint {shlex.quote(str(last[-1]))}"
        why = f"no */{BEST}, which comes with the first validation, but {last[-1]}"
        raise InputError(runs, why, "a validated run of train.py", advice)
    raise InputError(
        runs, f"no */{BEST}", "a run of train.py", "train first, or give --checkpoint PATH"
    )


def find_question(options: argparse.Namespace) -> Question:
    """Checkpoint, people and pictures, and how they are to be brought together."""
    path = Path(options.checkpoint) if options.checkpoint else newest_checkpoint(Path(options.runs))
    path = path / BEST if (path / BEST).is_file() else path
    trained = checkpoint.load_checkpoint(path, onnx=True)
    config = trained.config
    subjects = find_subjects(options, config, trained.skeleton)
    require_same_joints(subjects.skeleton, trained.skeleton, subjects.name, path)
    codec = codec_of(config.data, config.heatmaps, subjects.skeleton)
    trained_crop = "princeton" if codec.preset.princeton_crop else "affine"
    crop = options.crop or trained_crop
    preset = codec.preset._replace(princeton_crop=crop == "princeton")
    codec = replace(codec, preset=preset)
    if isinstance(subjects.source, ShardSet):
        shards = subjects.source
        require_preset_fits(shards.manifest, without_augmentation(codec.preset), shards.folder)
    loaders: tuple[LoaderName, ...] = (options.loader,)
    if options.compare_loaders:
        loaders = ("opencv", "dali")
    return Question(
        trained=trained,
        codec=codec,
        subjects=subjects,
        flip=config.eval.flip if options.flip is None else options.flip,
        loaders=loaders,
        remarks=differences(
            trained_crop, crop, trained.run.loader if trained.run else None, loaders
        ),
    )


def differences(
    trained_crop: str, crop: str, trained_loader: str | None, loaders: tuple[LoaderName, ...]
) -> list[str]:
    """In what the crops differ from those of training, a sentence each."""
    remarks = []
    if crop != trained_crop:
        rounding = " and their rounding of joints" if "princeton" in (crop, trained_crop) else ""
        remarks.append(
            f"trained on {trained_crop} crops, evaluated on {crop} ones{rounding} (--crop)"
        )
    if trained_loader and trained_loader not in loaders:
        remarks.append(
            f"trained on crops of {trained_loader}, evaluated on those of {loaders[0]}; "
            "--compare-loaders prints the gap"
        )
    if crop == "princeton" and "dali" in loaders:
        remarks.append("dali resamples princeton's box once, where its code resamples it twice")
    return remarks


def find_subjects(
    options: argparse.Namespace, config: Config, trained: Skeleton
) -> EvaluationDataset:
    """People and pictures, from shards or loose. trained: the network's joints. InputError."""
    joints = given_skeleton(options) or (trained if trained.has_names else None)
    if not (options.annotations or options.images):
        return open_shards_dataset(Path(options.shards or config.data.shards))
    if not (options.annotations and options.images) or options.shards:
        given = [n for n in ("annotations", "images", "shards") if getattr(options, n)]
        raise InputError(
            "command line",
            " and ".join(f"--{name}" for name in given),
            "--annotations with --images, or --shards alone",
            "give one of the two",
        )
    return open_pictures_dataset(Path(options.annotations), Path(options.images), joints)


def predict_everybody(
    options: argparse.Namespace, question: Question, dist: DistributedContext
) -> dict[LoaderName, Predictions]:
    """Everybody's joints through each loader, in the annotation's order."""
    config = question.trained.config
    workers = config.data.workers if options.workers is None else options.workers
    set_cpu_threads(dist.device, workers)
    network = checkpoint.evaluation_network(question.trained).to(dist.device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    people = question.subjects.people.count
    share = -(-people // dist.world_size)
    size = min(options.batch_size or fastest_batch(network, question, share, dist), share)
    if dist.is_first:
        print(f"predicting {people:,} people, {size} at a time ...", file=sys.stderr, flush=True)
    found: dict[LoaderName, Predictions] = {}
    for loader in question.loaders:
        found[loader] = predict_distributed(
            network, question.subjects.source, question.subjects.samples, question.codec, dist,
            loader=loader, batch_size=size, flip=question.flip,
            workers=workers,
            progress=lambda batches, name=loader: progress(  # type: ignore[misc]
                batches, f"evaluate ({name})", "batches", -(-share // size),
                shown=dist.is_first,
            ),
        )  # fmt: skip
    return found


def fastest_batch(
    network: nn.Module, question: Question, share: int, dist: DistributedContext
) -> int:
    """The batch size that suits this machine. share: people whom this rank is to predict."""
    if dist.is_first and share > FEW:
        print("finding the fastest batch size ...", file=sys.stderr, flush=True)
    size, rates = choose_batch_size(
        network, question.codec, share,
        flip=question.flip, device=dist.device, dtype=dist.dtype,
    )  # fmt: skip
    if dist.is_first and rates:
        tried = ", ".join(f"{each}: {rate:,.0f}" for each, rate in rates.items())
        print(f"batches of {size} are fastest (people/s by size: {tried})", file=sys.stderr)
    return size


def print_results(
    options: argparse.Namespace, question: Question, results: dict[str, dict[str, Any]]
) -> None:
    """The table, and what it counts."""
    first = next(iter(results.values()))
    flip = "flip test" if question.flip else "no flip test"
    trained = question.trained
    print(f"\n{trained.path} (step {trained.step}) on {question.subjects.name}, {flip}")
    if question.codec.preset.princeton_crop:
        print(f"cropped by princeton-vl's rules, heatmaps by the rule {question.codec.rule}")
    for remark in question.remarks:
        print(f"note: {remark}")
    if not first["joints_counted"]:
        print("No joint is annotated, so that there is nothing to score.")
        return
    print(COMPARISON_LEGEND.format(question.subjects.skeleton.metric) + "\n")
    print(report.results_table(results, question.subjects.skeleton))
    print()
    print(report.counts_text(first))
    if options.per_joint:
        print("\n" + report.details_table(first))
    if len(question.loaders) == 2:
        print("\n" + report.gap_text(*list(results.items())[:2]))


def print_comparison(other: ReferenceRun | None, results: dict[str, dict[str, Any]]) -> None:
    """The gap between the first result and another run's, if there is one, and what it is worth."""
    if not other:
        return
    name, own = next(iter(results.items()))
    print(f"\nthe other run: {other.name}")
    if why := data_mismatch(own, other.result):
        print(f"warning: {why}")
    print(report.gap_text(("the other run", other.result), (name, own)))


def write_files(
    options: argparse.Namespace,
    subjects: EvaluationDataset,
    found: Predictions,
    results: dict[str, Any],
) -> None:
    """The files that were asked for."""
    if options.json:
        write_text(Path(options.json), json.dumps(results, indent=1))
    keypoints, scores = found
    if options.save_predictions:
        entries = as_entries(subjects.people, keypoints, scores)
        write_text(Path(options.save_predictions), json.dumps(entries))
    if options.save_coco:
        write_text(Path(options.save_coco), json.dumps(as_coco(subjects.people, keypoints, scores)))
    if options.save_mat:
        write_mat(Path(options.save_mat), {"preds": keypoints})
        say_written(options.save_mat)
    if options.picture:
        count = min(options.people, subjects.people.count)
        rows = np.linspace(0, subjects.people.count - 1, count).astype(int)
        sheet = visualize.draw_people(
            subjects.source,
            subjects.samples[rows],
            subjects.people.select(rows),
            found.keypoints_NJ2[rows],
            subjects.skeleton,
        )
        path = Path(options.picture)
        _, encoded = cv2.imencode(path.suffix, sheet)
        write_atomic(path, encoded.tobytes())
        say_written(path)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, and say so."""
    write_atomic(path, (text + "\n").encode())
    say_written(path)


def say_written(what: object) -> None:
    """On stderr: a reader of the table that has seen enough must not keep files from being told."""
    print(f"wrote {what}", file=sys.stderr)


if __name__ == "__main__":
    run_main(record(main), report_error_once)
