"""A run's numbers and pictures for Weights & Biases or Trackio, which have the same functions."""

import importlib
import importlib.util
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import InputError
from configs.schema import Config, TrackerName, as_dict

PROJECT = "stacked-hourglass"


def require_tracker(name: TrackerName) -> None:
    """Raise InputError, with the command that installs it, if the package is not there."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise InputError(
            f"train.tracker: {name}",
            f"the package {name} is not installed",
            f"{name}, or no tracker",
            f"pip install {name}, or set train.tracker to none",
        )


class Tracker:
    """One open run of the package; nothing where the config asks for none."""

    def __init__(self, config: Config, folder: Path):
        """Begin the run, or continue the one that was begun for the same folder."""
        self._package: Any = None
        name = config.train.tracker
        if name == "none":
            return
        require_tracker(name)
        self._package = importlib.import_module(name)
        # Trackio knows a run by its name; Weights & Biases by an id, which the folder keeps.
        more = {"id": _identity(folder), "dir": str(folder)} if name == "wandb" else {}
        self._package.init(
            project=PROJECT, name=config.train.name, config=as_dict(config), resume="allow", **more
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a step."""
        if self._package:
            self._package.log(values, step=step)

    def picture(self, step: int, name: str, image_HW3: npt.NDArray[np.uint8]) -> None:
        """An RGB picture of a step."""
        if self._package:
            self._package.log({name: self._package.Image(image_HW3)}, step=step)

    def close(self) -> None:
        """Send what is left."""
        if self._package:
            self._package.finish()


def _identity(folder: Path) -> str:
    path = folder / "tracker_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex)
    return path.read_text()
