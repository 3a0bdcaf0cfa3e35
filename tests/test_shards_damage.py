"""Helpers that damage shards, and proof that they do."""

import json
import shutil
from pathlib import Path

import pytest

from pipelines.opencv_loader import decode
from pipelines.shard_format import MANIFEST, file_sha256
from pipelines.shards import ShardSet


def damage_picture(split: Path, copy: Path, sample: int) -> Path:
    """Copy a split and overwrite one picture with noise; hashes in the manifest are made to fit."""
    shutil.copytree(split, copy)
    shards = ShardSet(copy)
    extents = shards._extents
    tar = shards.tars[extents.shard[sample]]
    tar.chmod(0o644)
    with tar.open("r+b") as file:
        file.seek(int(extents.offset["jpg"][sample]))
        file.write(b"\x13" * int(extents.size["jpg"][sample]))
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["shards"][extents.shard[sample]]["sha256"] = file_sha256(tar)
    (copy / MANIFEST).write_text(json.dumps(manifest))
    return copy


def test_one_picture_is_damaged_and_the_others_are_not(tiny_shards, tmp_path):
    shards = ShardSet(damage_picture(tiny_shards / "valid", tmp_path / "bad", sample=2))
    for sample in (0, 1, 3, 4):
        assert decode(shards.jpeg(sample), "whole").shape[2] == 3
    with pytest.raises(Exception, match="no picture"):
        decode(shards.jpeg(2), "damaged")
