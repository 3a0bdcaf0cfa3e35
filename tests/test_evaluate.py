"""Evaluation: from pixels of the picture and back to them, in the annotation's order."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import make_codec, make_trainer, steps, tiny_config
from torch import nn

import evaluate
from common.errors import InputError, run_main
from configs.skeleton import MPII, Skeleton
from evaluation import inference, pckh, report, visualize
from model import checkpoint
from pipelines.annotations import read_annotations
from pipelines.augment import preset_of
from pipelines.codec import Codec
from pipelines.heatmaps import decode, render
from pipelines.loader import evaluation_batches, make_batch
from pipelines.opencv_loader import CropDataset, CropLoader, ListSampler, LooseImages, collate
from pipelines.shard_format import unpack_records
from pipelines.shards import ShardSet

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


class Oracle(nn.Module):
    """Answers with the perfect heatmaps of the crops that it is told of, mirrored on request."""

    def __init__(self, heat_NJHW: torch.Tensor, codec: Codec):
        super().__init__()
        self.heat, self.codec = heat_NJHW, codec

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        heat = self.heat
        if len(images) == 2 * len(heat):  # the flip test: the second half is mirrored
            mirrored = torch.tensor(self.codec.skeleton.mirrored)
            heat = torch.cat([heat, heat.flip(3)[:, mirrored]])
        return heat[:, None]


@pytest.mark.parametrize("flip", [False, True])
def test_perfect_heatmaps_come_back_to_the_annotated_pixels(flip, tiny_shards):
    """0.5 px on average is asked for; the exact rule loses far less, and has no bias."""
    split, codec = ShardSet(tiny_shards / "train"), make_codec("hrnet", "exact", 256)
    dataset = CropDataset(split, preset_of("none", False), 256, 0)
    raw = collate([dataset[(i, 0)] for i in range(12)])
    fields = unpack_records(raw.records_NR)
    joints, _ = codec.heat_joints(fields, raw.input_from_image_N23, raw.draws_ND)
    inside = ((joints > 1) & (joints < 62)).all(dim=-1) & fields.marked_NJ
    heat = render(joints, torch.ones(12, 16), 64, "exact", 1.0)
    found = inference.predict(
        Oracle(heat, codec).eval(), [raw], codec, flip=flip, device=CPU, dtype=torch.float32
    )
    error = (found.keypoints_NJ2 - fields.joints_NJ2.double().numpy())[inside.numpy()]
    assert len(error) > 60
    assert np.linalg.norm(error, axis=-1).max() < 0.01
    assert np.abs(error.mean(axis=0)).max() < 0.005


def test_the_flip_test_averages_the_mirrored_prediction_with_left_and_right_swapped():
    codec = make_codec()

    class Pattern(nn.Module):
        def forward(self, images):
            # The right ankle's map is the red channel; all others are empty.
            heat = torch.zeros(len(images), 1, 16, 16, 16)
            heat[:, 0, 0] = nn.functional.avg_pool2d(images[:, 0], 4)
            return heat

    images = torch.rand(2, 3, 64, 64)
    heat = inference.last_heatmaps(Pattern().eval(), images, codec, flip=True)
    expected = nn.functional.avg_pool2d(images[:, 0], 4) / 2
    torch.testing.assert_close(heat[:, 0], expected)
    torch.testing.assert_close(heat[:, 5], expected)  # the left ankle, from the mirrored picture
    assert heat[:, 1:5].abs().max() == 0


def test_princetons_flip_test_is_cut_at_one():
    class Two(nn.Module):
        def forward(self, images):
            return torch.full((len(images), 1, 16, 4, 4), 2.0)

    images = torch.rand(1, 3, 16, 16)
    for rule, highest in (("princeton", 1.0), ("exact", 2.0)):
        heat = inference.last_heatmaps(
            Two().eval(), images, make_codec("hrnet", rule, 256), flip=True
        )
        assert heat.max().item() == highest


def test_a_network_in_train_mode_is_refused(tiny_shards):
    with pytest.raises(AssertionError):
        inference.predict(
            nn.Linear(1, 1),
            [],
            make_codec("hrnet", "exact", 256),
            flip=False,
            device=CPU,
            dtype=torch.float32,
        )


def test_evaluation_crops_keep_princetons_rule_without_a_draw(tiny_shards):
    split = ShardSet(tiny_shards / "valid")
    batches = evaluation_batches(
        split, np.arange(5), make_codec("princeton", "exact", 256), loader="opencv", device=CPU,
        batch_size=3, workers=0,
    )  # fmt: skip
    raw = list(batches)
    assert [len(r.images_NHW3) for r in raw] == [3, 2]
    assert raw[0].images_NHW3.dtype == torch.float32
    assert (raw[0].draws_ND[:, :3] == torch.tensor([1.0, 0.0, 0.0])).all()


def test_the_table_prints_every_mean_with_its_label():
    people_joints = np.zeros((1, 16, 2))
    from test_pckh import people_at

    result = pckh.summary(people_joints, people_at(people_joints), MPII)
    text = report.results_table({"network": result}, MPII)
    for label in ("head", "ankle", "pooled 16 (<)", "mean 14 (<)", "weighted 14 (<=)", "AUC"):
        assert label in text
    assert text.count("100.00") == 2 * 11


def test_the_picture_shows_the_prediction_where_it_is(tiny_shards):
    split = ShardSet(tiny_shards / "valid")
    people, samples = split.people()
    keypoints = np.repeat(people.center[:, None], 16, axis=1)  # all joints at the box's middle
    sheet = visualize.draw_people(split, samples[:2], people.select([0, 1]), keypoints[:2], MPII, 2)
    assert sheet.shape == (258, 516, 3)
    for column in (0, 258):
        spot = sheet[128:131, column + 127 : column + 131].reshape(-1, 3)
        colours = {visualize.RIGHT_BGR, visualize.LEFT_BGR, visualize.MIDDLE_BGR}
        assert {tuple(map(int, c)) for c in spot} & colours


def command(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "evaluate.py", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny_shards, tmp_path_factory) -> Path:
    """A run with best.pt, barely trained."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    run = make_trainer(tiny_config(tiny_shards), folder)
    steps(run, 2)
    run.save(["best.pt"])
    return folder


