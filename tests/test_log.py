"""What a run tells: lines on a terminal and in a file, pictures, a tracker, the end."""

import errno
import json
import math
import re
import sys
import traceback
import types
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, Stream
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training import HERE, make_run, metrics, tiny_config

import train as train_program
from common.errors import InputError
from configs.schema import parse_config
from model import checkpoint
from training import curves, screen, tracker
from training import metrics as log
from training.screen import Screen, fit


def test_a_terminal_sees_one_line_that_is_written_over_and_whole_lines_above_it():
    stream = Stream(terminal=True)
    shown = Screen(stream)
    shown.show(["step 1", "loss 2"])
    shown.show(["step 2"])  # a moment later: not yet
    shown.say("step 2: PCKh")
    shown.show(["step 3"], at_once=True)
    shown.close()
    lines = stream.getvalue().replace("\x1b[K", "").split("\n")
    assert [line.split("\r")[-1] for line in lines] == ["step 2: PCKh", "step 3", ""]
    assert "step 2\r" not in stream.getvalue()


def test_a_file_gets_whole_lines_without_control_codes_at_most_one_in_fifteen_seconds(monkeypatch):
    stream, clock = Stream(terminal=False), [100.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: clock[0])
    shown = Screen(stream)
    for step in range(40):
        shown.show([f"step {step}", "loss 1"])
        clock[0] += 1
    shown.say("the end")
    shown.close()
    expected = "step 0  loss 1\nstep 15  loss 1\nstep 30  loss 1\nthe end\n"
    assert stream.getvalue() == expected


@pytest.mark.parametrize("terminal", [True, False])
def test_a_screen_that_takes_nothing_fails_nothing(terminal):
    class Gone(Stream):
        def flush(self):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    shown = Screen(Gone(terminal))
    assert shown.is_live is terminal
    shown.show(["step 1"])
    shown.say("a sentence")
    shown.close()


def test_a_long_validation_tells_a_file_how_far_it_is(tiny_shards, tmp_path, monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: clock[0])
    told = log.Log(tmp_path, tiny_config(tiny_shards), HERE, 3)
    batch = types.SimpleNamespace(records_NR=np.zeros((4, 1)))
    for _ in told.validating([batch] * 6, 22):
        clock[0] += 8
    told.close()
    assert capsys.readouterr().err.splitlines() == [
        f"step 3  validating: {done} of 22 people" for done in (4, 12, 20)
    ]


def test_tensorboard_begins_anew_after_a_full_disk_and_keeps_no_tracebacks(
    tiny_shards, tmp_path, capsys
):
    told = log.Log(tmp_path, tiny_config(tiny_shards), HERE, 0)
    full = OSError(28, "No space left on device")
    told._board._get_file_writer().event_writer._async_writer._worker.exception = full
    for step in range(1, 6):
        told.train(step, {"loss": float(step), "wait_share": 0.0, "people_per_s": 9.0})
    told.close()
    assert capsys.readouterr().err.count("the log cannot be written") == 1
    frames = sum(1 for _ in traceback.walk_tb(full.__traceback__))
    assert frames < 20, "each later call makes it longer"
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 3, 4, 5]


def test_a_narrow_terminal_keeps_the_most_important_parts():
    parts = ["step 1/9", "0:07 left", "loss 0.1"]
    assert fit(parts, 100) == "step 1/9  0:07 left  loss 0.1"
    assert fit(parts, 19) == "step 1/9  0:07 left"
    assert fit(parts, 18) == "step 1/9"
    assert fit(parts, 4) == "step"


