"""Finds people's joints in pictures, a video or a webcam's frames, with a trained network."""

import sys
from pathlib import Path

# `python tools/predict.py` puts tools/ on the path, and not the folder of the packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import functools
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
import numpy.typing as npt

from common.cli import Parser, add_device_options, at_least, counting, info
from common.errors import InputError, run_main
from common.files import write_atomic
from common.system import usable_cores
from configs.skeleton import PIXELS_PER_SCALE, Skeleton
from evaluation.estimator import PoseEstimator, read_picture
from evaluation.visualize import draw_skeleton
from pipelines.annotations import stays_inside
from pipelines.boxes import MARGIN, Person, Square, read_people, square_about, whole_picture
from pipelines.opencv_loader import Item
from tools.video import CODECS, Frames, VideoFile, check_window, show

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
"""What counts as a picture in a folder; a file that is named by itself may end otherwise."""
VIDEOS = {".avi", ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv"}
MOST_FRAMES = 8
"""Frames of a video that are held at a time; one in 4K takes 25 MB."""
LINE_SHARE = 1 / 128
"""Width of a drawn limb over the side of the person's square."""

T = TypeVar("T")
R = TypeVar("R")


class Picture(NamedTuple):
    """A picture and the people to find in it."""

    path: Path
    rows: list[int]
    """Place of each person in the results."""
    people: list[Person]


class Subject(NamedTuple):
    """Who is looked for."""

    picture: Picture | None
    facts: dict[str, Any]
    """What the results say beside the joints."""
    square: Square


class Found(NamedTuple):
    """The same person with joints, and without the crop: there may be very many."""

    subject: Subject
    keypoints_J2: npt.NDArray[np.float64]
    """Px of the picture."""
    scores_J: npt.NDArray[np.float64]


def main() -> None:
    """Predict, draw on the way, and write what was found, also when it is cut short."""
    options = make_parser().parse_args()
    source = moving_source(options)
    pictures = list_pictures(options) if source is None else []
    check_outputs(options, pictures)
    estimator = PoseEstimator.from_checkpoint(
        options.checkpoint,
        flip=options.flip,
        batch_size=options.batch_size,
        device=options.device,
        precision=options.precision,
    )
    found: list[Found] = []
    try:
        if source is None:
            predict_pictures(options, estimator, pictures, found)
        else:
            predict_video(options, estimator, source, found)
    finally:
        write_results(options, estimator.skeleton, found)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="predict.py",
        description="Find people's joints in pictures, a video or a webcam's frames.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/predict.py --checkpoint runs/2hg/best.pt photo.jpg "
        "--box 410 95 180 420 --overlay pose.jpg",
    )
    what = parser.add_argument_group("what to look at")
    what.add_argument(
        "input", nargs="*", type=Path, help="pictures, folders of pictures, or one video"
    )
    what.add_argument("--webcam", type=int, metavar="N", help="the camera of this number, from 0")
    what.add_argument(
        "--ignore-exif",
        action="store_true",
        help="take pictures as they are stored; default: turned upright, as viewers show them",
    )
    what.add_argument(
        "--skip-bad", action="store_true", help="name unreadable pictures and go on without them"
    )
    add_place_options(parser)
    how = parser.add_argument_group("how")
    how.add_argument(
        "--checkpoint",
        required=True,
        help="of train.py or of others' code, or an exported .safetensors or .onnx",
    )
    how.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="average with the prediction for the mirrored picture; default: as in training",
    )
    how.add_argument(
        "--batch-size", type=at_least(1), help="people at a time; default: as in training"
    )
    how.add_argument(
        "--workers",
        type=at_least(1),
        default=usable_cores(),
        help="threads that read (default: all cores)",
    )
    add_device_options(how)
    add_output_options(parser)
    return parser


