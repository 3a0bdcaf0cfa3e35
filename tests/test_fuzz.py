"""Every reader on damaged files: success or InputError (for pictures, PictureError), nothing else.

`make fuzz` gives each reader more of them, and leaves the inputs that were faults in runs/fuzz.
"""

import contextlib
import functools
import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from helpers import make_trainer, tiny_config
from jsonargparse import ArgumentParser
from test_label_files import ONE_ANIMAL, write_fixed_layout, write_older_layout

from common.errors import InputError
from configs.schema import add_config_options, parse_config
from configs.skeleton import load_skeleton
from evaluation.estimator import read_picture
from evaluation.predictions import as_coco, as_entries, read_predictions, write_mat
from model.checkpoint import load_checkpoint, trained_network
from pipelines.annotations import People, read_annotations
from pipelines.boxes import read_people
from pipelines.jpeg import PictureError, check_jpeg, decode
from pipelines.label_files import read_table
from pipelines.shard_format import MANIFEST
from pipelines.shards import ShardSet
from tools import check_shards

INPUTS = int(os.environ.get("FUZZ_INPUTS", "100"))
"""For each reader."""
SECONDS = 60
"""For one input; more is a hang."""
PICTURES = (".jpg", ".png", ".webp", ".tiff", ".bmp", ".gif")
ODD_VALUES = [0, -1, 2**31, 2**64, 10**30, 0.5, 1e308, float("nan"), float("inf"), None, True, "",
              "x", "../x", "a\0b", [], {}, [[]], [None], {"": 0}, [1, 2, 3]]  # fmt: skip
ODD_BYTES = [b"\0", b"\xff", b"\n", b"[", b"{", b'"', b",", b"9" * 30, b"NaN", b"1e999", b"null",
             b"../", b"&a", b"*a", b"!!python/name:os.system", b": ", b"\xff\xd8"]  # fmt: skip
COCO = ROOT / "configs" / "skeletons" / "coco.yaml"
Reader = Callable[[Path], object]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four random changes of a file's bytes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        start = rng.randrange(len(out) + 1)
        if rng.random() < 0.5:  # formats have their structure in the first bytes
            start = min(start, rng.randrange(2048))
        size = rng.choice((1, 2, 4, 8, 64, 1024))
        old = out[start : start + size]
        new = [
            bytes(byte ^ 1 << rng.randrange(8) for byte in old[:1]) + old[1:],
            rng.randbytes(len(old)),
            b"",
            rng.choice(ODD_BYTES) + old,
            old + old,
        ]
        if rng.random() < 0.15:
            del out[start:]
        else:
            out[start : start + size] = rng.choice(new)
    return bytes(out)


