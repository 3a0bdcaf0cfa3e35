"""All settings of a run: one frozen dataclass per concern, a docstring under each field.

`parse_config` reads a YAML file and dotted overrides (`--optim.lr 1e-3`) into a Config.
An unknown setting is an error that suggests the nearest known one. jsonargparse checks the types.
"""

import dataclasses
import functools
import itertools
import json
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from common.cli import check_options, did_you_mean
from common.errors import InputError
from common.files import read_yaml, write_atomic

LoaderName = Literal["auto", "dali", "opencv"]
WorkerKind = Literal["threads", "processes"]
PresetName = Literal["princeton", "newell", "hrnet", "mild", "none"]
RuleName = Literal["exact", "princeton", "hrnet"]
TrackerName = Literal["none", "wandb", "trackio"]

_LIMITS = {
    "least": (operator.ge, "{:,} or more"),
    "above": (operator.gt, "above {:,}"),
    "most": (operator.le, "{:,} at most"),
    "below": (operator.lt, "below {:,}"),
}


def _number(default: Any, **limits: float) -> Any:
    """A field whose values `check_values` compares with the limits (names in _LIMITS)."""
    return field(default=default, metadata=limits)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the people come from and how they are loaded."""

    shards: dict[str, float] | str = "data/shards/mpii"
    """Folder with the splits train and valid, made by tools/make_shards.py, or s3://, gs://,
    https:// (docs/remote-shards.md). Several folders: {FOLDER: WEIGHT, ...} (docs/training.md)."""
    cache_dir: str = ""
    """Cache folder for object storage; empty: stacked-hourglass in $XDG_CACHE_HOME or ~/.cache."""
    cache_gb: float = _number(50.0, above=0)
    """Maximum size of the cache, in units of 1e9 bytes; least recently used tars are removed."""
    shard_window: int = _number(0, least=0)
    """Number of shards whose people are mixed at a time; 0: all, which must fit the cache."""
    loader: LoaderName = "auto"
    """auto: dali on a GPU, opencv on a CPU."""
    batch_size: int = _number(16, least=1, most=65_536)
    """People per rank and step."""
    workers: int | Literal["auto"] = _number("auto", least=0)
    """Workers of the OpenCV loader, or threads of DALI, per rank; auto: by the usable cores."""
    worker_kind: WorkerKind = "threads"
    """Whether the OpenCV loader's workers are threads or processes."""
    input_px: int = _number(256, least=1, most=8192)
    """Side of the network's square input."""
    preset: PresetName = "hrnet"
    """Augmentation preset, named after the code that it follows (docs/conventions.md)."""
    mirror: bool = True
    """Allow mirroring; false for people whose left and right sides look different."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """If a training picture cannot be decoded: end the run, or use a neighbour instead."""
    max_bad_samples: int = _number(20, least=0)
    """With `skip`, more damaged pictures than this end the run."""

    @property
    def weights(self) -> dict[str, float]:
        """The location of each data set, and how often an epoch takes its people."""
        return {self.shards: 1.0} if isinstance(self.shards, str) else self.shards


@dataclass(frozen=True, kw_only=True)
class HeatmapsConfig:
    """How joints become target heatmaps and back."""

    rule: RuleName = "exact"
    """How targets are discretised and decoded (docs/conventions.md)."""
    sigma: float = _number(1.0, above=0)
    """Standard deviation of the Gaussian, px of a 64 x 64 heatmap; HRNet uses 2."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network's size. The number of joints comes with the data."""

    stacks: int = _number(2, least=1, most=64)
    """Number of hourglasses."""
    width: int = _number(256, least=2, most=8192)
    """Channels in the hourglasses."""
    depth: int = _number(4, least=1, most=10)
    """How many times an hourglass halves the resolution."""
    stem: tuple[int, int, int] = _number((64, 128, 128), least=2, most=8192)
    """Channels after the first convolution and the first two residual blocks."""
    head_scale: float = _number(1.0, least=0)
    """Factor on the initial weights and biases of the heads (docs/recipes.md)."""
    checkpoint_activations: bool = False
    """Activation checkpointing in the hourglasses: less memory, slower."""
    input_mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """RGB in 0..1, subtracted from the picture."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Details of the loss."""

    unmarked: Literal["empty", "ignore"] = "empty"
    """Joints without annotation: train them as empty heatmaps, or leave them out of the loss. Used
    if the data set's skeleton does not set its own `unmarked`."""
    foreground: float = _number(0.0, least=0)
    """A pixel's squared error is multiplied by 1 + foreground x its target (docs/recipes.md)."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning rate."""

    name: Literal["adam", "rmsprop"] = "adam"
    """Optimizer; Adam is fused."""
    lr: float = _number(1e-3, above=0)
    """Peak learning rate."""
    weight_decay: float = _number(0.0, least=0)
    """L2 penalty, as torch's Adam and RMSprop define it."""
    schedule: Literal["constant", "step", "cosine"] = "step"
    """Learning rate after the warm-up."""
    milestones: tuple[int, ...] = (100_000,)
    """Steps at which `step` multiplies the rate by `gamma`."""
    gamma: float = _number(0.2, least=0)
    """Factor at each milestone."""
    final_fraction: float = _number(0.01, least=0)
    """With `cosine`, the learning rate of the last step as a fraction of `lr`."""
    warmup_steps: int = _number(0, least=0)
    """Steps of linear warm-up from 0."""
    clip_norm: float = _number(0.0, least=0)
    """Maximum gradient norm; 0: no clipping."""
    accumulate: int = _number(1, least=1)
    """Batches per optimizer step (gradient accumulation)."""
    ema_decay: float = _number(0.0, least=0, below=1)
    """Decay per step of the weights' moving average (EMA), which is evaluated; 0: no EMA."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, precision and bookkeeping of a run."""

    name: str = "hourglass"
    """The run's folder is `out`/`name`."""
    out: str = "runs"
    """Folder of runs."""
    steps: int = _number(200_000, least=1)
    """Total optimizer steps."""
    steps_per_epoch: int = _number(1_000, least=1)
    """Steps between validations and checkpoints, the same on every rank."""
    save_minutes: float = _number(10.0, least=0)
    """Also write a checkpoint when this time has passed without one; 0: only after each epoch."""
    keep_last: int = _number(2, least=1)
    """Number of newest checkpoints to keep, including last.pt; best.pt is always kept."""
    max_minutes: float = _number(0.0, least=0)
    """Validate, write a checkpoint and stop after this time; 0 sets no limit."""
    verify_every: int = _number(0, least=0)
    """Every N steps compute the gradients twice, and stop if they differ; 0: never."""
    hang_minutes: float = _number(10.0, least=0)
    """End a rank that makes no progress for this time, and print where it waits; 0: never."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Autocast type; auto: bf16 if the device has it, else fp16 on a GPU and fp32 on a CPU."""
    compile: bool = False
    """Compile the residual blocks with torch.compile."""
    cuda_graph: bool | Literal["auto"] = "auto"
    """Record the step as one CUDA graph (bf16 or fp32, Adam, no accumulation); auto: on one GPU."""
    fused_kernels: bool | Literal["auto"] = "auto"
    """Train networks of up to 256 channels with Triton kernels; auto: in a CUDA graph."""
    profile_steps: int = _number(0, least=0)
    """Profile this many of the first steps into trace.json; 0: no profile."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: a GPU if there is one."""
    threads: int = _number(0, least=0)
    """CPU threads of torch; 0: measured at the start and written into config.yaml."""
    seed: int = _number(0, least=0)
    """Random seed of initial weights, data order and augmentation."""
    log_every: int = _number(20, least=1)
    """Steps between lines of metrics.jsonl."""
    tracker: TrackerName = "none"
    """Also send the log to Weights & Biases or to Trackio."""
    max_bad_steps: int = _number(20, least=1)
    """End the run after this many consecutive steps with a non-finite loss or gradient."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Validation during training."""

    batch_size: int = _number(32, least=1)
    """People per batch."""
    flip: bool = True
    """Average with the prediction for the mirrored picture (flip test)."""
    people: int = _number(0, least=0)
    """Number of people to validate on, the first of the split; 0: all."""


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


