"""Person crops by NVIDIA DALI, on a GPU or a CPU. The only file that imports DALI.

People, order and draws come from the same code as in the OpenCV loader. A thread reads the pictures
of the next batches and computes one affine for each person; DALI decodes and warps. DALI's origin
is a pixel's corner, hence the two half-pixel shifts around the affine.
"""

import functools
import re
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.pipeline import Pipeline

from common.errors import InputError
from pipelines import geometry, princeton
from pipelines.augment import Draw
from pipelines.i420 import NEUTRAL_CHROMA, planes_to_rgb
from pipelines.jpeg import BadSamplesError, PictureError, check_jpeg, require_sane_size
from pipelines.opencv_loader import (
    LoaderSpec,
    RawBatch,
    Source,
    bad_samples_named,
    crop_affines,
    draws_of,
    halves_large_pictures,
    image_from_stored,
)
from pipelines.shard_cache import Key
from pipelines.shard_format import Records, unpack_records
from pipelines.shards import read_ahead
from pipelines.workers import THREADS_AHEAD, in_threads

Node = Any
"""A DALI data node; one scalar or tensor per sample."""

_NO_MEMORY = re.compile(
    "Can't allocate|allocation failed|bad_alloc|ALLOCATOR_FAILURE|MemoryAllocation|out of memory"
)
"""Messages of DALI, C++, nvJPEG and CUDA about memory."""


class Feed(NamedTuple):
    """A batch before DALI has decoded and warped its pictures."""

    keys: list[Key]
    pictures: list[npt.NDArray[np.uint8]]
    """The bytes of each."""
    matrices_N23: npt.NDArray[np.float32]
    """input_from_part, px counted from the corner."""
    parts_N5: npt.NDArray[np.int32]
    """The part of the stored picture that the affine is applied to (x, y, width, height), and how
    often the picture is halved before."""
    facts: tuple[torch.Tensor, ...]
    """All fields of the RawBatch but its images."""


class DaliCrops(Iterator[RawBatch]):
    """The people that batches of keys name, cropped on the device. The last batch may be shorter.

    Records have the source's precision; they, the affines and the draws stay on the CPU.
    """

    def __init__(
        self, source: Source, batches: Iterable[list[Key]], spec: LoaderSpec, people: Iterable[int]
    ):
        """people: all that the keys may name. Raises InputError."""
        self.source, self.spec = source, spec
        read = functools.partial(read_feed, source, spec)
        # Begins to fetch tars of object storage while the pipeline is built.
        ahead = read_ahead(source, batches, behind=THREADS_AHEAD)
        self._fed = deque[Feed]()
        """The batches that DALI has begun and not returned."""
        self._returned: Feed | None = None
        """The batch returned last: its bytes may still be on their way to the GPU."""
        cuda = spec.device.type == "cuda"
        self.pipeline = pipeline_def(_graph)(
            batch_size=spec.batch_size,
            num_threads=max(spec.workers, 1),
            device_id=(spec.device.index or 0) if cuda else None,
            exec_dynamic=True,
            feed=in_threads(read, ahead, 1, pin=False),
            fed=self._fed,
            spec=spec,
            raw=source.is_raw,
            halvings=_most_halvings(source, people, spec),
        )
        try:
            self.pipeline.build()
        except RuntimeError as error:
            _raise_if_out_of_memory(self.pipeline, error)
            found, advice = f"no pipeline: {_reason(error)}", "use --data.loader opencv"
            raise InputError("DALI", found, "a working DALI", advice) from error

    def __next__(self) -> RawBatch:
        """The next crops, without a copy of those that are RGB.

        Raises BadSamplesError, and InputError if there is not enough memory; after an error the
        object cannot be used.
        """
        device = self.pipeline.device_id
        # Outputs are handed over on this stream, so that the host does not wait for the GPU.
        stream = [] if device is None or device < 0 else [torch.cuda.current_stream(device)]
        try:
            outputs = self.pipeline.run(*stream)
        except RuntimeError as error:  # a damaged picture, or no memory
            _raise_if_out_of_memory(self.pipeline, error)
            faults = {} if self.source.is_raw else _faults(self._fed)
            if not faults:
                raise
            first = min(faults)
            more = f", and {len(faults) - 1} more people" if len(faults) > 1 else ""
            where, found = self.source.where(first), faults[first] + more
            # Not stored in a variable: a reference cycle would keep the pipeline's memory.
            raise BadSamplesError.of(faults, where, found) from error
        planes = [torch.from_dlpack(output.as_tensor()) for output in outputs]
        images = planes_to_rgb(*planes) if planes[1:] else planes[0]
        self._returned = self._fed.popleft()
        facts = self._returned.facts
        if stream:
            facts = tuple(tensor.pin_memory() for tensor in facts)
        return RawBatch(images, *facts)


