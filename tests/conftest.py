"""Data that the tests share: real files where they are at hand, and a tiny made-up set."""

import functools
import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the networks are tiny; beside other processes more threads only wait
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
# A shell starts background jobs with Ctrl-C ignored, and so would be every program that is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)

# (width, height) px of the tiny set's pictures; no two alike, so that a mix-up shows.
TRAIN_SIZES = [(320, 180), (200, 260), (161, 97), (256, 256), (400, 150),
               (90, 310), (333, 222), (128, 64), (277, 199)]  # fmt: skip
VALID_SIZES = [(301, 203), (180, 320), (240, 136), (75, 75), (350, 351)]
# The picture of each person: 12 people in 9 pictures, and 5 in 5.
TRAIN_PICTURES = [0, 0, 1, 2, 3, 3, 3, 4, 5, 6, 7, 8]
VALID_PICTURES = [0, 1, 2, 3, 4]


class Stream(io.StringIO):
    """An output that is a terminal, or a file."""

    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def screen(self) -> list[str]:
        """What a terminal shows in the end, line by line."""
        return [line.split("\r")[-1].rstrip() for line in self.getvalue().split("\n")]


@functools.cache
def may_mount() -> bool:
    """Whether a test may mount a small disk."""
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "x", "/mnt"]
    return (
        bool(shutil.which("unshare"))
        and not subprocess.run(probe, capture_output=True, check=False).returncode
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need a GPU where there is none, and say so."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data: POSE_SHARED, by default ../shared. It lacks in most checkouts."""
    folder = ROOT / os.environ.get("POSE_SHARED", "../shared")
    if not (folder / "data").is_dir():
        pytest.skip(f"no real data in {folder / 'data'} (set POSE_SHARED)")
    return folder.resolve()


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up set in MPII's layout: annot/{train,valid}.h5 of 12 and 5 people, images/*.jpg.

    Pictures are coloured noise with a coarse and a fine part. Joints are random; in every person
    two are unmarked and four invisible. Do not change it: copy it (shutil.copytree).
    """
    return make_tiny_set(tmp_path_factory.mktemp("tiny"))


def make_tiny_set(root: Path) -> Path:
    """Write the files of tiny_set."""
    for number, (split, sizes, pictures) in enumerate(
        [("train", TRAIN_SIZES, TRAIN_PICTURES), ("valid", VALID_SIZES, VALID_PICTURES)]
    ):
        rng = np.random.default_rng([7, number])
        names = [f"{100 * number + i:09d}.jpg" for i in range(len(sizes))]
        for name, size in zip(names, sizes, strict=True):
            write_jpeg(root / "images" / name, noise_picture(rng, *size))
        columns = random_people(rng, [sizes[i] for i in pictures])
        columns["imgname"] = np.array([names[i].encode() for i in pictures], "S13")
        columns["index"] = np.array(pictures, dtype=np.float64)
        write_h5(root / "annot" / f"{split}.h5", columns)
    return root


@pytest.fixture(scope="session")
def tiny_shards(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny set packed by tools/make_shards.py: train in 3 shards (5 + 5 + 2), valid in 1."""
    from tools.make_shards import main

    output = tmp_path_factory.mktemp("packed") / "tiny"
    assert main(pack_arguments(tiny_set, output)) == 0
    return output


def pack_arguments(root: Path, output: Path, *more: object) -> list[str]:
    """Command line of tools/make_shards.py for a set in the layout of tiny_set, in one process."""
    words = ["--annotations", root / "annot", "--images", root / "images", "--output", output]
    return [str(word) for word in [*words, "--people-per-shard", 5, "--workers", 1, *more]]


def noise_picture(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8."""
    coarse = rng.uniform(0, 255, (5, 4, 3)).astype(np.float32)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return (image + rng.normal(0, 12, image.shape)).clip(0, 255).astype(np.uint8)


def write_jpeg(path: Path, image_HWC: np.ndarray, *options: int) -> None:
    """Write a JPEG of quality 85; options as cv2.imencode takes them."""
    ok, jpeg = cv2.imencode(".jpg", image_HWC, [cv2.IMWRITE_JPEG_QUALITY, 85, *options])
    assert ok
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg.tobytes())


def random_people(rng: np.random.Generator, sizes_wh: list[tuple[int, int]]) -> dict[str, Any]:
    """Columns of an MPII h5 file but imgname and index, a person for each size, in pictures px."""
    count, size = len(sizes_wh), np.array(sizes_wh, dtype=np.float64)
    part = np.floor(rng.uniform(0.1, 0.9, (count, 16, 2)) * size[:, None])
    visible = np.ones((count, 16))
    for row in range(count):
        unmarked, hidden = np.split(rng.permutation(16)[:6], [2])
        part[row, unmarked], visible[row, unmarked], visible[row, hidden] = 0, 0, 0
    return {
        "center": rng.uniform(0.3, 0.7, (count, 2)) * size,
        "scale": rng.uniform(0.6, 1.1, count) * size.min(axis=1) / 200,
        "part": part,
        "visible": visible,
        "normalize": rng.uniform(10, 40, count),
        "person": np.arange(count, dtype=np.float64),
        "torsoangle": np.zeros(count),
    }


def write_h5(path: Path, columns: dict[str, Any]) -> None:
    """Write a file of datasets."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in columns.items():
            file.create_dataset(name, data=values)
