"""What evaluate.py does: evaluate a checkpoint, a prediction file, or perfect heatmaps.

`options` are the command line of evaluate.py, parsed; its --help explains them.
"""

import json
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import cv2
import numpy as np
import numpy.typing as npt
import torch

from common.cli import info, progress
from common.distributed import DistributedContext, free_threads, loader_workers
from common.errors import InputError
from common.files import write_atomic
from configs.schema import Config, LoaderName, RuleName
from configs.skeleton import Skeleton, load_skeleton, require_same_joints
from evaluation import inference, oks, pckh, predictions, report
from evaluation.calibration import calibrate
from evaluation.html_report import html_report
from evaluation.inference import Predictions
from evaluation.pckh import Floats
from evaluation.report import ReferenceRun, Summary, read_reference
from evaluation.visualize import PredictedPeople, draw_people
from model.checkpoint import BEST, Checkpoint, evaluation_network, load_checkpoint, save_checkpoint
from pipelines.annotations import People, read_annotations
from pipelines.codec import Codec, codec_of
from pipelines.joined_shards import with_joints_of
from pipelines.opencv_loader import LooseImages, Source
from pipelines.shard_cache import local_folder
from pipelines.shard_format import MANIFEST, read_manifest
from pipelines.shards import ShardSet

NETWORK_OPTIONS = (
    "checkpoint", "shards", "calibrate", "picture", "save_predictions", "save_coco", "save_mat",
    "save_submission", "compare_loaders",
)  # fmt: skip
"""Options that are used only where a network predicts."""


class EvaluationDataset(NamedTuple):
    """People with pictures, in the annotation's order."""

    people: People
    source: Source
    samples: npt.NDArray[np.int64]
    """(N,) each person's number in the source."""
    skeleton: Skeleton
    name: str


class EvaluationJob(NamedTuple):
    """A checkpoint, the data to evaluate it on, and how."""

    trained: Checkpoint
    codec: Codec
    dataset: EvaluationDataset
    flip: bool
    loaders: tuple[LoaderName, ...]
    """One, or two to compare."""
    remarks: list[str]
    """Differences from training."""


class Evaluation(NamedTuple):
    """What is printed and written after an evaluation."""

    title: list[str]
    facts: dict[str, Any]
    """What was evaluated; the first keys of --json."""
    results: dict[str, Summary]
    """By name; the first is the one that is reported."""
    skeleton: Skeleton
    data: PredictedPeople | None = None
    reference: ReferenceRun | None = None


def check_options(options: Namespace) -> None:
    """Raise InputError for options that cannot work, before any work is done."""
    outputs = [options.json, options.save_predictions, options.save_coco, options.save_mat]
    outputs += [options.save_submission, options.picture, options.report and report_file(options)]
    outputs.append(options.calibrate)
    for path in filter(None, outputs):
        if path.is_dir() or any(parent.is_file() for parent in path.parents):
            raise InputError(path, "a folder, or below a file", "a file name", "give another name")
    if options.report and options.report.suffix not in ("", ".html"):
        raise InputError(options.report, "another kind of file", ".html, or a folder", "rename it")
    if options.oracle and (options.report or options.compare):
        raise _wrong("--oracle with --report or --compare", "these with a network or predictions")
    if (options.oracle or options.predictions) and not options.annotations:
        raise _wrong("--oracle or --predictions", "--annotations FILE with it")
    given = [name for name in NETWORK_OPTIONS if getattr(options, name)]
    if given and (options.oracle or options.predictions):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise _wrong(f"{names} with --oracle or --predictions", "these only with a network")
    if options.skeleton and not options.annotations:
        raise _wrong("--skeleton without --annotations", "both; shards contain their joints")
    if bool(options.save_submission) != bool(options.release):
        raise _wrong("one of --save-submission and --release", "both")
    if options.picture and options.picture.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise InputError(options.picture, "another kind of file", ".png or .jpg", "rename it")


def _wrong(found: str, expected: str) -> InputError:
    return InputError("command line", found, expected, "see evaluate.py --help")