def read_feed(source: Source, spec: LoaderSpec, keys: list[Key]) -> Feed:
    """Read the pictures of a batch and compute its affines. Raises BadSamplesError."""
    pictures = []
    for sample, _ in keys:
        with bad_samples_named(source, sample):
            picture = source.picture(sample)
            if not source.is_raw:
                require_sane_size(picture, source.where(sample))
            pictures.append(np.frombuffer(picture, dtype=np.uint8))
    records_NR = np.stack([source.record(sample) for sample, _ in keys])
    draws_ND = draws_of(spec.preset, spec.seed, keys)
    matrices, from_corner, parts = _affines(unpack_records(records_NR), Draw(*draws_ND.T), spec)
    facts = matrices[:, :2].astype(np.float32), draws_ND.astype(np.float32), records_NR
    return Feed(
        keys,
        pictures,
        from_corner[:, :2].astype(np.float32),
        parts.astype(np.int32),
        tuple(map(torch.from_numpy, facts)),
    )


def _inputs(feeds: Iterable[Feed], fed: deque[Feed], count: int) -> Iterator[tuple[Any, ...]]:
    """The first inputs of `_graph`. Each batch is appended to `fed` when DALI begins it."""
    for feed in feeds:
        fed.append(feed)
        yield feed[1 : 1 + count]


def _affines(
    records: Records, drawn: Draw, spec: LoaderSpec
) -> tuple[geometry.Matrix, geometry.Matrix, npt.NDArray[np.int64]]:
    """input_from_image and input_from_part (N, 3, 3), the second counted from the corner, and the
    parts_N5 of a Feed.

    drawn: fields (N,), or numbers.
    """
    matrix = crop_affines(records, drawn, spec.preset, spec.input_px)
    if spec.preset.princeton_crop:
        center_N2, scale_N = (v.astype(np.float64) for v in (records.center_N2, records.scale_N))
        upper_left, end = princeton.box_corners(center_N2, scale_N, spec.input_px)
        part_N4 = np.concatenate([upper_left, np.maximum(end - upper_left, 1)], axis=1)
        image_from_part = geometry.translation(*upper_left.T)
    else:
        part_N4 = np.pad(records.size_N2, ((0, 0), (2, 0)))
        image_from_part = image_from_stored(records)
    warp = matrix @ image_from_part
    halvings_N = geometry.halvings(warp)
    from_corner = geometry.translation(0.5, 0.5) @ warp @ geometry.translation(-0.5, -0.5)
    return matrix, from_corner, np.column_stack([part_N4, halvings_N])


def _most_halvings(source: Source, people: Iterable[int], spec: LoaderSpec) -> int:
    """The largest number of halvings among these people, without augmentation."""
    if source.is_raw or not halves_large_pictures(spec.preset):
        return 0
    records = unpack_records(np.stack([source.record(sample) for sample in people]))
    return int(_affines(records, Draw(), spec)[2][:, 4].max())


def _raise_if_out_of_memory(pipeline: Pipeline, error: Exception) -> None:
    if not _NO_MEMORY.search(str(error)):
        return
    where, free = "DALI on the CPU", ""
    if pipeline.device_id is not None:
        free_bytes, all_bytes = torch.cuda.mem_get_info(pipeline.device_id)
        where = f"DALI on cuda:{pipeline.device_id}"
        free = f"; {free_bytes / 1e6:,.0f} MB of {all_bytes / 1e6:,.0f} MB are free"
    found, batches = f"not enough memory ({_reason(error)}{free})", pipeline.prefetch_queue_depth
    expected = f"room for {batches + 1} batches of {pipeline.max_batch_size} people"
    advice = "reduce data.batch_size (and raise optim.accumulate) or eval.batch_size, or pack crops"
    raise InputError(where, found, expected, advice) from error


def _faults(feeds: Iterable[Feed]) -> dict[int, str]:
    """Sample -> fault, for the damaged JPEGs of these batches."""
    faults = {}
    for feed in feeds:
        for (sample, _), picture in zip(feed.keys, feed.pictures, strict=True):
            try:
                check_jpeg(picture.tobytes())
            except PictureError as error:
                faults[sample] = str(error)
    return faults


