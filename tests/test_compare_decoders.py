"""The comparison of decoders counts correctly, and names what it could not compare."""

import numpy as np
import pytest
import torch
from helpers import make_trainer, tiny_config

from tools import compare_decoders


def test_differences_by_hand():
    a = np.zeros((2, 2, 3), dtype=np.uint8)
    b = a.copy()
    b[0, 0] = [3, 0, 4]
    b[1, 1, 1] = 255
    found = compare_decoders.compare([a, a], [b, a])
    assert found.pixels == 2 / 8
    assert found.total == 3 + 4 + 255 and found.largest == 255
    assert found.rms == pytest.approx(((9 + 16 + 255**2) / 24) ** 0.5)


def test_every_decoder_at_hand_reads_the_same_pictures(tiny_shards, capsys):
    compare_decoders.main(["--shards", str(tiny_shards / "train")])
    text = capsys.readouterr().out
    decoders, missing = compare_decoders.find_decoders()
    assert "9 pictures" in text  # of 12 people
    pairs = len(decoders) * (len(decoders) - 1) // 2
    assert pairs >= 1 and text.count(" - ") == pairs
    assert all(f"not compared: {name}" in text for name in missing)
    if not torch.cuda.is_available():
        assert "nvjpeg" in missing


def test_pckh_is_printed_for_each_decoder(tiny_shards, tmp_path, capsys):
    make_trainer(tiny_config(tiny_shards), tmp_path).save(["best.pt"])
    words = ["--shards", tiny_shards / "valid", "--checkpoint", tmp_path / "best.pt"]
    compare_decoders.main([str(word) for word in words])
    table = capsys.readouterr().out.split("PCKh of")[1]
    assert all(name in table for name in compare_decoders.find_decoders()[0])