def change_value(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """The same JSON value with one leaf or branch replaced or removed."""
    if not (isinstance(value, dict | list) and value) or (depth and rng.random() < 0.15):
        return rng.choice(ODD_VALUES)
    changed: Any = value.copy()
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    if rng.random() < 0.2:
        del changed[key]
    else:
        changed[key] = change_value(value[key], rng, depth + 1)
    return changed


@functools.cache
def people_of(folder: Path) -> People:
    return read_annotations(folder / "people.h5", "valid")[0]


def read_split(path: Path) -> None:
    """As training does, and as tools/check_shards.py does, which must not end in an error."""
    check_shards.main([str(path.parent), "--workers", "0", "--decode"])
    split = ShardSet(path.parent)
    split.people()
    for sample in range(len(split)):
        decode(split.picture(sample), split.where(sample))


def read_config(path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    add_config_options(parser)
    parse_config(parser, ["--config", str(path)])


def read_as_all_do(path: Path) -> None:
    """As packing, training and prediction read a picture."""
    with contextlib.suppress(PictureError):
        check_jpeg(path.read_bytes())
    with contextlib.suppress(InputError):
        decode(path.read_bytes(), str(path))
    read_picture(path)


def read_as_predictions(path: Path) -> None:
    read_predictions(path, people_of(path.parent))


READERS: dict[str, Reader] = {
    "valid.h5": lambda path: read_annotations(path, "valid"),
    "mpii.json": lambda path: read_annotations(path, "valid"),
    "coco.json": lambda path: read_annotations(path, "valid", load_skeleton(COCO)),
    "predictions.mat": read_as_predictions,
    "found.json": read_as_predictions,
    "results.json": read_as_predictions,
    "split/00000.tar": read_split,
    "split/00000.idx": read_split,
    "split/manifest.json": read_split,
    "split/people.json": read_split,
    "config.yaml": read_config,
    "skeleton.yaml": load_skeleton,
    "last.pt": lambda path: trained_network(load_checkpoint(path)),
    "people.csv": read_people,
    "people.json": read_people,
    "CollectedData.csv": read_table,
    "fixed.h5": read_table,
    "older.h5": read_table,
    "deeplabcut/config.yaml": lambda path: read_annotations(path, "train"),
    "yolo/data.yaml": lambda path: read_annotations(path, "train"),
    "yolo/pictures.txt": lambda path: read_annotations(path.with_name("data.yaml"), "train"),
    "yolo/a.txt": lambda path: read_annotations(path.with_name("data.yaml"), "train"),
    **{f"picture{suffix}": read_as_all_do for suffix in PICTURES},
}


@pytest.fixture(scope="module")
def good_files(tiny_set, tiny_shards, tmp_path_factory):
    """A folder with a good file for every reader."""
    pytest.importorskip("scipy")
    folder = tmp_path_factory.mktemp("files")
    for name in ("valid.h5", "people.h5"):
        shutil.copy(tiny_set / "annot" / "valid.h5", folder / name)
    shutil.copytree(tiny_shards / "valid", folder / "split")
    shutil.copy(ROOT / "configs" / "2hg.yaml", folder / "config.yaml")
    shutil.copy(COCO, folder / "skeleton.yaml")
    people = people_of(folder)
    write_json(people, folder)
    write_mat(folder / "predictions.mat", {"preds": people.joints})
    (folder / "people.csv").write_text("image,x,y,width,height\na.jpg,1,2,30,40\nb.jpg,,,,\n")
    picture = np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    for suffix in PICTURES:
        assert cv2.imwrite(str(folder / f"picture{suffix}"), picture)
    write_labels(folder)
    make_trainer(tiny_config(tiny_shards), folder).save(["last.pt"])
    return folder


def write_json(people: People, folder: Path) -> None:
    mpii = [
        {"img_paths": people.images[i], "isValidation": 1.0, "objpos": people.center[i].tolist(),
         "scale_provided": people.scale[i], "annolist_index": i, "people_index": 1,
         "joint_self": np.c_[people.joints[i], people.visible[i]].tolist()}
        for i in range(people.count)
    ]  # fmt: skip
    images = [{"id": i, "file_name": name} for i, name in enumerate(people.images)]
    person = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 40], "keypoints": [5, 6, 2] * 17}
    scores = people.visible.astype(float)
    contents = {
        "mpii.json": mpii,
        "coco.json": {"images": images, "annotations": [{"id": i, **person} for i in range(5)]},
        "people.json": [{"image": "a", "box": [1, 2, 3, 4]}, {"image": "b", "image_id": 1}],
        "found.json": as_entries(people, people.joints, scores),
        "results.json": as_coco(people, people.joints, scores),
    }
    for name, value in contents.items():
        (folder / name).write_text(json.dumps(value))


