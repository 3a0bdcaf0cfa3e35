"""Finds people's joints in pictures, a video or a webcam's frames, with a trained network."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of configs/

import argparse
import functools
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from common.cli import Parser, add_device_options, at_least, info, progress
from common.errors import InputError, run_main
from common.files import write_atomic
from common.system import usable_cores
from configs.skeleton import PIXELS_PER_SCALE, Skeleton
from evaluation.detector import Detector
from evaluation.estimator import PoseEstimator, read_picture
from evaluation.predictions import deeplabcut_table
from evaluation.tracking import MIN_JOINT_SCORE, OneEuroFilter, Track, Tracker, square_of_joints
from evaluation.video import CODECS, frame_rate, open_video, read_frames, write_video
from evaluation.visualize import draw_skeleton
from pipelines.annotations import stays_inside
from pipelines.boxes import MARGIN, Person, Square, read_people, square_about, whole_picture
from pipelines.jpeg import ENDINGS
from pipelines.opencv_loader import RawBatch
from pipelines.workers import in_threads

PICTURES = {*ENDINGS, ".ppm", ".pgm", ".gif", ".avif"}
"""Extensions of the pictures in a folder; a file given by its name may have another."""
VIDEOS = {".avi", ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv"}
MAX_FRAMES = 8
"""Frames of a video in memory at a time; one in 4K takes 25 MB."""
LINE_SHARE = 1 / 128
"""Width of a drawn limb / side of the square about the drawn joints."""
MIN_BOX_SCORE = 0.3
"""Detections in videos with a lower score are left out by default."""

Image = npt.NDArray[np.uint8]
Options = argparse.Namespace
Result = dict[str, Any]
"""One person as written to JSON; `evaluate.py --predictions` reads it too."""
Subject = tuple[Result, RawBatch]
"""One person to find: the result without joints, and the crop."""


class Picture(NamedTuple):
    """A picture file and the people to find in it."""

    path: Path
    people: list[tuple[int, Person]]
    """With their index in the results."""
    overlay: Path | None = None


class Frame(NamedTuple):
    """A picture or a frame of a video, with the people to find in it."""

    source: Picture | Image
    """A picture is read again to draw on it, which saves memory. Frames are (H, W, 3) BGR."""
    subjects: list[Subject]
    tracks: Sequence[Track] = ()
    """Of a video's people, in the same order."""


def main(argv: list[str] | None = None) -> None:
    """Predict, draw, and write the results, also those of an interrupted run."""
    options = make_parser().parse_args(argv)
    video = video_source(options)
    people, is_video = list[Person](), video is not None
    if options.min_box_score is None:
        options.min_box_score = MIN_BOX_SCORE if is_video else 0.0
    if path := options.people:
        coco = options.annotations
        people = read_people(path, options.margin, annotations=coco, in_video=is_video)
        least = options.min_box_score
        people = [person for person in people if person.score is None or person.score >= least]
    pictures = add_overlays(options, list_pictures(options, people)) if video is None else []
    check_outputs(options)
    estimator = make_estimator(options, options.checkpoint)
    results: list[list[Result]] = []
    try:
        if video is None:
            predict_pictures(options, estimator, pictures, results)
        else:
            predict_video(options, estimator, video, people, results)
    finally:
        write_results(options, estimator.skeleton, results)


