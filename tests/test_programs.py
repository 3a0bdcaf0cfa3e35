"""What holds for every program: how it answers a wrong option, and how it ends after Ctrl-C."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_architecture import module, programs

from common.cli import Parser
from common.errors import InputError

PROGRAMS = sorted({*map(module, programs())} - {"train"})
"""train.py has a parser of jsonargparse; tests/test_config.py tests it."""


def parser_of(name: str) -> Parser:
    return importlib.import_module(name).make_parser()


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_can_be_printed_and_an_unknown_option_suggests_the_nearest_known_one(name):
    parser = parser_of(name)
    option = max(parser._option_string_actions, key=len)
    assert option in parser.format_help()
    with pytest.raises(InputError, match=f"did you mean {option}"):
        parser.parse_args([option[:-2] + option[-1]])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tools.make_shards", "--splits val"),
        ("tools.predict", "--box 1 2 x 4"),
        ("evaluate", "--people 0"),
        ("evaluate", "--xyzzy 3"),
        ("evaluate", "--batch 3"),
    ],
)
def test_a_wrong_value_or_an_abbreviation_is_one_error_with_its_option(name, words):
    with pytest.raises(InputError) as caught:
        parser_of(name).parse_args(words.split())
    assert words.split()[0] in caught.value.found


def interrupted(words: list[object], marker: str) -> tuple[int, str]:
    """Exit code and output of a program that gets Ctrl-C after it has printed the marker."""
    run = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert run.stdout and any(marker in line for line in run.stdout)
        time.sleep(0.3)
        os.killpg(run.pid, signal.SIGINT)
        text = run.communicate(timeout=60)[0]
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    return run.returncode, text


@pytest.mark.slow
def test_ctrl_c_ends_a_program_with_a_sentence_and_130(tiny_shards: Path, tmp_path: Path) -> None:
    words = ["tools/show_batch.py", "--shards", tiny_shards, "--people", 20_000,
             "--output", tmp_path / "x.png"]  # fmt: skip
    code, text = interrupted(words, "cropping")
    assert code == 130 and "Traceback" not in text
    assert "Interrupted; complete files are kept." in text
    assert not (tmp_path / "x.png").exists()
