"""The presets draw what the code they are named after draws, and colour follows OpenCV's HSV."""

import re
import shutil
from typing import get_args

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import draws_array

from configs.schema import PresetName
from pipelines import augment
from pipelines.augment import (
    PRESETS,
    Distribution,
    Draw,
    Preset,
    color_by_torch,
    draw,
    draw_batch,
    draw_rng,
    jitter,
    preset_of,
)


@pytest.fixture(params=["one by one", "in a batch"])
def many(request):
    """Makes a Draw of columns."""

    def make(name: str, count: int = 4000) -> Draw:
        rng, preset = np.random.default_rng(1), PRESETS[name]
        if request.param == "in a batch":
            return Draw(*draw_batch(preset, [rng] * count).astype(np.float32).T)
        return Draw(*draws_array([draw(preset, rng) for _ in range(count)]).T)

    return make


NEUTRAL = draws_array([Draw()])[0, 3:]
NUMBER = r"(-?[\d.]+)"
COLORS = {"-": "none", "channel gain U(0.6, 1.4)": "channel_gain"}
COLORS["hue, saturation, brightness, contrast, of flipped people only"] = "hsv_if_flipped"


def documented_distribution(text: str) -> Distribution:
    """U(low, high), clip(mean + deviation N, low, high), or one number."""
    if found := re.match(rf"U\({NUMBER}, {NUMBER}\)", text):
        return Distribution("uniform", *map(float, found.groups()))
    if found := re.match(rf"clip\((?:{NUMBER} \+ )?{NUMBER} N, {NUMBER}, {NUMBER}\)", text):
        mean, std, low, high = (float(number or 0) for number in found.groups())
        return Distribution("normal", low, high, mean, std)
    return Distribution("uniform", float(text), float(text))


def documented_preset(scale: str, rotation: str, flip: str, color: str) -> Preset:
    """A row of the table in docs/conventions.md."""
    share = re.search(r"in (\d+) %", rotation)
    return Preset(
        scale=documented_distribution(scale.removeprefix("2^")),
        scale_is_log2=scale.startswith("2^"),
        rotation_deg=documented_distribution(rotation),
        rotation_probability=int(share[1]) / 100 if share else float(rotation != "0"),
        flip_probability=float(flip),
        color=COLORS[color],
    )


def test_every_preset_is_that_of_its_row_in_the_conventions():
    page = (ROOT / "docs" / "conventions.md").read_text()
    table = page.split("| preset | scale factor |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", table, re.MULTILINE)
    documented = {name: documented_preset(*cells.split(" | ")) for name, cells in rows}
    here = {name: preset._replace(princeton_crop=False) for name, preset in PRESETS.items()}
    assert here == documented
    assert set(get_args(PresetName)) == here.keys()


def test_princeton_draws_uniform_scale_and_rotation_and_colours_only_the_flipped(many):
    draws = many("princeton")
    assert (draws.scale.min(), draws.scale.max()) == pytest.approx((0.75, 1.25), abs=0.005)
    assert np.ptp(draws.rotation_deg) == pytest.approx(60, abs=0.4)
    assert draws.flip.mean() == pytest.approx(0.5, abs=0.03)
    colors = np.stack(draws[3:], axis=1)
    assert (colors[draws.flip == 0] == NEUTRAL).all()
    limits = [(-0.2, 0.2), (0.5, 1.5), (-0.3, 0.3), (0.5, 1.5)]
    for values, low_high in zip(colors[draws.flip == 1].T, limits, strict=False):
        assert (values.min(), values.max()) == pytest.approx(low_high, abs=0.01)


def test_newell_draws_a_clipped_normal_exponent_and_gains(many):
    draws = many("newell")
    exponent = np.log2(draws.scale)
    # P(|N| > 2) = 4.55 % of the draws are clipped to the ends.
    assert np.abs(exponent).max() == pytest.approx(0.5, abs=1e-6)
    assert (np.abs(exponent) > 0.4999).mean() == pytest.approx(0.0455, abs=0.012)
    assert (draws.rotation_deg != 0).mean() == pytest.approx(0.4, abs=0.03)
    assert np.abs(draws.rotation_deg).max() == pytest.approx(60, abs=1e-4)
    assert (draws.red.min(), draws.red.max()) == pytest.approx((0.6, 1.4), abs=0.01)
    assert (draws.hue == 0).all()


def test_hrnet_draws_a_clipped_normal_and_no_colour(many):
    draws = many("hrnet")
    # One standard deviation is kept, so 31.7 % lie on the ends.
    at_limit = (draws.scale == 0.75) | (draws.scale == 1.25)
    assert at_limit.mean() == pytest.approx(0.317, abs=0.03)
    assert (draws.rotation_deg != 0).mean() == pytest.approx(0.6, abs=0.03)
    assert (np.stack(draws[3:], axis=1) == NEUTRAL).all()


def test_none_draws_nothing(many):
    assert (np.stack(many("none", 50), axis=1) == draws_array([Draw()])).all()


