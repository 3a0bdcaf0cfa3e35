"""What holds for every program: its help, its answer to a wrong option, its end after Ctrl-C."""

import argparse
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import train as train_program
from common.cli import Parser
from common.errors import InputError
from configs.schema import Config, parse_config
from pipelines import loader
from pipelines.codec import codec_of
from pipelines.shards import ShardSet

PROGRAMS = ["evaluate", "benchmarks.throughput", "benchmarks.gpu_loader", "benchmarks.gpu_train",
            "benchmarks.gpu_accuracy", "benchmarks.packing", "tools.make_shards",
            "tools.make_synthetic", "tools.show_batch", "tools.convert_checkpoint",
            "tools.compare_decoders", "tools.predict", "tools.export_onnx",
            "tools.check_shards"]  # fmt: skip
FILES = [ROOT / (name.replace(".", "/") + ".py") for name in [*PROGRAMS, "train"]]


def parser_of(name: str) -> Parser:
    return importlib.import_module(name).make_parser()


def test_no_program_is_forgotten():
    found = {p for folder in (".", "tools", "benchmarks") for p in (ROOT / folder).glob("*.py")}
    assert {p for p in found if "run_main(main" in p.read_text()} == set(FILES)


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_is_a_sentence_groups_of_explained_options_and_an_example(name):
    parser = parser_of(name)
    description = parser.description or ""
    assert description[0].isupper() and re.fullmatch(r"[^.]+(\.(\w+|\s)[^.]*)*\.", description)
    assert re.search(rf"example:\s+python {name.replace('.', '/')}\.py ", parser.epilog or "")
    for action in parser._actions:
        assert action.help, action.option_strings
    groups = [g for g in parser._action_groups if g._group_actions]
    options = sum(len(g._group_actions) for g in groups)
    assert len(groups) >= 3 or options <= 5


def test_the_help_of_training_explains_every_setting_in_groups_with_an_example():
    parser = train_program.make_parser()
    text = " ".join(parser.format_help().split())
    assert text.count("default: ") > 40 and "example: python train.py --config" in text
    for action in parser._actions:
        assert action.help or action.nargs == 0 or "." not in action.dest, action.dest
    titles = " ".join(str(group.title) for group in parser._action_groups)
    assert all(word in titles for word in ("loaded", "network", "Optimizer", "Validation"))


@pytest.mark.parametrize("name", PROGRAMS)
def test_defaults_are_told(name):
    parser = parser_of(name)
    text = " ".join(parser.format_help().split())
    for action in parser._actions:
        told = isinstance(action.default, (int, str)) and not isinstance(action.default, bool)
        if told and action.default != argparse.SUPPRESS:
            assert str(action.default) in text and "default" in text, action


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_unknown_option_names_the_nearest_known_one(name):
    option = max(parser_of(name)._option_string_actions, key=len)
    with pytest.raises(InputError, match=f"did you mean {option}"):
        parser_of(name).parse_args([option[:-2] + option[-1]])


@pytest.mark.parametrize(
    ("name", "words", "expected", "advice"),
    [("tools.make_shards", "--splits val", "one of train, valid", "did you mean valid?"),
     ("tools.make_shards", "--splits train,valid", "one of train, valid",
      "put spaces between them: --splits train valid"),
     ("tools.predict", "--device gpu", "one of auto, cuda, cpu", "did you mean cuda?"),
     ("tools.predict", "--box 1 2 x 4", "a number", "see predict.py --help"),
     ("evaluate", "--people none", "a whole number from 1 on", "see evaluate.py --help"),
     ("evaluate", "--people 0", "a whole number from 1 on", "see evaluate.py --help")],
)  # fmt: skip
def test_a_wrong_value_is_told_with_its_option_what_fits_and_the_nearest(
    name, words, expected, advice
):
    with pytest.raises(InputError) as caught:
        parser_of(name).parse_args(words.split())
    error = caught.value
    assert (error.where, error.expected, error.next_step) == (words.split()[0], expected, advice)
    assert error.found.strip("'") in words


def test_an_option_like_none_of_them_points_to_the_help():
    with pytest.raises(InputError, match=r"see evaluate\.py --help"):
        parser_of("evaluate").parse_args(["--xyzzy", "3"])