def test_evaluate_takes_the_newest_run_and_writes_what_was_asked_for(
    trained, tiny_shards, tiny_set, tmp_path
):
    done = command("--runs", trained.parent, "--json", tmp_path / "n.json",
                   "--save-predictions", tmp_path / "p.json",
                   "--picture", tmp_path / "s.png")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "mean pose @0.5" in done.stdout and "flip test" in done.stdout
    numbers = json.loads((tmp_path / "n.json").read_text())
    assert numbers["network"]["people"] == 5 and "0.1" in numbers["network"]["pckh"]
    assert cv2.imread(str(tmp_path / "s.png")).shape[1] == 6 * 258
    entries = json.loads((tmp_path / "p.json").read_text())
    assert [e["index"] for e in entries] == [0, 1, 2, 3, 4]
    assert [e["image"] for e in entries] == [f"{100 + i:09d}.jpg" for i in range(5)]
    assert np.array([e["keypoints"] for e in entries]).shape == (5, 16, 3)


def test_a_damaged_training_split_costs_the_mean_pose_alone(trained, tiny_shards, tmp_path):
    shutil.copytree(tiny_shards, tmp_path / "shards")
    os.truncate(tmp_path / "shards" / "train" / "00000.tar", 3000)
    done = command("--checkpoint", trained / "best.pt", "--shards", tmp_path / "shards")
    assert done.returncode == 0, done.stderr
    assert "network @0.5" in done.stdout and "mean pose" not in done.stdout
    assert "no mean pose, for the training split is damaged" in done.stderr


def test_files_are_written_even_if_nobody_reads_the_table(trained, tmp_path):
    """As with `| head`; and a run's folder stands for its best.pt."""
    words = [sys.executable, "evaluate.py", "--checkpoint", trained, "--workers", "0",
             "--json", tmp_path / "n.json", "--save-predictions", tmp_path / "p.json"]  # fmt: skip
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        list(map(str, words)), cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True,
        timeout=240, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "n.json").exists() and (tmp_path / "p.json").exists()


