"""Untrusted files end in one error: no code is run, no folder is left, no memory is filled."""

import contextlib
import gzip
import io
import os
import pickle
import resource
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import torch
from conftest import noise_picture
from helpers import make_spec, make_trainer, tiny_config
from PIL import Image

from common.errors import InputError
from common.files import read_yaml
from configs.skeleton import load_skeleton
from evaluation.estimator import read_picture
from evaluation.predictions import open_mat
from model import checkpoint
from pipelines import annotations
from pipelines.annotations import read_annotations, stays_inside
from pipelines.boxes import read_people
from pipelines.jpeg import PictureError, check_jpeg, decode, require_sane_size
from pipelines.opencv_loader import LooseImages
from pipelines.shards import ShardSet

MEMORY_LIMIT = 3 << 30


@contextlib.contextmanager
def address_space(extra: int) -> Iterator[None]:
    """Allow this process so many more bytes; an attempt to allocate more is a MemoryError."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + extra, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


# Pictures


def encoded(width: int, height: int, *options: int) -> bytes:
    picture = noise_picture(np.random.default_rng(0), width, height)
    return cv2.imencode(".jpg", picture, options)[1].tobytes()


def blank(kind: str) -> bytes:
    """A picture of 9 x 7 px."""
    with io.BytesIO() as file:
        Image.new("RGB", (9, 7)).save(file, kind)
        return file.getvalue()


@pytest.fixture(scope="module")
def jpeg() -> bytes:
    return encoded(160, 90)


def claiming(jpeg: bytes, width: int, height: int) -> bytes:
    """The same JPEG with another size in its frame header."""
    at = max(jpeg.find(b"\xff\xc0"), jpeg.find(b"\xff\xc2"))
    return jpeg[: at + 5] + struct.pack(">HH", height, width) + jpeg[at + 9 :]


def progressive_bomb(jpeg: bytes) -> bytes:
    """A progressive JPEG whose last scan is repeated a thousand times."""
    image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    return data[:-2] + data[data.rfind(b"\xff\xda") : -2] * 1000 + b"\xff\xd9"


def sequential_bomb(jpeg: bytes) -> bytes:
    """A baseline JPEG, all of one grey, whose three components come in 1002 scans.

    A block is a DC difference of 0 and an end of block, 00 and 1010 in the usual Huffman tables.
    """
    kind = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    data = cv2.imencode(".jpg", np.zeros((64, 64, 3), np.uint8), kind)[1].tobytes()
    blocks = int("001010" * 64, 2).to_bytes(48, "big")
    scans = [b"\xff\xda\x00\x08\x01%c\x00\x00\x3f\x00" % part + blocks for part in (1, 2, 3)]
    return data[: data.find(b"\xff\xda")] + scans[0] + scans[1] + scans[2] * 1000 + b"\xff\xd9"


def claimed_size(data: bytes) -> str:
    with pytest.raises(InputError) as caught:
        require_sane_size(data, "here", limit=0)
    return caught.value.found.removeprefix("a header that says ")


@pytest.mark.parametrize("options", [[], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]])
def test_the_size_of_a_jpeg_is_found_where_libjpeg_finds_it(options):
    data = encoded(161, 97, *options)
    assert claimed_size(data) == claimed_size(data[:700]) == "161 x 97"
    # libjpeg skips what lies between segments, and padding.
    odd = data[:20] + b"\x00junk\xff\xff" + data[20:]
    assert cv2.imdecode(np.frombuffer(odd, np.uint8), 1).shape == (97, 161, 3)
    assert claimed_size(odd) == "161 x 97"


def test_a_picture_that_claims_to_be_huge_is_refused_before_it_is_decoded(
    jpeg, tmp_path, monkeypatch
):
    gif, bomb = blank("GIF"), claiming(jpeg, 65_500, 65_500)
    pictures = {
        "a.jpg": bomb,
        "b.jpg": bomb[:20] + b"\x00junk" + bomb[20:],
        "c.gif": gif[:6] + struct.pack("<HH", 30_000, 30_000) + gif[10:],
    }
    monkeypatch.setattr(cv2, "imdecode", None)
    for name, data in pictures.items():
        (tmp_path / name).write_bytes(data)
        for read in (lambda d: decode(d, "x"), lambda _, n=name: read_picture(tmp_path / n)):
            with pytest.raises(InputError, match="a header that says"):
                read(data)
        with pytest.raises(PictureError):
            check_jpeg(data)


@pytest.mark.parametrize("bomb", [progressive_bomb, sequential_bomb])
def test_a_jpeg_of_a_thousand_scans_is_refused_before_it_is_decoded(
    bomb, jpeg, tmp_path, monkeypatch
):
    data = bomb(jpeg)
    assert cv2.imdecode(np.frombuffer(data, np.uint8), 1) is not None, "a decoder would take it"
    (tmp_path / "a.jpg").write_bytes(data)
    monkeypatch.setattr(cv2, "imdecode", None)
    with pytest.raises(PictureError, match="over 100 scans"):
        check_jpeg(data)
    for read in (lambda: decode(data, "a person"), lambda: read_picture(tmp_path / "a.jpg")):
        with pytest.raises(InputError, match="over 100 scans"):
            read()


def test_scans_after_one_with_the_whole_picture_do_not_count(jpeg):
    """libjpeg reads no further: a video behind a telephone's photograph does no harm."""
    after = jpeg[:-2] + jpeg[jpeg.find(b"\xff\xda") : -2] * 200 + b"\xff\xd9"
    assert decode(after, "").shape == decode(jpeg + b"\xff\xda" * 200, "").shape == (90, 160, 3)


