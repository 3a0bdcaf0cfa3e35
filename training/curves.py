"""Learning curves as a picture, from the lines of metrics.jsonl."""

import math
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

WIDTH_PX, HEIGHT_PX = 620, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 40, 44
"""Margins of a panel, px."""
INK, GRID = (60, 60, 60), (225, 225, 225)
COLORS_BGR = ((180, 90, 20), (40, 120, 240), (60, 160, 60))

Picture = npt.NDArray[np.uint8]


class Curve(NamedTuple):
    """One line of a panel."""

    name: str
    steps: list[float]
    values: list[float]


def draw_curves(entries: list[dict[str, Any]], metric: str = "PCKh") -> Picture:
    """(380, 1240, 3) BGR: the loss, on a logarithmic axis, and PCK in per cent, over the steps.

    entries: lines of metrics.jsonl. metric: the name of the validation's, PCKh or PCK.
    """
    loss = [curve("loss of training", entries, "train", "loss")]
    rates = [
        curve(f"{metric}@0.5 of validation", entries, "valid", "pckh@0.5_pooled", 100),
        curve(f"{metric}@0.1 of validation", entries, "valid", "pckh@0.1_pooled", 100),
        curve("PCK of training (augmented)", entries, "train", "pck", 100),
    ]
    last = max([entry["step"] for entry in entries], default=1)
    return np.hstack([_panel("loss", loss, last, True), _panel("%", rates, last, False)])


def curve(
    name: str, entries: list[dict[str, Any]], kind: str, key: str, factor: float = 1.0
) -> Curve:
    """The numbers under a key of the lines of one kind."""
    points = [
        (entry["step"], factor * entry[key])
        for entry in entries
        if entry.get("kind") == kind and _can_be_drawn(entry.get(key))
    ]
    return Curve(name, [step for step, _ in points], [value for _, value in points])


def _can_be_drawn(value: object) -> bool:
    """Whether it is a loss or a rate; what a rotten line holds may be anything."""
    return isinstance(value, (int, float)) and (value == 0 or 1e-99 < value < 1e99)


def _panel(unit: str, curves: list[Curve], last_step: float, is_log: bool) -> Picture:
    picture = np.full((HEIGHT_PX, WIDTH_PX, 3), 255, dtype=np.uint8)
    values = [value for c in curves for value in c.values if value > 0 or not is_log]
    if is_log:
        low, high = math.log10(min(values, default=1e-3)), math.log10(max(values, default=1.0))
        low, high = low - 0.05, max(high, low + 0.1) + 0.05
    else:
        top = max(values, default=0.0)
        low, high = 0.0, next((h for h in (10.0, 25.0, 50.0, 100.0) if top <= h), top)
    ticks = log_ticks(low, high) if is_log else [high * fifth / 5 for fifth in range(6)]
    for tick in ticks:
        y = _y(math.log10(tick) if is_log else tick, low, high)
        cv2.line(picture, (LEFT, y), (WIDTH_PX - RIGHT, y), GRID, 1)
        _text(picture, f"{tick:g}", LEFT - 8, y + 4, align_right=True)
    for tick in step_ticks(last_step):
        x = _x(tick, last_step)
        cv2.line(picture, (x, TOP), (x, HEIGHT_PX - BOTTOM), GRID, 1)
        _text(picture, f"{tick:,}", x + 4, HEIGHT_PX - BOTTOM + 18, align_right=tick > 0)
    _text(picture, unit, LEFT - 8, TOP - 12, align_right=True)
    _text(picture, "step", WIDTH_PX - RIGHT, HEIGHT_PX - 8, align_right=True)
    for number, one in enumerate(curves):
        _draw(picture, one, COLORS_BGR[number], last_step, low, high, is_log)
    _legend(picture, curves)
    return picture


def _draw(
    picture: Picture,
    one: Curve,
    color: tuple[int, int, int],
    last_step: float,
    low: float,
    high: float,
    is_log: bool,
) -> None:
    points = [
        (_x(step, last_step), _y(math.log10(value) if is_log else value, low, high))
        for step, value in zip(one.steps, one.values, strict=True)
        if value > 0 or not is_log
    ]
    if points:
        cv2.polylines(picture, [np.array(points, np.int32)], False, color, 2, cv2.LINE_AA)
    for point in points if len(points) <= 25 else ():
        cv2.circle(picture, point, 3, color, -1, cv2.LINE_AA)


def _legend(picture: Picture, curves: list[Curve]) -> None:
    """The names, in the colours of their lines, with the last value of each."""
    x = LEFT
    for number, one in enumerate(curves):
        last = f" {one.values[-1]:.3g}" if one.values else ""
        x = _text(picture, one.name + last, x, 20, COLORS_BGR[number], scale=0.36) + 12


def _x(step: float, last_step: float) -> int:
    return round(LEFT + (WIDTH_PX - LEFT - RIGHT) * step / max(last_step, 1))


def _y(value: float, low: float, high: float) -> int:
    height = HEIGHT_PX - TOP - BOTTOM
    return round(HEIGHT_PX - BOTTOM - height * (value - low) / (high - low))


def _text(
    picture: Picture,
    text: str,
    x: int,
    y: int,
    color: tuple[int, int, int] = INK,
    align_right: bool = False,
    scale: float = 0.4,
) -> int:
    """Write a line whose baseline is y, and return where it ends."""
    (width, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    left = x - width if align_right else x
    cv2.putText(picture, text, (left, y), cv2.FONT_HERSHEY_SIMPLEX, scale, color, 1, cv2.LINE_AA)
    return left + width


def step_ticks(last: float) -> list[int]:
    """0 and up to eight multiples of 1, 2 or 5 x 10^k, to the last step."""
    unit = 10 ** max(0, math.floor(math.log10(max(last, 1) / 8)))
    gap = next(unit * m for m in (1, 2, 5, 10) if last / (unit * m) <= 8)
    return list(range(0, math.floor(last) + 1, gap))


def log_ticks(low: float, high: float) -> list[float]:
    """Numbers of the form 1, 2, 5 x 10^k between 10^low and 10^high; over 3 decades 10^k alone."""
    digits = (1, 2, 5) if high - low <= 3 else (1,)
    found = [d * 10.0**k for k in range(math.floor(low), math.ceil(high) + 1) for d in digits]
    return [tick for tick in found if low <= math.log10(tick) <= high]