def test_shards_and_loose_pictures_give_the_same_predictions(trained, tiny_set, tmp_path):
    checkpoint = trained / "best.pt"
    one = command(
        "--checkpoint", checkpoint, "--save-predictions", tmp_path / "a.json", "--no-flip"
    )
    two = command("--checkpoint", checkpoint, "--save-predictions", tmp_path / "b.json",
                  "--no-flip", "--annotations", tiny_set / "annot" / "valid.h5",
                  "--images", tiny_set / "images")  # fmt: skip
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    a, b = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    found = [np.array([e["keypoints"] for e in entries]) for entries in (a, b)]
    near = np.abs(found[0] - found[1]).max(axis=-1) < 0.05
    # An untrained network's maps are nearly flat, so that a hair's breadth can move a maximum.
    assert near.mean() > 0.9


def predictions(path: Path) -> np.ndarray:
    return np.array([entry["keypoints"] for entry in json.loads(path.read_text())])


def test_the_gap_between_the_loaders_is_printed(trained, tmp_path):
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    done = command("--checkpoint", trained / "best.pt", "--compare-loaders", "--workers", 1,
                   "--json", tmp_path / "n.json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "gap, dali crops minus opencv crops" in done.stdout
    numbers = json.loads((tmp_path / "n.json").read_text())
    assert {"opencv crops", "dali crops", "mean pose"} <= numbers.keys()
    one, other = (numbers[f"{n} crops"]["pckh"]["0.5"]["pooled"] for n in ("opencv", "dali"))
    assert f"pooled {100 * (other - one):+.3f}" in done.stdout


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("preset", ["hrnet", "princeton"])
def test_dali_makes_the_same_people_in_the_same_order(preset, device, tiny_set):
    """From loose pictures, in the order asked for, the last batch shorter."""
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    people, _ = read_annotations(tiny_set / "annot", "train")
    source, order = LooseImages(people, tiny_set / "images"), np.array([7, 0, 3, 11, 5])
    codec, raw = make_codec(preset, "princeton"), {}
    for loader in ("opencv", "dali"):
        place = torch.device(device if loader == "dali" else "cpu")
        batches = evaluation_batches(source, order, codec, loader=loader, device=place,
                                batch_size=2, workers=1)  # fmt: skip
        raw[loader] = list(batches)
    assert [len(b.records_NR) for b in raw["dali"]] == [2, 2, 1]
    for one, other in zip(raw["opencv"], raw["dali"], strict=True):
        assert torch.equal(one.records_NR, other.records_NR)
        matrices = other.input_from_image_N23.cpu()
        torch.testing.assert_close(one.input_from_image_N23, matrices, atol=1e-3, rtol=1e-5)
        assert (one.images_NHW3.float() - other.images_NHW3.cpu().float()).abs().mean() < 0.6


def test_what_differs_from_training_is_said(trained, capsys, monkeypatch):
    import evaluate

    words = ["--checkpoint", str(trained / "best.pt"), "--workers", "0", "--crop", "princeton"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
    evaluate.main()
    assert "note: trained on affine crops, evaluated on princeton ones" in capsys.readouterr().out
    differences = evaluate.differences
    assert differences("affine", "affine", "opencv", ("opencv",)) == []
    assert "--compare-loaders" in differences("affine", "affine", "dali", ("opencv",))[0]
    assert differences("affine", "affine", "dali", ("opencv", "dali")) == []
    assert "twice" in differences("princeton", "princeton", "dali", ("dali",))[0]


def test_the_same_joints_come_back_through_either_crop(tiny_shards):
    """Perfect heatmaps of the exact rule on princeton's crop: its rounding is in the matrix."""
    split, codec = ShardSet(tiny_shards / "train"), make_codec("princeton", "exact", 256)
    (raw,) = evaluation_batches(split, np.arange(12), codec, loader="opencv", device=CPU,
                           batch_size=12, workers=0)  # fmt: skip
    batch = make_batch(raw, codec, CPU)
    inside = ((batch.joints_NJ2 > 1) & (batch.joints_NJ2 < 62)).all(dim=-1) & batch.drawn_NJ
    assert inside.sum() > 60
    decoded, _ = decode(batch.heat_NJHW, "exact")
    found = codec.image_joints(
        decoded, unpack_records(raw.records_NR.numpy()), raw.input_from_image_N23
    )
    truth = unpack_records(raw.records_NR).joints_NJ2.numpy()
    np.testing.assert_allclose(found[inside], truth[inside], atol=0.05)


def test_predictions_do_not_depend_on_the_batch_size_or_the_number_of_processes(trained, tmp_path):
    words = ["--checkpoint", trained / "best.pt", "--workers", 0, "--device", "cpu"]
    done = command(*words, "--batch-size", 1, "--save-predictions", tmp_path / "one.json")
    assert done.returncode == 0, done.stderr
    done = command(*words, "--batch-size", 5, "--save-predictions", tmp_path / "five.json")
    assert done.returncode == 0, done.stderr
    torchrun = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "evaluate.py", *map(str, words), "--save-predictions", str(tmp_path / "two.json")],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert torchrun.returncode == 0, torchrun.stderr
    assert torchrun.stdout.count("PCKh in %") == 1  # the first rank alone speaks
    one = predictions(tmp_path / "one.json")
    assert one.shape == (5, 16, 3)
    for name in ("five", "two"):
        other = predictions(tmp_path / f"{name}.json")
        near = np.abs(other - one)[..., :2].max(axis=-1) < 1e-2
        # An untrained network's maps are nearly flat, so that a hair's breadth can move a maximum.
        assert near.mean() > 0.95, name
        np.testing.assert_allclose(other[..., 2], one[..., 2], atol=1e-5)


@pytest.mark.gpu
def test_a_gpu_predicts_what_the_cpu_predicts(trained, tmp_path):
    for device in ("cpu", "cuda"):
        done = command("--checkpoint", trained / "best.pt", "--workers", 0, "--device", device,
                       "--save-predictions", tmp_path / f"{device}.json")  # fmt: skip
        assert done.returncode == 0, done.stderr
    one, other = (predictions(tmp_path / f"{device}.json") for device in ("cpu", "cuda"))
    np.testing.assert_allclose(other[..., 2], one[..., 2], atol=1e-3)  # scores; TF32 may be on
    assert (np.abs(other - one)[..., :2].max(axis=-1) < 0.5).mean() > 0.9


class Machine:
    """Batches that take made times: people/s by size, and slow moments by number of the batch."""

    def __init__(self, rates: dict[int, float], stalls: dict[int, float] | None = None):
        self.rates, self.stalls, self.sizes, self.spent = rates, stalls or {}, [], 0.0

    def __call__(self, size: int) -> float:
        if size not in self.rates:
            raise torch.OutOfMemoryError
        took = size / self.rates[size] + self.stalls.get(len(self.sizes), 0.0)
        self.sizes.append(size)
        self.spent += took
        return took


RATES = {1: 100.0, 2: 150.0, 4: 230.0, 8: 400.0, 16: 410.0, 32: 700.0, 64: 720.0, 128: 600.0}


@pytest.mark.parametrize("stalled", [None, 0, 2, 3, 4, 6, 8, 12])
def test_the_fastest_batch_is_found_over_a_dip_and_through_a_slow_moment(stalled):
    stalls = {} if stalled is None else {stalled: 0.5, stalled + 1: 0.3}
    machine = Machine(RATES, stalls)
    size, rates = inference.fastest_size(machine, 128)
    assert size == 32  # 64 is hardly faster; 16 was a dip
    assert list(rates) == list(RATES) and rates[8] == pytest.approx(400)


def test_the_search_for_the_fastest_batch_is_over_in_time():
    """Of a big network on a CPU, where a batch gains nothing; the first batch warms up."""
    for slow, sizes in ((0.2, {1}), (3.0, {1, 2}), (60.0, {1, 2, 4, 8, 16, 32})):
        machine = Machine(dict.fromkeys(RATES, slow))
        size, rates = inference.fastest_size(machine, 128)
        assert size == 1 and set(rates) == sizes
        assert machine.spent - 1 / slow <= max(4.0, 1 / slow)


def test_a_batch_that_does_not_fit_ends_the_search():
    size, rates = inference.fastest_size(Machine({1: 10.0, 2: 19.0, 4: 30.0}), 128)
    assert size == 4 and list(rates) == [1, 2, 4]
    assert inference.fastest_size(Machine({}), 128) == (1, {})


@pytest.mark.parametrize(("people", "expected"), [(5, 5), (16, 8), (inference.FEW, 8)])
def test_for_a_few_people_nothing_is_measured(people, expected):
    words = {"flip": False, "device": CPU, "dtype": torch.float32}
    chosen = inference.choose_batch_size(None, make_codec("hrnet", "exact", 256), people, **words)
    assert chosen == (expected, {})


def test_batches_that_are_measured_are_a_small_part_of_the_work(monkeypatch):
    asked = []
    monkeypatch.setattr(inference, "fastest_size", lambda seconds, most: asked.append(most))
    for people in (inference.FEW + 1, 400, 3000):
        words = {"flip": False, "device": CPU, "dtype": torch.float32}
        inference.choose_batch_size(None, make_codec("hrnet", "exact", 256), people, **words)
    assert asked == [8, 25, 128]


def one_joint_result() -> dict:
    from test_pckh import people_at

    nose = Skeleton("nose", ("nose",), (), (), (("nose", (0,)),))
    return pckh.summary(np.zeros((1, 1, 2)), people_at(np.zeros((1, 1, 2))), nose)


def bad_inputs(trained: Path, tiny_shards: Path, tiny_set: Path, tmp_path: Path) -> dict:
    """Command lines that must end in one clear error, and what each must name."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "noise.pt").write_bytes(b"noise")
    (tmp_path / "noise.h5").write_bytes(b"noise")
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "others.json").write_text(json.dumps({"network": one_joint_result()}))
    no_index = shutil.copytree(tiny_shards / "valid", tmp_path / "no_index")
    next(no_index.glob("*.idx")).unlink()
    old = shutil.copytree(tiny_shards / "valid", tmp_path / "old")
    manifest = old / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 9'))
    best = ["--checkpoint", trained / "best.pt"]
    annotations = tiny_set / "annot" / "valid.h5"
    return {
        "no run": (["--runs", tmp_path / "empty"], "train first"),
        "no checkpoint": (["--checkpoint", tmp_path / "nowhere.pt"], "nowhere.pt"),
        "bad checkpoint": (["--checkpoint", tmp_path / "noise.pt"], "noise.pt"),
        "no shards": ([*best, "--shards", tmp_path / "empty"], "no manifest.json"),
        "no index": ([*best, "--shards", no_index], ".idx"),
        "old manifest": ([*best, "--shards", old], "format version 9"),
        "bad h5": ([*best, "--annotations", tmp_path / "noise.h5", "--images", tiny_set],
                   "noise.h5"),
        "no pictures": ([*best, "--annotations", annotations, "--images", tmp_path / "empty"],
                        "5 of 5 pictures missing"),
        "half a pair": ([*best, "--annotations", annotations], "--images"),
        "no picture": ([*best, "--picture", tmp_path / "p.xyz"], "p.xyz"),
        "a folder": ([*best, "--save-predictions", tmp_path], str(tmp_path)),
        "in a file": ([*best, "--save-coco", tmp_path / "noise.pt" / "c.json"], "c.json"),
        "half a submission": ([*best, "--save-submission", tmp_path / "s.mat"], "--release"),
        "no earlier run": ([*best, "--compare", tmp_path / "nowhere.json"],
                           "nowhere.json\n  found:    no such file\n"),
        "noise to compare": ([*best, "--compare", tmp_path / "noise.pt"],
                             "noise.pt\n  found:    no JSON"),
        "nothing to compare": ([*best, "--compare", tmp_path / "empty.json"], "no result in it"),
        "other joints": ([*best, "--compare", tmp_path / "others.json"], "joints nose"),
        "a page in a file": ([*best, "--report", tmp_path / "noise.pt" / "out"], "index.html"),
        "oracle on a page": (["--oracle", "--annotations", annotations, "--report",
                              tmp_path / "out"], "--oracle with --report"),
        "no release": ([*best, "--save-submission", tmp_path / "s.mat", "--release",
                        tmp_path / "nowhere.mat"], "nowhere.mat"),
    }  # fmt: skip


def test_bad_input_ends_in_one_clear_error(trained, tiny_shards, tiny_set, tmp_path, monkeypatch):
    cases = bad_inputs(trained, tiny_shards, tiny_set, tmp_path)
    assert len(cases) == 20
    for name, (words, expected) in cases.items():
        out = tmp_path / "out.json"
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words), "--json", str(out)])
        stderr = []
        monkeypatch.setattr(sys.stderr, "write", stderr.append)
        with pytest.raises(SystemExit) as left:
            run_main(evaluate.main)
        text = "".join(stderr)
        assert left.value.code == 2, name
        assert expected in text and "found:" in text and "next:" in text, (name, text)
        assert "Traceback" not in text and not out.exists(), name


def test_a_picture_that_rots_after_packing_is_named(trained, tiny_shards, tmp_path):
    from helpers import damage_picture

    bad = damage_picture(tiny_shards / "valid", tmp_path / "bad", sample=1)
    done = command("--checkpoint", trained / "best.pt", "--shards", bad, "--workers", 1)
    assert done.returncode == 2
    assert "00000.tar: sample 1" in done.stderr


def test_no_permission_to_write_is_one_clear_error(trained, monkeypatch, tmp_path, capsys):
    """As root nothing is forbidden, so the operating system's answer is put in its mouth."""

    def forbidden(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "write_bytes", forbidden)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "evaluate.py",
            "--checkpoint",
            str(trained / "best.pt"),
            "--json",
            str(tmp_path / "n.json"),
        ],
    )
    with pytest.raises(SystemExit) as left:
        run_main(evaluate.main)
    assert left.value.code == 2
    assert "Permission denied" in capsys.readouterr().err