@pytest.mark.parametrize("bomb", [progressive_bomb, lambda jpeg: claiming(jpeg, 65500, 65500)])
def test_dali_never_gets_such_a_picture_in_evaluation(bomb, jpeg, tiny_shards, monkeypatch):
    pytest.importorskip("nvidia.dali")
    from pipelines.dali_loader import DaliCrops

    source = ShardSet(tiny_shards / "valid")
    monkeypatch.setattr(source, "picture", lambda sample: bomb(jpeg))
    loader = DaliCrops(source, [[(0, 0)]], make_spec("none", batch_size=1), [0])
    with pytest.raises(InputError, match=r"over 100 scans|a header that says"):
        list(loader)


# Names and annotation files


def test_names_and_links_out_of_the_folder_of_pictures_are_refused(tiny_set, tmp_path):
    people = read_annotations(tiny_set / "annot", "valid")[0]
    folder = tmp_path / "images"
    folder.mkdir()
    for name in people.images:
        (folder / name).symlink_to(tiny_set / "images" / name)
    with pytest.raises(InputError, match="outside by a link"):
        LooseImages(people, folder)
    (folder / "loop").symlink_to(folder / "loop")
    assert not any(stays_inside(folder, name) for name in ("loop", "../a.jpg", "/etc/passwd"))


def replaced(name: str, **how) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, **how)

    return change


def external_link(file: h5py.File) -> None:
    del file["scale"]
    file["scale"] = h5py.ExternalLink("/etc/other.h5", "scale")


def virtual(file: h5py.File) -> None:
    del file["scale"]
    layout = h5py.VirtualLayout(shape=(5,), dtype="f8")
    layout[:] = h5py.VirtualSource("/etc/other.h5", "scale", shape=(5,))
    file.create_virtual_dataset("scale", layout)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (external_link, "no dataset scale in the file itself"),
        (replaced("scale", shape=(5,), dtype="u1", external=[("/etc/passwd", 0, 5)]), "no dataset"),
        (virtual, "no dataset scale"),
        (replaced("scale", shape=(2**29,), dtype="f8", chunks=(2**20,)), "claims 4,294,967,296 b"),
        (replaced("imgname", shape=(2**40,), dtype="S8", chunks=(2**10,)), "claims"),
        (replaced("index", shape=(5,), dtype=h5py.ref_dtype), "object of shape"),
    ],
)
def test_hdf5_with_data_elsewhere_or_of_a_huge_size_is_refused(change, found, tiny_set, tmp_path):
    shutil.copy(tiny_set / "annot" / "valid.h5", tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        change(file)
    with pytest.raises(InputError, match=found):
        read_annotations(tmp_path / "a.h5", "valid")


def test_json_that_unpacks_to_more_than_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(annotations, "LARGEST_JSON", 1 << 20)
    for extra, found in ((0, "a JSON list"), (10, "more than 1 MiB")):
        blanks = b" " * ((1 << 20) - 2 + extra)
        (tmp_path / "a.json.gz").write_bytes(gzip.compress(b"[" + blanks + b"]"))
        with pytest.raises(InputError, match=found):
            read_annotations(tmp_path / "a.json.gz", "valid")


# Code


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_is_unpickled(tmp_path):
    trap = tmp_path / "trap"
    data = pickle.dumps(Trap(trap))
    torch.save({"model": Trap(trap)}, tmp_path / "zip.pt")
    torch.save(Trap(trap), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with (tmp_path / "b.mat").open("wb") as file:
        np.save(file, np.array([Trap(trap)], dtype=object), allow_pickle=True)
    evil = f"!!python/object/apply:os.mkdir ['{trap}']"
    (tmp_path / "a.yaml").write_text(f"train: {evil}\njoints: {evil}\n")
    for name in ("raw.pt", "a.mat", "a.json"):
        (tmp_path / name).write_bytes(data)
    readers = {
        ".pt": checkpoint.load_checkpoint,
        ".mat": lambda path: open_mat(path, ["preds"], "a .mat"),
        ".json": read_people,
        ".yaml": load_skeleton,
    }
    files = [path for path in tmp_path.iterdir() if path.suffix in readers]
    assert len(files) == 7
    for path in files:
        with pytest.raises(InputError):
            readers[path.suffix](path)
    with pytest.raises(InputError):
        read_yaml(tmp_path / "a.yaml", "keys")
    assert not trap.exists()
    pickle.loads(data)
    assert trap.exists(), "the trap works"


# Checkpoints


@pytest.fixture(scope="module")
def saved(tiny_shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    make_trainer(tiny_config(tiny_shards), folder).save(["last.pt"])
    return folder / "last.pt"


def test_a_checkpoint_of_a_huge_network_takes_no_memory(saved, tmp_path):
    contents = torch.load(saved, weights_only=True)
    for change, found in (
        ({"width": 8192}, "weights of another network"),
        ({"width": 10**9}, "8,192 at most"),
        ({"stacks": 10**9}, "64 at most"),
    ):
        config = {**contents["config"], "model": {**contents["config"]["model"], **change}}
        checkpoint.write_archive(tmp_path / "a.pt", {**contents, "config": config})
        with address_space(MEMORY_LIMIT), pytest.raises(InputError, match=found):
            checkpoint.trained_network(checkpoint.load_checkpoint(tmp_path / "a.pt"))


def test_a_compressed_checkpoint_is_refused(saved, tmp_path):
    with (
        zipfile.ZipFile(saved) as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    with pytest.raises(InputError, match="compressed records"):
        checkpoint.load_checkpoint(tmp_path / "b.pt")