def test_a_draw_follows_from_seed_epoch_and_person_alone():
    preset = PRESETS["princeton"]
    assert draw(preset, draw_rng(3, 1, 7)) == draw(preset, draw_rng(3, 1, 7))
    others = [draw_rng(4, 1, 7), draw_rng(3, 2, 7), draw_rng(3, 1, 8)]
    assert all(draw(preset, rng) != draw(preset, draw_rng(3, 1, 7)) for rng in others)


def test_mirroring_can_be_forbidden():
    rng = np.random.default_rng(0)
    draws = [draw(preset_of("princeton", mirror=False), rng) for _ in range(100)]
    assert {d.flip for d in draws} == {0.0}


def princeton_by_opencv(image: np.ndarray, drawn: Draw) -> np.ndarray:
    """Float RGB in 0..1, by OpenCV's HSV (hue in degrees)."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = np.mod(hsv[..., 0] + 360 * drawn.hue + 360, 360)
    hsv[..., 1] = np.clip(hsv[..., 1] * drawn.saturation, 0, 1)
    rgb = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) + drawn.brightness
    grey = rgb.mean(axis=2, keepdims=True)
    return np.clip((rgb - grey) * drawn.contrast + grey, 0, 1)


def image_of_every_hue() -> np.ndarray:
    image = np.random.default_rng(2).uniform(0, 1, (60, 60, 3)).astype(np.float32)
    image[:3] = [[0.2, 0.2, 0.2]], [[0, 0, 0]], [[1, 1, 1]]  # greys have no hue
    return image


def test_princetons_jitter_equals_opencvs_hsv_on_every_hue():
    image = image_of_every_hue()
    colors = [(0.2, 1.5, 0.3, 0.5), (-0.2, 0.5, -0.3, 1.5), (0.07, 1.2, 0.0, 1.0)]
    drawn = [Draw(1.0, 0.0, 1.0, *color) for color in colors]
    batch = torch.from_numpy(np.stack([image] * 3)).permute(0, 3, 1, 2)
    for apply in (jitter, color_by_torch):
        mine = apply(batch, torch.from_numpy(draws_array(drawn))).permute(0, 2, 3, 1).numpy()
        for result, one in zip(mine, drawn, strict=True):
            np.testing.assert_allclose(result, princeton_by_opencv(image, one), atol=2e-5)


@pytest.mark.parametrize("name", ["princeton", "newell"])
def test_jitter_on_a_cpu_equals_that_on_a_gpu(name):
    """The routine of each device, on 8-bit crops and on princeton's, which lie between."""
    image, eighths = image_of_every_hue(), np.round(image_of_every_hue() * 255) / np.float32(255)
    dark = image * np.float32(0.004)
    batch = torch.from_numpy(np.stack([image, eighths, dark] * 20)).permute(0, 3, 1, 2)
    preset = PRESETS[name]._replace(flip_probability=1.0)
    rows = draws_array([draw(preset, draw_rng(0, 0, n)) for n in range(60)])
    drawn = torch.from_numpy(rows)
    assert (rows[:, 3:] != np.array(Draw()[3:], dtype=np.float32)).any(axis=1).all()
    difference = (jitter(batch, drawn) - color_by_torch(batch, drawn)).abs()
    assert difference.max() < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_jitter_is_the_same():
    image, preset = image_of_every_hue(), PRESETS["princeton"]
    batch = torch.from_numpy(np.stack([image] * 6)).permute(0, 3, 1, 2)
    drawn = torch.from_numpy(draws_array([draw(preset, draw_rng(0, 0, n)) for n in range(6)]))
    neutral = torch.tensor(Draw()[3:])
    plain = augment._color_where_drawn(batch, drawn, neutral)
    compiled = torch.compile(augment._color_where_drawn)(batch, drawn, neutral)
    torch.testing.assert_close(compiled, plain, atol=1e-6, rtol=0)
    assert compiled.stride() == plain.stride() == batch.stride()
    mirrored = drawn[:, 2] > 0
    assert torch.equal(plain[~mirrored], batch[~mirrored]) and mirrored.any()


@pytest.mark.parametrize(
    ("triton", "capability", "is_compiled"),
    [(True, (9, 0), True), (True, (6, 1), False), (False, (9, 0), False)],
)
def test_jitter_is_compiled_where_triton_works(triton, capability, is_compiled, monkeypatch):
    monkeypatch.setattr(augment, "triton_works", lambda: triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    chosen = augment._color_where_drawn_on_gpu.__wrapped__()
    assert (chosen is not augment._color_where_drawn) == is_compiled


def test_channel_gain_multiplies_and_clips():
    image = torch.full((1, 3, 2, 2), 0.8)
    drawn = torch.from_numpy(draws_array([Draw(red=0.5, green=1.0, blue=1.4)]))
    result = jitter(image, drawn)[0, :, 0, 0]
    torch.testing.assert_close(result, torch.tensor([0.4, 0.8, 1.0]))


def test_a_neutral_draw_changes_no_bit_and_no_layout():
    image = torch.rand(2, 8, 8, 3).permute(0, 3, 1, 2)
    result = jitter(image, torch.from_numpy(draws_array([Draw(), Draw(hue=0.1)])))
    assert torch.equal(result[0], image[0]) and not torch.equal(result[1], image[1])
    assert result.is_contiguous(memory_format=torch.channels_last)