def test_a_full_disk_is_told_with_the_file(trained, monkeypatch, tmp_path, capsys):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "index.html.tmp").symlink_to("/dev/full")  # where nothing has room
    words = [
        "--checkpoint",
        trained / "best.pt",
        "--report",
        tmp_path / "report",
        "--batch-size",
        5,
    ]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        run_main(evaluate.main)
    assert left.value.code == 2
    text = capsys.readouterr().err
    assert f"error: {tmp_path}/report/index.html\n  found:    No space left on device" in text
    assert not list((tmp_path / "report").iterdir())


def test_a_missing_best_pt_is_told_with_the_command_for_the_last(trained, tmp_path, monkeypatch):
    run = tmp_path / "runs" / "stopped"
    run.mkdir(parents=True)
    shutil.copy(trained / "best.pt", run / "last.pt")
    for given in (run / "best.pt", run):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--checkpoint", str(given), "--no-flip"])
        with pytest.raises(InputError, match=r"last\.pt is there; best\.pt comes with") as caught:
            evaluate.main()
        again = f"python evaluate.py --checkpoint {run / 'last.pt'} --no-flip"
        assert caught.value.next_step == again
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--runs", str(tmp_path / "runs")])
    with pytest.raises(InputError) as caught:
        evaluate.main()
    assert caught.value.next_step == f"python evaluate.py --checkpoint {run / 'last.pt'}"
    with pytest.raises(InputError, match=r"give .*last\.pt"):  # from Python there is no command
        checkpoint.load_checkpoint(run / "best.pt")
    with pytest.raises(InputError, match="give its path"):
        checkpoint.load_checkpoint(tmp_path / "best.pt")


def test_the_list_sampler_covers_every_sample_once(tiny_shards):
    dataset = CropDataset(ShardSet(tiny_shards / "train"), preset_of("none", False), 64, 0)
    order = np.array([3, 1, 11, 0])
    rows = [
        int(row)
        for raw in CropLoader(dataset, ListSampler(order, 3), 0, False)
        for row in raw.records_NR[:, 0]
    ]
    assert rows == [int(ShardSet(tiny_shards / "train").record(i)[0]) for i in order]
