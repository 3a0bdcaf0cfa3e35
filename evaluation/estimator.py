"""A trained network as a Python call: pictures in, joints out (docs/predict.md)."""

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import nn

from common.distributed import choose_device, choose_dtype, free_threads, loader_workers
from common.errors import InputError
from configs.skeleton import PIXELS_PER_SCALE, Skeleton
from evaluation.inference import predict
from model.calibration import Calibration
from model.checkpoint import Checkpoint, evaluation_network, load_checkpoint
from pipelines.augment import Draw, without_augmentation
from pipelines.boxes import MARGIN, Square, check_square, square_about, whole_picture
from pipelines.codec import Codec, codec_of
from pipelines.jpeg import decode
from pipelines.opencv_loader import RawBatch, collate, crop_person
from pipelines.shard_format import COLUMNS, IDENTITY_AFFINE, record_length, unpack_records

Picture = str | Path | bytes | Image.Image | npt.NDArray[np.uint8]
"""A file, its content, a Pillow image, or an array as cv2.imread gives it: (H, W, 3) BGR or (H, W)
grey, uint8."""
_PICTURES = (str, Path, bytes, Image.Image, np.ndarray)

_MAX_PIXELS = 256_000_000
"""Limit for a user's picture: above the resolution of cameras, below the size of memory."""
_MAX_BYTES = 1 << 30


class Poses(NamedTuple):
    """Joints of N people."""

    keypoints_NJ2: npt.NDArray[np.float64]
    """Px of the picture."""
    scores_NJ: npt.NDArray[np.float64]
    """Probabilities that the joints are correct, by the checkpoint's calibration; without one the
    heights of the heatmaps' peaks."""
    errors_NJ: npt.NDArray[np.float64]
    """Expected errors, px of the picture; NaN without a calibration."""