def report_file(options: Namespace) -> Path:
    """The HTML file of --report: its value, or index.html in that folder."""
    return options.report if options.report.suffix == ".html" else options.report / "index.html"


def evaluate_oracle(options: Namespace) -> Evaluation:
    """The scores of perfect heatmaps by each rule, which are upper bounds. Raises InputError."""
    people, skeleton = _read_people(options)
    results = {}
    for rule in progress(get_args(RuleName), "rules", "rules"):
        keypoints = inference.oracle_keypoints(people, skeleton, rule, input_px=256)
        results[rule] = summary(keypoints, people, skeleton)
    title = f"perfect heatmaps at 256 px, decoded again: upper bounds on {options.annotations}"
    return Evaluation([title], {}, results, skeleton)


def evaluate_file(options: Namespace) -> Evaluation:
    """The scores of a prediction file. Raises InputError."""
    people, skeleton = _read_people(options)
    reference = read_reference(options.compare, skeleton) if options.compare else None
    source = LooseImages(people, options.images) if options.images else None
    predicted = predictions.read_predictions(options.predictions, people)
    truth = predicted.truth if options.ground_truth == "file" else None
    keypoints, samples = predicted.keypoints_NJ2, np.arange(people.count)
    result = summary(keypoints, truth or people, skeleton, predicted.scores_N)
    facts = {"predictions_file": str(options.predictions), "data": str(options.annotations)}
    facts["ground_truth"] = "file" if truth else "annotations"
    against = "its own ground truth" if truth else options.annotations
    data = PredictedPeople(truth or people, keypoints, skeleton, source, samples)
    title = [f"{options.predictions} against {against}"]
    return Evaluation(title, facts, {"predictions": result}, skeleton, data, reference)


def _read_people(options: Namespace) -> tuple[People, Skeleton]:
    skeleton = load_skeleton(options.skeleton) if options.skeleton else None
    return read_annotations(options.annotations, "valid", skeleton, options.images)


def evaluate_checkpoint(options: Namespace, dist: DistributedContext) -> Evaluation:
    """Predict with all ranks; rank 0 writes the prediction files. Raises InputError."""
    job = make_job(options)
    if options.calibrate and job.trained.is_onnx:
        advice = "calibrate the checkpoint that it was made from, and export that again"
        raise InputError(job.trained.path, "an ONNX file", "a checkpoint to calibrate", advice)
    people, source, samples, skeleton, name = job.dataset
    release = predictions.read_release(options.release, people) if options.release else None
    reference = read_reference(options.compare, skeleton) if options.compare else None
    found = run_job(job, dist, batch_size=options.batch_size, workers=options.workers)
    first = found[job.loaders[0]]
    calibration = None
    if options.calibrate:
        table, calibration = calibrate(first, people)
        if dist.is_first:
            save_checkpoint(options.calibrate, replace(job.trained, calibration=table))
            info(f"wrote {options.calibrate}")
    data = PredictedPeople(people, first.keypoints_NJ2, skeleton, source, samples)
    if dist.is_first:
        _write_predictions(options, data, first.scores_NJ)
    if dist.is_first and release:
        path = options.save_submission
        count = predictions.write_submission(path, release, people, first.keypoints_NJ2)
        info(f"wrote {path}: {count:,} people of the test set")
    results = {
        f"{loader} crops" if len(found) > 1 else "network": summary(
            keypoints, people, skeleton, scores.mean(axis=1)
        )
        for loader, (keypoints, scores) in found.items()
    }
    results["mean pose"] = summary(pckh.mean_pose(people), people, skeleton)
    flip = "flip test" if job.flip else "no flip test"
    title = [f"{job.trained.path} (step {job.trained.step}) on {name}, {flip}"]
    if job.codec.preset.princeton_crop:
        title.append(f"cropped by princeton-vl's rules, heatmaps by the rule {job.codec.rule}")
    title += [f"note: {remark}" for remark in job.remarks]
    facts = {"checkpoint": str(job.trained.path), "step": job.trained.step, "data": name}
    facts |= {"flip": job.flip, "loaders": list(job.loaders), "remarks": job.remarks}
    facts |= {"calibration": calibration} if calibration else {}
    return Evaluation(title, facts, results, skeleton, data, reference)


