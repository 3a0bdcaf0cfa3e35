"""Files that attack end in one error: no code is run, no folder left, no memory filled."""

import ast
import contextlib
import gzip
import io
import json
import math
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, noise_picture, write_jpeg
from helpers import make_trainer, overwrite, tiny_config
from test_architecture import imports, sources

from common import files as reading
from common.errors import InputError
from configs.schema import load_yaml
from configs.skeleton import load_skeleton
from evaluation.estimator import read_picture
from evaluation.predictions import open_mat
from model import checkpoint
from pipelines.annotations import read_annotations, stays_inside
from pipelines.augment import PRESETS
from pipelines.boxes import read_people
from pipelines.jpeg import PictureError, check_jpeg, claimed_size
from pipelines.opencv_loader import LooseImages, decode
from pipelines.shards import ShardSet

LIMIT = 3 << 30


def claiming(jpeg: bytes, width: int, height: int) -> bytes:
    """The same JPEG with another size in its frame header."""
    at = max(jpeg.find(b"\xff\xc0"), jpeg.find(b"\xff\xc2"))
    return jpeg[: at + 5] + struct.pack(">HH", height, width) + jpeg[at + 9 :]


@pytest.fixture(scope="module")
def jpeg(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("jpeg") / "a.jpg"
    write_jpeg(path, noise_picture(np.random.default_rng(0), 160, 90))
    return path.read_bytes()


# Pictures


@pytest.mark.parametrize("options", [[], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]])
def test_the_size_in_a_header_is_found_without_decoding(options, tmp_path):
    write_jpeg(tmp_path / "a.jpg", noise_picture(np.random.default_rng(0), 161, 97), *options)
    data = (tmp_path / "a.jpg").read_bytes()
    assert claimed_size(data) == claimed_size(data[:700]) == (161, 97)
    # libjpeg passes over what lies between segments, and over padding.
    odd = data[:20] + b"\x00junk\xff\xff" + data[20:]
    assert cv2.imdecode(np.frombuffer(odd, np.uint8), 1).shape == (97, 161, 3)
    assert claimed_size(odd) == (161, 97)
    png = cv2.imencode(".png", np.zeros((7, 9, 3), np.uint8))[1].tobytes()
    assert claimed_size(png) == (9, 7)
    assert [claimed_size(x) for x in (b"", b"\xff\xd8", b"\xff\xd8\xff", b"noise" * 9)] == [
        None
    ] * 4


@pytest.mark.parametrize("junk", [b"", b"\x00junk"])
def test_a_jpeg_that_claims_to_be_huge_is_refused_before_it_is_decoded(
    jpeg, junk, tmp_path, monkeypatch
):
    monkeypatch.setattr(cv2, "imdecode", None)
    monkeypatch.setattr(cv2, "imread", None)
    bomb = claiming(jpeg, 65_500, 65_500)
    bomb = bomb[:20] + junk + bomb[20:]  # after the segment JFIF
    (tmp_path / "bomb.jpg").write_bytes(bomb)
    for read in (lambda: decode(bomb, "x"), lambda: read_picture(tmp_path / "bomb.jpg")):
        with pytest.raises(InputError, match="65500 x 65500"):
            read()
    with pytest.raises(PictureError):
        check_jpeg(bomb)


def test_opencvs_own_refusals_are_errors_of_ours(jpeg):
    png = cv2.imencode(".png", np.zeros((7, 9, 3), np.uint8))[1].tobytes()
    with pytest.raises(InputError):
        decode(png[:16] + struct.pack(">II", 2**21, 1) + png[24:], "x")


def test_shards_with_a_huge_picture_are_refused_at_the_start(tiny_shards, tmp_path):
    import shutil

    copy = Path(shutil.copytree(tiny_shards / "train", tmp_path / "train"))
    data = ShardSet(copy)
    bomb = claiming(data.jpeg(6), 65_500, 65_500)
    overwrite(copy, 6, "jpg", bomb)
    with pytest.raises(InputError, match="65500 x 65500") as caught:
        ShardSet(copy).records()
    assert "sample 6" in caught.value.where


def progressive_bomb(jpeg: bytes) -> bytes:
    """A progressive JPEG whose last scan comes a thousand times more."""
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


@pytest.mark.parametrize("bomb", [progressive_bomb, sequential_bomb])
def test_a_jpeg_of_a_thousand_scans_is_refused_before_it_is_decoded(
    bomb, jpeg, tmp_path, monkeypatch
):
    data = bomb(jpeg)
    assert cv2.imdecode(np.frombuffer(data, np.uint8), 1) is not None, "a decoder would take it"
    monkeypatch.setattr(cv2, "imdecode", None)
    with pytest.raises(PictureError, match="over 100 scans"):
        check_jpeg(data)
    with pytest.raises(InputError, match="over 100 scans"):
        decode(data, "a person")
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(InputError, match="over 100 scans"):
        read_picture(tmp_path / "a.jpg")


