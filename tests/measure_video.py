"""Measures tracking and smoothing on synthetic videos of moving people, whose joints are known.

    python tests/measure_video.py --checkpoint runs/demo/best.pt

In a video of 10 s a figure of pipelines/synthetic.py moves and rests in turn, on a still background
with noise. `tools/predict.py` finds its joints in several ways. Columns, means over the videos:
joints that are wrong by more than half the head's length, which do not count in the others; mean
error; jitter, the root mean square of the error's change from frame to frame, at rest and in
motion; lag, the delay that explains most of the error in motion, by least squares.
"""

import argparse
import contextlib
import csv
import io
import itertools
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np

from pipelines import synthetic
from tools import predict

SIZE_WH, RATE = (640, 480), 30.0
MOVE, REST, MOVES = 20, 10, 10
"""Frames of a movement and of the rest after it; movements in a video."""


def key_pose(rng: np.random.Generator) -> np.ndarray:
    """(POINTS, 3) of an upright body that faces the viewer, so that blends look like bodies."""
    while True:
        body = synthetic.sample_body(rng)
        faces_us = body[13, 0] - body[12, 0] > 0.15
        if faces_us and body[synthetic.PELVIS, 1] - body[synthetic.HEAD_TOP, 1] > 0.4:
            return body


def bodies(rng: np.random.Generator) -> np.ndarray:
    """(F, POINTS, 3) px: poses follow each other by cosine interpolation, with rests between."""
    height = SIZE_WH[1] * rng.uniform(0.5, 0.7)
    poses = []
    for _ in range(MOVES + 1):
        body = height * key_pose(rng)
        low, high = body[:, :2].min(0), body[:, :2].max(0)
        body[:, :2] += rng.uniform(-low, np.maximum(np.array(SIZE_WH) - high, 1 - low))
        poses.append(body)
    share = [*(0.5 - 0.5 * np.cos(np.linspace(0, np.pi, MOVE))), *[1.0] * REST]
    return np.array([(1 - s) * a + s * b for a, b in itertools.pairwise(poses) for s in share])


def write_video(path: Path, points_FP3: np.ndarray, seed: int) -> None:
    """Draw the figure in the same colours in every frame, with new noise."""
    rng = np.random.default_rng(seed)
    empty = np.full((*SIZE_WH[::-1], 3), rng.uniform(60, 200, 3), np.uint8)
    background = synthetic.Canvas(empty, np.zeros(SIZE_WH[::-1], np.uint8))
    for _ in range(20):
        synthetic.draw_clutter(rng, background, rng.uniform(0, 1, 2) * SIZE_WH, 0.4)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), RATE, SIZE_WH)
    for points_P3 in points_FP3:
        canvas = background._replace(image_HW3=background.image_HW3.copy())
        synthetic.draw_body(np.random.default_rng(seed), canvas, points_P3, 1)
        noise = rng.normal(0, 8, canvas.image_HW3.shape)
        writer.write((canvas.image_HW3 + noise).clip(0, 255).astype(np.uint8))
    writer.release()


def boxes_of(points_FP3: np.ndarray) -> np.ndarray:
    """(F, 4) x, y, width, height of the figure, px."""
    low, high = points_FP3[..., :2].min(1), points_FP3[..., :2].max(1)
    return np.hstack([low, high - low])


def measures(found_FJ3: np.ndarray, points_FP3: np.ndarray) -> dict[str, float]:
    """The numbers of one video, px and ms."""
    truth = points_FP3[:, : synthetic.JOINTS, :2]
    error = found_FJ3[..., :2] - truth
    px = np.linalg.norm(error, axis=-1)
    head = np.linalg.norm(truth[:, synthetic.HEAD_TOP] - truth[:, synthetic.NECK], axis=-1)
    right = px < 0.5 * head[:, None]
    both = right[1:] & right[:-1]
    change = (np.diff(error, axis=0) ** 2).sum(-1)
    speed = np.diff(truth, axis=0)
    moves = (speed**2).sum(-1) > 1
    of = {"rest": both & ~moves, "motion": both & moves}
    lag = -(error[1:] * speed)[of["motion"]].sum() / (speed**2)[of["motion"]].sum()
    return {
        "wrong %": 100 * (1 - right.mean()),
        "error px": px[right].mean(),
        "jitter at rest px": change[of["rest"]].mean() ** 0.5,
        "jitter in motion px": change[of["motion"]].mean() ** 0.5,
        "lag ms": 1000 * lag / RATE,
    }


def ways(folder: Path, boxes_F4: np.ndarray, rng: np.random.Generator) -> dict[str, list[str]]:
    """Options of tools/predict.py by name. Detections differ from the true boxes by 3 % of them."""
    noise = 0.03 * boxes_F4[:, 2:].max(axis=1, keepdims=True) * rng.normal(size=boxes_F4.shape)
    for name, boxes in (("true", boxes_F4), ("detected", boxes_F4 + noise)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            header = ["frame", "x", "y", "width", "height"]
            csv.writer(file).writerows([header, *([n, *box] for n, box in enumerate(boxes))])
    true, detected = ([f"--people={folder / name}.csv"] for name in ("true", "detected"))
    first = ["--box", *map(str, boxes_F4[0])]
    return {
        "whole picture, no tracking": ["--no-track"],
        "true boxes, no tracking": ["--no-track", *true],
        "detections, no tracking": ["--no-track", *detected],
        "detections, smoothed": ["--no-track", *detected, "--smooth", "1"],
        "tracked from the first box": first,
        "tracked and smoothed": [*first, "--smooth", "1"],
        "tracked from the whole picture": [],
    }


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="trained on synthetic people")
    parser.add_argument("--videos", type=int, default=2)
    return parser


def main() -> None:
    """Draw the videos, predict them, print a table."""
    options = make_parser().parse_args()
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in range(options.videos):
        points_FP3 = bodies(np.random.default_rng(seed))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_video(folder / "video.avi", points_FP3, seed)
            for way, words in ways(folder, boxes_of(points_FP3), np.random.default_rng(1)).items():
                line = ["--checkpoint", options.checkpoint, str(folder / "video.avi"), *words]
                with contextlib.redirect_stderr(io.StringIO()):
                    predict.main([*line, "--save-predictions", str(folder / "p.json")])
                entries = json.loads((folder / "p.json").read_text())
                found_FJ3 = np.array([entry["keypoints"] for entry in entries])
                rows.setdefault(way, []).append(measures(found_FJ3, points_FP3))
    columns = list(rows["tracked and smoothed"][0])
    print(f"{'':32}" + "".join(f"{column:>22}" for column in columns))
    for way, videos in rows.items():
        print(f"{way:32}" + "".join(f"{np.mean([f[c] for f in videos]):22.2f}" for c in columns))


if __name__ == "__main__":
    main()