@dataclass
class PoseEstimator:
    """A network with the crop, flip and decode rules that it was trained with."""

    network: nn.Module
    """In eval mode, on the device."""
    codec: Codec
    flip: bool
    """Flip test: average with the prediction for the mirrored picture."""
    device: torch.device
    dtype: torch.dtype
    """Autocast type; float32: no autocast."""
    batch_size: int
    """People per batch."""
    threads: int
    """torch's thread count during a prediction; the caller's count is restored."""
    calibration: Calibration | None = None

    @property
    def skeleton(self) -> Skeleton:
        return self.codec.skeleton

    @classmethod
    def from_checkpoint(
        cls,
        source: str | Path | Checkpoint,
        *,
        flip: bool | None = None,
        batch_size: int | None = None,
        device: Literal["auto", "cuda", "cpu"] = "auto",
        precision: Literal["auto", "bf16", "fp16", "fp32"] = "fp32",
        threads: int | None = None,
    ) -> "PoseEstimator":
        """From a checkpoint of this project or of other code, a .safetensors or an .onnx.

        flip, batch_size: None uses the checkpoint's settings of `eval`, without the flip test if it
        does not say which joints are left and right. threads: None leaves as many cores free as
        training had workers, as evaluate.py does, because a core that torch shares with a busy
        process slows all threads (`free_threads`). Raises InputError.
        """
        loaded = source
        if not isinstance(loaded, Checkpoint):
            loaded = load_checkpoint(Path(loaded), onnx=True)
        config, skeleton = loaded.config, loaded.skeleton
        if flip and not skeleton.has_names:
            found, expected = "a flip test of joints without names", "joints with names"
            raise InputError(loaded.path, found, expected, "switch the flip test off")
        chosen = choose_device(device)
        return cls(
            evaluation_network(loaded).to(chosen),
            codec_of(config.data, config.heatmaps, skeleton),
            flip=config.eval.flip and skeleton.has_names if flip is None else flip,
            device=chosen,
            dtype=choose_dtype(precision, chosen),
            batch_size=batch_size or config.eval.batch_size,
            threads=threads or free_threads(loader_workers(config.data.workers, chosen)),
            calibration=loaded.calibration,
        )

    def __call__(
        self,
        pictures: Picture | Sequence[Picture],
        boxes: npt.ArrayLike | Sequence[npt.ArrayLike] | None = None,
        *,
        centers: npt.ArrayLike | None = None,
        scales: npt.ArrayLike | None = None,
        margin: float = MARGIN,
    ) -> Poses:
        """Joints, one row per person. Raises InputError.

        pictures: one, or a list. Files and Pillow images are turned upright as their EXIF
        orientation says (`read_picture`).
        boxes: (N, 4) x, y, width, height, px; the network sees a square of `margin` x the longer
        side. Or centers (N, 2) px and scales (N,), as in MPII's h5 files. For one picture: one box
        (or centre) per person in it. For a list of pictures: one per picture, or a list of them per
        picture. Without boxes and centers: each whole picture.
        """
        is_one = isinstance(pictures, _PICTURES) or not isinstance(pictures, Sequence)
        listed: Any = [pictures] if is_one else pictures
        wanted = _squares(boxes, centers, scales, margin, None if is_one else len(listed))
        predictions, crops = list[Poses](), list[RawBatch]()
        for number, (picture, squares) in enumerate(zip(listed, wanted, strict=True)):
            image = read_picture(picture)
            for person, square in enumerate(squares):
                crops.append(self.crop(image, square, f"picture {number}, person {person}"))
                if len(crops) == self.batch_size:
                    predictions.append(self.predict(crops))
                    crops = []
        predictions.append(self.predict(crops))
        return Poses(*map(np.concatenate, zip(*predictions, strict=True)))

    def crop(self, image_HW3: npt.NDArray[np.uint8], square: Square | None, where: str) -> RawBatch:
        """One person for `predict`. image: BGR. square: None is the whole picture.

        where: names the picture in the InputError for a square outside it.
        """
        height, width = image_HW3.shape[:2]
        square = square or whole_picture(width, height)
        check_square(square, width, height, where)
        record_1R = np.zeros((1, record_length(self.skeleton.joint_count)))
        record_1R[:, COLUMNS["center"]] = square.x, square.y
        record_1R[:, COLUMNS["scale"]] = square.scale
        record_1R[:, COLUMNS["size"]] = width, height
        record_1R[:, COLUMNS["image_from_stored"]] = IDENTITY_AFFINE
        preset, input_px = without_augmentation(self.codec.preset), self.codec.input_px
        made = crop_person(image_HW3, unpack_records(record_1R), Draw(), preset, input_px)
        crop, matrix = (torch.from_numpy(each[None]) for each in made)
        return RawBatch(crop, matrix, torch.tensor([Draw()]), torch.from_numpy(record_1R))

    def predict(self, crops: list[RawBatch]) -> Poses:
        """The joints in crops that `crop` made, in the same order; runs in batches."""
        size, previous = self.batch_size, torch.get_num_threads()
        batches = [collate(crops[i : i + size]) for i in range(0, len(crops), size)]
        how: Any = {"flip": self.flip, "device": self.device, "dtype": self.dtype}
        torch.set_num_threads(self.threads)
        try:
            keypoints_NJ2, scores_NJ = predict(self.network, batches, self.codec, **how)
        finally:
            torch.set_num_threads(previous)
        if self.calibration is None:
            return Poses(keypoints_NJ2, scores_NJ, np.full_like(scores_NJ, np.nan))
        scale_N = np.array([float(crop.records_NR[0, COLUMNS["scale"]]) for crop in crops])
        errors_NJ = self.calibration.errors(scores_NJ) * PIXELS_PER_SCALE * scale_N[:, None]
        return Poses(keypoints_NJ2, self.calibration.probabilities(scores_NJ), errors_NJ)


def read_picture(picture: Picture, upright: bool = True) -> npt.NDArray[np.uint8]:
    """(H, W, 3) BGR of a file that OpenCV reads, of a Pillow image or an array. Raises InputError.

    upright: turn as the EXIF orientation says, as every viewer does; joints are then in px of the
    picture as it is shown. Grey becomes three equal channels, 16 bits become 8, and transparency is
    dropped. An animation gives its first frame.
    """
    if isinstance(picture, np.ndarray):
        return _checked_array(picture)
    if isinstance(picture, Image.Image):
        return _from_pillow(picture, upright)
    if not isinstance(picture, _PICTURES):
        found, expected = f"a {type(picture).__name__}", "a path, bytes, Pillow image or array"
        raise InputError("picture", found, expected, "give one of these, or a list of them")
    if isinstance(picture, bytes):
        return decode(picture, "picture", upright, _MAX_PIXELS)
    return decode(_file_content(Path(picture)), picture, upright, _MAX_PIXELS)