def make_estimator(options: Options, checkpoint: str) -> PoseEstimator:
    """A network on the device of the command line. Raises InputError."""
    return PoseEstimator.from_checkpoint(
        checkpoint,
        flip=options.flip,
        batch_size=options.batch_size,
        device=options.device,
        precision=options.precision,
    )


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        description="Find people's joints in pictures, a video or a webcam's frames.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/predict.py --checkpoint runs/2hg/best.pt photo.jpg "
        "--box 410 95 180 420 --overlay pose.jpg",
    )
    add = parser.add_argument_group("input").add_argument
    add("input", nargs="*", type=Path, help="pictures, folders of pictures, or one video")
    add("--webcam", type=int, metavar="N", help="camera number, from 0, instead of a video")
    add("--ignore-exif", action="store_true", help="do not turn pictures upright")
    add("--skip-bad", action="store_true", help="report unreadable pictures and continue")
    _add_position_options(parser)
    add = parser.add_argument_group("videos").add_argument
    track_help = "look for people about their last joints; --no-track: only at the given places"
    add("--track", action=argparse.BooleanOptionalAction, default=True, help=track_help)
    smooth_help = "One Euro filter with this cutoff for joints at rest, such as 1"
    add("--smooth", type=float, metavar="HZ", help=smooth_help)
    beta_help = "cutoff that it adds at a speed of one square per second (default: %(default)s)"
    add("--beta", type=float, default=30.0, metavar="HZ", help=beta_help)
    group = parser.add_argument_group("network")
    add = group.add_argument
    add("--checkpoint", required=True, help="a checkpoint, .safetensors or .onnx")
    flip_help = "average with the mirrored picture's prediction; default: as in training"
    add("--flip", action=argparse.BooleanOptionalAction, help=flip_help)
    add("--batch-size", type=at_least(1), help="people per batch; default: as in training")
    add("--workers", type=at_least(1), default=usable_cores(), help="threads that read pictures")
    add_device_options(group)
    add = parser.add_argument_group("output (default: JSON on the terminal)").add_argument
    add("--save-predictions", type=Path, metavar="OUT", help="JSON, joints in px")
    add("--save-coco", type=Path, metavar="OUT", help="COCO keypoint results")
    overlay_help = "drawn skeletons: a picture for one, .avi or .mp4 for a video, else a folder"
    add("--overlay", type=Path, metavar="OUT", help=overlay_help)
    csv_help = "a video's joints in the columns of DeepLabCut"
    add("--save-csv", type=Path, metavar="OUT", help=csv_help)
    score_help = "draw joints whose score is at least this high (default: %(default)s)"
    add("--min-score", type=float, default=MIN_JOINT_SCORE, help=score_help)
    return parser


def _add_position_options(parser: Parser) -> None:
    group = parser.add_argument_group(
        "position of the person",
        "in px of the upright picture, in every picture or frame; default: the whole picture",
    )
    add = group.add_mutually_exclusive_group().add_argument
    # fmt: off
    add("--box", type=float, nargs=4, action="append", default=[], metavar=("X", "Y", "W", "H"),
        help="box around a person; once for each person")
    add("--center", type=float, nargs=2, action="append", default=[], metavar=("X", "Y"),
        help="as in MPII's h5 files, with --scale; once for each person")
    # fmt: on
    people_help = ".csv or .json of people in the pictures of one folder, or in a video's frames"
    add("--people", type=Path, metavar="FILE", help=people_help)
    detector_help = "of a video's people: an ONNX file of the layout in docs/predict.md"
    add("--detector", type=Path, metavar="FILE", help=detector_help)
    finder_help = "of a video: a network trained on whole pictures, which finds whoever is lost"
    add("--finder", metavar="CHECKPOINT", help=finder_help)
    add = group.add_argument
    names_help = "COCO's annotation file with the pictures' names, if --people are COCO results"
    add("--annotations", type=Path, metavar="FILE", help=names_help)
    scale_help = "side of the square / 200 px, one for each --center"
    add("--scale", type=float, action="append", default=[], help=scale_help)
    margin_help = "side of the network's square / longer side of the box (default: %(default)s)"
    add("--margin", type=float, default=MARGIN, help=margin_help)
    least_help = "leave out boxes with a lower score (default: 0.3 in videos, else none)"
    add("--min-box-score", type=float, metavar="S", help=least_help)


# Checking the command line