def add_place_options(parser: argparse.ArgumentParser) -> None:
    """Options that say where the person is."""
    where = parser.add_argument_group(
        "where the person is",
        "in px of the picture as it is shown, in every picture or frame; default: it fills it",
    )
    one = where.add_mutually_exclusive_group()
    one.add_argument(
        "--box", type=float, nargs=4, metavar=("X", "Y", "W", "H"), help="drawn about the person"
    )
    one.add_argument(
        "--center", type=float, nargs=2, metavar=("X", "Y"), help="MPII's, as in its h5 files"
    )
    one.add_argument(
        "--people",
        type=Path,
        metavar="FILE",
        help=".csv or .json of people in the pictures of one folder (docs/predict.md)",
    )
    where.add_argument("--scale", type=float, help="side of the square / 200 px, with --center")
    where.add_argument(
        "--margin",
        type=float,
        default=MARGIN,
        help="side of the square that the network sees / longer side of a box "
        "(default: %(default)s)",
    )


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Options that say what to write."""
    out = parser.add_argument_group("what to write (default: the JSON, to the terminal)")
    out.add_argument("--save-predictions", type=Path, metavar="OUT", help="JSON, joints in px")
    out.add_argument("--save-coco", type=Path, metavar="OUT", help="COCO keypoint results")
    out.add_argument(
        "--overlay",
        type=Path,
        metavar="OUT",
        help="skeletons drawn: a file for one picture, .avi or .mp4 for a video, else a folder",
    )
    out.add_argument(
        "--min-score",
        type=float,
        default=0.0,
        help="draw joints whose peak is at least this high (default: %(default)s; 1 is ideal)",
    )


def moving_source(options: argparse.Namespace) -> Path | int | None:
    """The video or camera; None for pictures. Raises InputError for a mixture of them."""
    videos = [path for path in options.input if path.suffix.lower() in VIDEOS]
    webcam = options.webcam is not None
    if len(videos) + webcam > 1 or ((videos or webcam) and len(options.input) > len(videos)):
        raise _misused("a video or webcam, and something else", "pictures, one video or a webcam")
    if not options.input and not webcam:
        raise _misused("nothing to look at", "pictures, folders, a video, or --webcam N")
    if (options.center is None) != (options.scale is None):
        raise _misused("--center or --scale alone", "both of them")
    if not options.margin > 0 or (options.box and not min(options.box[2:]) > 0):
        raise _misused("a --box or --margin without a size", "sizes above 0")
    if not (videos or webcam):
        return None
    if options.people:
        raise _misused("--people with a video or webcam", "--box, or --center with --scale")
    if options.overlay and options.overlay.suffix.lower() not in CODECS:
        raise InputError(
            options.overlay, "another kind of file", " or ".join(CODECS), "name the overlay so"
        )
    if webcam and not options.overlay:
        check_window()
    return options.webcam if webcam else videos[0]


def _misused(found: str, expected: str) -> InputError:
    return InputError("command line", found, expected, "see --help")


def list_pictures(options: argparse.Namespace) -> list[Picture]:
    """The pictures with their people, in the order given. Raises InputError."""
    if options.people:
        if len(options.input) != 1 or not options.input[0].is_dir():
            raise _misused("--people without its pictures", "the one folder in which they lie")
        return people_in(options.input[0], read_people(options.people, options.margin))
    square = given_square(options)
    found = []
    for path in options.input:
        if not path.exists():
            raise InputError(path, "no such file or folder", "a picture", "give its path")
        if not path.is_dir():
            found.append((path, str(path)))
            continue
        inside = [p for p in sorted(path.iterdir()) if p.suffix.lower() in PICTURES]
        found += [(p, p.name) for p in inside]
        if not inside:
            kinds = ", ".join(sorted(PICTURES))
            raise InputError(path, "no picture in this folder", kinds, "name another folder")
    return [Picture(path, [row], [Person(name, square)]) for row, (path, name) in enumerate(found)]


def people_in(folder: Path, people: list[Person]) -> list[Picture]:
    """The people of a file by their pictures, each of which is read once. Raises InputError."""
    pictures: dict[str, Picture] = {}
    for row, person in enumerate(people):
        path = folder / person.image
        if not stays_inside(folder, person.image) or not path.is_file():
            raise InputError(
                path, f"no such picture, of person {row}", f"one in {folder}", "correct the file"
            )
        picture = pictures.setdefault(person.image, Picture(path, [], []))
        picture.rows.append(row)
        picture.people.append(person)
    return list(pictures.values())


def given_square(options: argparse.Namespace) -> Square | None:
    """Where the command line says that the person is."""
    if options.box:
        return square_about(options.box, options.margin)
    if options.center:
        x, y = options.center
        return Square(x, y, options.scale)
    return None


def check_outputs(options: argparse.Namespace, pictures: list[Picture]) -> None:
    """Refuse files that cannot be written before the work is done. Raises InputError."""
    for path in (options.save_predictions, options.save_coco, options.overlay):
        if path and any(p.is_file() for p in path.parents):
            raise InputError(path, "in a file", "in a folder", "name another file")
        if path and path.is_dir() and path is not options.overlay:
            raise InputError(path, "a folder", "a file name", "name another file")
    drawn = [overlay_path(options, picture, pictures) for picture in pictures]
    if options.overlay and len(set(drawn)) < len(drawn):
        raise InputError(
            options.overlay, "pictures of the same name", "different ones", "take them in turn"
        )
    sources = {picture.path.resolve() for picture in pictures}
    sources |= {path.resolve() for path in options.input if path.is_file()}
    if {path.resolve() for path in [*drawn, options.overlay] if path} & sources:
        raise InputError(
            options.overlay, "the picture itself", "a place for the overlay", "name another"
        )


def overlay_path(
    options: argparse.Namespace, picture: Picture, pictures: list[Picture]
) -> Path | None:
    """Where the overlay of one of the pictures goes. Raises InputError."""
    out: Path | None = options.overlay
    if out is None:
        return None
    if len(pictures) == 1 and out.suffix.lower() in PICTURES and not out.is_dir():
        return out
    if out.suffix.lower() in PICTURES | VIDEOS or out.is_file():
        raise InputError(
            out, f"one file, for {len(pictures)} pictures", "a folder", "name a folder"
        )
    if out.suffix and not out.is_dir() and len(pictures) == 1:
        kinds = " ".join(sorted(PICTURES))
        raise InputError(out, "another kind of file", f"a folder, or one of {kinds}", "name it so")
    inside = picture.people[0].image if options.people else picture.path.name
    path = out / inside
    return path if path.suffix.lower() in PICTURES else path.with_suffix(".png")


def predict_pictures(
    options: argparse.Namespace,
    estimator: PoseEstimator,
    pictures: list[Picture],
    found: list[Found],
) -> None:
    """Fill `found`, and draw each picture when everybody in it is found. Raises InputError."""
    waiting: dict[Path, list[Found]] = {}
    read = functools.partial(read_subjects, options, estimator)
    with (
        ThreadPoolExecutor(options.workers) as pool,
        counting("predict", sum(len(p.rows) for p in pictures), "people") as advance,
    ):
        subjects = itertools.chain.from_iterable(ahead(pool, read, pictures, 2 * options.workers))
        for batch in in_batches(subjects, estimator.batch_size):
            done = predict_subjects(estimator, batch)
            found += done
            for picture, people in whole_pictures(done, waiting):
                out = overlay_path(options, picture, pictures)
                if out:
                    image = read_picture(picture.path, not options.ignore_exif)
                    write_picture(out, draw(image, people, estimator.skeleton, options.min_score))
            advance(len(batch))
    say_left_out(pictures, found)


def say_left_out(pictures: list[Picture], found: list[Found]) -> None:
    """Count the bad pictures. Raises InputError if there is no other."""
    paths = {picture.path for picture in pictures}
    good = {one.subject.picture.path for one in found if one.subject.picture}
    if paths and not good:
        where, count = ", ".join(map(str, sorted(paths)[:3])), len(paths)
        raise InputError(
            where + (", ..." if count > 3 else ""),
            f"{count} picture(s), all of them bad (named above)",
            "one that OpenCV reads at least",
            "replace them",
        )
    if good != paths:
        print(f"left out: {len(paths - good):,} of {len(paths):,} pictures", file=sys.stderr)


def whole_pictures(
    found: list[Found], waiting: dict[Path, list[Found]]
) -> Iterator[tuple[Picture, list[Found]]]:
    """The pictures in which everybody is found now. waiting: people of the others, kept here."""
    for one in found:
        picture = one.subject.picture
        assert picture is not None, "a frame of a video"
        waiting.setdefault(picture.path, []).append(one)
        if len(waiting[picture.path]) == len(picture.rows):
            yield picture, waiting.pop(picture.path)


def read_subjects(
    options: argparse.Namespace, estimator: PoseEstimator, picture: Picture
) -> list[tuple[Subject, Item]]:
    """The people of one picture, cropped; nobody if the picture is bad and that is allowed."""
    try:
        image = read_picture(picture.path, not options.ignore_exif)
    except InputError as error:
        if not options.skip_bad:
            advice = f"{error.next_step}, or leave such pictures out with --skip-bad"
            raise InputError(error.where, error.found, error.expected, advice) from error
        info(f"left out: {error.where}: {error.found}")
        return []
    return [
        crop_subject(estimator, image, picture, person, {"index": row})
        for row, person in zip(picture.rows, picture.people, strict=True)
    ]


def crop_subject(
    estimator: PoseEstimator,
    image_HW3: npt.NDArray[np.uint8],
    picture: Picture | None,
    person: Person,
    facts: dict[str, Any],
) -> tuple[Subject, Item]:
    """One person and their crop. Raises InputError for a square that is not in the picture."""
    height, width = image_HW3.shape[:2]
    square = person.square or whole_picture(width, height)
    facts = {"image": person.image, **facts, "width": width, "height": height}
    if person.image_id is not None:
        facts["image_id"] = person.image_id
    where = f"{person.image}: person {facts['index']}"
    return Subject(picture, facts, square), estimator.crop(image_HW3, square, where)


def ahead(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], most: int
) -> Iterator[R]:
    """function(item) of each item, in order, worked out in the pool up to `most` items ahead."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def in_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter if need be."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def predict_subjects(estimator: PoseEstimator, subjects: list[tuple[Subject, Item]]) -> list[Found]:
    """One batch through the network."""
    keypoints, scores = estimator.predict([crop for _, crop in subjects])
    return [
        Found(subject, joints, heights)
        for (subject, _), joints, heights in zip(subjects, keypoints, scores, strict=True)
    ]


