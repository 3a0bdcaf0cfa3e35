"""What a run reports: lines on a terminal and in a file, metrics, pictures, a tracker."""

import sys
import types

import cv2
import numpy as np
import pytest
from conftest import Stream
from helpers import CPU, make_trainer, metrics, tiny_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from common.errors import InputError
from training import metrics as log
from training.metrics import (
    Console,
    MetricsLogger,
    draw_curves,
    open_tracker,
    read_metrics,
)


def test_a_terminal_sees_one_line_that_is_written_over_and_whole_lines_above_it(monkeypatch):
    stream = Stream(terminal=True)
    monkeypatch.setattr(sys, "stderr", stream)
    shown = Console()
    shown.show(["step 1", "loss 2"])
    shown.show(["step 2"])  # a moment later: not yet
    shown.info("step 2: PCKh")
    shown.show(["step 3"], at_once=True)
    shown.close()
    lines = stream.getvalue().replace("\x1b[K", "").split("\n")
    assert [line.split("\r")[-1] for line in lines] == ["step 2: PCKh", "step 3", ""]
    assert "step 2\r" not in stream.getvalue()


def test_a_file_gets_whole_lines_without_control_codes_at_most_one_in_fifteen_seconds(monkeypatch):
    stream, clock = Stream(terminal=False), [100.0]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(log.time, "monotonic", lambda: clock[0])
    shown = Console()
    for step in range(40):
        shown.show([f"step {step}", "loss 1"])
        clock[0] += 1
    shown.info("the end")
    shown.close()
    expected = "step 0  loss 1\nstep 15  loss 1\nstep 30  loss 1\nthe end\n"
    assert stream.getvalue() == expected


@pytest.mark.parametrize(
    ("columns", "line"),
    [(100, "step 1/9  0:07 left  loss 0.1"), (22, "step 1/9  0:07 left"), (21, "step 1/9")],
)
def test_a_narrow_terminal_keeps_the_most_important_parts(columns, line, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stream(terminal=True))
    monkeypatch.setenv("COLUMNS", str(columns))
    Console().show(["step 1/9", "0:07 left", "loss 0.1"])
    assert sys.stderr.getvalue() == f"\r{line}\x1b[K"


def test_a_long_validation_tells_a_file_how_far_it_is(tiny_shards, tmp_path, monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: clock[0])
    logger = MetricsLogger(tmp_path, tiny_config(tiny_shards), CPU, 3, "PCKh")
    for done in range(0, 22, 4):
        logger.show_validation(done, 22)
        clock[0] += 8
    logger.close()
    assert capsys.readouterr().err.splitlines() == [
        f"step 3  validating: {done} of 22 people" for done in (4, 12, 20)
    ]


def test_the_time_to_the_end_is_that_of_the_steps_so_far(tiny_shards, tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: clock[0])
    config = tiny_config(tiny_shards, train={"steps": 110, "max_minutes": 1})
    logger = MetricsLogger(tmp_path, config, CPU, 10, "PCKh")
    for _ in range(10):
        logger.advance()
    clock[0] = 5.0  # 10 of 100 steps in 5 s: 45 s are left
    assert logger._parts()[1] == "00:45 left"
    clock[0] = 20.0  # 180 s are left, but the limit comes after 40
    assert logger._parts()[1] == "00:40 to its limit"
    logger.close()


def test_time_shares(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: clock[0])
    times = log.TimeShares()
    for name, seconds in (("validation_share", 3.0), ("save_share", 0.5), ("save_share", 0.5)):
        clock[0] += 2.0
        with times.measure(name):
            clock[0] += seconds
    assert times.shares() == {"validation_share": 0.3, "save_share": 0.1}