def video_source(options: Options) -> Path | int | None:
    """The video or camera number; None for pictures. Raises InputError for a mixture of them."""
    cameras = [] if options.webcam is None else [options.webcam]
    videos = [path for path in options.input if path.suffix.lower() in VIDEOS] + cameras
    is_flat = not min([options.margin, *(side for box in options.box for side in box[2:])]) > 0
    mistakes = {
        "no input": not options.input and not cameras,
        "a video or webcam, and something else": videos and len(options.input + cameras) > 1,
        "--webcam without an output": cameras and not outputs(options),
        "--center and --scale not together": len(options.center) != len(options.scale),
        "a --box or --margin without a size": is_flat,
        "a --smooth that is not positive, or a negative --beta": not (options.smooth or 1) > 0
        or not options.beta >= 0,
        "--people without the one folder of its pictures": options.people
        and not videos
        and not (len(options.input) == 1 and options.input[0].is_dir()),
        "--annotations without --people": options.annotations and not options.people,
        "--detector, --finder or --save-csv without a video": not videos
        and (options.detector or options.finder or options.save_csv),
    }
    for found, is_made in mistakes.items():
        if is_made:
            raise InputError("command line", found, "options that go together", "see --help")
    if videos and options.overlay and options.overlay.suffix.lower() not in CODECS:
        raise InputError(options.overlay, "not a video", " or ".join(CODECS), "rename the overlay")
    return videos[0] if videos else None


def list_pictures(options: Options, people: list[Person]) -> list[Picture]:
    """The pictures with their people, in the order given. Raises InputError.

    People of the same picture are grouped, so that it is read once.
    """
    if options.people:
        folder, pictures = options.input[0], dict[Path, Picture]()
        for index, person in enumerate(people):
            path = folder / person.image
            if not stays_inside(folder, person.image) or not path.is_file():
                found = f"no such picture (person {index})"
                raise InputError(path, found, f"one in {folder}", "correct the file")
            pictures.setdefault(path, Picture(path, [])).people.append((index, person))
        return list(pictures.values())
    named: list[tuple[Path, str]] = []
    for path in options.input:
        inside = [p for p in sorted(path.glob("*")) if p.suffix.lower() in PICTURES]
        if path.is_dir() and not inside:
            kinds = ", ".join(sorted(PICTURES))
            raise InputError(path, "no picture in this folder", kinds, "give another folder")
        named += [(p, p.name) for p in inside] or [(path, str(path))]
    numbers, squares = itertools.count(), given_squares(options)
    return [
        Picture(path, [(next(numbers), Person(name, square)) for square in squares])
        for path, name in named
    ]


def given_squares(options: Options) -> list[Square | None]:
    """The people's positions on the command line; None is the whole picture."""
    centers = zip(options.center, options.scale, strict=True)
    squares = [square_about(box, options.margin) for box in options.box]
    squares += [Square(x, y, scale) for (x, y), scale in centers]
    return [*squares] or [None]


def check_outputs(options: Options) -> None:
    """Refuse paths that cannot be written, before the work. Raises InputError."""
    for path in outputs(options):
        is_folder = path.is_dir() and path != options.overlay
        if is_folder or any(parent.is_file() for parent in path.parents):
            raise InputError(path, "a folder, or in a file", "a file name", "give another name")
        if any(path.resolve() == other.resolve() for other in options.input if other.is_file()):
            raise InputError(path, "the input itself", "another path", "give another name")


def add_overlays(options: Options, pictures: list[Picture]) -> list[Picture]:
    """The pictures with the paths of their overlays, if wanted. Raises InputError."""
    out: Path | None = options.overlay
    if out is None:
        return pictures
    names = [p.people[0][1].image if options.people else p.path.name for p in pictures]
    paths = [out / name for name in names]
    names_file = out.suffix.lower() in PICTURES | VIDEOS or (out.suffix and len(pictures) == 1)
    if names_file and not out.is_dir():
        if len(pictures) > 1 or out.suffix.lower() not in PICTURES:
            found = f"one file of kind {out.suffix!r}, for {len(pictures)} pictures"
            raise InputError(out, found, "a .png or .jpg for one, else a folder", "rename it")
        paths = [out]
    paths = [p if p.suffix.lower() in PICTURES else p.with_suffix(".png") for p in paths]
    if len(set(paths)) < len(paths):
        raise InputError(out, "pictures of the same name", "different ones", "use separate runs")
    if {path.resolve() for path in paths} & {picture.path.resolve() for picture in pictures}:
        raise InputError(out, "the input itself", "another path", "rename the overlay")
    return [p._replace(overlay=path) for p, path in zip(pictures, paths, strict=True)]


