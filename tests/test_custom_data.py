"""docs/custom-data.md, run as it is written, on the five joints that it draws."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT

from pipelines.shards import ShardSet

PAGE, MOUSE = (ROOT / "docs" / "custom-data.md").read_text().split("\n## From DeepLabCut's folder")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"[Ss]ave this as `([\w.]+)`")


def bash(command: str, folder: Path, seconds: int = 240) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder, capture_output=True, text=True, timeout=seconds, check=False,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "warning: " not in done.stderr
    return done.stdout


def prepare(page: str, folder: Path) -> list[str]:
    """Save the files that a page shows; returns its commands."""
    for name in ("tools", "train.py", "evaluate.py"):
        (folder / name).symlink_to(ROOT / name)
    for named in FILE.finditer(page):
        block = BLOCK.search(page, named.end())
        assert block and block[1] in ("python", "yaml")
        (folder / named[1]).write_text(block[2])
    return [block[2] for block in BLOCK.finditer(page) if block[1] == "bash"]


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder in which the page was followed, and what each of its commands printed."""
    folder = tmp_path_factory.mktemp("figures")
    return folder, [bash(command, folder) for command in prepare(PAGE, folder)]


def test_the_pages_figures_are_packed_without_a_warning(tmp_path):
    """bash() refuses warnings, such as that of pictures in both splits."""
    draw, pack = prepare(PAGE, tmp_path)[:2]
    bash(draw, tmp_path)
    printed = bash(pack, tmp_path)
    assert "train: 60 people" in printed and "valid: 20 people" in printed


@pytest.mark.slow
def test_the_page_followed_as_written_ends_in_a_pck_far_above_the_mean_pose(followed):
    folder, printed = followed
    assert len(printed) == 9
    pck = json.loads((folder / "pck.json").read_text())
    network, mean = pck["network"], pck["mean pose"]
    assert network["people"] == 20 and network["joints_counted"] == 100
    assert list(network["pckh"]["0.5"]["groups"]) == ["head", "hand", "foot"]
    # Other seeds, precisions and initial weights gave 0.67 to 0.97 (11 runs).
    assert network["pckh"]["0.5"]["pooled"] > 0.6 > 0.5 > mean["pckh"]["0.5"]["pooled"]
    lines = (folder / "runs/figures_from_people/metrics.jsonl").read_text().splitlines()
    tuned = json.loads(lines[-1])
    assert tuned["kind"] == "valid" and tuned["pckh@0.1_pooled"] > network["pckh"]["0.1"]["pooled"]


@pytest.mark.slow
def test_its_shards_and_results_hold_the_joints_and_ids_of_its_json(followed):
    folder, _ = followed
    for split, count in (("train", 60), ("valid", 20)):
        truth = json.loads((folder / "data" / "figures" / f"{split}.json").read_text())
        people, _ = ShardSet(folder / "data" / "shards" / "figures" / split).people()
        keypoints = np.array([a["keypoints"] for a in truth["annotations"]]).reshape(count, 5, 3)
        np.testing.assert_array_equal(people.joints, keypoints[..., :2])
        assert people.person.tolist() == [a["id"] for a in truth["annotations"]]
    results = json.loads((folder / "results.json").read_text())
    assert [r["image_id"] for r in results] == [a["image_id"] for a in truth["annotations"]]


@pytest.mark.slow
def test_the_mouse_of_deeplabcuts_folder_is_tracked_through_its_video(shared, tmp_path):
    """Training takes three minutes on two cores; the video is of another mouse, without labels."""
    (tmp_path / "openfield").symlink_to(shared / "data" / "dlc_openfield")
    for command in prepare(MOUSE, tmp_path):
        bash(command, tmp_path, seconds=1800)
    network = json.loads((tmp_path / "mouse.json").read_text())["network"]
    assert network["joints_counted"] == 48 and network["pckh"]["0.5"]["pooled"] > 0.8
    rows = list(csv.reader((tmp_path / "mouse.csv").open()))
    assert rows[1][1::3] == ["snout", "leftear", "rightear", "tailbase"] and len(rows) == 3 + 2330
    joints = np.array([[float(cell or "nan") for cell in row[1:]] for row in rows[3:]])
    xy, likelihood = joints.reshape(-1, 4, 3)[..., :2], joints.reshape(-1, 4, 3)[..., 2]
    is_found = (likelihood > 0.2).mean(axis=1) >= 0.5
    assert is_found.mean() > 0.9
    length = np.linalg.norm(xy[:, 0] - xy[:, 3], axis=1)[is_found]
    assert 90 < np.median(length) < 140  # the labelled mouse measures 102 to 143 px
    video = cv2.VideoCapture(str(tmp_path / "mouse.mp4"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 2330
