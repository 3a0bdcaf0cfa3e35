"""Evaluate a trained network: python evaluate.py [--checkpoint runs/NAME/best.pt]."""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from configs.errors import InputError, run_main
from configs.schema import Config
from configs.skeleton import Skeleton
from evaluation import pckh, report
from evaluation.inference import Predictions, evaluation_batches, predict
from evaluation.oracle import oracle_keypoints
from evaluation.predictions import as_coco, as_entries, read_predictions, write_mat
from pipelines.annotations import People, read_annotations
from pipelines.augment import preset_of
from pipelines.batches import Target
from pipelines.heatmaps import Rule
from pipelines.memory import keep_freed_memory
from pipelines.opencv_crops import LooseImages, Source
from pipelines.shards import MANIFEST, ShardSet
from training import checkpoint, runtime

COMPARISON_LEGEND = (
    "PCKh in %; < and <= say whether an error equal to the threshold counts as found (groups: <=)"
)


class Subjects(NamedTuple):
    """Whom to evaluate on."""

    people: People
    source: Source
    samples: npt.NDArray[np.int64]
    """(N,) number in the source of each person."""
    skeleton: Skeleton
    train: People | None
    """The people of the training split, if it is at hand, for the mean pose."""
    name: str


def main() -> None:
    """Predict everybody, print the table, write what was asked for."""
    options = make_parser().parse_args()
    check_outputs(options)
    if options.oracle:
        score_oracle(options)
        return
    if options.predictions:
        score_file(options)
        return
    path = Path(options.checkpoint) if options.checkpoint else newest_checkpoint(Path(options.runs))
    state = checkpoint.load(path)
    config = checkpoint.config_of(state, path)
    flip = config.eval.flip if options.flip is None else options.flip
    subjects = find_subjects(options, config)
    if subjects.skeleton != checkpoint.skeleton_of(state):
        raise InputError(
            subjects.name,
            f"joints of {subjects.skeleton.name}: {', '.join(subjects.skeleton.names[:4])}, ...",
            f"those that {path} was trained on",
            "evaluate on data of the same joints",
        )
    found = predict_subjects(options, config, state, path, subjects, flip)
    results = {"network": pckh.summary(found.keypoints_NJ2, subjects.people, subjects.skeleton)}
    if subjects.train:
        mean = pckh.mean_pose(subjects.train, subjects.people)
        results["mean pose"] = pckh.summary(mean, subjects.people, subjects.skeleton)
    print_results(path, state, subjects, results, flip=flip)
    write_files(options, path, subjects, found, {"flip": flip, **results})


def check_outputs(options: argparse.Namespace) -> None:
    """Refuse files that cannot be written before the work is done. Raises InputError."""
    names = (options.json, options.save_predictions, options.save_coco, options.save_mat)
    for name in [*names, options.picture]:
        path = Path(name) if name else None
        if path and (path.is_dir() or any(p.is_file() for p in path.parents)):
            raise InputError(path, "a folder, or in a file", "a file name", "name another file")
    if options.picture and Path(options.picture).suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise InputError(options.picture, "another kind of file", ".png or .jpg", "rename it")


def score_oracle(options: argparse.Namespace) -> None:
    """Score perfect heatmaps by every rule: the ceiling of each. Raises InputError."""
    if not options.annotations:
        raise InputError(
            "command line", "--oracle alone", "--annotations FILE with it", "give both"
        )
    people, skeleton = read_annotations(Path(options.annotations), "valid")
    rules: tuple[Rule, ...] = ("exact", "princeton", "hrnet")
    results: dict[str, dict[str, Any]] = {
        rule: pckh.summary(oracle_keypoints(people, skeleton, rule, 256), people, skeleton)
        for rule in rules
    }
    print(f"\nperfect heatmaps at 256 px, decoded again: the ceiling on {options.annotations}")
    print(COMPARISON_LEGEND + "\n")
    print(report.table(results, skeleton))
    if options.json:
        write_text(Path(options.json), json.dumps(results, indent=1))


def score_file(options: argparse.Namespace) -> None:
    """Score predictions that somebody else made. Raises InputError."""
    if not options.annotations:
        raise InputError(
            "command line", "--predictions alone", "--annotations FILE with it", "give both"
        )
    people, skeleton = read_annotations(Path(options.annotations), "valid")
    path = Path(options.predictions)
    predicted = read_predictions(path, people)
    own = predicted.truth if options.ground_truth == "file" else None
    results = {"predictions": pckh.summary(predicted.keypoints_NJ2, own or people, skeleton)}
    print(f"\n{path} against {'its own ground truth' if own else options.annotations}")
    print(COMPARISON_LEGEND + "\n")
    print(report.table(results, skeleton))
    print()
    print(report.explain(results["predictions"]))
    if options.json:
        facts = {"predictions_file": str(path), "ground_truth": "file" if own else "annotations"}
        write_text(Path(options.json), json.dumps({**facts, **results}, indent=1))


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Evaluate a trained network by PCKh, with OpenCV's crops.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python evaluate.py --checkpoint runs/2hg/best.pt --json pckh.json",
    )
    what = parser.add_argument_group("what to evaluate")
    what.add_argument("--checkpoint", help="default: best.pt of the newest run")
    what.add_argument("--runs", default="runs", help="folder of runs (default: %(default)s)")
    what.add_argument("--shards", help="a split, or the folder of splits; default: as in training")
    what.add_argument(
        "--annotations", help="valid.h5 or mpii_annotations.json(.gz), for loose pictures"
    )
    what.add_argument("--images", help="folder of the pictures, with --annotations")
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
    how = parser.add_argument_group("how")
    how.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="average with the prediction for the mirrored picture; default: as in training",
    )
    how.add_argument("--batch-size", type=int, help="people at a time; default: as in training")
    how.add_argument("--workers", type=int, help="processes that crop; default: as in training")
    how.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    how.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="fp32")
    out = parser.add_argument_group("what to write")
    out.add_argument("--json", metavar="OUT", help="every number")
    out.add_argument(
        "--save-predictions", metavar="OUT", help="joints in px of the original pictures"
    )
    out.add_argument("--save-coco", metavar="OUT", help="the same as COCO keypoint results")
    out.add_argument(
        "--save-mat", metavar="OUT", help="the same as .mat, `preds` counted from 1, as HRNet's"
    )
    out.add_argument("--picture", metavar="OUT", help="PNG or JPEG of predictions")
    out.add_argument(
        "--people", type=int, default=24, help="people in the picture (default: %(default)s)"
    )
    return parser