_SECTIONS = [section.name for section in dataclasses.fields(Config)]
_FIXED = (
    "data.batch_size data.shard_window data.input_px data.preset data.mirror heatmaps.rule "
    "heatmaps.sigma loss.unmarked loss.foreground model.stacks model.width model.depth "
    "model.stem model.input_mean optim.name optim.accumulate train.seed"
)
_FREE = (
    "data.shards data.cache_dir data.cache_gb data.workers data.worker_kind data.loader "
    "model.checkpoint_activations model.head_scale train.name train.out train.steps "
    "train.steps_per_epoch train.max_minutes train.hang_minutes train.verify_every train.device "
    "train.threads train.log_every train.keep_last train.save_minutes train.tracker "
    "train.profile_steps train.compile train.cuda_graph train.fused_kernels"
)
FIXED_ON_RESUME = frozenset(_FIXED.split())
"""Settings that a resumed run may not change."""
FREE_ON_RESUME = frozenset(_FREE.split())
"""Settings that a resumed run may change silently; other changes are printed."""


def flat(raw: dict[str, Any]) -> dict[str, Any]:
    """Nested sections as one dict with dotted names."""
    return {
        f"{section}.{name}": value
        for section, values in raw.items()
        for name, value in values.items()
    }


def as_dict(config: Config) -> dict[str, Any]:
    """Nested dicts of plain values, tuples as lists, for YAML and checkpoints."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def add_config_options(parser: ArgumentParser) -> None:
    """Add `--config FILE` and an option for every field, with its docstring, to a parser."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    help_text = "YAML file of settings, such as configs/8hg.yaml"
    parser.add_argument("--config", action="config", help=help_text)
    parser.add_class_arguments(Config, None)