# Predicting


def predict_pictures(
    options: Options, estimator: PoseEstimator, pictures: list[Picture], results: list[list[Result]]
) -> None:
    """Append the people of each picture to the results, and write overlays. Raises InputError."""
    bad: list[Path] = []
    total = sum(len(picture.people) for picture in pictures)
    with progress(None, "predict", "people", total) as bar:
        read = functools.partial(read_frame, options, estimator)
        frames = in_threads(read, pictures, options.workers, pin=False)
        for (picture, subjects, _), found in find_people(estimator, frames, estimator.batch_size):
            assert isinstance(picture, Picture)
            if not subjects:
                bad.append(picture.path)
            elif picture.overlay:
                image = read_picture(picture.path, not options.ignore_exif)
                draw(image, found, estimator.skeleton, options.min_score)
                _, data = cv2.imencode(picture.overlay.suffix, image)
                write_atomic(picture.overlay, data.tobytes())
            results.append(found)
            bar.update(len(found))
    if len(bad) == len(pictures):
        problem = f"{len(bad)} picture(s), all of them bad (reported above)"
        raise InputError(bad[0], problem, "pictures that OpenCV reads", "replace them")
    if bad:
        print(f"left out: {len(bad):,} of {len(pictures):,} pictures", file=sys.stderr)


def read_frame(options: Options, estimator: PoseEstimator, picture: Picture) -> Frame:
    """The cropped people of a picture; none if it is bad and --skip-bad was given."""
    try:
        image = read_picture(picture.path, not options.ignore_exif)
    except InputError as error:
        if not options.skip_bad:
            error.next_step += ", or leave such pictures out with --skip-bad"
            raise
        info(f"left out: {error.where}: {error.found}")
        return Frame(picture, [])
    subjects = [crop_person(estimator, image, p, {"row": n}) for n, p in picture.people]
    return Frame(picture, subjects)


def crop_person(
    estimator: PoseEstimator, image_HW3: Image, person: Person, facts: Result
) -> Subject:
    """Raises InputError for a square outside the picture. facts: more keys of the result."""
    height, width = image_HW3.shape[:2]
    square = person.square or whole_picture(width, height)
    facts = {"image": person.image, **facts, "width": width, "height": height}
    optional = {"image_id": person.image_id, "box_score": person.score}
    facts |= {name: value for name, value in optional.items() if value is not None}
    facts |= {"center": [square.x, square.y], "scale": square.scale}
    where = f"{person.image}: person {facts['row']}"
    return facts, estimator.crop(image_HW3, square, where)


def find_people(
    estimator: PoseEstimator, frames: Iterable[Frame], batch_size: int
) -> Iterator[tuple[Frame, list[Result]]]:
    """Each frame with its people's results, in order; about a batch of people at a time."""
    group: list[Frame] = []
    for frame in frames:
        group.append(frame)
        # A frame without people counts too, because the group holds its picture.
        if sum(max(1, len(frame.subjects)) for frame in group) >= batch_size:
            yield from predict_group(estimator, group)
            group = []
    yield from predict_group(estimator, group)


def predict_group(
    estimator: PoseEstimator, group: list[Frame]
) -> Iterator[tuple[Frame, list[Result]]]:
    """Each frame with its results; `keypoints`: x, y in px and score of each joint."""
    subjects = [subject for frame in group for subject in frame.subjects]
    keypoints_NJ2, scores_NJ, errors_NJ = estimator.predict([crop for _, crop in subjects])
    rows = np.concatenate([keypoints_NJ2, scores_NJ[..., None]], axis=2).tolist()
    found = [{"keypoints": row} for row in rows]
    if estimator.calibration:
        expected = zip(found, errors_NJ.tolist(), strict=True)
        found = [{**joints, "expected_errors": errors} for joints, errors in expected]
    results = iter(found)
    for frame in group:
        yield frame, [{**facts, **next(results)} for facts, _ in frame.subjects]


