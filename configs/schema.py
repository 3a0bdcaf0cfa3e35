"""Everything that a run can be told: a frozen dataclass a concern, a docstring under each field.

`load_config` reads a YAML file and dotted command-line overrides (`--optim.lr 1e-3`) into a Config.
An unknown key is fatal and the message names the nearest known one. jsonargparse checks the types.
"""

import dataclasses
import difflib
import functools
import itertools
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from common.cli import check_options, wrong_choice
from common.errors import InputError
from common.files import read_yaml, write_atomic

TrackerName = Literal["none", "wandb", "trackio"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the people come from and how they are loaded."""

    shards: str = "data/shards/mpii"
    """Folder with the splits train and valid, made by tools/make_shards.py."""
    loader: Literal["auto", "dali", "opencv"] = "auto"
    """auto: dali on a GPU, opencv on a CPU."""
    batch_size: int = 16
    """People per rank and step."""
    workers: int = 4
    """Worker processes of the OpenCV path, threads of DALI, per rank."""
    shuffle_buffer: int = 1024
    """People whom DALI holds to draw from, per rank."""
    input_px: int = 256
    """Side of the square that the network sees."""
    preset: Literal["princeton", "newell", "hrnet", "mild", "none"] = "hrnet"
    """Augmentation, by the code it is named after (docs/conventions.md)."""
    cache_mb: int = 0
    """GPU memory (MB) in which DALI keeps decoded pictures; 0 decodes them each time."""
    mirror: bool = True
    """Let the preset mirror pictures; false for people whose left and right differ in looks."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """A training picture that cannot be decoded: end the run, or put a neighbour in its place."""
    max_bad_samples: int = 20
    """With `skip`, the run stops beyond so many damaged pictures."""


@dataclass(frozen=True, kw_only=True)
class HeatmapsConfig:
    """How joints become target heatmaps and back."""

    rule: Literal["exact", "princeton", "hrnet"] = "exact"
    """Discretisation, for rendering and decoding alike."""
    sigma: float = 1.0
    """Heatmap px at 64 x 64; hrnet's own is 2."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network's size. The number of joints comes with the data."""

    stacks: int = 2
    """Hourglasses one after another."""
    width: int = 256
    """Channels in the hourglasses."""
    depth: int = 4
    """How often an hourglass halves the resolution."""
    stem: tuple[int, int, int] = (64, 128, 128)
    """Channels after the first convolution and the first two residuals."""
    checkpoint_activations: bool = False
    """Keep no activations inside the hourglasses and compute them twice: less memory, slower."""
    input_mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """RGB in 0..1 that is subtracted from the picture."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Details of the loss."""

    unmarked: Literal["empty", "ignore"] = "empty"
    """A joint that is not marked counts as an empty map, or not at all."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning rate."""

    name: Literal["adam", "rmsprop"] = "adam"
    """Optimizer; its fused form where the device has one."""
    lr: float = 1e-3
    """Highest learning rate."""
    weight_decay: float = 0.0
    """L2 penalty, as torch's Adam and RMSprop define it."""
    schedule: Literal["constant", "step", "cosine"] = "step"
    """How the learning rate falls after the warm-up."""
    milestones: tuple[int, ...] = (100_000,)
    """Steps at which `step` multiplies the rate by `gamma`."""
    gamma: float = 0.2
    """Factor at each milestone."""
    final_fraction: float = 0.01
    """What `cosine` leaves of the rate at the last step."""
    warmup_steps: int = 0
    """Steps of linear rise from 0."""
    clip_norm: float = 0.0
    """Largest norm of the gradient; 0 does not clip."""
    accumulate: int = 1
    """Batches per step of the optimizer."""
    ema_decay: float = 0.0
    """Decay per step of the averaged weights, which are then those evaluated; 0 keeps none."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, precision and bookkeeping of a run."""

    name: str = "hourglass"
    """The run's folder is `out`/`name`."""
    out: str = "runs"
    """Folder of runs."""
    steps: int = 200_000
    """Steps of the optimizer in all."""
    steps_per_epoch: int = 1_000
    """Steps between validations and checkpoints, the same on every rank."""
    keep_last: int = 2
    """Newest checkpoints that are kept, last.pt among them; best.pt is kept besides."""
    max_minutes: float = 0.0
    """Stop after this time since the start, with validation and checkpoint; 0 sets no limit."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic; auto: bf16 if the device computes in it, else fp16 on a GPU and fp32 on a CPU."""
    compile: bool = False
    """Run the network through torch.compile."""
    fuse_targets: bool = False
    """Render the targets inside the compiled loss, so that heatmaps are never written."""
    profile_steps: int = 0
    """Write what so many of the first steps spent their time on into trace.json; 0 does not."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: a GPU where there is one."""
    seed: int = 0
    """Of weights, order and draws."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    tracker: TrackerName = "none"
    """Send the numbers and pictures of the log to Weights & Biases or to Trackio as well."""
    max_bad_steps: int = 20
    """Steps with a loss or gradient that is not finite, in a row, after which the run stops."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Validation during training."""

    batch_size: int = 32
    """People at a time."""
    flip: bool = True
    """Average with the prediction for the mirrored picture."""
    people: int = 0
    """Validate on the first so many people of the annotation; 0 takes all."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    data: DataConfig = field(default_factory=DataConfig)
    heatmaps: HeatmapsConfig = field(default_factory=HeatmapsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


# What a resumed run may not change, for it would be another run. Other changes are remarked on,
# but for those that only say where and how long.
FIXED_ON_RESUME = {
    *(f"model.{f.name}" for f in dataclasses.fields(ModelConfig)
      if f.name != "checkpoint_activations"),
    *(f"heatmaps.{f.name}" for f in dataclasses.fields(HeatmapsConfig)),
    *(f"loss.{f.name}" for f in dataclasses.fields(LossConfig)),
    "data.batch_size", "data.input_px", "data.preset", "data.mirror",
    "optim.name", "optim.accumulate", "train.seed",
}  # fmt: skip
FREE_ON_RESUME = {
    "data.shards", "data.workers", "data.loader", "train.name", "train.out", "train.steps",
    "train.max_minutes", "train.device", "train.log_every", "train.steps_per_epoch",
    "train.keep_last",
    "train.tracker", "train.profile_steps", "model.checkpoint_activations",
}  # fmt: skip


_SECTIONS = {section.name for section in dataclasses.fields(Config)}


def flat(raw: dict[str, Any]) -> dict[str, Any]:
    """Nested sections as one dict with dotted names, in the order of the schema."""
    sections = as_dict(Config())
    return {
        f"{section}.{name}": raw.get(section, {}).get(name, default)
        for section, fields in sections.items()
        for name, default in fields.items()
    }


def add_config_options(parser: ArgumentParser) -> None:
    """Add `--config FILE` and an option for every field, with its docstring, to a parser."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser.add_argument(
        "--config", action="config", help="YAML file of settings, such as configs/8hg.yaml"
    )
    parser.add_class_arguments(Config, None)