def test_console_metrics_tensorboard_and_tracker_get_the_same_numbers_and_pictures(
    tiny_shards, tmp_path, monkeypatch, capsys
):
    calls: list = []
    monkeypatch.setitem(sys.modules, "trackio", replacement("trackio", calls))
    options = {"tracker": "trackio", "name": "mine", "steps_per_epoch": 3, "log_every": 1}
    make_trainer(tiny_config(tiny_shards, train=options), tmp_path).train()

    logged, text = metrics(tmp_path, "train"), capsys.readouterr().err
    first = text.splitlines()[0].split("  ")
    assert first[0] == "step 1/6" and first[1].endswith(" left") and first[6] == "epoch 1/2"
    assert first[2] == f"loss {logged[0]['loss']:.5f}" and first[3] == "PCKh -"
    assert "\r" not in text and "\x1b" not in text
    assert logged[-1]["left_s"] == 0 < logged[0]["left_s"]
    # torch alone is larger than 100 MB; a unit mistaken by 1,000 would show.
    assert all(100 < line["memory_mb"] < 50_000 for line in logged)

    events = EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0, "scalars": 0}).Reload()
    scalars = events.Scalars("train/loss")
    assert [event.value for event in scalars] == pytest.approx([x["loss"] for x in logged])
    assert {"train/memory_mb", "valid/pckh@0.5_pooled"} <= {*events.Tags()["scalars"]}
    for picture, file in (("validation", "validation.jpg"), ("curves", "curves.png")):
        images = events.Images(f"pictures/{picture}")
        assert [image.step for image in images] == [3, 6]
        shape = cv2.imread(str(tmp_path / file)).shape
        assert shape == (images[-1].height, images[-1].width, 3)

    (word, _, begun), *between, last = calls
    assert (word, begun["name"], begun["resume"], last[0]) == ("init", "mine", "allow", "finish")
    assert begun["config"]["train"]["tracker"] == "trackio"
    assert all(word == "log" for word, _, _ in between)
    sent = {
        key: value for _, (values,), k in between if k["step"] == 6 for key, value in values.items()
    }
    for kind in ("train", "valid"):
        line = metrics(tmp_path, kind)[-1]
        numbers = {f"{kind}/{k}": v for k, v in line.items() if k not in ("kind", "step", "time")}
        assert numbers.items() <= sent.items()
    assert sent["pictures/curves"] == ("image", (380, 1240, 3), np.uint8)
    assert "pictures/validation" in sent


def replacement(name: str, calls: list) -> types.ModuleType:
    """A module with the functions of wandb and trackio that records how it is called."""
    module = types.ModuleType(name)
    module.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
    for word in ("init", "log", "finish"):
        setattr(module, word, lambda *a, word=word, **k: calls.append((word, a, k)))
    module.Image = lambda array: ("image", array.shape, array.dtype)  # type: ignore[attr-defined]
    return module


def test_a_run_that_is_resumed_keeps_its_identity(tmp_path, monkeypatch, tiny_shards):
    calls: list = []
    monkeypatch.setitem(sys.modules, "wandb", replacement("wandb", calls))
    config = tiny_config(tiny_shards, train={"tracker": "wandb"})
    for _ in range(2):
        open_tracker(config, tmp_path)
    ids = [k["id"] for word, _, k in calls if word == "init"]
    assert len(ids) == 2 and ids[0] == ids[1] == (tmp_path / "tracker_id").read_text()


def test_a_missing_tracker_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(InputError, match="pip install trackio"):
        train.main(["--train.tracker", "trackio"])


def test_the_picture_shows_the_same_people_and_their_prediction(tiny_shards, tmp_path):
    trainer = make_trainer(tiny_config(tiny_shards), tmp_path)
    validator = trainer.validator
    validator.run(trainer.evaluation_network())
    before = validator.picture()
    validator.found.keypoints_NJ2[0] = validator.people.joints[0]
    changed = np.argwhere((before != validator.picture()).any(axis=2))
    assert len(changed) > 50 and changed[:, 1].max() < 258, "only the first tile may change"


def test_a_power_law_is_a_straight_falling_line_in_the_curve_of_the_loss():
    entries = [
        {"kind": "train", "step": s, "loss": 10.0 ** -(1 + s / 100), "pck": None}
        for s in range(1, 101)
    ]
    picture = draw_curves(entries, "PCKh")
    assert picture.shape == (380, 1240, 3) and picture.dtype == np.uint8
    left = picture[60:330, :620].astype(int)  # below the legend
    blue = np.argwhere((left == (31, 119, 180)).all(axis=2))  # matplotlib's first colour
    slope = np.polyfit(blue[:, 1], blue[:, 0], 1)
    assert np.abs(np.polyval(slope, blue[:, 1]) - blue[:, 0]).max() < 3
    assert slope[0] > 0.3 and np.ptp(blue[:, 1]) > 350


def test_half_a_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n{"ste')
    assert read_metrics(path) == [{"step": 1}, {"step": 3}]
    log.keep_lines_until(path, 2)
    assert path.read_text() == '{"step": 1}\n'