def test_the_line_of_a_run_tells_everything_and_metrics_hold_the_same(
    tiny_shards, tmp_path, capsys
):
    config = tiny_config(tiny_shards, train={"steps_per_epoch": 3, "log_every": 1})
    make_run(config, tmp_path).train()
    text = capsys.readouterr().err
    first = text.splitlines()[0].split("  ")
    assert [part.split()[0] for part in first[:1] + first[2:5]] == [
        "step",
        "loss",
        "PCKh",
        "waiting",
    ]
    assert [part.split()[-1] for part in first[5:6]] == ["people/s"]
    assert first[0] == "step 1/6" and first[1].endswith(" left") and first[6] == "epoch 1/2"
    assert first[7].startswith("RSS ") and first[7].endswith(" MB")
    assert "\r" not in text and "\x1b" not in text
    logged = metrics(tmp_path, "train")
    assert f"loss {logged[0]['loss']:.5f}" in first
    assert logged[-1]["left_s"] == 0 < logged[0]["left_s"]
    # torch alone is larger than 100 MB; a unit mistaken by 1,000 would show.
    assert all(100 < line["memory_mb"] < 50_000 for line in logged)


def test_the_sample_line_of_the_readme_is_one_that_the_demo_prints():
    config = parse_config(
        train_program.make_parser(), ["--config", str(ROOT / "configs/demo.yaml")]
    )[0]
    text = (ROOT / "README.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("step ") and " left " in line)
    found = re.fullmatch(
        r"step ([\d,]+)/([\d,]+)  (\d+):(\d\d) left  loss 0\.\d{5}  PCKh \d+\.\d %  "
        r"waiting \d+ %  ([\d,]+) people/s  epoch (\d+)/(\d+)  RSS [\d,]+ MB", line,
    )  # fmt: skip
    step, steps, minutes, seconds, rate, epoch, epochs = (
        int(word.replace(",", "")) for word in found.groups()
    )
    train = config.train
    assert (steps, epochs) == (train.steps, train.steps / train.steps_per_epoch)
    assert epoch == math.ceil(step / train.steps_per_epoch)
    left = (steps - step) * config.data.batch_size / rate
    assert left == pytest.approx(60 * minutes + seconds, abs=1)
    assert "0:09 to its limit" in text


def test_the_time_to_the_end_is_that_of_the_steps_so_far(tiny_shards, tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: clock[0])
    config = tiny_config(tiny_shards, train={"steps": 110, "max_minutes": 1})
    told = log.Log(tmp_path, config, HERE, 10)
    for _ in range(10):
        told.advance()
    clock[0] = 5.0  # 10 of 100 steps in 5 s: 45 s are left
    assert told._left() == (pytest.approx(45), "left")
    assert told._parts()[1] == "0:45 left"
    clock[0] = 20.0  # 180 s are left, but the limit comes after 40
    assert told._parts()[1] == "0:40 to its limit"
    told.close()


def test_tensorboard_gets_scalars_and_pictures_of_every_validation(tiny_shards, tmp_path):
    run = make_run(tiny_config(tiny_shards, train={"steps_per_epoch": 3}), tmp_path)
    run.train()
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0, "scalars": 0}).Reload()
    assert {"train/loss", "train/memory_mb", "valid/pckh@0.5_pooled"} <= {*events.Tags()["scalars"]}
    for name, file in (("validation", "validation.jpg"), ("curves", "curves.png")):
        images = events.Images(f"pictures/{name}")
        assert [image.step for image in images] == [3, 6]
        assert images[-1].encoded_image_string == (tmp_path / file).read_bytes()
        shape = cv2.imread(str(tmp_path / file)).shape
        assert shape == (images[-1].height, images[-1].width, 3)


def test_the_sheet_shows_the_same_people_and_their_prediction(tiny_shards, tmp_path):
    run = make_run(tiny_config(tiny_shards), tmp_path)
    run.validate()
    before = run._sheet()
    run.predicted_NJ2 = run.predicted_NJ2.copy()
    run.predicted_NJ2[0] = run.valid_people.joints[0]
    after = run._sheet()
    changed = np.argwhere((before != after).any(axis=2))
    assert len(changed) > 50 and changed[:, 1].max() < 258, "only the first tile may change"