# Video


def predict_video(
    options: Options,
    estimator: PoseEstimator,
    source: Path | int,
    people: list[Person],
    results: list[list[Result]],
) -> None:
    """Append the people of each frame of a video or webcam to the results; write the overlay.

    people: from --people. Raises InputError.
    """
    capture = open_video(source)
    smooth = options.smooth and (options.smooth, options.beta, frame_rate(capture))
    tracker = Tracker(options.track, lambda: OneEuroFilter(*smooth) if smooth else None)
    name = str(source)
    frames = video_frames(options, estimator, tracker, read_frames(capture, name), name, people)
    batch_size = 1 if options.track else min(estimator.batch_size, MAX_FRAMES)
    count = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
    overlay = write_video(options.overlay, capture) if options.overlay else nullcontext()
    with overlay as writer, progress(None, "predict", "frames", count or None) as bar:
        # With tracking, a frame is read when the joints of the frame before it are known.
        for (image, _, tracks), found in find_people(estimator, frames, batch_size):
            assert isinstance(image, np.ndarray)
            for person, track in zip(found, tracks, strict=True):
                smooth_joints(person, track, tracker)
            if writer:
                draw(image, found, estimator.skeleton, options.min_score)
                writer.write(image)
            results.append(found)
            bar.update(1)
    late = [person.frame for person in people if person.frame >= len(results)]
    if late:
        found_late = f"{len(late)} people after the last frame, such as in frame {max(late)}"
        advice = "correct the file; the results of the other people are written"
        raise InputError(options.people, found_late, f"frames 0 to {len(results) - 1}", advice)


def video_frames(
    options: Options,
    estimator: PoseEstimator,
    tracker: Tracker,
    images: Iterable[Image],
    name: str,
    people: list[Person],
) -> Iterator[Frame]:
    """The frames with their people: given, detected, or followed from the frame before."""
    source, rows = people_source(options, tracker, people), itertools.count()
    for n, image in enumerate(images):
        tracks = tracker.look(source(n, image))
        subjects = []
        for track in tracks:
            facts = {"row": next(rows), "frame": n, "person": track.identity}
            subjects.append(crop_person(estimator, image, Person(name, track.square), facts))
        yield Frame(image, subjects, tracks)


def people_source(
    options: Options, tracker: Tracker, people: list[Person]
) -> Callable[[int, Image], list[Square]]:
    """A function of a frame's number and picture: where people are given or detected there."""
    if options.detector:
        detect = Detector(options.detector, options.margin, options.min_box_score)
        return lambda number, image: detect(image)
    if options.finder:
        finder = make_estimator(options, options.finder)
        return lambda number, image: [] if tracker.identities() else find_one(finder, image)
    always, listed = given_squares(options), defaultdict[int, list[Square | None]](list)
    for person in people:
        listed[person.frame].append(person.square)

    def given(number: int, image: Image) -> list[Square]:
        lost = [square for i, square in enumerate(always) if i not in tracker.identities()]
        whole = whole_picture(image.shape[1], image.shape[0])
        return [square or whole for square in (listed[number] if people else lost)]

    return given


def find_one(finder: PoseEstimator, image_HW3: Image) -> list[Square]:
    """The square about the person that a network for whole pictures finds; [] if it finds none."""
    poses = finder(image_HW3)
    square = square_of_joints(poses.keypoints_NJ2[poses.scores_NJ >= MIN_JOINT_SCORE])
    return [square] if square else []


def smooth_joints(person: Result, track: Track, tracker: Tracker) -> None:
    """Tell the tracker where the person's joints are, and replace them by the smoothed ones."""
    keypoints_J2, scores_J1 = np.split(np.array(person["keypoints"]), [2], axis=1)
    last = np.array([person["width"], person["height"]]) - 1
    inside_J = ((keypoints_J2 >= 0) & (keypoints_J2 <= last)).all(axis=1)
    keypoints_J2 = tracker.update(track, keypoints_J2, inside_J * scores_J1[:, 0])
    person["keypoints"] = np.hstack([keypoints_J2, scores_J1]).tolist()