def summary(
    keypoints_NJ2: Floats, people: People, skeleton: Skeleton, scores_N: Floats | None = None
) -> Summary:
    """PCK, and COCO's AP where it can be computed. scores_N: None for equal ones."""
    precision = oks.average_precision(keypoints_NJ2, scores_N, people, skeleton)
    return {**pckh.summary(keypoints_NJ2, people, skeleton), "oks": precision}


def newest_checkpoint() -> Path:
    """The best.pt in runs/ that was written last. Raises InputError if there is none."""
    found = sorted(Path("runs").glob(f"*/{BEST}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError(f"runs/*/{BEST}", "no such file", "a run", "give --checkpoint PATH")
    return found[-1]


def make_job(options: Namespace) -> EvaluationJob:
    """Load the checkpoint and open the data. Raises InputError."""
    path = options.checkpoint or newest_checkpoint()
    trained = load_checkpoint(path, onnx=True)
    config = trained.config
    dataset = _open_dataset(options, config, trained.skeleton)
    require_same_joints(dataset.skeleton, trained.skeleton, dataset.name, trained.path)
    codec = codec_of(config.data, config.heatmaps, dataset.skeleton)
    trained_crop = "princeton" if codec.preset.princeton_crop else "affine"
    crop = options.crop or trained_crop
    preset = codec.preset._replace(princeton_crop=crop == "princeton")
    loaders: tuple[LoaderName, ...] = (options.loader,)
    if options.compare_loaders:
        loaders = ("opencv", "dali")
    flip = config.eval.flip if options.flip is None else options.flip
    return EvaluationJob(
        trained,
        replace(codec, preset=preset),
        dataset,
        flip and dataset.skeleton.mirror,
        loaders,
        differences(trained, trained_crop, crop, loaders, dataset.source),
    )


def _open_dataset(options: Namespace, config: Config, trained: Skeleton) -> EvaluationDataset:
    """A split of shards, or an annotation file and its pictures. Raises InputError."""
    annotations, images = options.annotations, options.images
    if not annotations and not images:
        data = config.data
        if len(data.weights) > 1 and not options.shards:
            raise _wrong("no --shards", f"one of {', '.join(data.weights)}")
        location = options.shards or next(iter(data.weights))
        folder = local_folder(location, data.cache_dir, data.cache_gb)
        if not (folder / MANIFEST).is_file() and (folder / "valid").is_dir():
            folder /= "valid"
        # The network may have more joints than the people, who then have no others marked.
        shards = with_joints_of(ShardSet(folder), trained)
        people, samples = shards.people()
        return EvaluationDataset(people, shards, samples, shards.manifest.skeleton, shards.location)
    if not annotations or not images or options.shards:
        given = [f"--{n}" for n in ("annotations", "images", "shards") if getattr(options, n)]
        raise _wrong(" and ".join(given), "--annotations with --images, or only --shards")
    joints = load_skeleton(options.skeleton) if options.skeleton else trained
    known = joints if joints.has_names else None
    people, skeleton = read_annotations(annotations, "valid", known, images, exif="stored")
    if (people.turned == 1).any():
        found = "labels of pictures as their EXIF turns them"
        advice = "pack them with tools/make_shards.py, and evaluate with --shards"
        raise InputError(annotations, found, "labels of pictures as they are stored", advice)
    source, samples = LooseImages(people, images), np.arange(people.count)
    return EvaluationDataset(people, source, samples, skeleton, str(annotations))


def differences(
    trained: Checkpoint, old_crop: str, crop: str, loaders: tuple[LoaderName, ...], source: Source
) -> list[str]:
    """One sentence for each difference between these crops and those of training."""
    loader = trained.run and trained.run.loader
    folders = [Path(location) / "train" for location in trained.config.data.weights]
    packing = source.manifest.packing if isinstance(source, ShardSet) else "original"
    old = {read_manifest(each).packing for each in folders if (each / MANIFEST).is_file()}
    sentences = {
        f"trained on {old_crop} crops, evaluated on {crop} ones (--crop)": crop != old_crop,
        f"trained on crops of {loader}, evaluated on those of {loaders[0]}; --compare-loaders "
        "prints the gap": loader and loader not in loaders,
        "dali resamples princeton's box once, princeton-vl's code twice": crop == "princeton"
        and "dali" in loaders,
        f"trained on --packing {' and '.join(sorted(old))}, evaluated on {packing}: pictures are "
        "resampled differently": old and packing not in old,
    }
    return [sentence for sentence, is_true in sentences.items() if is_true]


def run_job(
    job: EvaluationJob, dist: DistributedContext, *, batch_size: int | None, workers: int | None
) -> dict[LoaderName, Predictions]:
    """The predictions through each loader, in the annotation's order.

    batch_size: None takes 8 on a CPU, whose caches hold it, and that of training on a GPU.
    workers: None takes those of training.
    """
    wanted = job.trained.config.data.workers if workers is None else workers
    workers = loader_workers(wanted, dist.device)
    if dist.device.type == "cpu":
        torch.set_num_threads(free_threads(workers))
    network = evaluation_network(job.trained).to(dist.device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    people = job.dataset.people.count
    share = -(-people // dist.world_size)
    default = 8 if dist.device.type == "cpu" else job.trained.config.eval.batch_size
    size = min(batch_size or default, share)
    if dist.is_first:
        info(f"predicting {people:,} people, {size} at a time ...")
    bar = partial(progress, unit="batches", total=-(-share // size), shown=dist.is_first)
    return {
        loader: inference.predict_distributed(
            network,
            job.dataset.source,
            job.dataset.samples,
            job.codec,
            dist,
            loader=loader,
            batch_size=size,
            workers=workers,
            flip=job.flip,
            watch=partial(bar, what=f"evaluate ({loader})"),
        )
        for loader in job.loaders
    }


def _write_predictions(options: Namespace, data: PredictedPeople, scores_NJ: Floats) -> None:
    found = data.people, data.keypoints_NJ2, scores_NJ
    if options.save_predictions:
        names = {"joints": data.skeleton.names}
        entries = [{**entry, **names} for entry in predictions.as_entries(*found)]
        _write(options.save_predictions, json.dumps(entries))
    if options.save_coco:
        _write(options.save_coco, json.dumps(predictions.as_coco(*found)))
    if options.save_mat:
        predictions.write_mat(options.save_mat, {"preds": data.keypoints_NJ2})
        info(f"wrote {options.save_mat}")
    if options.picture:
        _, encoded = cv2.imencode(options.picture.suffix, draw_people(data, options.people))
        write_atomic(options.picture, encoded.tobytes())
        info(f"wrote {options.picture}")


def publish(evaluation: Evaluation, options: Namespace) -> None:
    """Write the files, then print, because `| head` may end the program during the table."""
    title, facts, results, skeleton, data, reference = evaluation
    if options.json:
        _write(options.json, json.dumps({**facts, **results}, indent=1))
    if options.report and data:
        page = html_report(facts, results, reference, data, options.people, {})
        _write(report_file(options), page)
    name, first = next(iter(results.items()))
    print("\n" + "\n".join(title))
    if first["joints_counted"]:
        signs = "< and <= say whether an error equal to the threshold counts as found (groups: <=)"
        print(f"{skeleton.metric} in %; {signs}\n")
        print(report.results_table(results, skeleton))
        if skeleton.sigmas:
            print("\n" + report.oks_table(results))
        if data:
            print("\n" + report.counts_text(first))
        if options.per_joint and data:
            print("\n" + report.details_table(first))
    else:
        print("No joint is annotated, so there is nothing to score.")
    if len(facts.get("loaders", ())) == 2:
        print("\n" + report.gap_text(*list(results.items())[:2]))
    if calibration := facts.get("calibration"):
        print("\n" + report.calibration_text(calibration))
    if reference:
        print(f"\nthe other run: {reference.name}")
        if warning := report.data_mismatch(first, reference.result):
            print(f"warning: {warning}")
        print(report.gap_text(("the other run", reference.result), (name, first)))


def _write(path: Path, text: str) -> None:
    write_atomic(path, (text + "\n").encode())
    info(f"wrote {path}")