def _reason(error: Exception) -> str:
    """The line after "encountered:", or the first one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = lines.index("encountered:") + 1 if "encountered:" in lines else 0
    return lines[min(after, len(lines) - 1)][:300] if lines else repr(error)


def _graph(
    *, feed: Iterable[Feed], fed: deque[Feed], spec: LoaderSpec, raw: bool, halvings: int
) -> tuple[Node, ...]:
    """The crops, on the device: images NHW3 or, for raw pictures, Y (N, H, W, 1) and chroma
    (N, 2, H / 2, W / 2, 1).

    feed, fed: see `_inputs`. halvings: the most of all people.
    """
    count = 3 if raw or spec.preset.princeton_crop or halvings else 2
    picture, matrix, *parts = fn.external_source(
        source=_inputs(feed, fed, count),
        num_outputs=count,
        no_copy=True,  # a Feed lives until the next crops are returned
        dtype=[types.UINT8, types.FLOAT, types.INT32][:count],
        ndim=[1, 2, 1][:count],
    )
    gpu = spec.device.type == "cuda"
    if raw:
        luma, chroma = _planes(picture, parts[0][2:4], gpu)
        # Measured between corners, the sides of chroma are half as long as those of Y.
        halved = matrix * types.Constant(np.array([1, 1, 0.5], dtype=np.float32))
        return (
            _warp(luma, matrix, spec.input_px),
            _warp(chroma, halved, spec.input_px // 2, outside=NEUTRAL_CHROMA),
        )
    image = _decode(picture, gpu)
    if spec.preset.princeton_crop:
        image = _cut(image, parts[0][0:2], parts[0][2:4])
    if halvings:
        image, part_from_half = _halved(image, parts[0][4], halvings)
        matrix = fn.transforms.combine(part_from_half, matrix)
    return (_warp(image, matrix, spec.input_px),)


def _decode(jpeg: Node, gpu: bool) -> Node:
    # Whole pictures, not regions: on a GPU, nvImageCodec 0.9 can combine regions with this chroma
    # upsampling only from nvJPEG 13.2 on (CUDA 13.3). Before, it uses another decoder silently.
    return fn.decoders.image(
        jpeg,
        device="mixed" if gpu else "cpu",
        output_type=types.RGB,
        # Both as OpenCV does: stored pixels, libjpeg-turbo's chroma upsampling.
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
    )


def _planes(picture: Node, size: Node, gpu: bool) -> tuple[Node, Node]:
    """Y (H, W, 1), and Cb and Cr (2, h, w, 1) as two frames, of a raw picture (i420.py)."""
    width, height, one, two = size[0], size[1], types.Constant(1), types.Constant(2)
    half = (size + 1) // 2
    pixels = width * height
    picture = picture.gpu() if gpu else picture
    luma = fn.reshape(picture[:pixels], shape=fn.stack(height, width, one), layout="HWC")
    shape = fn.stack(two, half[1], half[0], one)
    return luma, fn.reshape(picture[pixels:], shape=shape, layout="FHWC")


def _warp(image: Node, matrix: Node, size_px: int, outside: int = 0) -> Node:
    """A square crop. matrix: picture -> crop, both in px counted from the corner."""
    return fn.warp_affine(
        image,
        matrix=matrix,
        inverse_map=False,
        size=(size_px, size_px),
        interp_type=types.INTERP_LINEAR,
        fill_value=outside,
        dtype=types.UINT8,
    )


def _halved(image: Node, due: Node, most: int) -> tuple[Node, Node]:
    """The picture halved `due` times (at most `most` times), and the affine from the halved picture
    to the whole one, px counted from the corner."""
    before = size = fn.cast(image.shape()[0:2], dtype=types.FLOAT)
    for done in range(most):
        is_due = fn.cast(due > done, dtype=types.FLOAT)
        size = is_due * math.max(math.floor(size / 2), 1.0) + (1 - is_due) * size
        image = fn.resize(image, size=size, interp_type=types.INTERP_LINEAR, antialias=False)
    ratio = before / size
    return image, fn.transforms.scale(scale=fn.stack(ratio[1], ratio[0]))


def _cut(image: Node, upper_left: Node, size: Node) -> Node:
    """Cut out the box, black outside the picture, as princeton's code does before it warps."""
    return fn.slice(
        image,
        start=upper_left,
        shape=size,
        axis_names="WH",
        out_of_bounds_policy="pad",
        fill_values=0,
    )
