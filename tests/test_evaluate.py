"""Evaluation: crops, heatmaps, joints in picture coordinates, and the program evaluate.py."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import torch
from conftest import pack_arguments
from helpers import (
    damage_picture,
    leaves,
    make_codec,
    make_trainer,
    people_at,
    steps,
    tiny_config,
    train_options,
)
from torch import nn

import evaluate
import train
from common.errors import InputError, run_main
from configs.skeleton import MPII, Skeleton
from evaluation import evaluator, inference, pckh, report
from model.checkpoint import load_checkpoint
from pipelines.annotations import read_annotations
from pipelines.augment import PRESETS, Draw, without_augmentation
from pipelines.loader import evaluation_batches, make_batch
from pipelines.opencv_loader import LooseImages, crop_person
from pipelines.shard_format import unpack_records
from pipelines.shards import ShardSet
from tools import make_shards

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
PLAIN = {"flip": False, "device": CPU, "dtype": torch.float32}
EQUAL_SHARE = 0.9
"""Of joints. Maps of an untrained network are nearly flat, so rounding moves a few maxima far."""


class Fixed(nn.Module):
    """Returns given heatmaps, and for the second half of a flip test their mirror image."""

    def __init__(self, heat_NJHW: torch.Tensor):
        super().__init__()
        self.heat = heat_NJHW

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        heat = self.heat
        if len(images) == 2 * len(heat):
            heat = torch.cat([heat, heat.flip(3)[:, torch.tensor(MPII.flip_indices)]])
        return heat[:, None]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("preset", ["hrnet", "princeton"])
def test_target_heatmaps_decode_to_the_annotated_pixels(preset, flip, tiny_shards):
    """Of either crop; princeton's rounding is in its affine."""
    split, codec = ShardSet(tiny_shards / "train"), make_codec(preset, "exact", 256)
    options = {"loader": "opencv", "device": CPU, "batch_size": 12, "workers": 0}
    (raw,) = evaluation_batches(split, np.arange(12), codec, **options)
    batch = make_batch(raw, codec, CPU)
    inside = ((batch.joints_NJ2 > 1) & (batch.joints_NJ2 < 62)).all(dim=-1) & batch.has_target_NJ
    found = inference.predict(
        Fixed(batch.heat_NJHW).eval(), [raw], codec, **{**PLAIN, "flip": flip}
    )
    truth = unpack_records(raw.records_NR).joints_NJ2.double().numpy()
    error = (found.keypoints_NJ2 - truth)[inside.numpy()]
    assert len(error) > 60
    assert np.linalg.norm(error, axis=-1).max() < (0.01 if preset == "hrnet" else 0.05)
    assert np.abs(error.mean(axis=0)).max() < 0.005


def test_the_flip_test_averages_the_mirrored_prediction_with_left_and_right_swapped():
    class RedAsRightAnkle(nn.Module):
        def forward(self, images):
            heat = torch.zeros(len(images), 1, 16, 16, 16)
            heat[:, 0, 0] = nn.functional.avg_pool2d(images[:, 0], 4)
            return heat

    images = torch.rand(2, 3, 64, 64)
    heat = inference.last_heatmaps(RedAsRightAnkle().eval(), images, make_codec(), flip=True)
    expected = nn.functional.avg_pool2d(images[:, 0], 4) / 2
    torch.testing.assert_close(heat[:, 0], expected)
    torch.testing.assert_close(heat[:, 5], expected)  # the left ankle, from the mirrored picture
    assert heat[:, 1:5].abs().max() == 0