def test_one_scan_with_all_of_the_picture_is_one_whatever_follows(jpeg):
    """libjpeg reads no further: a film behind a telephone's photograph does no harm."""
    after = jpeg[:-2] + jpeg[jpeg.find(b"\xff\xda") : -2] * 200 + b"\xff\xd9"
    assert decode(after, "").shape == decode(jpeg + b"\xff\xda" * 200, "").shape == (90, 160, 3)


class OnePicture:
    """A source of one person."""

    def __init__(self, jpeg: bytes, split: ShardSet):
        self.data, self.split = jpeg, split

    def __len__(self) -> int:
        return 1

    def jpeg(self, sample: int) -> bytes:
        return self.data

    def record(self, sample: int) -> np.ndarray:
        return self.split.record(sample)

    def where(self, sample: int) -> str:
        return "the one person"


@pytest.mark.parametrize("bomb", [progressive_bomb, lambda jpeg: claiming(jpeg, 65500, 65500)])
def test_dali_is_not_even_fed_such_a_picture_in_evaluation(bomb, jpeg, tiny_shards):
    pytest.importorskip("nvidia.dali")
    from pipelines.dali_loader import DaliEvaluationLoader

    source = OnePicture(bomb(jpeg), ShardSet(tiny_shards / "valid"))
    loader = DaliEvaluationLoader(source, np.arange(1), PRESETS["none"], input_px=64, batch_size=1,
                        device=torch.device("cpu"))  # fmt: skip
    with pytest.raises(InputError, match=r"over 100 scans|a header that says") as caught:
        list(loader)
    assert caught.value.where == "the one person"


# Names


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/passwd", "a/../../b.jpg", "..\\a.jpg", "C:\\a",
                                  "a//b", ".", "a\nb", "a\0b", ""])  # fmt: skip
def test_names_that_leave_the_folder_are_refused(name, tmp_path):
    assert not stays_inside(tmp_path, name)


def test_links_out_of_the_folder_of_pictures_are_refused(tiny_set, tmp_path):
    people = read_annotations(tiny_set / "annot", "valid")[0]
    folder = tmp_path / "images"
    folder.mkdir()
    for name in people.images:
        (folder / name).symlink_to(tiny_set / "images" / name)
    with pytest.raises(InputError, match="a link that leads out"):
        LooseImages(people, folder)
    (folder / "loop").symlink_to(folder / "loop")
    assert not stays_inside(folder, "loop")


# HDF5


def h5_with(tiny_set: Path, path: Path, change: Callable[[h5py.File], None]) -> Path:
    path.write_bytes((tiny_set / "annot" / "valid.h5").read_bytes())
    with h5py.File(path, "r+") as file:
        change(file)
    return path


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
    [(external_link, "scale is a link"),
     (replaced("scale", shape=(5,), dtype="u1", external=[("/etc/passwd", 0, 5)]), "another file"),
     (virtual, "the values of scale lie in another file"),
     (replaced("scale", shape=(2**29,), dtype="f8", chunks=(2**20,)), "claims 4,294,967,296 bytes"),
     (replaced("imgname", shape=(2**40,), dtype="S8", chunks=(2**10,)), "claims"),
     (replaced("index", shape=(5,), dtype=h5py.ref_dtype), "type object")],
)  # fmt: skip
def test_h5_that_reaches_out_or_claims_to_be_huge_is_refused(change, found, tiny_set, tmp_path):
    with pytest.raises(InputError, match=found):
        read_annotations(h5_with(tiny_set, tmp_path / "a.h5", change), "valid")


@pytest.mark.parametrize("where", ["/", "scale"])
def test_an_attribute_in_h5_that_claims_4_gb_takes_no_memory(where, tiny_set, tmp_path):
    """Attributes are never read; libhdf5 meets this one as it opens the file."""
    path = h5_with(tiny_set, tmp_path / "a.h5", lambda h5: h5[where].attrs.create(
        "bomb", np.arange(1000.0)))  # fmt: skip
    data = path.read_bytes()
    dimension = struct.pack("<Q", 1000)
    at = data.index(dimension, data.index(b"bomb\0"))
    path.write_bytes(data[:at] + struct.pack("<Q", 2**29) + data[at + 8 :])
    with h5py.File(path) as file, pytest.raises((OSError, KeyError, RuntimeError, MemoryError)):
        file[where].attrs["bomb"][()]  # it is a bomb
    with address_space(LIMIT):
        try:
            assert read_annotations(path, "valid")[0].count == 5
        except InputError as error:
            assert str(path) in error.where


