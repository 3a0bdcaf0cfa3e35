"""The tables of docs/results.md name the very keys of the files that are written."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from helpers import make_trainer, tiny_config
from test_evaluate import command

PAGE = ROOT / "docs" / "results.md"


@pytest.fixture(scope="module")
def written(tiny_shards, tmp_path_factory) -> Path:
    """A run, and its numbers and predictions in out/."""
    folder = tmp_path_factory.mktemp("run")
    make_trainer(tiny_config(tiny_shards, train={"steps": 4, "log_every": 2}), folder).train()
    done = command("--checkpoint", folder / "best.pt", "--shards", tiny_shards, "--json",
                   folder / "n.json", "--save-predictions", folder / "p.json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def documented(heading: str) -> set[str]:
    """What the first cells of the table under a heading name."""
    section = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert cells
    return {key for cell in cells for key in re.findall(r"`([^`]+)`", cell)}


def keys(value: Any, names: dict[str, str], path: str = "") -> set[str]:
    """Dotted keys of the leaves; lists are leaves, a list of dicts is one and each of them."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {path}.union(*(keys(each, names, path) for each in value))
    if not isinstance(value, dict):
        return {path}
    inner = {f"{path}.{names.get(key, key)}".lstrip("."): each for key, each in value.items()}
    return set().union(*(keys(each, names, name) for name, each in inner.items()))


def test_numbers_of_an_evaluation(written):
    numbers = json.loads((written / "n.json").read_text())
    assert set(numbers) == documented("`evaluate.py --json`")
    result = numbers["network"]
    names = {"0.5": "T", "0.1": "T"}
    names |= dict.fromkeys(result["joint_names"], "JOINT")
    names |= dict.fromkeys(result["details"]["groups"], "GROUP")
    assert keys(result, names) == documented("A result")
    assert len(result["person_error_percentiles"]) == 101


def test_predictions(written):
    entries = json.loads((written / "p.json").read_text())
    assert {key for entry in entries for key in entry} == documented("Predictions")


def test_lines_of_a_run(written):
    lines = [json.loads(line) for line in (written / "metrics.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"train", "valid"}
    assert {key for line in lines for key in line} == documented("`metrics.jsonl`")