def parse_config(parser: ArgumentParser, arguments: list[str]) -> tuple[Config, dict[str, Any]]:
    """The Config and the parser's other values. Raises InputError. `--help` prints and leaves."""
    known = [option for action in parser._actions for option in action.option_strings]
    check_options(arguments, known, "train.py --help")
    for option, value in _values(arguments):
        if option == "--config":
            check_keys(load_yaml(value), value)
        elif option.removeprefix("--") in _SECTIONS:
            _check_section(option.removeprefix("--"), value)
    try:
        values = parser.instantiate(parser.parse_args(arguments))
    except (ArgumentError, TypeError, ValueError) as error:
        raise _wrong_value(error, lambda key: _place(key, arguments)) from error
    sections = {f.name: getattr(values, f.name) for f in dataclasses.fields(Config)}
    config = Config(**sections)
    check_values(config)
    others = {k: v for k, v in vars(values).items() if k not in sections and k != "config"}
    return config, others


@functools.cache
def _plain_parser() -> ArgumentParser:
    """Of the sections alone; to make it takes a tenth of a second."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Config, None)
    return parser


def config_from_dict(raw: dict[str, Any], where: str) -> Config:
    """The Config of nested plain values, as `as_dict` gives them. Raises InputError."""
    check_keys(raw, where)
    parser = _plain_parser()
    try:
        values = parser.instantiate(parser.parse_object(raw))
    except (ArgumentError, TypeError, ValueError) as error:
        raise _wrong_value(error, lambda key: f"{where}: {key}") from error
    return Config(**{f.name: getattr(values, f.name) for f in dataclasses.fields(Config)})


def as_dict(config: Config) -> dict[str, Any]:
    """Nested plain values, tuples as lists, fit for YAML and for a checkpoint."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def save_yaml(config: Config, path: Path) -> None:
    """Write every field, so that the file repeats the run by itself."""
    write_atomic(path, yaml.safe_dump(as_dict(config), sort_keys=False).encode())