def write_labels(folder: Path) -> None:
    """Tables and a project of DeepLabCut; a YOLO-pose data set with all files in one folder."""
    video = folder / "deeplabcut" / "labeled-data" / "v1"
    video.mkdir(parents=True)
    for name in ("a.jpg", "b.jpg"):
        shutil.copy(folder / "picture.jpg", video / name)
    for place in (folder, video):
        (place / "CollectedData.csv").write_text(ONE_ANIMAL)
    (video / "CollectedData.csv").rename(video / "CollectedData_Ann.csv")
    (folder / "deeplabcut" / "config.yaml").write_text("Task: a\nskeleton:\n- [snout, tail]\n")
    write_fixed_layout(folder / "fixed.h5")
    names = [("Ann", joint, xy) for joint in ("snout", "tail") for xy in "xy"]
    write_older_layout(folder / "older.h5", pickle.dumps(names, 0))
    yolo = folder / "yolo"
    yolo.mkdir()
    shutil.copy(folder / "picture.jpg", yolo / "a.jpg")
    (yolo / "a.txt").write_text("0 0.5 0.5 0.4 0.8 0.25 0.5 2 0.75 0.5 1\n")
    (yolo / "pictures.txt").write_text("a.jpg\n")
    facts = {"path": ".", "train": "pictures.txt", "kpt_shape": [2, 3], "flip_idx": [1, 0]}
    facts["kpt_names"] = {0: ["snout", "tail"]}
    (yolo / "data.yaml").write_text(yaml.safe_dump(facts))


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"not done after {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def damaged(path: Path, good: bytes, number: int) -> bytes:
    """A file's bytes after damage `number`, which is the same at each call."""
    rng = random.Random(f"{path.name} {number}")
    is_foreign_json = path.suffix == ".json" and path.name != MANIFEST
    if is_foreign_json and rng.random() < 0.5:
        return json.dumps(change_value(json.loads(good), rng)).encode()
    return mutate(good, rng)


def read_all(path: Path, good: bytes, read: Reader, numbers: range, results: Connection) -> None:
    """Send the fault's text for each input; "" without a fault."""
    torch.set_num_threads(1)  # a forked process lacks the threads of its parent
    cv2.setNumThreads(0)
    for number in numbers:
        path.write_bytes(damaged(path, good, number))
        fault, text = "", io.StringIO()
        try:
            with time_limit(), contextlib.redirect_stderr(text), contextlib.redirect_stdout(text):
                read(path)
        except InputError:
            pass
        except Exception as error:
            fault = f"{type(error).__name__}: {str(error)[:200]}"
        results.send(fault)


def outcomes(path: Path, good: bytes, read: Reader, inputs: int) -> Iterator[str]:
    """As `read_all` sends them. A crash of the process is a fault; another process reads on."""
    fork, done = multiprocessing.get_context("fork"), 0
    while done < inputs:
        results, send = fork.Pipe(duplex=False)
        process = fork.Process(target=read_all, args=(path, good, read, range(done, inputs), send))
        process.start()
        send.close()
        with contextlib.suppress(EOFError):
            while True:
                yield results.recv()
                done += 1
        process.join()
        if done < inputs:
            yield f"crash, exit code {process.exitcode}"
            done += 1


def fuzz(path: Path, read: Reader, inputs: int, keep: Path) -> list[str]:
    """Faults, one line each; their inputs are written to `keep`. Two calls make the same inputs."""
    good, faults = path.read_bytes(), list[str]()
    for number, fault in enumerate(outcomes(path, good, read, inputs)):
        if fault:
            faults.append(f"{path.name} {number}: {fault}")
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{number}-{path.name}").write_bytes(damaged(path, good, number))
    path.write_bytes(good)
    read(path)  # the good file is read
    return faults


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(good_files, name):
    assert fuzz(good_files / name, READERS[name], INPUTS, ROOT / "runs" / "fuzz") == []


def test_the_fuzzer_finds_a_fault_of_a_reader(tmp_path):
    """A reader that divides by a byte."""
    (tmp_path / "file").write_bytes(bytes(range(1, 60)))
    reader = lambda path: [1 // byte for byte in path.read_bytes()]  # noqa: E731
    faults = fuzz(tmp_path / "file", reader, 200, tmp_path)
    assert 5 < len(faults) < 195 and "ZeroDivisionError" in faults[0]


def test_a_crash_of_a_reader_is_one_fault_and_the_next_inputs_are_read(tmp_path):
    """A reader whose process is killed by a signal if the first byte is odd."""
    (tmp_path / "file").write_bytes(bytes(60))
    reader = lambda path: path.read_bytes()[:1] < b"\1" or os.kill(os.getpid(), 9)  # noqa: E731
    faults = fuzz(tmp_path / "file", reader, 50, tmp_path / "kept")
    assert 0 < len(faults) < 50 and "exit code -9" in faults[0]
    assert len(faults) == len([*(tmp_path / "kept").iterdir()])
