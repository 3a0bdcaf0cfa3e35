"""Settings: every field can be set from YAML and the command line, every mistake is named."""

from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from common.errors import InputError
from configs.schema import (
    FIXED_ON_RESUME,
    FREE_ON_RESUME,
    Config,
    add_config_options,
    as_dict,
    config_from_dict,
    flat,
    parse_config,
    save_yaml,
)

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def parse(*arguments: object) -> Config:
    parser = ArgumentParser(exit_on_error=False)
    add_config_options(parser)
    return parse_config(parser, list(map(str, arguments)))[0]


def test_every_config_of_the_project_is_valid_and_named_after_its_file():
    assert len(CONFIGS) >= 4
    assert [parse("--config", path).train.name for path in CONFIGS] == [p.stem for p in CONFIGS]


@pytest.mark.parametrize(("name", "stacks"), [("2hg", 2), ("8hg", 8)])
def test_the_princeton_recipe(name, stacks):
    """Values of princeton-vl/pytorch_stacked_hourglass, task/pose.py."""
    config = flat(as_dict(parse("--config", f"configs/{name}.yaml")))
    expected = {
        "model.stacks": stacks, "model.width": 256, "data.input_px": 256, "data.batch_size": 16,
        "data.preset": "princeton", "heatmaps.rule": "princeton", "loss.unmarked": "empty",
        "optim.name": "adam", "optim.lr": 1e-3, "optim.schedule": "step", "optim.gamma": 0.2,
        "optim.milestones": [100_000], "train.steps": 200_000, "train.steps_per_epoch": 1_000,
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected


def test_the_command_line_overrides_the_file(tmp_path):
    text = "optim:\n  lr: 0.5\n  clip_norm: 2.0\nmodel:\n  stem: [8, 16, 16]\n"
    (tmp_path / "c.yaml").write_text(text)
    config = parse("--config", tmp_path / "c.yaml", "--optim.lr", "1e-3")
    assert (config.optim.lr, config.optim.clip_norm, config.model.stem) == (1e-3, 2.0, (8, 16, 16))


def test_a_saved_config_repeats_itself(tmp_path):
    config = parse("--optim.milestones", "[3, 7]", "--data.preset", "newell")
    save_yaml(config, tmp_path / "c.yaml")
    assert parse("--config", tmp_path / "c.yaml") == config
    assert config_from_dict(as_dict(config), "here") == config
    assert yaml.safe_load((tmp_path / "c.yaml").read_text())["optim"]["milestones"] == [3, 7]


def test_what_may_change_on_resume_are_settings_and_no_setting_is_both():
    assert flat(as_dict(Config())).keys() >= FIXED_ON_RESUME | FREE_ON_RESUME
    assert not FIXED_ON_RESUME & FREE_ON_RESUME


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("optim:\n  learning_rat: 1\n", "optim.learning_rat", "correct the name"),
        ("optim:\n  learning_rate: 1\n", "optim.learning_rate", "did you mean optim.lr?"),
        ("lr: 1\n", "lr", "did you mean optim.lr?"),
        ("optm:\n  lr: 1\n", "optm", "did you mean optim?"),
        ("model:\n  stack: 4\n", "model.stack", "did you mean model.stacks?"),
    ],
)
def test_an_unknown_key_in_yaml_is_an_error_that_suggests_the_nearest(tmp_path, text, key, nearest):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        parse("--config", tmp_path / "c.yaml")
    assert key in caught.value.found and nearest in caught.value.next_step
    assert caught.value.where == str(tmp_path / "c.yaml")


def test_an_unknown_option_is_an_error_that_suggests_the_nearest():
    for option, nearest in {"train.stepz": "train.steps", "lr": "optim.lr"}.items():
        with pytest.raises(InputError, match=rf"did you mean --{nearest}\?"):
            parse(f"--{option}", 3)
    with pytest.raises(InputError, match="with --config"):
        parse(CONFIGS[0])


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("optim.lr", "fast", "float"),
        ("optim.lr", "0", "above 0"),
        ("optim.lr", ".nan", "above 0"),
        ("optim.ema_decay", "1", "below 1"),
        ("optim.weight_decay", "-1", "0 or more"),
        ("data.preset", "hrnett", "one of princeton, newell, hrnet"),
        ("data.mirror", "maybe", "bool"),
        ("data.input_px", "100", "a multiple of 64"),
        ("data.batch_size", "70000", "65,536 at most"),
        ("model.stem", "[1, 2]", "tuple[int, int, int]"),
        ("model.stem", "[33, 2, 64]", "even numbers"),
        ("model.width", "7", "even numbers"),
        ("train.steps", "1.5", "int"),
        ("train.name", "../x", "a folder name"),
        ("data.shards", "{a: 1, b: 0}", "weights above 0"),
        ("data.shards", "{a: 1, a/: 2}", "each folder once"),
        ("data.shards", "{a 1, b: 2}", "{FOLDER: WEIGHT, ...}"),
    ],
)
def test_a_wrong_value_is_an_error_with_the_setting_and_what_fits(name, value, expected):
    with pytest.raises(InputError) as caught:
        parse(f"--{name}", value)
    assert name in str(caught.value) and expected in str(caught.value)


def test_a_wrong_value_in_a_file_is_an_error_with_the_setting(tmp_path):
    (tmp_path / "c.yaml").write_text("data:\n  preset: hrne\n")
    with pytest.raises(InputError, match=r"c\.yaml: data\.preset"):
        parse("--config", tmp_path / "c.yaml")
    with pytest.raises(InputError, match=r"(?s)here: train\.device.*did you mean cuda"):
        config_from_dict({"train": {"device": "gpu"}}, "here")


@pytest.mark.parametrize(
    "text",
    ["- a\n- b\n", "optim: [1", "optim: 3\n", "\x00", "optim:\n  lr:\n", "train: {name: null}"],
)
def test_yaml_that_is_no_config_is_an_error(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError):
        parse("--config", tmp_path / "c.yaml")
    with pytest.raises(InputError, match="no such file"):
        parse("--config", tmp_path / "nowhere.yaml")