def predict_video(
    options: argparse.Namespace, estimator: PoseEstimator, source: Path | int, found: list[Found]
) -> None:
    """The same for every frame of a video or webcam; nobody is followed from frame to frame."""
    live = isinstance(source, int)
    person = Person(f"webcam {source}" if live else str(source), given_square(options))
    keep = not live or options.save_predictions or options.save_coco
    frames = Frames(source)
    video = VideoFile(options.overlay, frames.per_second) if options.overlay else None
    size = 1 if live else min(estimator.batch_size, MOST_FRAMES)
    number = 0
    try:
        with counting("predict", frames.count, "frames") as advance:
            for batch in in_batches(frames, size):
                subjects = [
                    crop_subject(estimator, image, None, person, {"index": row, "frame": row})
                    for row, image in enumerate(batch, number)
                ]
                results = predict_subjects(estimator, subjects)
                found += results if keep else []
                for image, one in zip(batch, results, strict=True):
                    drawn = draw(image, [one], estimator.skeleton, options.min_score)
                    if video:
                        video.write(drawn)
                    elif live and not show(drawn):
                        return
                number += len(batch)
                advance(len(batch))
    finally:
        frames.close()
        if video:
            video.close()


def draw(
    image_HW3: npt.NDArray[np.uint8], found: list[Found], skeleton: Skeleton, min_score: float
) -> npt.NDArray[np.uint8]:
    """Everybody's skeleton onto the picture, which is changed; returns it."""
    for one in found:
        side = PIXELS_PER_SCALE * one.subject.square.scale
        width = max(1, round(LINE_SHARE * min(side, max(image_HW3.shape))))
        draw_skeleton(image_HW3, one.keypoints_J2, one.scores_J >= min_score, skeleton, width)
    return image_HW3