def load_yaml(path: str) -> dict[str, Any]:
    """A YAML file of settings as nested dicts. Raises InputError."""
    try:
        raw = read_yaml(Path(path))
    except FileNotFoundError as error:
        raise InputError(path, "no such file", "a YAML file of settings", "see configs/") from error
    except (ValueError, IsADirectoryError) as error:
        raise InputError(path, f"not YAML: {error}", "a YAML file", "correct it") from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise InputError(
            path, f"a {type(raw).__name__}", "sections such as `optim:`", "see configs/"
        )
    return raw


def check_keys(raw: dict[str, Any], where: str, cls: type = Config, prefix: str = "") -> None:
    """Raise InputError at the first unknown key; its message names the nearest known one."""
    types = typing.get_type_hints(cls)
    for key, value in raw.items():
        if key not in types:
            raise _unknown(where, f"{prefix}{key}", [f"{prefix}{name}" for name in types])
        if dataclasses.is_dataclass(types[key]):
            if not isinstance(value, dict):
                names = ", ".join(typing.get_type_hints(types[key]))
                raise InputError(
                    f"{where}: {prefix}{key}",
                    repr(value)[:100],
                    f"a section of {names}",
                    "indent them below it",
                )
            check_keys(value, where, types[key], f"{prefix}{key}.")


def check_values(config: Config) -> None:
    """Raise InputError at the first value that no run can use."""
    _check_given(config)
    positive = {
        "data.batch_size": config.data.batch_size,
        "model.stacks": config.model.stacks,
        "model.depth": config.model.depth,
        "heatmaps.sigma": config.heatmaps.sigma,
        "optim.lr": config.optim.lr,
        "optim.accumulate": config.optim.accumulate,
        "train.steps": config.train.steps,
        "train.steps_per_epoch": config.train.steps_per_epoch,
        "train.keep_last": config.train.keep_last,
        "train.log_every": config.train.log_every,
        "eval.batch_size": config.eval.batch_size,
        "train.max_bad_steps": config.train.max_bad_steps,
    }
    not_negative = {
        "data.workers": config.data.workers,
        "data.shuffle_buffer": config.data.shuffle_buffer,
        "data.max_bad_samples": config.data.max_bad_samples,
        "data.cache_mb": config.data.cache_mb,
        "optim.weight_decay": config.optim.weight_decay,
        "optim.warmup_steps": config.optim.warmup_steps,
        "optim.clip_norm": config.optim.clip_norm,
        "optim.gamma": config.optim.gamma,
        "optim.final_fraction": config.optim.final_fraction,
        "train.seed": config.train.seed,
        "train.max_minutes": config.train.max_minutes,
        "eval.people": config.eval.people,
        "train.profile_steps": config.train.profile_steps,
    }
    for name, value in not_negative.items():
        if not value >= 0:
            raise InputError(name, str(value), "0 or more", "correct the config")
    if any(channels < 2 or channels % 2 for channels in config.model.stem):
        raise InputError(
            "model.stem", str(config.model.stem), "three even numbers", "correct the config"
        )
    for name, value in positive.items():
        if not value > 0:
            raise InputError(name, str(value), "a value above 0", "correct the config")
    _check_sizes(config)
    if config.model.width < 2 or config.model.width % 2:
        raise InputError(
            "model.width", str(config.model.width), "an even number", "correct the config"
        )
    if not 0 <= config.optim.ema_decay < 1:
        raise InputError(
            "optim.ema_decay", str(config.optim.ema_decay), "0 to below 1", "correct it"
        )
    _check_together(config)
    if Path(config.train.name).name != config.train.name or config.train.name in ("", ".", ".."):
        raise InputError(
            "train.name", config.train.name, "a plain folder name", "put folders in train.out"
        )


