"""Every reader on damaged files: success or InputError, nothing else (make fuzz does more)."""

import random
from pathlib import Path

import fuzz
import pytest

from common.errors import InputError

NAMES = ["h5", "json", "json.gz", "coco", "mat", "mat with truth", "release", "tar", "index",
         "manifest", "config", "skeleton", "checkpoint", "princeton's checkpoint", "predictions",
         "coco results", "people csv", "people json", "picture", "bad samples", "resume",
         "bearpaw's checkpoint", "safetensors", "onnx",
         *(f"picture {suffix}" for suffix in fuzz.PICTURES)]  # fmt: skip


@pytest.fixture(scope="module")
def targets(tiny_set, tiny_shards, tmp_path_factory) -> tuple[Path, dict[str, fuzz.Target]]:
    for module in ("scipy", "safetensors", "onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("fuzz")
    return folder, {t.name: t for t in fuzz.prepare(tiny_set, tiny_shards, folder)}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_300_damaged_files_are_read_or_refused(name, targets):
    folder, known = targets
    assert set(known) == set(NAMES)
    assert fuzz.fuzz(known[name], folder, 300, seed=1, keep=None) == []


def test_the_fuzzer_finds_what_a_reader_lets_through(tmp_path):
    """A reader that divides by a byte."""
    (tmp_path / "file").write_bytes(bytes(range(1, 60)))

    def read(path: Path) -> None:
        data = path.read_bytes()
        if len(data) < 40:
            raise InputError(path, "short", "long", "lengthen it")
        assert all(1 // byte >= 0 for byte in data[:40])

    faults = fuzz.fuzz(fuzz.Target("weak", "file", read), tmp_path, 200, seed=0, keep=None)
    assert 5 < len(faults) < 195 and "ZeroDivisionError" in faults[0]
    again = fuzz.fuzz(fuzz.Target("weak", "file", read), tmp_path, 200, seed=0, keep=None)
    assert again == faults, "the same seed, the same inputs"


@pytest.mark.slow
def test_every_mutation_changes_files_and_keeps_some_readable(targets):
    folder, known = targets
    for target in known.values():
        whole = (folder / target.file).read_bytes()
        rng = random.Random(0)
        ways = [fuzz.mutate, *([target.structured] if target.structured else [])]
        for way in ways:
            assert sum(way(whole, rng) != whole for _ in range(10)) >= 7, target.name