def write_picture(path: Path, image_HW3: npt.NDArray[np.uint8]) -> None:
    """Write a picture whole or not at all. Raises InputError."""
    fine, data = cv2.imencode(path.suffix, image_HW3)
    if not fine:
        raise InputError(path, "OpenCV cannot write it", "a .png or .jpg", "name another file")
    write_atomic(path, data.tobytes())


def write_results(options: argparse.Namespace, skeleton: Skeleton, found: list[Found]) -> None:
    """The JSON files that were asked for, or the JSON on the terminal if nothing was."""
    if not found:
        return
    found = sorted(found, key=lambda one: one.subject.facts["index"])
    entries = [as_entry(one) for one in found]
    if options.save_predictions:
        write_atomic(options.save_predictions, (json.dumps(entries) + "\n").encode())
    if options.save_coco:
        coco = [as_coco(entry) for entry in entries]
        write_atomic(options.save_coco, (json.dumps(coco) + "\n").encode())
    for path in (options.save_predictions, options.save_coco, options.overlay):
        if path and path.exists():
            print(f"wrote {path}", file=sys.stderr)
    if not (options.save_predictions or options.save_coco or options.overlay):
        print(json.dumps(entries))
    print(f"joints: {', '.join(skeleton.names)}", file=sys.stderr)


def as_entry(one: Found) -> dict[str, Any]:
    """One person of our JSON; `evaluate.py --predictions` reads it too."""
    square = one.subject.square
    keypoints = np.concatenate([one.keypoints_J2, one.scores_J[:, None]], axis=1)
    place = {"center": [square.x, square.y], "scale": square.scale}
    return {**one.subject.facts, **place, "keypoints": keypoints.tolist()}


def as_coco(entry: dict[str, Any]) -> dict[str, Any]:
    """The same person as a COCO keypoint result; score is the mean over joints."""
    joints = entry["keypoints"]
    return {
        "image_id": entry.get("image_id", entry["index"]),
        "category_id": 1,
        "keypoints": [value for joint in joints for value in joint],
        "score": sum(score for _, _, score in joints) / len(joints),
    }


if __name__ == "__main__":
    run_main(main)