def _check_together(config: Config) -> None:
    """Raise InputError at settings that do not go together."""
    unit = 4 * 2**config.model.depth
    if config.data.input_px <= 0 or config.data.input_px % unit:
        raise InputError(
            "data.input_px",
            str(config.data.input_px),
            f"a multiple of {unit}, which is 4 x 2^model.depth",
            "change data.input_px or model.depth",
        )
    if config.train.compile and config.model.checkpoint_activations:
        raise InputError(
            "train.compile and model.checkpoint_activations",
            "both",
            "one of them: torch.compile chooses by itself what to compute twice",
            "leave one out",
        )


def _check_given(config: Config) -> None:
    """Raise InputError at the first field without a value."""
    for name, value in flat(as_dict(config)).items():
        if value is None:  # which the parser takes for any type
            raise InputError(name, "no value", "a value", "give it one, or leave it out")


def _check_sizes(config: Config) -> None:
    """Raise InputError at the first size that no machine has room for."""
    largest = {
        "data.batch_size": (config.data.batch_size, 65_536),
        "data.input_px": (config.data.input_px, 8192),
        "model.stacks": (config.model.stacks, 64),
        "model.width": (config.model.width, 8192),
        "model.depth": (config.model.depth, 10),
        "model.stem": (max(config.model.stem), 8192),
    }
    for name, (value, most) in largest.items():
        if value > most:
            raise InputError(name, str(value), f"{most:,} at most", "correct the config")


def _values(arguments: list[str]) -> list[tuple[str, str]]:
    """Options with the word that follows each."""
    pairs = [(a, b) for a, b in itertools.pairwise(arguments) if a.startswith("--")]
    whole = [a.split("=", 1) for a in arguments if a.startswith("--") and "=" in a]
    return pairs + [(option, value) for option, value in whole]


def _check_section(section: str, value: str) -> None:
    """Check `--data FILE`, a YAML file of one section; other values are left to jsonargparse."""
    if Path(value).is_file():
        raw = load_yaml(value)
        if raw.keys() & _SECTIONS:
            raise InputError(
                value, "settings of a whole run", f"those of {section} alone", "use --config"
            )
        check_keys({section: raw}, value)


def _unknown(where: str, key: str, known: list[str]) -> InputError:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    section = key.split(".")[0] + "."
    beside = [name for name in known if name.startswith(section)] or known
    advice = f"did you mean {near[0]}?" if near else f"known are {', '.join(beside)}"
    return InputError(where, f"unknown setting {key}", "a setting of configs/schema.py", advice)


def _place(key: str, arguments: list[str]) -> str:
    """Where a setting was given: its option, or a file of settings."""
    given = dict(_values(arguments))
    if f"--{key}" in given:
        return f"--{key}"
    file = given.get(f"--{key.split('.')[0]}") or given.get("--config")
    return f"{file}: {key}" if file else key


def _wrong_value(error: Exception, place: Callable[[str], str]) -> InputError:
    """What the parser says of a value, in our words. place: where a key was given."""
    text = " ".join(str(error).split())
    types = {
        f"{section}.{name}": kind
        for section, cls in typing.get_type_hints(Config).items()
        for name, kind in typing.get_type_hints(cls).items()
    }
    said = re.match(r'Parser key "([\w.]+)":.* Got value: (.*)', text)
    if not said or said[1] not in types:
        return InputError("settings", text[:400], "values that fit", "see train.py --help")
    key, value = said.groups()
    if typing.get_origin(types[key]) is Literal:
        return wrong_choice(place(key), value, typing.get_args(types[key]))
    return InputError(place(key), repr(value)[:200], _in_words(key, types[key]), "correct it")


def _in_words(key: str, kind: Any) -> str:
    """What a setting takes that is no choice."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if kind in words:
        return words[kind]
    first, *rest = typing.get_args(kind)
    count = "" if rest == [...] else f"{1 + len(rest)} "
    return f"a list of {count}{words[first][2:]}s, such as {flat(as_dict(Config()))[key]}"