def _file_content(path: Path) -> bytes:
    if not path.is_file():
        raise InputError(path, "no such file", "a picture", "give its path")
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise InputError(path, f"{size:,} bytes", f"{_MAX_BYTES:,} at most", "make it smaller")
    return path.read_bytes()


def _from_pillow(image: Image.Image, upright: bool) -> npt.NDArray[np.uint8]:
    if image.mode[0] in "IF":
        found, expected = f"a Pillow image of mode {image.mode}", "8 bits a channel, such as RGB"
        raise InputError("picture", found, expected, "convert it, or give the file")
    turned = ImageOps.exif_transpose(image) if upright else image
    return np.ascontiguousarray(np.asarray(turned.convert("RGB"))[..., ::-1])


def _checked_array(image: npt.NDArray) -> npt.NDArray[np.uint8]:
    if image.dtype == np.uint8 and image.size:
        if image.ndim == 2:
            return np.stack([image] * 3, axis=-1)
        if image.ndim == 3 and image.shape[2] == 3:
            # OpenCV is fifteen times slower on a mirrored view, such as rgb[..., ::-1].
            return np.ascontiguousarray(image)
    found = f"an array of shape {image.shape}, {image.dtype}"
    expected = "(H, W, 3) BGR or (H, W) grey, uint8, as cv2.imread gives"
    raise InputError("picture", found, expected, "convert it")


def _squares(
    boxes: Any, centers: Any, scales: Any, margin: float, pictures: int | None
) -> Sequence[Sequence[Square | None]]:
    """The squares of each picture; None: the whole picture. pictures: their number; None: one
    picture, not a list."""
    if (centers is None) != (scales is None) or (boxes is not None and centers is not None):
        found, expected = "both kinds, or an incomplete one", "only boxes, or centers with scales"
        raise InputError("boxes, centers, scales", found, expected, "give one of the two")
    given = [each for each in (boxes, centers, scales) if each is not None]
    if not given:
        return [[None]] * (1 if pictures is None else pictures)
    counts = [len(each) if isinstance(each, Sized) else 0 for each in given]
    if pictures is not None and counts != [pictures] * len(given):
        found, expected = f"{counts[0]} for {pictures} pictures", "one or a list for each picture"
        raise InputError("boxes, or centers and scales", found, expected, f"give {pictures}")
    each_picture = [given] if pictures is None else zip(*given, strict=True)
    if centers is not None:
        return [_from_centers(*own) for own in each_picture]
    return [_from_boxes(own, margin) for (own,) in each_picture]


def _from_boxes(boxes: Any, margin: float) -> list[Square]:
    rows = _numbers("boxes", boxes, "x, y, width, height, px", 4)
    if not (rows[:, 2:] > 0).all():
        raise InputError("boxes", f"{rows[:, 2:].min():g} px", "sizes above 0", "correct it")
    return [square_about(row, margin) for row in rows.tolist()]


def _from_centers(centers: Any, scales: Any) -> list[Square]:
    middles = _numbers("centers", centers, "x, y, px", 2)
    sizes = _numbers("scales", scales, "a scale for each centre", 1)
    if len(middles) != len(sizes):
        found = f"{len(middles)} centers and {len(sizes)} scales"
        raise InputError("centers, scales", found, "the same number of both", "correct them")
    return [Square(*row) for row in np.column_stack([middles, sizes]).tolist()]


def _numbers(name: str, value: Any, expected: str, columns: int) -> npt.NDArray[np.float64]:
    """(N, columns). Raises InputError."""
    try:
        return np.reshape(np.asarray(value, dtype=np.float64), (-1, columns))
    except (TypeError, ValueError) as error:
        raise InputError(name, f"{value!r:.80}", f"numbers: {expected}", "correct it") from error