@contextlib.contextmanager
def address_space(extra: int) -> Iterator[None]:
    """What this process has and so many bytes more; a larger need is a MemoryError."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + extra, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


# JSON, YAML, CSV


@pytest.mark.slow
def test_bombs_of_json_yaml_and_gzip_end_in_an_error(tiny_set, tmp_path):
    """In a process that may take 3 GiB: what they claim would be ten times that."""
    with gzip.open(tmp_path / "zeros.json.gz", "wb", compresslevel=1) as file:
        file.write(b"[")
        for _ in range(700):
            file.write(bytes(1 << 20).replace(b"\0", b" "))
    (tmp_path / "lists.json").write_bytes(b"[" + b"[]," * 60_000_000 + b"[]]")
    # As much as is let through: two GiB of dicts, and more numbers than there is memory for.
    (tmp_path / "dicts.json").write_bytes(b"[" + b'{"":0},' * 9_999_999 + b"0]")
    (tmp_path / "numbers.json").write_bytes(b"[" + b"0.5," * 79_999_990 + b"0]")
    (tmp_path / "deep.json").write_bytes(b"[" * 10_000_000)
    laughs = "a0: &a0 [x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
    )
    (tmp_path / "laughs.yaml").write_text(laughs)
    (tmp_path / "deep.yaml").write_text("[" * 100_000)
    code = f"""
import resource, sys
from pathlib import Path
from common.errors import InputError
from configs.schema import load_yaml
from configs.skeleton import load_skeleton
from pipelines.annotations import read_annotations
from pipelines.boxes import read_people
resource.setrlimit(resource.RLIMIT_AS, ({LIMIT}, {LIMIT}))
folder = Path(sys.argv[1])
refused = []
for name, read in [
    *((name, lambda p: read_annotations(p, "valid"))
      for name in ("zeros.json.gz", "lists.json", "dicts.json", "numbers.json", "deep.json")),
    *((name, read_people) for name in ("lists.json", "deep.json")),
    *((name, read) for name in ("laughs.yaml", "deep.yaml")
      for read in (lambda p: load_yaml(str(p)), load_skeleton)),
]:
    try:
        read(folder / name)
    except InputError:
        refused.append(name)
print(len(refused))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip() == "11", done.stderr


def test_json_of_cocos_size_passes_and_is_weighed_by_what_it_takes_in_memory(monkeypatch):
    """In the proportions of person_keypoints_train2017.json, by the thousand people."""
    person = {"segmentation": [[510.66] * 76], "area": 702.1, "iscrowd": 0, "image_id": 289343,
              "bbox": [473.07, 395.93, 38.65, 28.67], "keypoints": [0] * 51, "num_keypoints": 0,
              "category_id": 18, "id": 1768}  # fmt: skip
    names = ("license", "file_name", "coco_url", "height", "width", "flickr_url", "id")
    image = dict.fromkeys(names, "x")
    monkeypatch.setattr(reading, "_LARGEST_WEIGHT", reading._LARGEST_WEIGHT // 1000)
    people = [person] * 262 + [image] * 118
    assert len(reading.parse_json(json.dumps(people).encode())) == 380
    with pytest.raises(ValueError, match="more values than"):
        reading.parse_json(json.dumps(people * 2).encode())
    for odd in ("{}", '{"":0}', '"a"', "[]", "[0.5]"):
        text = "[" + ",".join([odd] * 50_000) + "]"
        with pytest.raises(ValueError, match="more values than"):
            reading.parse_json(text.encode())


def test_memory_that_runs_out_is_an_error_of_ours(monkeypatch):
    monkeypatch.setattr(json, "loads", lambda data: bytearray(1 << 60))
    with pytest.raises(ValueError, match="memory"):
        reading.parse_json(b"[]")


class Evil:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled(tmp_path, tiny_set):
    trap = tmp_path / "trap"
    data = pickle.dumps(Evil(trap))
    torch.save({"model": Evil(trap)}, tmp_path / "zip.pt")
    torch.save(Evil(trap), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "raw.pt").write_bytes(data)
    for name in ("zip.pt", "old.pt", "raw.pt"):
        with pytest.raises(InputError, match="only running code of the file"):
            checkpoint.load_checkpoint(tmp_path / name)
    buffer = io.BytesIO()
    np.save(buffer, np.array([Evil(trap)], dtype=object), allow_pickle=True)
    for name, content in [("a.mat", data), ("b.mat", buffer.getvalue())]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError):
            open_mat(tmp_path / name, ["preds"], "a .mat")
    evil = f"!!python/object/apply:os.mkdir ['{trap}']"
    (tmp_path / "a.yaml").write_text(f"train: {evil}\njoints: {evil}\n")
    for read in (lambda p: load_yaml(str(p)), load_skeleton):
        with pytest.raises(InputError, match="not YAML"):
            read(tmp_path / "a.yaml")
    (tmp_path / "a.csv").write_bytes(b"image\n" + data)
    (tmp_path / "a.json").write_bytes(data)
    for name in ("a.csv", "a.json"):
        with pytest.raises(InputError):
            read_people(tmp_path / name)
    assert not trap.exists()
    pickle.loads(data)
    assert trap.exists(), "the trap works"