# Output


def draw(image_HW3: Image, people: list[Result], skeleton: Skeleton, min_score: float) -> None:
    """Draw the skeletons of all people onto the picture."""
    for person in people:
        keypoints_J3 = np.array(person["keypoints"])
        drawn_J = keypoints_J3[:, 2] >= min_score
        side = PIXELS_PER_SCALE * person["scale"]
        if square := square_of_joints(keypoints_J3[drawn_J, :2]):  # smaller than a whole picture
            side = min(side, PIXELS_PER_SCALE * square.scale)
        width = max(1, round(LINE_SHARE * min(side, max(image_HW3.shape))))
        draw_skeleton(image_HW3, keypoints_J3[:, :2], drawn_J, skeleton, width)


def outputs(options: Options) -> list[Path]:
    """The files to write; the overlay may be a folder."""
    given = (options.save_predictions, options.save_coco, options.save_csv, options.overlay)
    return [path for path in given if path]


def write_results(options: Options, skeleton: Skeleton, results: list[list[Result]]) -> None:
    """Write the requested JSON and CSV, or print the JSON if no output was requested.

    results: the people of each picture or frame.
    """
    people = sorted(itertools.chain(*results), key=lambda person: person["row"])
    if not results:  # an error came first
        return
    nobody = f"nobody was found in {len(results)} frames"
    print(scores_text(results, options.min_score) if people else nobody, file=sys.stderr)
    coco = [as_coco(person) for person in people]
    named = [{**person, "joints": skeleton.names} for person in people]
    for path, entries in ((options.save_predictions, named), (options.save_coco, coco)):
        if path:
            write_atomic(path, (json.dumps(entries) + "\n").encode())
    if path := options.save_csv:
        scorer = "/".join(Path(options.checkpoint).resolve().parts[-2:])
        table = deeplabcut_table(people, skeleton.names, scorer, frames=len(results))
        write_atomic(path, table.encode())
    for path in outputs(options):
        print(f"wrote {path}", file=sys.stderr)
    if not outputs(options):
        print(json.dumps(named))
    print(f"joints: {', '.join(skeleton.names)}", file=sys.stderr)


def scores_text(results: list[list[Result]], min_score: float) -> str:
    """How many joints score `min_score`, and how many pictures or frames have no such joint."""
    frames = [[xys[2] for person in people for xys in person["keypoints"]] for people in results]
    found, total = (
        sum(score >= min_score for each in frames for score in each),
        sum(map(len, frames)),
    )
    empty = sum(max(each, default=-np.inf) < min_score for each in frames)
    text = f"{found:,} of {total:,} joints score {min_score} or more (--min-score)"
    if empty:
        text += f"; {empty:,} of {len(results):,} pictures or frames have no such joint"
    if found > 0.1 * total:
        return text
    advice = "train longer, or say where the person is (--box, --people)"
    return f"{text}\nwarning: nearly nothing was found; {advice}"


def as_coco(person: Result) -> Result:
    """A COCO keypoint result; score is the mean over joints.

    With the box's score, it is that times the mean over joints above 0.2 (0 without such a joint),
    as in mmpose/evaluation/metrics/coco_metric.py (`score_mode` bbox_keypoint,
    `keypoint_score_thr` 0.2) and HRNet's lib/dataset/coco.py.
    """
    keypoints = person["keypoints"]
    scores = [score for _, _, score in keypoints]
    total = sum(scores) / len(scores)
    if "box_score" in person:
        sure = [score for score in scores if score > MIN_JOINT_SCORE]
        total = person["box_score"] * sum(sure) / max(1, len(sure))
    return {
        "image_id": person.get("image_id", person.get("frame", person["row"])),
        "category_id": 1,
        "keypoints": [value for joint in keypoints for value in joint],
        "score": total,
    }


if __name__ == "__main__":
    run_main(main)
