"""Damages files of every kind and lets every reader loose on them: python tests/fuzz.py

A reader may succeed or raise InputError (pictures: PictureError). Anything else is a fault: another
exception, a crash, a hang. What was found is left in the folder --keep.
"""

import argparse
import contextlib
import gzip
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
for place in (ROOT, ROOT / "tests"):
    sys.path.insert(0, str(place))

import cv2  # noqa: E402
import torch  # noqa: E402

from common.cli import progress  # noqa: E402
from common.distributed import DistributedContext  # noqa: E402
from common.errors import InputError  # noqa: E402
from configs.schema import (  # noqa: E402
    Config,
    add_config_options,
    check_values,
    config_from_dict,
    load_yaml,
)
from configs.skeleton import load_skeleton  # noqa: E402
from evaluation import (
    estimator,
    predictions,
)
from evaluation.predictions import as_coco, as_entries, read_predictions, write_mat  # noqa: E402
from model import checkpoint  # noqa: E402
from model.export import INPUT, KEY, OUTPUT  # noqa: E402
from pipelines.annotations import People, read_annotations  # noqa: E402
from pipelines.bad_samples import LIST, BadSamples  # noqa: E402
from pipelines.boxes import read_people  # noqa: E402
from pipelines.jpeg import PictureError, check_jpeg  # noqa: E402
from pipelines.opencv_loader import decode  # noqa: E402
from pipelines.shards import ShardSet  # noqa: E402
from tools.check_shards import main as check_shards  # noqa: E402
from training import checkpoint_manager as keeping
from training.resume import load_resumable  # noqa: E402
from training.trainer import Trainer  # noqa: E402

SECONDS = 60
"""For one input; more is a hang."""
PICTURES = (".png", ".webp", ".tiff", ".bmp", ".gif", ".jp2", ".avif", ".ppm", ".pfm", ".hdr",
            ".ras")  # fmt: skip
HERE = DistributedContext(0, 1, torch.device("cpu"), torch.float16)
"""With fp16, so that there is a scaler."""
ODD_NUMBERS = [0, 1, -1, 2**31, 2**53, 2**63, 2**64, 10**30, 0.5, 1e308, -1e308, float("nan"),
               float("inf"), -0.0]  # fmt: skip
ODD_VALUES = [*ODD_NUMBERS, None, True, "", "x", "../x", "/etc/passwd", "a\0b", "\ud800",
              "9" * 5000, [], {}, [[]], [None], {"": 0}, [1, 2, 3]]  # fmt: skip
ODD_BYTES = [b"\0", b"\xff", b"\n", b"[", b"{", b'"', b",", b"\\", b"9" * 30, b"NaN", b"1e999",
             b"null", b"-", b"../", b"&a", b"*a", b"!!python/name:os.system", b": ", b"2001-99-99",
             b"\xef\xbb\xbf", b"\xff\xd8", b"0x", b"? "]  # fmt: skip


