"""Every reader on damaged files: success or InputError (for pictures, PictureError), nothing else.

`make fuzz` gives each reader more of them, and leaves the inputs that were faults in runs/fuzz.
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import ROOT
from helpers import make_trainer, tiny_config
from jsonargparse import ArgumentParser

from common.errors import InputError
from configs.schema import add_config_options, parse_config
from configs.skeleton import load_skeleton
from evaluation.estimator import read_picture
from evaluation.predictions import as_coco, as_entries, read_predictions, write_mat
from model.checkpoint import load_checkpoint, trained_network
from pipelines.annotations import People, read_annotations
from pipelines.boxes import read_people
from pipelines.jpeg import PictureError, check_jpeg, decode
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


def make_readers(tiny: Path, packed: Path, folder: Path) -> dict[str, Reader]:
    """Write a good file for every reader into the folder; returns the readers by file."""
    people = read_annotations(tiny / "annot", "valid")[0]
    coco = load_skeleton(ROOT / "configs" / "skeletons" / "coco.yaml")
    shutil.copy(tiny / "annot" / "valid.h5", folder)
    shutil.copytree(packed / "valid", folder / "split")
    shutil.copy(ROOT / "configs" / "2hg.yaml", folder / "config.yaml")
    shutil.copy(ROOT / "configs" / "skeletons" / "coco.yaml", folder / "skeleton.yaml")
    write_json(people, folder)
    write_mat(folder / "predictions.mat", {"preds": people.joints})
    (folder / "people.csv").write_text("image,x,y,width,height\na.jpg,1,2,30,40\nb.jpg,,,,\n")
    picture = np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    for suffix in PICTURES:
        assert cv2.imwrite(str(folder / f"picture{suffix}"), picture)
    make_trainer(tiny_config(packed), folder).save(["last.pt"])
    return {
        "valid.h5": lambda path: read_annotations(path, "valid"),
        "mpii.json": lambda path: read_annotations(path, "valid"),
        "coco.json": lambda path: read_annotations(path, "valid", coco),
        "predictions.mat": lambda path: read_predictions(path, people),
        "found.json": lambda path: read_predictions(path, people),
        "results.json": lambda path: read_predictions(path, people),
        "split/00000.tar": read_split,
        "split/00000.idx": read_split,
        "split/manifest.json": read_split,
        "split/people.json": read_split,
        "config.yaml": read_config,
        "skeleton.yaml": load_skeleton,
        "last.pt": lambda path: trained_network(load_checkpoint(path)),
        "people.csv": read_people,
        "people.json": read_people,
        **{f"picture{suffix}": read_as_all_do for suffix in PICTURES},
    }


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


def fuzz(path: Path, read: Reader, inputs: int, keep: Path) -> list[str]:
    """Faults, one line each; their inputs are copied to `keep`. Two calls make the same inputs."""
    good, faults = path.read_bytes(), list[str]()
    for number in range(inputs):
        rng = random.Random(f"{path.name} {number}")
        is_foreign_json = path.suffix == ".json" and path.name != MANIFEST
        if is_foreign_json and rng.random() < 0.5:
            path.write_text(json.dumps(change_value(json.loads(good), rng)))
        else:
            path.write_bytes(mutate(good, rng))
        quiet = contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO())
        try:
            with time_limit(), quiet[0], quiet[1]:
                read(path)
        except InputError:
            pass
        except Exception as error:
            faults.append(f"{path.name} {number}: {type(error).__name__}: {str(error)[:200]}")
            keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, keep / f"{number}-{path.name}")
    path.write_bytes(good)
    read(path)  # the good file is read
    return faults


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_refused(tiny_set, tiny_shards, tmp_path):
    pytest.importorskip("scipy")
    readers = make_readers(tiny_set, tiny_shards, tmp_path)
    keep = ROOT / "runs" / "fuzz"
    faults = [fuzz(tmp_path / name, read, INPUTS, keep) for name, read in readers.items()]
    assert len(faults) == 21 and not [*filter(None, faults)]


def test_the_fuzzer_finds_a_fault_of_a_reader(tmp_path):
    """A reader that divides by a byte."""
    (tmp_path / "file").write_bytes(bytes(range(1, 60)))
    reader = lambda path: [1 // byte for byte in path.read_bytes()]  # noqa: E731
    faults = fuzz(tmp_path / "file", reader, 200, tmp_path)
    assert 5 < len(faults) < 195 and "ZeroDivisionError" in faults[0]