def test_curves_are_drawn_where_their_numbers_are():
    entries = [{"kind": "train", "step": s, "loss": 10.0 ** -(1 + s / 100), "pck": 0.0}
               for s in range(1, 101)]  # fmt: skip
    picture = curves.draw_curves([*entries, {"kind": "train", "step": 50, "loss": float("nan")}])
    left = picture[curves.TOP :, : curves.WIDTH_PX].astype(int)
    blue = np.argwhere((left == curves.COLORS_BGR[0]).all(axis=2))
    # A power law on a logarithmic axis is a straight line, from the upper left to the lower right.
    slope = np.polyfit(blue[:, 1], blue[:, 0], 1)
    assert np.abs(np.polyval(slope, blue[:, 1]) - blue[:, 0]).max() < 3
    assert slope[0] > 0.3 and np.ptp(blue[:, 1]) > 0.9 * 0.98 * (curves.WIDTH_PX - 84)


@pytest.mark.parametrize("last", [1, 7, 60, 999, 200_000])
def test_ticks_are_round_and_few(last):
    ticks = curves.step_ticks(last)
    assert ticks[0] == 0 and ticks[-1] <= last and 2 <= len(ticks) <= 9
    assert str(ticks[1]).strip("0") in "125"


def test_logarithmic_ticks_by_hand():
    assert curves.log_ticks(-2.1, -0.9) == pytest.approx([0.01, 0.02, 0.05, 0.1])
    assert curves.log_ticks(-4, 0) == pytest.approx([1e-4, 1e-3, 1e-2, 0.1, 1])


def stand_in(name: str, calls: list) -> types.ModuleType:
    """A module with the functions of wandb and trackio that records how it is called."""
    module = types.ModuleType(name)
    module.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
    for word in ("init", "log", "finish"):
        setattr(module, word, lambda *a, word=word, **k: calls.append((word, a, k)))
    module.Image = lambda array: ("image", array.shape, array.dtype)  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_the_numbers_and_pictures_of_the_log(
    name, tiny_shards, tmp_path, monkeypatch
):
    calls: list = []
    monkeypatch.setitem(sys.modules, name, stand_in(name, calls))
    config = tiny_config(tiny_shards, train={"tracker": name, "name": "mine"})
    make_run(config, tmp_path).train()
    (word, _, begun), *between, last = calls
    assert (word, begun["name"], begun["resume"], last[0]) == ("init", "mine", "allow", "finish")
    assert begun["config"]["train"]["tracker"] == name
    assert begun.get("id") == ((tmp_path / "tracker_id").read_text() if name == "wandb" else None)
    assert all(word == "log" for word, _, _ in between)
    sent = {
        key: value for _, (values,), k in between if k["step"] == 6 for key, value in values.items()
    }
    for kind in ("train", "valid"):
        line = metrics(tmp_path, kind)[-1]
        numbers = {f"{kind}/{k}": v for k, v in line.items() if k not in ("kind", "step", "time")}
        assert numbers.items() <= sent.items()
    kind, shape, dtype = sent["pictures/curves"]
    assert (kind, shape, dtype) == ("image", (380, 1240, 3), np.uint8)
    assert "pictures/validation" in sent


def test_a_run_that_is_resumed_keeps_its_identity(tmp_path, monkeypatch, tiny_shards):
    calls: list = []
    monkeypatch.setitem(sys.modules, "wandb", stand_in("wandb", calls))
    config = tiny_config(tiny_shards, train={"tracker": "wandb"})
    for _ in range(2):
        tracker.Tracker(config, tmp_path).close()
    ids = [k["id"] for word, _, k in calls if word == "init"]
    assert len(ids) == 2 and ids[0] == ids[1]