def parse_config(parser: ArgumentParser, arguments: list[str]) -> tuple[Config, dict[str, Any]]:
    """The Config and the parser's other values. Raises InputError. `--help` prints and exits."""
    known = [option for action in parser._actions for option in action.option_strings]
    check_options(arguments, known, f"{parser.prog} --help")
    for word, following in itertools.pairwise([*arguments, ""]):
        if word.split("=")[0] == "--config":
            path = word.removeprefix("--config=") if "=" in word else following
            keys = "sections such as `optim:` (configs/ has examples)"
            _parse_dict(read_yaml(Path(path), keys), path)
    others = vars(_instantiate(parser, lambda: parser.parse_args(arguments), "command line"))
    others.pop("config", None)
    config = Config(**{section: others.pop(section) for section in _SECTIONS})
    check_values(config)
    return config, others


def config_from_dict(raw: dict[str, Any], where: str) -> Config:
    """The Config of the nested dicts that `as_dict` returns. Raises InputError."""
    values = _parse_dict(raw, where)
    config = Config(**{section: getattr(values, section) for section in _SECTIONS})
    check_values(config)
    return config


def _parse_dict(raw: dict[str, Any], where: str) -> Namespace:
    check_keys(raw, where)
    parser = _sections_parser()
    return _instantiate(parser, lambda: parser.parse_object(raw), where)


def _instantiate(parser: ArgumentParser, parse: Callable[[], Namespace], where: str) -> Namespace:
    try:
        return parser.instantiate(parse())
    except ArgumentError as error:  # its text names the setting
        text = " ".join(str(error).split())
        match = re.match(r'Parser key "(\w+)\.(\w+)":.* (?:Got|Given) value: (.*)', text)
        if not match:
            advice = "give files of settings with --config" if "unrecog" in text else "correct it"
            raise InputError(where, text[:400], "known settings", advice) from error
        section, name, value = match.groups()
        kind = get_type_hints(get_type_hints(Config)[section])[name]
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        expected = re.sub(r"<class '|'>|typing\.", "", str(kind))
        if choices:
            expected = f"one of {', '.join(choices)}"
        advice = did_you_mean(value, choices) or "correct it"
        raise InputError(f"{where}: {section}.{name}", value[:100], expected, advice) from error


@functools.cache
def _sections_parser() -> ArgumentParser:
    """Cached, because making it takes 0.1 s."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Config, None)
    return parser


def save_yaml(config: Config, path: Path) -> None:
    """Write every field, so that the file is enough to repeat the run."""
    write_atomic(path, yaml.safe_dump(as_dict(config), sort_keys=False).encode())


def check_keys(raw: dict[str, Any], where: str) -> None:
    """Raise InputError at the first unknown section or setting, with the most similar known one."""
    known = flat(as_dict(Config()))
    for section, settings in raw.items():
        if section not in _SECTIONS:
            raise _unknown(where, section, _SECTIONS)
        in_section = [name for name in known if name.startswith(f"{section}.")]
        if not isinstance(settings, dict):
            expected = f"a section with {', '.join(in_section)}"
            raise InputError(f"{where}: {section}", repr(settings)[:100], expected, "indent them")
        for name in settings:
            if f"{section}.{name}" not in known:
                raise _unknown(where, f"{section}.{name}", in_section)


def _unknown(where: str, name: object, known: list[str]) -> InputError:
    advice = did_you_mean(str(name), [*known, *flat(as_dict(Config()))]) or "correct the name"
    return InputError(where, f"unknown setting {name}", f"one of {', '.join(known)}", advice)


def check_values(config: Config) -> None:
    """Raise InputError at the first impossible value."""
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        for setting in dataclasses.fields(values):
            name, value = f"{section.name}.{setting.name}", getattr(values, setting.name)
            _require(value is not None, name, "no value", "a value")  # jsonargparse accepts null
            numbers = value if isinstance(value, tuple) else (value,)
            for limit, bound in setting.metadata.items():
                compare, words = _LIMITS[limit]
                holds = value == "auto" or all(compare(number, bound) for number in numbers)
                _require(holds, name, value, words.format(bound))
    weights = config.data.weights
    is_text = any(location.startswith(("{", "[")) for location in weights)
    _require(not is_text, "data.shards", weights, "a location, or {FOLDER: WEIGHT, ...}")
    are_positive = all(weight > 0 for weight in weights.values())
    _require(bool(weights) and are_positive, "data.shards", weights, "weights above 0")
    folders = {location.rstrip("/") for location in weights}
    _require(len(folders) == len(weights), "data.shards", weights, "each folder once")
    model, name, unit = config.model, config.train.name, 4 * 2**config.model.depth
    for channels in (model.width, *model.stem):
        _require(channels % 2 == 0, "model.width and model.stem", channels, "even numbers")
    px, fits = config.data.input_px, config.data.input_px % unit == 0
    _require(fits, "data.input_px", px, f"a multiple of {unit}, which is 4 x 2^model.depth")
    is_plain = Path(name).name == name and name not in ("", ".", "..")
    _require(is_plain, "train.name", name, "a folder name; train.out takes the path")


def _require(holds: bool, name: str, found: object, expected: str) -> None:
    if not holds:
        raise InputError(name, str(found), expected, "correct the config")
