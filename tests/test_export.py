"""Trained networks as safetensors and ONNX: they answer as the checkpoint does, or are refused."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_trainer, steps, tiny_config
from test_predict import read_json

import evaluate
from common.errors import InputError
from model import checkpoint
from model.export import OnnxNetwork
from tools import export_onnx, predict

needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))),
    reason="no onnx, onnxscript, onnxruntime (pip install -e '.[export]')",
)
needs_safetensors = pytest.mark.skipif(
    not importlib.util.find_spec("safetensors"),
    reason="no safetensors (pip install -e '.[export]')",
)


@pytest.fixture(scope="module")
def trained(tiny_shards, tmp_path_factory) -> Path:
    """A checkpoint with averaged weights, which differ from the trained ones."""
    config = tiny_config(tiny_shards, optim={"ema_decay": 0.5})
    trainer = make_trainer(config, tmp_path_factory.mktemp("runs") / "tiny")
    steps(trainer, 2)
    trainer.save(["best.pt"])
    return trainer.folder / "best.pt"


@pytest.fixture(scope="module")
def plain_onnx(trained, tmp_path_factory) -> Path:
    """Its graph without the flip test."""
    path = tmp_path_factory.mktemp("onnx") / "t.onnx"
    run(export_onnx, trained, "--onnx", path)
    return path


def run(program, *words: object) -> None:
    program.main([*map(str, words)])


def found_by_both(path: Path, tiny_set: Path, folder: Path, *more: str) -> np.ndarray:
    """(2, 5, 16, 3) joints: predict.py's of whole pictures, evaluate.py's of the annotation."""
    own = {100 + i for i in range(5)}
    pictures = sorted(p for p in (tiny_set / "images").iterdir() if int(p.stem) in own)
    run(predict, "--checkpoint", path, *pictures, "--device", "cpu",
            "--save-predictions", folder / "p.json", *more)  # fmt: skip
    run(evaluate, "--checkpoint", path, "--images", tiny_set / "images",
            "--annotations", tiny_set / "annot" / "valid.h5", "--device", "cpu", "--workers", 0,
            "--save-predictions", folder / "e.json", *more)  # fmt: skip
    return np.stack([read_json(folder / name)[1] for name in ("p.json", "e.json")])


@needs_safetensors
def test_safetensors_are_the_checkpoint_without_the_run(trained, tiny_set, tmp_path):
    out = tmp_path / "out" / "t.safetensors"
    run(export_onnx, trained, "--safetensors", out)
    before, after = checkpoint.load_checkpoint(trained), checkpoint.load_checkpoint(out)
    assert checkpoint.header(before) == checkpoint.header(after)
    assert after.weights.keys() == before.averaged.keys() and len(after.weights) > 100
    for name, tensor in after.weights.items():
        assert torch.equal(tensor, before.averaged[name]), name
    assert not torch.equal(before.weights["heads.0.weight"], before.averaged["heads.0.weight"])
    assert after.optimizer is None and after.run is None
    np.testing.assert_array_equal(
        found_by_both(trained, tiny_set, tmp_path),
        found_by_both(out, tiny_set, tmp_path),
    )


def check_same_answers(trained: Path, graph: Path, tiny_set: Path, folder: Path) -> None:
    """A checkpoint and its graph, through both programs."""
    theirs = found_by_both(trained, tiny_set, folder)
    mine = found_by_both(graph, tiny_set, folder)
    assert theirs.shape == (2, 5, 16, 3)
    np.testing.assert_allclose(mine[..., 2], theirs[..., 2], atol=1e-5)
    # A barely trained network's maps are nearly flat, so that a hair's breadth can move a maximum.
    assert (np.abs(mine - theirs).max(axis=-1) < 0.05).mean() > 0.9
    unflipped = found_by_both(trained, tiny_set, folder, "--no-flip")
    assert np.abs(mine[..., 2] - unflipped[..., 2]).max() > 1e-4


@needs_onnx
def test_an_onnx_predicts_and_evaluates_as_its_checkpoint(trained, plain_onnx, tiny_set, tmp_path):
    assert checkpoint.load_checkpoint(plain_onnx, onnx=True).config.eval.flip
    check_same_answers(trained, plain_onnx, tiny_set, tmp_path)


@needs_onnx
@pytest.mark.slow
def test_an_onnx_with_the_flip_test_inside_gets_no_second_one(trained, tiny_set, tmp_path):
    run(export_onnx, trained, "--onnx", tmp_path / "t.onnx", "--flip")
    assert not checkpoint.load_checkpoint(tmp_path / "t.onnx", onnx=True).config.eval.flip
    check_same_answers(trained, tmp_path / "t.onnx", tiny_set, tmp_path)


@needs_onnx
def test_a_graph_that_answers_otherwise_is_not_kept(trained, plain_onnx, tmp_path, monkeypatch):
    def write_anothers(path, network, facts):
        shutil.copy(plain_onnx, path)
        network.network.heads[0].bias.data += 1e-3

    monkeypatch.setattr(export_onnx, "write_onnx", write_anothers)
    with pytest.raises(InputError, match=r"differ from torch's by 1\.0e-03"):
        run(export_onnx, trained, "--onnx", tmp_path / "t.onnx")
    assert list(tmp_path.iterdir()) == []


@needs_onnx
def test_metadata_that_is_not_utf_8_is_refused(plain_onnx, tmp_path):
    data = plain_onnx.read_bytes()
    assert b'"skeleton": {' in data
    (tmp_path / "a.onnx").write_bytes(data.replace(b'"skeleton": {', b'"skel\xff\xffon": {'))
    with pytest.raises(InputError, match="no metadata"):
        checkpoint.load_checkpoint(tmp_path / "a.onnx", onnx=True)


def test_an_onnx_is_not_taken_for_weights(tmp_path):
    (tmp_path / "t.onnx").write_bytes(b"whatever")
    with pytest.raises(InputError, match="has no weights"):
        checkpoint.load_checkpoint(tmp_path / "t.onnx")


@needs_onnx
@needs_safetensors
@pytest.mark.parametrize("name", ["t.onnx", "t.safetensors"])
def test_noise_is_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"noise")
    with pytest.raises(InputError, match="not readable"):
        checkpoint.load_checkpoint(tmp_path / name, onnx=True)


@needs_safetensors
@pytest.mark.parametrize("metadata", [{"format": "pt"}, {"stacked_hourglass": "[" * 100_000}])
def test_safetensors_of_other_programs_are_refused(metadata, tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, tmp_path / "t.safetensors", metadata)
    with pytest.raises(InputError, match="no metadata"):
        checkpoint.load_checkpoint(tmp_path / "t.safetensors")


@pytest.mark.parametrize(
    ("module", "name"), [("onnxruntime", "t.onnx"), ("safetensors", "t.safetensors")]
)
def test_a_missing_package_says_the_command_that_installs_it(module, name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=f"pip install {module}"):
        checkpoint.load_checkpoint(tmp_path / name, onnx=True)


def test_what_cannot_be_written_is_refused(trained, tmp_path, monkeypatch):
    cases = {
        (): "nothing to write",
        ("--onnx", tmp_path / "t.pt"): "no file of this kind",
        ("--safetensors", tmp_path): "no file of this kind",
    }
    for words, found in cases.items():
        with pytest.raises(InputError, match=found):
            run(export_onnx, trained, *words)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install onnx onnxscript onnxruntime"):
        run(export_onnx, trained, "--onnx", tmp_path / "t.onnx")


@needs_safetensors
def test_the_facts_can_be_read_by_anybody(trained, tmp_path):
    """By the format's own definition: a length, a JSON header, the tensors."""
    run(export_onnx, trained, "--safetensors", tmp_path / "t.safetensors")
    data = (tmp_path / "t.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    facts = json.loads(header["__metadata__"]["stacked_hourglass"])
    assert facts["skeleton"]["names"][0] == "r_ankle"
    assert facts["config"]["data"]["input_px"] == 64


@needs_onnx
def test_pictures_of_another_size_than_the_graphs_are_refused(plain_onnx):
    with pytest.raises(InputError, match="cannot be run"):
        OnnxNetwork(plain_onnx)(torch.zeros(1, 3, 96, 96))