def test_a_missing_tracker_says_what_installs_it(monkeypatch):
    monkeypatch.setattr(tracker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install trackio"):
        tracker.require_tracker("trackio")
    tracker.require_tracker("none")


def test_the_end_names_everything_that_was_made_and_the_next_command(tiny_shards, tmp_path, capsys):
    folder = tmp_path / "run"
    run = make_run(tiny_config(tiny_shards), folder)
    run.train()
    train_program.conclude(run, 0)
    text = capsys.readouterr().out
    assert all(str(path) in text for path in folder.iterdir())
    assert f"Next: python evaluate.py --checkpoint {folder / 'best.pt'}" in text
    run.interrupted = True
    train_program.conclude(run, 0)
    assert f"train.py --config {folder / 'config.yaml'} --resume" in capsys.readouterr().out


def test_gpu_memory_is_the_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3_000_000)
    assert log.memory_mb(torch.device("cuda", 0)) == 3.0
    resident = Path("/proc/self/status")
    if resident.exists():
        kb = next(line for line in resident.read_text().splitlines() if line.startswith("VmRSS"))
        assert log.memory_mb(torch.device("cpu")) == pytest.approx(
            1.024e-3 * int(kb.split()[1]), rel=0.1
        )


def test_a_resumed_run_shows_the_pckh_of_its_last_validation(tmp_path):
    lines = [{"kind": "valid", "step": s, "pckh@0.5_pooled": s / 10} for s in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    log.cut(tmp_path / "metrics.jsonl", 2)
    assert log._last_pckh(tmp_path / "metrics.jsonl") == 0.2
    assert len(log.read_metrics(tmp_path / "metrics.jsonl")) == 2


ROTTEN = [
    b'{"kind": "valid", "st\xe5p": 1, "pckh@0.5_pooled": 0.1}', b'{"stfp": 1}', b"5", b"null",
    b"[]", b'"step"', b'{"step": "1"}', b'{"step": 1.5}', b'{"step": -1}', b'{"step": 1e999}',
    b"[" * 100_000, b'{"step": true}', b'{"st',
]  # fmt: skip


@pytest.mark.parametrize("name", ["metrics.jsonl", "skipped_batches.jsonl"])
def test_rotten_lines_are_dropped_and_the_run_goes_on(name, tiny_shards, tmp_path):
    config = tiny_config(tiny_shards, train={"steps": 4, "steps_per_epoch": 2})
    run = make_run(config, tmp_path)
    run.config = tiny_config(tiny_shards, train={"steps": 2, "steps_per_epoch": 2})
    run.train()
    path = tmp_path / name
    whole = path.read_bytes() if path.exists() else b'{"step": 1, "rows": [1]}\n'
    path.write_bytes(b"\n".join(ROTTEN) + b"\n" + whole)
    make_run(config, tmp_path, checkpoint.load_checkpoint(tmp_path / "last.pt")).train()
    assert path.read_bytes().startswith(whole)
    assert not any(line in path.read_bytes().splitlines() for line in ROTTEN)


def test_lines_of_which_only_the_step_is_left_whole_are_shown_as_far_as_they_can(tmp_path):
    """A bit is flipped in a name or a digit: a line has a step, and anything else."""
    good = {"kind": "valid", "step": 3, "pckh@0.5_pooled": 0.25}
    others = [{"step": 1}, {"kind": "valid", "step": 4}, {**good, "pckh@0.5_pooled": "x"},
              {"kind": ["train"], "step": 2, "loss": 1.0}, {**good, "pckh@0.5_pooled": None},
              *({"kind": "train", "step": 2, "loss": x} for x in (10**400, -1e308, 5e-324)),
             ]  # fmt: skip
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [good, *others]))
    assert log._last_pckh(path) == 0.25
    lines = log.read_metrics(path)
    assert len(lines) == 9
    assert curves.curve("", lines, "valid", "pckh@0.5_pooled", 100)[1:] == ([3], [25.0])
    assert curves.curve("", lines, "train", "loss").values == []
    assert curves.draw_curves([*lines, {**good, "pckh@0.5_pooled": 8.5}]).shape == (380, 1240, 3)
