"""Functions that several test files share; fixtures are in conftest.py."""

from typing import Any

from configs.skeleton import MPII
from pipelines.augment import PRESETS
from pipelines.codec import Codec


def make_codec(
    preset: str = "hrnet", rule: Any = "exact", input_px: int = 64, skeleton: Any = MPII
) -> Codec:
    """A codec with sigma 1."""
    return Codec(preset=PRESETS[preset], rule=rule, sigma=1.0, input_px=input_px, skeleton=skeleton)