@pytest.mark.parametrize(("rule", "highest"), [("princeton", 1.0), ("exact", 2.0)])
def test_only_princetons_flip_test_clamps_at_one(rule, highest):
    network = Fixed(torch.full((1, 16, 4, 4), 2.0)).eval()
    heat = inference.last_heatmaps(network, torch.rand(1, 3, 16, 16), make_codec(rule=rule), True)
    assert heat.max().item() == highest


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("preset", ["hrnet", "princeton"])
def test_dali_makes_the_same_people_in_the_same_order(preset, device, tiny_set):
    """From pictures in a folder, in the order asked for, the last batch shorter."""
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    people, _ = read_annotations(tiny_set / "annot", "train")
    source, order = LooseImages(people, tiny_set / "images"), np.array([7, 0, 3, 11, 5])
    raw = {}
    for loader in ("opencv", "dali"):
        where = torch.device(device if loader == "dali" else "cpu")
        options = {"loader": loader, "device": where, "batch_size": 2, "workers": 1}
        codec = make_codec(preset, "princeton")
        raw[loader] = list(evaluation_batches(source, order, codec, **options))
    assert [len(b.records_NR) for b in raw["dali"]] == [2, 2, 1]
    for one, other in zip(raw["opencv"], raw["dali"], strict=True):
        assert torch.equal(one.records_NR, other.records_NR)
        matrices = other.input_from_image_N23.cpu()
        torch.testing.assert_close(one.input_from_image_N23, matrices, atol=1e-3, rtol=1e-5)
        assert (one.images_NHW3.float() - other.images_NHW3.cpu().float()).abs().mean() < 0.6


@pytest.mark.parametrize("preset", ["hrnet", "princeton"])
def test_a_large_picture_is_averaged_before_it_is_shrunk_except_with_princetons_crop(preset):
    """Stripes of two pixels, shrunk four times, are an even grey; samples hit black ones alone.

    Columns 16 to 271 are the box; princeton's rule places it half a pixel further left.
    """
    stripes = np.where((np.arange(330) - 16) % 4 % 3 == 0, 255, 0).astype(np.uint8)
    picture = np.tile(stripes[:, None], (300, 1, 3))
    record = np.zeros((1, 13 + 64))
    middle = 144 if preset == "princeton" else 143.5
    record[0, 1:4], record[0, 7:13] = (middle, 150, 256 / 200), (1, 0, 0, 0, 1, 0)
    none = without_augmentation(PRESETS[preset])
    crop, _ = crop_person(picture, unpack_records(record), Draw(), none, 64)
    expected = 0 if preset == "princeton" else 127.5
    assert np.abs(crop[10:50, 10:50].astype(float) - expected).max() <= 1


def test_both_loaders_average_pictures_in_the_same_way(tiny_set):
    """Pictures of 64 to 350 px at an input of 16 px: they are shrunk three to twenty times."""
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    people, _ = read_annotations(tiny_set / "annot", "train")
    source, codec, raw = LooseImages(people, tiny_set / "images"), make_codec(input_px=16), {}
    for loader in ("opencv", "dali"):
        options = {"loader": loader, "device": CPU, "batch_size": 12, "workers": 1}
        (raw[loader],) = evaluation_batches(source, np.arange(12), codec, **options)
    gap = raw["opencv"].images_NHW3.float() - raw["dali"].images_NHW3.float()
    assert gap.abs().mean() <= 0.5 and gap.abs().quantile(0.999) <= 6


# The program


@pytest.fixture(scope="module")
def trained(tiny_shards, tmp_path_factory) -> Path:
    """A run with best.pt, barely trained."""
    folder = tmp_path_factory.mktemp("work") / "runs" / "tiny"
    run = make_trainer(tiny_config(tiny_shards), folder)
    steps(run, 2)
    run.save(["best.pt"])
    return folder


def run(*words: object) -> None:
    evaluate.main([*map(str, words), "--workers", "0", "--device", "cpu"])


def predictions(path: Path) -> np.ndarray:
    """(N, 16, 3) of a file of --save-predictions."""
    return np.array([entry["keypoints"] for entry in json.loads(path.read_text())])