def doors_of(path: Path) -> list[str]:
    """What a source file names that can run code of a file, or let its names leave a folder."""
    names = imports(path)
    if "pickle.UnpicklingError" in names:  # which torch.load raises
        names -= {"pickle", "pickle.UnpicklingError"}
    unpicklers = {"pickle", "dill", "marshal", "shelve", "joblib"}
    found = [name for name in names if name.split(".")[0] in unpicklers]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            safe = {"torch.load": "weights_only=True", "yaml.load": "_PlainLoader"}.get(call)
            if call in {"eval", "exec", "np.load", "numpy.load"} or call.endswith(
                (".extract", ".extractall", ".unsafe_load", ".full_load")
            ):
                found.append(call)
            elif safe and safe not in ast.unparse(node):
                found.append(ast.unparse(node))
    return found


def test_no_source_file_names_a_function_that_runs_what_it_reads_or_unpacks_a_tar(tmp_path):
    assert len(sources()) > 50
    assert not {path.name: doors for path in sources() if (doors := doors_of(path))}
    (tmp_path / "a.py").write_text(
        "import pickle\nnp.load(x)\ntorch.load(x)\nyaml.load(x, yaml.Loader)\ntar.extractall()"
    )
    assert len(doors_of(tmp_path / "a.py")) == 5


# Checkpoints


@pytest.fixture(scope="module")
def made(tiny_shards, tmp_path_factory) -> checkpoint.Checkpoint:
    folder = tmp_path_factory.mktemp("made")
    make_trainer(tiny_config(tiny_shards), folder).save(["last.pt"])
    return checkpoint.load_checkpoint(folder / "last.pt")


@pytest.fixture(scope="module")
def contents(made) -> dict:
    return torch.load(made.path, weights_only=True)


def refused(contents: dict, path: Path, match: str) -> None:
    checkpoint.write_archive(path, contents)
    with pytest.raises(InputError, match=match):
        checkpoint.trained_network(checkpoint.load_checkpoint(path))


def test_a_checkpoint_of_a_huge_network_takes_no_memory(contents, tmp_path):
    with address_space(LIMIT):
        config = {**contents["config"], "model": {**contents["config"]["model"], "width": 8192}}
        refused({**contents, "config": config}, tmp_path / "wide.pt", "weights of another network")
        config["model"] = {**config["model"], "width": 10**9}
        refused({**contents, "config": config}, tmp_path / "wider.pt", "8,192 at most")
        config["model"] = {**config["model"], "width": 16, "stacks": 10**9}
        refused({**contents, "config": config}, tmp_path / "deep.pt", "64 at most")


def test_a_compressed_checkpoint_is_refused(made, tmp_path):
    with (
        zipfile.ZipFile(made.path) as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    with pytest.raises(InputError, match="compressed records"):
        checkpoint.load_checkpoint(tmp_path / "b.pt")


def test_records_that_claim_more_than_the_file_has_are_refused(contents, tmp_path):
    with io.BytesIO() as file:
        torch.save(contents, file)
        data = bytearray(file.getvalue())
    entry = data.index(b"PK\x01\x02")  # of the archive's directory
    entry = data.index(b"PK\x01\x02", entry + 1)
    assert struct.unpack_from("<I", data, entry + 24)[0] < len(data)
    for claimed in (len(data), 2**31):
        struct.pack_into("<I", data, entry + 24, claimed)
        with (tmp_path / "a.pt").open("w+b") as file:
            file.write(data)
            checkpoint.append_checksum(file)
        with pytest.raises(InputError, match=r"records of [\d,]+ bytes"):
            checkpoint.load_checkpoint(tmp_path / "a.pt")


def test_of_the_optimizers_settings_a_checkpoint_tells_none(made, tiny_shards, tmp_path):
    for group in made.optimizer["param_groups"]:
        group |= {"betas": "x", "eps": math.nan, "amsgrad": True, "weight_decay": 1e9}
    run = make_trainer(tiny_config(tiny_shards), tmp_path, made)
    assert run.train_step.optimizer.param_groups[0]["betas"] == (0.9, 0.999)