class Target(NamedTuple):
    """One reader."""

    name: str
    file: str
    """Its damaged file, relative to a folder made for it."""
    read: Callable[[Path], object]
    """What reads it; is given the file's path."""
    structured: Callable[[bytes, random.Random], bytes] | None = None
    """A mutation that leaves the format valid and changes what it says."""


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four random changes of a file's bytes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(len(out) + 1)
        # Formats have their structure in the first bytes and the last.
        if rng.random() < 0.5:
            place = min(place, rng.randrange(2048))
        end = min(len(out), place + rng.choice((1, 2, 4, 8, 64, 1024)))
        kind = rng.randrange(7)
        if kind == 0 and place < len(out):
            out[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[place:end] = rng.randbytes(end - place)
        elif kind == 2:
            del out[place:end]
        elif kind == 3:
            out[place:place] = rng.choice(ODD_BYTES)
        elif kind == 4:
            out[place:end] = bytes([rng.choice((0, 255))]) * (end - place)
        elif kind == 5:
            out[place:place] = out[place:end]
        else:
            del out[place:]
    return bytes(out)


def change_value(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """The same plain value with one leaf or branch replaced, removed or repeated."""
    inner = isinstance(value, (dict, list, tuple)) and len(value) > 0
    if not inner or (depth and rng.random() < 0.15):
        odd = rng.choice(ODD_VALUES)
        return (
            torch.full((2,), 3.0) if isinstance(value, torch.Tensor) and rng.random() < 0.5 else odd
        )
    if isinstance(value, dict):
        name = rng.choice(list(value))
        changed = dict(value)
        if rng.random() < 0.15:
            del changed[name]
        elif rng.random() < 0.1:
            changed[rng.choice(["x", "", name])] = changed.pop(name)
        else:
            changed[name] = change_value(value[name], rng, depth + 1)
        return changed
    place, items = rng.randrange(len(value)), list(value)
    if rng.random() < 0.15:
        del items[place]
    elif rng.random() < 0.1:
        items.insert(place, items[place])
    else:
        items[place] = change_value(items[place], rng, depth + 1)
    return items


def change_json(data: bytes, rng: random.Random) -> bytes:
    value = change_value(json.loads(data), rng)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def change_gzip(data: bytes, rng: random.Random) -> bytes:
    return gzip.compress(change_json(gzip.decompress(data), rng), 1)


def change_checkpoint(data: bytes, rng: random.Random) -> bytes:
    state = torch.load(io.BytesIO(data), weights_only=True)
    with io.BytesIO() as file:
        torch.save(change_value(state, rng), file)
        return file.getvalue()


def change_index(data: bytes, rng: random.Random) -> bytes:
    words = data.decode().split(" ")
    odd = [*map(str, ODD_NUMBERS), "..", "f32", "jpg"]
    words[rng.randrange(len(words))] = rng.choice(odd)
    return " ".join(words).encode()


def change_h5(data: bytes, rng: random.Random) -> bytes:
    """Columns of other values, shapes and types."""
    import h5py

    with tempfile.NamedTemporaryFile(suffix=".h5", dir="/dev/shm") as file:
        file.write(data)
        file.flush()
        with h5py.File(file.name, "r+") as h5:
            name = rng.choice(list(h5))
            values = h5[name][()]
            del h5[name]
            numbers = values.dtype.kind == "f"
            if numbers and rng.random() < 0.6:
                values.reshape(-1)[rng.randrange(values.size)] = rng.choice(ODD_NUMBERS)
            elif numbers:
                values = values.astype(rng.choice(("i1", "u8", "f2", "S3", "c16", "?")))
            else:
                values = np.array(
                    rng.choices([b"", b"../x", b"\xff\xfe", b"a" * 300], k=len(values))
                )
            if rng.random() < 0.2:
                values = values[: rng.randrange(len(values) + 1)]
            if rng.random() < 0.9:
                h5[name] = values
        return Path(file.name).read_bytes()


def change_line(data: bytes, rng: random.Random) -> bytes:
    """One line of a .jsonl."""
    lines = data.splitlines()
    place = rng.randrange(len(lines))
    lines[place] = change_json(lines[place], rng)
    return b"\n".join(lines)


def change_facts(text: str, rng: random.Random) -> str:
    """What model/export.py writes into others' formats."""
    if rng.random() < 0.1:
        return rng.choice(["[", '{"": ', "[1", ""]) * 10**5
    return change_json(text.encode(), rng).decode("utf-8", "replace")


def change_png(data: bytes, rng: random.Random) -> bytes:
    """What is inside of a chunk, or of the pixels' stream; checksums are those of the result."""
    chunks, place = [], 8
    while place < len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        chunks.append((data[place + 4 : place + 8], data[place + 8 : end - 4]))
        place = end
    number = rng.randrange(len(chunks) - 1)  # the last one is empty
    kind, body = chunks[number]
    if kind == b"IDAT" and rng.random() < 0.5:
        body = zlib.compress(mutate(zlib.decompress(body), rng))
    else:
        body = mutate(body, rng)
    chunks[number] = kind, body
    return data[:8] + b"".join(
        len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
        for kind, body in chunks
    )


def change_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header, or our facts in it."""
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    if rng.random() < 0.5:
        facts = header["__metadata__"]
        facts[KEY] = change_facts(facts[KEY], rng)
    else:
        header = change_value(header, rng)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[size:]


def change_onnx(data: bytes, rng: random.Random) -> bytes:
    """Our facts, names and kinds in the graph, or shapes."""
    import onnx

    model = onnx.load_from_string(data)
    graph, kind, odd = model.graph, rng.randrange(5), rng.choice([0, -1, 3, 2**31, 2**62])
    node, tensor = rng.choice(graph.node), rng.choice(graph.initializer)
    numbers = [a for n in graph.node for a in n.attribute if a.ints]
    if kind == 0:
        model.metadata_props[0].value = change_facts(model.metadata_props[0].value, rng)
    elif kind == 1:
        node.op_type = rng.choice([n.op_type for n in graph.node] + ["Reshape", "Loop", "x"])
    elif kind == 2:
        names = rng.choice([n for n in (node.input, node.output) if len(n)])
        names[rng.randrange(len(names))] = rng.choice(["", "x", INPUT, OUTPUT, tensor.name])
    elif kind == 3 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = odd
    else:
        ints = rng.choice(numbers).ints
        ints[rng.randrange(len(ints))] = odd
    return model.SerializeToString()


def prepare(tiny: Path, packed: Path, folder: Path) -> list[Target]:
    """Whole files of every kind in the folder, and who reads them."""
    people = read_annotations(tiny / "annot", "valid")[0]
    shutil.copy(tiny / "annot" / "valid.h5", folder / "valid.h5")
    write_json_kinds(people, folder)
    write_mat(folder / "predictions.mat", {"preds": people.joints})
    write_mat(folder / "tompson.mat", tompson(people))
    shutil.copytree(packed / "valid", folder / "split")
    shutil.copy(ROOT / "configs" / "2hg.yaml", folder / "config.yaml")
    shutil.copy(ROOT / "configs" / "skeletons" / "coco.yaml", folder / "skeleton.yaml")
    write_checkpoints(packed, folder)
    (folder / "people.csv").write_text(
        "image,x,y,width,height,image_id\na.jpg,1,2,30,40,7\nb.jpg,,,,,\n"
    )
    picture = ShardSet(folder / "split").jpeg(0)
    (folder / "picture.jpg").write_bytes(picture)
    whole = ShardSet(folder / "split")
    (folder / LIST).write_text(json.dumps({"sample": 1, "key": whole.key(1), "fault": "x"}) + "\n")
    coco = load_skeleton(ROOT / "configs" / "skeletons" / "coco.yaml")
    write_pictures(folder)
    config = write_run(packed, folder / "run")
    write_exported(folder)
    return [
        Target("h5", "valid.h5", lambda p: read_annotations(p, "valid"), change_h5),
        Target("json", "mpii.json", lambda p: read_annotations(p, "valid"), change_json),
        Target("json.gz", "mpii.json.gz", lambda p: read_annotations(p, "valid"), change_gzip),
        Target("coco", "coco.json", lambda p: read_annotations(p, "valid", coco), change_json),
        Target("mat", "predictions.mat", lambda p: read_predictions(p, people)),
        Target("mat with truth", "tompson.mat", lambda p: read_predictions(p, people)),
        Target("release", "tompson.mat", predictions._read_release),
        Target("tar", "split/00000.tar", lambda p: read_split(p.parent)),
        Target("index", "split/00000.idx", lambda p: read_split(p.parent), change_index),
        Target("manifest", "split/manifest.json", lambda p: read_split(p.parent), change_json),
        Target("config", "config.yaml", read_config),
        Target("skeleton", "skeleton.yaml", load_skeleton),
        Target("checkpoint", "last.pt", read_checkpoint, change_checkpoint),
        Target("princeton's checkpoint", "princeton.pt", read_checkpoint, change_checkpoint),
        Target("predictions", "predictions.json", lambda p: read_predictions(p, people),
               change_json),
        Target("coco results", "results.json", lambda p: read_predictions(p, people), change_json),
        Target("people csv", "people.csv", read_people),
        Target("people json", "people.json", read_people, change_json),
        Target("picture", "picture.jpg", read_picture),
        *(Target(f"picture {suffix}", f"picture{suffix}", read_picture,
                 change_png if suffix == ".png" else None) for suffix in PICTURES),
        Target("bad samples", LIST, lambda p: BadSamples(whole, p.parent, 5)),
        Target("resume", "run/last.pt", lambda p: resume(p, config), change_checkpoint),
        Target("bearpaw's checkpoint", "bearpaw.pt", read_checkpoint, change_checkpoint),
        Target("safetensors", "a.safetensors", read_checkpoint, change_safetensors),
        Target("onnx", "a.onnx", read_onnx, change_onnx),
    ]  # fmt: skip


def write_json_kinds(people: People, folder: Path) -> None:
    mpii = [
        {"img_paths": people.images[i], "isValidation": 1.0, "objpos": people.center[i].tolist(),
         "scale_provided": people.scale[i], "annolist_index": i, "people_index": 1,
         "joint_self": np.c_[people.joints[i], people.visible[i]].tolist()}
        for i in range(people.count)
    ]  # fmt: skip
    coco = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(people.images)],
        "categories": [{"id": 1, "keypoints": None}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "iscrowd": 0, "bbox": [1, 2, 30, 40],
             "keypoints": [5, 6, 2] * 17} for i in range(people.count)
        ],
    }  # fmt: skip
    scores = people.visible.astype(float)
    boxes = [{"image": "a.jpg", "box": [1, 2, 3, 4]}, {"image": "b", "center": [1, 2], "scale": 1}]
    for name, value in {
        "mpii.json": mpii, "coco.json": coco, "people.json": boxes,
        "predictions.json": as_entries(people, people.joints, scores),
        "results.json": as_coco(people, people.joints, scores),
    }.items():  # fmt: skip
        (folder / name).write_text(json.dumps(value))
    (folder / "mpii.json.gz").write_bytes(gzip.compress((folder / "mpii.json").read_bytes()))


def tompson(people: People) -> dict[str, Any]:
    """The layout of detections_our_format.mat, and a RELEASE beside it."""
    count = people.count
    release = {"annolist": np.array([({"objpos": 1},)] * 2, dtype=[("annorect", object)]),
               "img_train": np.zeros(2), "single_person": np.array([1, 1])}  # fmt: skip
    return {
        "pos_pred_src": people.joints.transpose(1, 2, 0),
        "pos_gt_src": people.joints.transpose(1, 2, 0),
        "jnt_missing": ~people.marked.T,
        "headboxes_src": np.ones((2, 2, count)),
        "RELEASE": release,
    }


def write_checkpoints(packed: Path, folder: Path) -> None:
    from helpers import make_trainer, tiny_config

    raw = {"stacks": 1, "width": 8, "depth": 1, "stem": [4, 4, 4]}
    make_trainer(tiny_config(packed, model=raw), folder).save([keeping.LAST])
    princeton = {"stacks": 1, "width": 8, "depth": 4, "stem": [64, 128, 128]}
    config = tiny_config(packed, model=princeton, data={"input_px": 64})
    made = make_trainer(config, folder / "princeton")._checkpoint([b""], [b""])
    torch.save(checkpoint.to_princeton(made), folder / "princeton.pt")
    from test_bearpaw import Plain

    torch.save({"state_dict": Plain(1, 16, depth=2, feats=8).state_dict()}, folder / "bearpaw.pt")


def write_exported(folder: Path) -> None:
    """last.pt as safetensors and ONNX."""
    import onnxruntime

    from tools import export_onnx

    onnxruntime.set_default_logger_severity(4)
    exports = ["--onnx", folder / "a.onnx", "--safetensors", folder / "a.safetensors"]
    words = ["export_onnx.py", folder / "last.pt", *exports]
    with mock.patch("sys.argv", [*map(str, words)]), contextlib.redirect_stdout(io.StringIO()):
        export_onnx.main()


def write_pictures(folder: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    for suffix in PICTURES:
        image = picture.astype(np.float32) if suffix == ".pfm" else picture
        assert cv2.imwrite(str(folder / f"picture{suffix}"), image)


def write_run(packed: Path, folder: Path) -> Config:
    """A run after its first validation. Returns the config that it goes on with, for one step."""
    from helpers import make_trainer, tiny_config

    raw: dict[str, Any] = {
        "model": {"stacks": 1, "width": 8, "depth": 1, "stem": [4, 4, 4]},
        "optim": {"ema_decay": 0.9},
    }
    first, second = (
        tiny_config(packed, **raw, train={"steps": n, "steps_per_epoch": 1, "log_every": 1})
        for n in (1, 2)
    )
    with contextlib.redirect_stderr(io.StringIO()):
        make_trainer(first, folder).train()
    return second


def read_split(folder: Path) -> None:
    """As training does, and as tools/check_shards.py does, which must not end in an error."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        check_shards([str(folder), "--workers", "0", "--decode"])
    split = ShardSet(folder)
    split.people()
    for sample in range(len(split)):
        decode(split.jpeg(sample), split.where(sample))


def read_config(path: Path) -> None:
    raw = load_yaml(str(path))
    check_values(config_from_dict(raw, str(path)))
    from jsonargparse import ArgumentParser

    from configs.schema import parse_config

    parser = ArgumentParser(exit_on_error=False)
    add_config_options(parser)
    parse_config(parser, ["--config", str(path)])


def read_checkpoint(path: Path) -> None:
    checkpoint.trained_network(checkpoint.load_checkpoint(path))


def read_picture(path: Path) -> None:
    """As packing, training and prediction do."""
    with contextlib.suppress(PictureError):
        check_jpeg(path.read_bytes())
    with contextlib.suppress(InputError):
        decode(path.read_bytes(), str(path))
    estimator.read_picture(path)


def resume(path: Path, config: Config) -> None:
    """One step, a validation and a checkpoint, in a folder of their own."""
    state = load_resumable(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        Trainer(config, HERE, Path(folder), state).train()


def read_onnx(path: Path) -> None:
    loaded = checkpoint.load_checkpoint(path, onnx=True)
    checkpoint.evaluation_network(loaded)(torch.zeros(1, 3, 64, 64))


@contextlib.contextmanager
def alarm() -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(target: Target, folder: Path, inputs: int, seed: int, keep: Path | None) -> list[str]:
    """Faults, a line each. The same seed makes the same inputs."""
    path, began = folder / target.file, time.perf_counter()
    whole, faults, outcomes = path.read_bytes(), list[str](), {"read": 0, "refused": 0}
    for number in progress(range(inputs), target.name, "inputs"):
        rng = random.Random(f"{seed} {target.name} {number}")
        structured = target.structured if rng.random() < 0.5 else None
        data = (structured or mutate)(whole, rng)
        path.write_bytes(data)
        try:
            with alarm(), contextlib.redirect_stderr(io.StringIO()):
                target.read(path)
            outcomes["read"] += 1
        except InputError:
            outcomes["refused"] += 1
        except Exception as error:
            faults.append(f"{target.name} {number}: {type(error).__name__}: {str(error)[:200]}")
            if keep:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{target.name}-{number}-{path.name}".replace(" ", "_")).write_bytes(data)
    path.write_bytes(whole)
    target.read(path)  # the whole file is read
    seconds = time.perf_counter() - began
    print(f"{target.name}: {outcomes}, {len(faults)} faults, {seconds:.0f} s", flush=True)
    return faults


def limit_memory(extra: int = 6 << 30) -> None:
    """More is a fault: a MemoryError, or the end of this process."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + extra, size + extra))


def main() -> int:
    """Make the files, fuzz every reader, print the faults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of readers")
    parser.add_argument("--keep", type=Path, help="folder for inputs that were faults")
    options = parser.parse_args()
    cv2.utils.logging.setLogLevel(0)
    from conftest import make_tiny_set, pack_arguments

    from tools.make_shards import main as pack

    # In memory where there is such a file system: it is written to for each input.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        folder = Path(name)
        make_tiny_set(folder / "tiny")
        with contextlib.redirect_stdout(io.StringIO()):
            pack(pack_arguments(folder / "tiny", folder / "packed"))
        (folder / "files").mkdir()
        targets = prepare(folder / "tiny", folder / "packed", folder / "files")
        names = [target.name for target in targets]
        if unknown := set(options.only or ()) - set(names):
            parser.error(f"--only: no reader {', '.join(sorted(unknown))}; there are {names}")
        limit_memory()
        faults = []
        for target in targets:
            if not options.only or target.name in options.only:
                faults += fuzz(target, folder / "files", options.inputs, options.seed, options.keep)
    print("\n".join(faults) or "no faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