def test_evaluate_takes_the_newest_run_and_writes_what_was_asked_for(
    trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(trained.parents[1])
    run("--json", tmp_path / "n.json", "--save-predictions", tmp_path / "p.json",
        "--picture", tmp_path / "s.png")  # fmt: skip
    printed = capsys.readouterr().out
    assert "mean pose @0.5" in printed and "flip test" in printed
    for label in ("head", "ankle", "pooled 16 (<)", "mean 14 (<)", "weighted 14 (<=)", "AUC"):
        assert label in printed
    numbers = json.loads((tmp_path / "n.json").read_text())
    assert numbers["network"]["people"] == 5 and "0.1" in numbers["network"]["pckh"]
    assert cv2.imread(str(tmp_path / "s.png")).shape[1] == 6 * 258
    entries = json.loads((tmp_path / "p.json").read_text())
    assert [e["row"] for e in entries] == [0, 1, 2, 3, 4]
    assert [e["image"] for e in entries] == [f"{100 + i:09d}.jpg" for i in range(5)]
    assert predictions(tmp_path / "p.json").shape == (5, 16, 3)


def test_files_are_written_before_the_table_is_printed(trained, tmp_path, monkeypatch):
    """So that `evaluate.py ... | head -1` writes them; and a run's folder means its best.pt."""

    def closed(text: str) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(sys.stdout, "write", closed)
    with pytest.raises(BrokenPipeError):
        run("--checkpoint", trained, "--json", tmp_path / "n.json", "--save-predictions",
            tmp_path / "p.json")  # fmt: skip
    assert (tmp_path / "n.json").exists() and (tmp_path / "p.json").exists()


def test_shards_pictures_and_batch_sizes_give_the_same_predictions(trained, tiny_set, tmp_path):
    pictures = ("--annotations", tiny_set / "annot" / "valid.h5", "--images", tiny_set / "images")
    cases = {"one": ("--batch-size", 1), "five": ("--batch-size", 5), "pictures": pictures}
    for name, words in cases.items():
        run("--checkpoint", trained, *words, "--save-predictions", tmp_path / f"{name}.json")
    one = predictions(tmp_path / "one.json")
    for name, tolerance in (("five", 0.01), ("pictures", 0.05)):
        other = predictions(tmp_path / f"{name}.json")
        near = np.abs(other - one)[..., :2].max(axis=-1) < tolerance
        assert near.mean() > EQUAL_SHARE, name


@pytest.mark.slow
def test_two_ranks_predict_what_one_predicts(trained, tmp_path):
    run("--checkpoint", trained, "--save-predictions", tmp_path / "one.json")
    words = ["--checkpoint", trained, "--workers", "0", "--device", "cpu", "--save-predictions"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "evaluate.py", *map(str, words), str(tmp_path / "two.json")],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("PCKh in %") == 1  # printed by rank 0 alone
    one, two = (predictions(tmp_path / f"{name}.json") for name in ("one", "two"))
    assert (np.abs(two - one)[..., :2].max(axis=-1) < 0.01).mean() > EQUAL_SHARE
    np.testing.assert_allclose(two[..., 2], one[..., 2], atol=1e-5)


@pytest.mark.gpu
def test_a_gpu_predicts_what_the_cpu_predicts(trained, tmp_path):
    for device in ("cpu", "cuda"):
        evaluate.main(["--checkpoint", str(trained), "--workers", "0", "--device", device,
                       "--save-predictions", str(tmp_path / f"{device}.json")])  # fmt: skip
    one, other = (predictions(tmp_path / f"{device}.json") for device in ("cpu", "cuda"))
    np.testing.assert_allclose(other[..., 2], one[..., 2], atol=1e-3)  # scores; TF32 may be on
    assert (np.abs(other - one)[..., :2].max(axis=-1) < 0.5).mean() > EQUAL_SHARE


def test_the_gap_between_the_loaders_is_printed(trained, tmp_path, capsys):
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    run("--checkpoint", trained, "--compare-loaders", "--json", tmp_path / "n.json")
    printed = capsys.readouterr().out
    assert "gap, dali crops minus opencv crops" in printed
    numbers = json.loads((tmp_path / "n.json").read_text())
    assert {"opencv crops", "dali crops", "mean pose"} <= numbers.keys()
    one, other = (numbers[f"{n} crops"]["pckh"]["0.5"]["pooled"] for n in ("opencv", "dali"))
    assert f"pooled {100 * (other - one):+.3f}" in printed


def test_another_packing_than_in_training_is_noted(trained, tiny_set, tmp_path, capsys):
    make_shards.main(pack_arguments(tiny_set, tmp_path / "crops", "--packing", "crop"))
    run("--checkpoint", trained, "--shards", tmp_path / "crops")
    note = "note: trained on --packing original, evaluated on crop"
    assert note in capsys.readouterr().out
    run("--checkpoint", trained)
    assert "note:" not in capsys.readouterr().out


def test_differences_from_training_are_printed(trained, capsys):
    run("--checkpoint", trained, "--crop", "princeton")
    assert "note: trained on affine crops, evaluated on princeton ones" in capsys.readouterr().out
    best = load_checkpoint(trained / "best.pt")
    with_dali = replace(best, run=replace(best.run, loader="dali"))
    source = ShardSet(Path(best.config.data.shards) / "valid")

    def found(loaders: tuple) -> list[str]:
        return evaluator.differences(with_dali, "affine", "affine", loaders, source)

    assert found(("opencv", "dali")) == []
    (remark,) = found(("opencv",))
    assert "--compare-loaders" in remark


def test_packing_training_and_evaluation_print_how_many_people_are_scored(
    tiny_set, tmp_path, capsys
):
    """One of the five people has no length, and another has one but no marked joint."""
    folder = Path(shutil.copytree(tiny_set, tmp_path / "set"))
    with h5py.File(folder / "annot" / "valid.h5", "r+") as file:
        file["normalize"][1] = 0
        file["part"][3] = 0
    make_shards.main(pack_arguments(folder, tmp_path / "shards"))
    words = train_options(tmp_path / "shards", tmp_path, "run", "--train.steps 1")
    train.main(words)
    printed = capsys.readouterr()
    assert "scored     3 of 5 people" in printed.out and "scored     12 people" in printed.out
    assert "validation scores 3 of 5 people" in printed.out
    assert "joints of 3 of 5 people (best" in printed.err
    run("--checkpoint", tmp_path / "run", "--json", tmp_path / "n.json", "--report",
        tmp_path / "report.html")  # fmt: skip
    assert "3 of 5 people, 42 annotated joints" in capsys.readouterr().out
    assert json.loads((tmp_path / "n.json").read_text())["network"]["people_scored"] == 3
    assert '"scored":"3 of 5 people"' in (tmp_path / "report.html").read_text()


def test_the_table_of_98_joints_fits_on_a_line():
    names = tuple(f"landmark_{n}" for n in range(98))
    face = Skeleton("face", names, (), (), tuple((name, (n,)) for n, name in enumerate(names)))
    joints = np.zeros((2, 98, 2))
    table = report.results_table({"network": pckh.summary(joints, people_at(joints), face)}, face)
    assert max(map(len, table.splitlines())) <= 100
    assert "98 groups of joints are listed with --per-joint" in table


def test_tables_of_mpii_have_three_means_in_short_lines_and_others_only_the_pooled_one():
    joints = np.zeros((2, 16, 2))
    table = report.results_table({"network": pckh.summary(joints, people_at(joints), MPII)}, MPII)
    assert max(map(len, table.splitlines())) <= 100
    titles = ["pooled 16 (<)", "mean 14 (<)", "weighted 14 (<=)", "AUC", "head", "ankle"]
    places = [table.index(title) for title in titles]
    assert places == sorted(places) and table.count("network @0.5") == 2
    own = MPII._replace(names=tuple(f"{name}_" for name in MPII.names))
    result = pckh.summary(joints, people_at(joints), own)
    table = report.results_table({"network": result}, own)
    assert "pooled 16 (<)" in table and "mean" not in table and "weighted" not in table
    gap = report.gap_text(("a", result), ("b", result)).splitlines()
    assert gap[1:] == ["  @0.5  pooled +0.000", "  @0.1  pooled +0.000"]


def documented(heading: str) -> set[str]:
    """The keys in the first column of a table of docs/results.md."""
    section = (ROOT / "docs" / "results.md").read_text().split(f"## {heading}\n")[1]
    lines = section.split("\n## ")[0].splitlines()
    cells = [line.split("|")[1] for line in lines if line.startswith("| `")]
    return {key for cell in cells for key in re.findall(r"`([^`]+)`", cell)}


def test_the_documented_keys_are_those_of_the_files(tiny_shards, tmp_path):
    make_trainer(tiny_config(tiny_shards, train={"steps": 4, "log_every": 2}), tmp_path).train()
    run("--checkpoint", tmp_path, "--shards", tiny_shards / "train", "--json", tmp_path / "n.json",
        "--save-predictions", tmp_path / "p.json", "--calibrate", tmp_path / "c.pt")  # fmt: skip
    numbers = json.loads((tmp_path / "n.json").read_text())
    assert set(numbers) == documented("`evaluate.py --json`")
    result = numbers["network"]
    names = {"0.5": "T", "0.1": "T", **dict.fromkeys(result["joint_names"], "JOINT")}
    names |= dict.fromkeys(result["details"]["groups"], "GROUP")
    paths = [path.split("/")[:-1] for path in leaves(result)]  # with indices of lists
    found = {".".join(names.get(k, k) for k in path if not k.isdigit()) for path in paths}
    assert found | {"by_size"} == documented("A result")
    assert len(result["person_error_percentiles"]) == 101
    entries = json.loads((tmp_path / "p.json").read_text())
    assert {key for entry in entries for key in entry} == documented("Predictions")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"train", "valid"}
    keys = {key for line in lines for key in line} | {"pckh@0.5_pooled/FOLDER"}  # of several sets
    assert keys == documented("`metrics.jsonl`")


