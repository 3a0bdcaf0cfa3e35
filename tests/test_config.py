"""Settings: every field reachable from YAML and the command line, every mistake named."""

import re
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from common.errors import InputError
from configs.schema import (
    Config,
    add_config_options,
    as_dict,
    config_from_dict,
    parse_config,
    save_yaml,
)

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def parse(*arguments: str) -> Config:
    parser = ArgumentParser(exit_on_error=False)
    add_config_options(parser)
    return parse_config(parser, list(arguments))[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_config_of_the_project_is_valid_and_named_after_its_file(path):
    assert len(CONFIGS) >= 4
    assert parse("--config", str(path)).train.name == path.stem


@pytest.mark.parametrize(("name", "stacks"), [("2hg", 2), ("8hg", 8)])
def test_the_princeton_recipe(name, stacks):
    config = parse("--config", f"configs/{name}.yaml")
    assert (config.model.stacks, config.model.width, config.data.input_px) == (stacks, 256, 256)
    assert (config.data.preset, config.heatmaps.rule, config.loss.unmarked) == (
        "princeton", "princeton", "empty",
    )  # fmt: skip
    optim, train = config.optim, config.train
    assert (optim.name, optim.lr, optim.weight_decay, config.data.batch_size) == (
        "adam",
        1e-3,
        0,
        16,
    )
    assert (train.steps, train.steps_per_epoch) == (200_000, 1_000)
    from training.optimizer import learning_rate

    rates = [learning_rate(optim, step, train.steps) for step in (0, 99_999, 100_000, 199_999)]
    assert rates == pytest.approx([1e-3, 1e-3, 2e-4, 2e-4])


def test_the_command_line_overrides_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "optim:\n  lr: 0.5\n  clip_norm: 2.0\nmodel:\n  stem: [8, 16, 16]\n"
    )
    config = parse("--config", str(tmp_path / "c.yaml"), "--optim.lr", "1e-3")
    assert (config.optim.lr, config.optim.clip_norm, config.model.stem) == (1e-3, 2.0, (8, 16, 16))


def test_a_saved_config_repeats_itself(tmp_path):
    config = parse("--optim.milestones", "[3, 7]", "--data.preset", "newell")
    save_yaml(config, tmp_path / "c.yaml")
    assert parse("--config", str(tmp_path / "c.yaml")) == config
    assert config_from_dict(as_dict(config), "here") == config
    assert yaml.safe_load((tmp_path / "c.yaml").read_text())["optim"]["milestones"] == [3, 7]


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [("optim:\n  learning_rat: 1\n", "optim.learning_rat", "optim."),
     ("optm:\n  lr: 1\n", "optm", "optim"),
     ("model:\n  stack: 4\n", "model.stack", "model.stacks")],
)  # fmt: skip
def test_an_unknown_key_in_yaml_is_fatal_and_the_nearest_is_named(tmp_path, text, key, nearest):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        parse("--config", str(tmp_path / "c.yaml"))
    assert key in caught.value.found and nearest in caught.value.next_step
    assert caught.value.where == str(tmp_path / "c.yaml")


def test_an_unknown_option_is_fatal_and_the_nearest_is_named():
    with pytest.raises(InputError, match=r"did you mean --train\.steps\?"):
        parse("--train.stepz", "3")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--optim.lr", "fast"], "optim.lr"), (["--data.preset", "hrnett"], "data.preset"),
     (["--model.stem", "[1, 2]"], "model.stem"), (["--train.steps", "1.5"], "train.steps"),
     (["--optim.lr", "0"], "optim.lr"), (["--optim.lr", "nan"], "optim.lr"),
     (["--model.width", "7"], "model.width"), (["--data.input_px", "100"], "data.input_px"),
     (["--train.name", "../x"], "train.name"), (["--optim.ema_decay", "1"], "optim.ema_decay"),
     (["--eval.people", "-1"], "eval.people"), (["--optim.weight_decay", "-1"], "weight_decay"),
     (["--train.seed", "-1"], "train.seed"), (["--model.stem", "[33, 1, 64]"], "model.stem")],
)  # fmt: skip
def test_a_wrong_type_or_value_is_fatal_and_named(arguments, named):
    with pytest.raises(InputError) as caught:
        parse(*arguments)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("words", "expected", "advice"),
    [("--data.preset hrne", "one of princeton, newell, hrnet, mild, none", "did you mean hrnet?"),
     ("--data.preset=HRNet", "one of princeton, newell, hrnet, mild, none", "did you mean hrnet?"),
     ("--train.device gpu", "one of auto, cuda, cpu", "did you mean cuda?"),
     ("--train.precision bfloat16", "one of auto, bf16, fp16, fp32", "did you mean bf16?"),
     ("--heatmaps.rule xyz", "one of exact, princeton, hrnet", "give one of them"),
     ("--optim.lr fast", "a number", "correct it"),
     ("--train.steps 1.5", "a whole number", "correct it"),
     ("--data.mirror maybe", "true or false", "correct it"),
     ("--model.stem [1,2]", "a list of 3 whole numbers, such as [64, 128, 128]", "correct it"),
     ("--optim.milestones [a]", "a list of whole numbers, such as [100000]", "correct it")],
)  # fmt: skip
def test_a_wrong_value_is_told_with_its_option_what_fits_and_the_nearest(words, expected, advice):
    option, value = re.split("[ =]", words)
    with pytest.raises(InputError) as caught:
        parse(*words.split())
    error = caught.value
    assert (error.where, error.expected, error.next_step) == (option, expected, advice)
    assert error.found.strip("'[]") == value.strip("[]").replace(",", ", ")


def test_a_wrong_value_of_a_file_is_told_with_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("data:\n  preset: hrne\n")
    with pytest.raises(InputError, match=r"(?s)c\.yaml: data\.preset\n.*did you mean hrnet"):
        parse("--config", str(tmp_path / "c.yaml"))
    with pytest.raises(InputError, match=r"(?s)here: train\.device\n.*did you mean cuda"):
        config_from_dict({"train": {"device": "gpu"}}, "here")


@pytest.mark.parametrize("text", ["- a\n- b\n", "optim: [1", "optim: 3\n", "\x00", "&a [*a]"])
def test_yaml_that_is_no_config_is_fatal(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=r"c\.yaml"):
        parse("--config", str(tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    "text",
    ["optim:\n  lr:\n", "train: {name: null}", "optim: {clip_norm: ~}",
     "a: 2001-99-99", "a: " + "9" * 5000, "a: &x [1]\nb: *x"],
)  # fmt: skip
def test_yaml_with_holes_dates_that_are_none_and_aliases_is_fatal(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError):
        parse("--config", str(tmp_path / "c.yaml"))


def test_a_missing_config_file_is_fatal():
    with pytest.raises(InputError, match="no such file"):
        parse("--config", "configs/nowhere.yaml")


def test_help_tells_what_each_field_is(capsys):
    parser = ArgumentParser(exit_on_error=False)
    add_config_options(parser)
    parser.print_help()
    text = " ".join(capsys.readouterr().out.split())
    assert "People per rank and step." in text and "Highest learning rate." in text