@pytest.mark.parametrize("words", [["--data", "{}"], ["--data={}"]])
def test_a_file_of_one_section_names_the_nearest_setting_too(words, tmp_path):
    (tmp_path / "data.yaml").write_text("shardz: data/here\n")
    given = [word.format(tmp_path / "data.yaml") for word in words]
    with pytest.raises(InputError, match=r"did you mean data\.shards"):
        parse_config(train_program.make_parser(), given)
    (tmp_path / "data.yaml").write_text("data:\n  shards: data/here\n")
    with pytest.raises(InputError, match="use --config"):
        parse_config(train_program.make_parser(), given)
    (tmp_path / "data.yaml").write_text("shards: data/here\n")
    assert parse_config(train_program.make_parser(), given)[0].data.shards == "data/here"


def test_evaluating_by_dali_without_it_says_what_installs_it(tiny_shards, monkeypatch):
    monkeypatch.setattr(loader, "dali_is_installed", lambda: False)
    split = ShardSet(tiny_shards / "valid")
    codec = codec_of(Config().data, Config().heatmaps, split.manifest.skeleton)
    with pytest.raises(InputError, match="pip install nvidia-dali-cuda120"):
        loader.evaluation_batches(
            split, np.arange(2), codec, loader="dali", device=torch.device("cpu"),
            batch_size=2, workers=0,
        )  # fmt: skip


def interrupted(words: list[object], ready) -> tuple[int, str]:
    """Exit code and output of a program that gets Ctrl-C, as from a terminal, once it is ready."""
    run = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        ready(run)
        os.killpg(run.pid, signal.SIGINT)
        text = run.communicate(timeout=60)[0]
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    return run.returncode, text


def says(marker: str):
    """Waits for the line that the program prints when its work begins."""

    def ready(run: subprocess.Popen) -> None:
        assert run.stdout
        for line in run.stdout:
            if marker in line:
                time.sleep(0.3)
                return
        raise AssertionError(f"it ended without {marker!r}")

    return ready


def test_ctrl_c_ends_make_synthetic_with_a_sentence(tmp_path):
    def ready(run: subprocess.Popen) -> None:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "s.partial" / "images").glob("*.jpg")):
            assert time.monotonic() < deadline and run.poll() is None
            time.sleep(0.05)

    words = ["tools/make_synthetic.py", "--output", tmp_path / "s", "--train", 9000, "--workers", 2]
    code, text = interrupted(words, ready)
    assert (code, text.strip()) == (130, "Interrupted; files that were complete are kept.")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("program", ["show_batch", "evaluate", "throughput"])
def test_ctrl_c_ends_a_program_with_a_sentence(program, tiny_shards, tmp_path):
    words: list[object] = {
        "show_batch": ["tools/show_batch.py", "--shards", tiny_shards, "--people", 20_000,
                       "--output", tmp_path / "x.png"],
        "evaluate": ["evaluate.py", "--checkpoint", fresh_checkpoint(tmp_path), "--shards",
                     tiny_shards, "--device", "cpu", "--workers", 1],
        "throughput": ["benchmarks/throughput.py", "--device", "cpu", "--suites", "train"],
    }[program]  # fmt: skip
    marker = {
        "show_batch": "cutting out",
        "evaluate": "predicting 5 people",
        "throughput": "timing",
    }
    code, text = interrupted(words, says(marker[program]))
    assert code == 130 and "Traceback" not in text
    assert "Interrupted; files that were complete are kept." in text
    assert not (tmp_path / "x.png").exists()


def fresh_checkpoint(folder: Path) -> Path:
    """A network of full size without training."""
    from configs.skeleton import MPII
    from model import checkpoint

    network = checkpoint.build_network(Config(), MPII.joint_count)
    made = checkpoint.Checkpoint(
        path=folder / "fresh.pt",
        config=Config(),
        skeleton=MPII,
        step=0,
        weights=network.state_dict(),
        averaged={},
        optimizer=None,
        run=None,
    )
    checkpoint.save_checkpoint(made.path, made)
    return folder / "fresh.pt"