def newest_checkpoint(runs: Path) -> Path:
    """best.pt of the run that wrote one last. Raises InputError."""
    found = sorted(runs.glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError(
            runs, "no */best.pt", "a run of train.py", "train first, or give --checkpoint PATH"
        )
    return found[-1]


def find_subjects(options: argparse.Namespace, config: Config) -> Subjects:
    """People and pictures, from shards or loose. Raises InputError."""
    if options.annotations or options.images:
        if not (options.annotations and options.images) or options.shards:
            given = [n for n in ("annotations", "images", "shards") if getattr(options, n)]
            raise InputError(
                "command line",
                " and ".join(f"--{name}" for name in given),
                "--annotations with --images, or --shards alone",
                "give one of the two",
            )
        people, skeleton = read_annotations(Path(options.annotations), "valid")
        source = LooseImages(people, Path(options.images))
        samples = np.arange(people.count)
        return Subjects(people, source, samples, skeleton, None, options.annotations)
    folder = Path(options.shards or config.data.shards)
    if not (folder / MANIFEST).is_file() and (folder / "valid").is_dir():
        folder = folder / "valid"
    shards = ShardSet(folder)
    people, samples = shards.people()
    beside = folder.parent / "train"
    train = ShardSet(beside).people()[0] if (beside / MANIFEST).is_file() else None
    return Subjects(people, shards, samples, shards.manifest.skeleton, train, str(folder))


def predict_subjects(
    options: argparse.Namespace,
    config: Config,
    state: dict[str, Any],
    path: Path,
    subjects: Subjects,
    flip: bool,
) -> Predictions:
    """Everybody's joints, in the annotation's order."""
    keep_freed_memory()
    device = runtime.choose_device(options.device)
    workers = config.data.workers if options.workers is None else options.workers
    size = config.eval.batch_size if options.batch_size is None else options.batch_size
    if size < 1 or workers < 0:
        raise InputError(
            "command line",
            f"batch size {size}, workers {workers}",
            "1 or more, 0 or more",
            "correct it",
        )
    network = checkpoint.evaluation_network(state, path).to(device)
    target = Target(
        preset=preset_of(config.data.preset, config.data.mirror),
        rule=config.heatmaps.rule,
        sigma=config.heatmaps.sigma,
        input_px=config.data.input_px,
        skeleton=subjects.skeleton,
    )
    batches = evaluation_batches(
        subjects.source, subjects.samples, target, size, workers, device.type == "cuda"
    )
    progress = tqdm(batches, desc="evaluate", unit="batch", total=-(-subjects.people.count // size))
    return predict(
        network,
        progress,
        target,
        flip=flip,
        device=device,
        dtype=runtime.choose_dtype(options.precision, device),
    )


def print_results(
    path: Path,
    state: dict[str, Any],
    subjects: Subjects,
    results: dict[str, dict[str, Any]],
    flip: bool,
) -> None:
    """The table, and what it counts."""
    print(
        f"\n{path} (step {state['step']}) on {subjects.name}, "
        f"{'flip test' if flip else 'no flip test'}"
    )
    print(COMPARISON_LEGEND + "\n")
    print(report.table(results, subjects.skeleton))
    print()
    print(report.explain(results["network"]))


def write_files(
    options: argparse.Namespace,
    path: Path,
    subjects: Subjects,
    found: Predictions,
    results: dict[str, Any],
) -> None:
    """The files that were asked for."""
    if options.json:
        facts = {"checkpoint": str(path), "data": subjects.name}
        write_text(Path(options.json), json.dumps({**facts, **results}, indent=1))
    keypoints, scores = found
    if options.save_predictions:
        entries = as_entries(subjects.people, keypoints, scores)
        write_text(Path(options.save_predictions), json.dumps(entries))
    if options.save_coco:
        write_text(Path(options.save_coco), json.dumps(as_coco(keypoints, scores)))
    if options.save_mat:
        write_mat(Path(options.save_mat), keypoints)
        print(f"wrote {options.save_mat}")
    if options.picture:
        count = min(max(options.people, 1), subjects.people.count)
        rows = np.linspace(0, subjects.people.count - 1, count).astype(int)
        sheet = report.draw_people(
            subjects.source,
            subjects.samples[rows],
            subjects.people.select(rows),
            found.keypoints_NJ2[rows],
            subjects.skeleton,
        )
        Path(options.picture).parent.mkdir(parents=True, exist_ok=True)
        if not cv2.imwrite(options.picture, sheet):
            raise InputError(
                options.picture, "cannot be written", "a .png or .jpg", "name another file"
            )
        print(f"wrote {options.picture}")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, and say so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text + "\n")
    temporary.rename(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    run_main(main)
