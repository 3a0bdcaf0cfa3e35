"""Ranks the people of a training split by how much their annotation disagrees with predictions.

The predictions are those of networks that did not train on the person (k-fold cross-validation), or
a file. Writes label_errors.csv, index.html with the most likely wrong people, and predictions.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of configs/

import csv
import io
import json
import tempfile
from dataclasses import replace

import numpy as np
from jsonargparse import ArgumentParser

from common.cli import info
from common.distributed import init_distributed
from common.errors import InputError, run_main
from common.files import write_atomic
from configs.schema import Config, add_config_options, parse_config
from evaluation import pckh
from evaluation.html_report import html_report
from evaluation.inference import Predictions
from evaluation.label_errors import KINDS, LabelErrors, label_errors_of
from evaluation.predictions import as_entries, read_predictions
from evaluation.visualize import PredictedPeople
from pipelines.shard_format import unpack_records, write_manifest, write_people_file
from pipelines.shards import ShardSet
from training.trainer import Trainer

PEOPLE = 24
"""In each gallery of the page."""


def main(arguments: list[str] | None = None) -> None:
    """Predict all people by networks that do not know them, rank them, write the files."""
    words = sys.argv[1:] if arguments is None else arguments
    config, options = parse_config(make_parser(), words)
    if not isinstance(config.data.shards, str):
        raise InputError("data.shards", f"{config.data.shards}", "one data set", "give each alone")
    output, shards = Path(options["output"]), ShardSet(Path(config.data.shards) / "train")
    people, samples = shards.people()
    skeleton, path = shards.manifest.skeleton, options["predictions"]
    facts = {"data": shards.location}
    if path:
        given = read_predictions(Path(path), people)
        scores = np.ones(people.marked.shape) if given.scores_NJ is None else given.scores_NJ
        found = Predictions(given.keypoints_NJ2, scores)
        facts["predictions_file"] = path
    else:
        found = predict_folds(config, shards, options["folds"], output)
        entries = json.dumps(as_entries(people, *found))
        write_atomic(output / "predictions.json", entries.encode())
    ranked = label_errors_of(found, people, skeleton)
    write_table(output / "label_errors.csv", ranked, shards)
    results = {"networks of other people": pckh.summary(found.keypoints_NJ2, people, skeleton)}
    data = PredictedPeople(people, found.keypoints_NJ2, skeleton, shards, samples)
    suspects = [row for row in ranked.order if ranked.ratios_NK[row].max() > 0]
    galleries = {
        kind: [row for row in suspects if ranked.kind_N[row] == number][:PEOPLE]
        for number, kind in enumerate(KINDS)
    }
    page = html_report(facts, results, None, data, PEOPLE, galleries)
    write_atomic(output / "index.html", page.encode())
    print(f"wrote label_errors.csv and index.html in {output}")


def make_parser() -> ArgumentParser:
    """The command line: that of train.py, and how to find errors."""
    parser = ArgumentParser(
        exit_on_error=False,
        description="Ranks people of the split `train` by how likely a wrong annotation is.",
    )
    add = parser.add_argument
    add("--output", required=True, help="folder of the results and of the folds' runs")
    add("--folds", type=int, default=3, help="networks to train, each without a part of the people")
    add("--predictions", help="predictions of the split by a network that did not train on it")
    add_config_options(parser)
    return parser


def predict_folds(config: Config, shards: ShardSet, folds: int, output: Path) -> Predictions:
    """Joints of each person, in the annotation's order, by a network trained on the other folds.

    A fold is every folds-th tar; people are shuffled when they are packed. Raises InputError.
    """
    if not 2 <= folds <= len(shards.tars):
        found, expected = f"{folds} folds of {len(shards.tars)} tars", "2 folds or more, of a tar"
        advice = "pack with a smaller --people-per-shard, or give other --folds"
        raise InputError(shards.folder, found, expected, advice)
    train = replace(config.train, out=str(output), steps_per_epoch=config.train.steps, keep_last=1)
    dist = init_distributed(train.device, train.precision)
    rows, parts = [], []
    for fold in range(folds):
        info(f"fold {fold + 1} of {folds}")
        name = f"fold_{fold}"
        with tempfile.TemporaryDirectory() as folder:
            link_fold(shards, fold, folds, Path(folder))
            data = replace(config.data, shards=folder)
            evaluation = replace(config.eval, people=0)
            own = replace(config, data=data, train=replace(train, name=name), eval=evaluation)
            trainer = Trainer(own, dist, output / name)
            trainer.train()
            if trainer.interrupted:
                raise KeyboardInterrupt
            held_out = trainer.validator
            rows.append(unpack_records(held_out.shards.records()).row_N[held_out.samples])
            parts.append(held_out.found)
    order = np.argsort(np.concatenate(rows))
    return Predictions(*(np.concatenate(each)[order] for each in zip(*parts, strict=True)))


def link_fold(shards: ShardSet, fold: int, folds: int, folder: Path) -> None:
    """Write splits of links to the tars: every folds-th tar in `valid`, the others in `train`."""
    people, order = shards.people()
    row_of_sample, shard_of_sample = np.argsort(order), shards.shard_of_sample
    is_valid = shard_of_sample % folds == fold
    for split, is_own in (("train", ~is_valid), ("valid", is_valid)):
        own = people.select(row_of_sample[is_own])
        chosen = [shards.manifest.shards[number] for number in np.unique(shard_of_sample[is_own])]
        (folder / split).mkdir()
        for name in (name for shard in chosen for name in (shard.tar, shard.index)):
            (folder / split / name).symlink_to((shards.folder / name).resolve())
        digest = write_people_file(folder / split, shards.records()[is_own], own)
        manifest = replace(shards.manifest, split=split, shards=tuple(chosen), people=own.count)
        write_manifest(folder / split, replace(manifest, people_file_sha256=digest))


def write_table(path: Path, ranked: LabelErrors, shards: ShardSet) -> None:
    """The CSV of all people, the most likely wrong first. row: in the annotation's split."""
    people, samples = shards.people()
    row_N = unpack_records(shards.records()).row_N[samples].astype(int)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["image", "row", "person", "score", "kind", "joint", *KINDS])
    for n in ranked.order:
        kind, joint = ranked.kind_N[n], shards.manifest.skeleton.names[ranked.joint_N[n]]
        ratios = [f"{ratio:.2f}" for ratio in ranked.ratios_NK[n]]
        where = [people.images[n], row_N[n], people.person[n]]
        writer.writerow([*where, ratios[kind], KINDS[kind], joint, *ratios])
    write_atomic(path, text.getvalue().encode())


if __name__ == "__main__":
    run_main(main)