# Errors


def bad_inputs(trained: Path, tiny_shards: Path, tiny_set: Path, tmp_path: Path) -> dict:
    """Command lines that must end in one clear error, and what each must name."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "noise.pt").write_bytes(b"noise")
    (tmp_path / "noise.h5").write_bytes(b"noise")
    (tmp_path / "config.yaml").write_text("model:\n  stacks: 2\n")
    (tmp_path / "empty.json").write_text("{}")
    nose = Skeleton("nose", ("nose",), (), (), (("nose", (0,)),))
    result = pckh.summary(np.zeros((1, 1, 2)), people_at(np.zeros((1, 1, 2))), nose)
    (tmp_path / "others.json").write_text(json.dumps({"network": result}))
    best = ["--checkpoint", trained / "best.pt"]
    annotations = tiny_set / "annot" / "valid.h5"
    return {
        "no checkpoint": (["--checkpoint", tmp_path / "nowhere.pt"], "nowhere.pt"),
        "bad checkpoint": (["--checkpoint", tmp_path / "noise.pt"], "noise.pt"),
        "no pictures": ([*best, "--annotations", annotations, "--images", tmp_path / "empty"],
                        "5 of 5 pictures missing"),
        "half a pair": ([*best, "--annotations", annotations], "--images"),
        "a folder": ([*best, "--save-predictions", tmp_path], str(tmp_path)),
        "another kind of report": ([*best, "--report", tmp_path / "r.pdf"], ".html, or a folder"),
        "noise to compare": ([*best, "--compare", tmp_path / "noise.pt"], "no JSON"),
        "nothing to compare": ([*best, "--compare", tmp_path / "empty.json"], "no result in it"),
        "other joints": ([*best, "--compare", tmp_path / "others.json"], "joints nose"),
        "oracle on a page": (["--oracle", "--annotations", annotations, "--report",
                              tmp_path / "out"], "--oracle with --report"),
        "nothing to calibrate": (["--oracle", "--annotations", annotations, "--calibrate",
                                  tmp_path / "c.pt"], "--calibrate with --oracle or --predictions"),
        "a checkpoint that is not used": ([*best, "--predictions", tmp_path / "p.json", "--picture",
                                           tmp_path / "s.png", "--annotations", annotations],
                                          "--checkpoint, --picture with --oracle or"),
        "a configuration": (["--checkpoint", tmp_path / "config.yaml"], "not a checkpoint"),
        "predictions alone": (["--predictions", tmp_path / "p.json"], "--annotations FILE"),
    }  # fmt: skip


def test_bad_input_ends_in_one_clear_error(trained, tiny_shards, tiny_set, tmp_path, capsys):
    cases = bad_inputs(trained, tiny_shards, tiny_set, tmp_path)
    out = tmp_path / "out.json"
    for name, (words, expected) in cases.items():
        with pytest.raises(SystemExit) as left:
            run_main(lambda words=words: run(*words, "--json", out))
        text = capsys.readouterr().err
        assert left.value.code == 2, name
        assert expected in text and "found:" in text and "next:" in text, (name, text)
        assert not out.exists(), name


def test_a_picture_damaged_after_packing_is_named(trained, tiny_shards, tmp_path):
    bad = damage_picture(tiny_shards / "valid", tmp_path / "bad", sample=1)
    with pytest.raises(InputError, match=r"00000\.tar: sample 1"):
        run("--checkpoint", trained, "--shards", bad)


def test_without_a_validated_run_a_checkpoint_is_asked_for(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "stopped"
    folder.mkdir(parents=True)
    shutil.copy(trained / "best.pt", folder / "last.pt")
    with pytest.raises(InputError, match="--checkpoint PATH"):
        run()
