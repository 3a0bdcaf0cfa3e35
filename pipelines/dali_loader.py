"""Shards -> person crops by NVIDIA DALI, on a GPU or a CPU. The only file that imports DALI.

One graph serves both devices: read, decode, draw, build the affine, warp. It draws from the same
table of presets as the OpenCV path and returns its draws, so that the other path can repeat them.
DALI's origin is a pixel's corner, hence the two half-pixel shifts around the affine.

Do not add, remove or reorder operators: their order sets their seeds, and a saved state fits only
the operators that it names.
"""

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.pipeline import Pipeline

from common.errors import InputError
from configs.skeleton import PIXELS_PER_SCALE
from pipelines import augment
from pipelines.augment import Distribution, Draw, Preset
from pipelines.jpeg import BadSamplesError, PictureError, check_jpeg, require_sane_size
from pipelines.opencv_loader import LoaderSpec, RawBatch, Source
from pipelines.shard_format import COLUMNS
from pipelines.shards import ShardSet

Node = Any
"""A DALI data node; one scalar or tensor per sample."""


class DaliLoader:
    """Endless batches of one rank's share of a split, on the device.

    `DaliLoader(shards, spec, loader.state())` continues the same sequence.
    """

    def __init__(
        self, shards: ShardSet, spec: LoaderSpec, state: bytes = b"", hw_decoder_load: float = 0.65
    ):
        """hw_decoder_load: share of the pictures for the GPU's JPEG engine (DALI's default)."""
        self.shards = shards
        decoder: dict[str, Any] = {}
        if spec.device.type == "cuda":
            decoder["hw_decoder_load"] = hw_decoder_load
            decoder["preallocate_width_hint"] = shards.manifest.max_width
            decoder["preallocate_height_hint"] = shards.manifest.max_height
        if spec.cache_mb:
            decoder |= {"cache_size": spec.cache_mb, "cache_type": "threshold"}
        self._arguments = _common_arguments(spec.device, spec.batch_size, spec.workers) | {
            "seed": spec.seed + spec.rank,
            "enable_checkpointing": True,
            "shards": shards,
            "spec": spec,
            "decoder": decoder,
        }
        self.pipeline = self._build(shards.indices, state)

    def _build(self, indices: list[Path], state: bytes) -> Pipeline:
        """Build the pipeline on the shards' tars with these index files, at `state`."""
        more = {"checkpoint": state} if state else {}
        graph = pipeline_def(_graph)(**self._arguments, indices=indices, **more)
        try:
            graph.build()
        except RuntimeError as error:
            raise InputError(
                self.shards.folder,
                f"DALI cannot build the pipeline: {_reason(error)}",
                "undamaged shards and a working DALI",
                "pack them again with tools/make_shards.py, or use data.loader opencv",
            ) from error
        return graph

    def next(self) -> RawBatch:
        """The next batch. Raises BadSamplesError, after which only `state` can be used."""
        return RawBatch(*_run(self.pipeline, self.shards, self._find_faults))

    def _find_faults(self) -> dict[int, str]:
        """Find the damaged people of a batch that failed; DALI's message does not name them.

        If all records are undamaged, the same pipeline is run with a good picture for each person:
        its records name the people of this batch and of the prefetched ones.
        """
        split = self.shards
        faults = split.damaged_records() or _faults_of_tars_without_good_pictures(split)
        if not faults:
            sample_of_row = {float(split.record(i)[0]): i for i in range(len(split))}
            with tempfile.TemporaryDirectory() as folder:
                probe = self._build(_indices_of_good_pictures(split, Path(folder)), self.state())
                for _ in range(probe.prefetch_queue_depth + 1):
                    *_, records = _run(probe, split, dict)
                    faults |= _faults(split, [sample_of_row[row] for row in records[:, 0].tolist()])
        return {split.origin(sample): fault for sample, fault in faults.items()}

    def state(self) -> bytes:
        """The position after the batches returned so far."""
        return self.pipeline.checkpoint()


class DaliEvaluationLoader:
    """People of any source in a given order, without augmentation.

    Iterating gives RawBatches on the device; the last may be shorter. Records stay on the CPU, in
    the source's precision.
    """

    def __init__(self, source: Source, samples: npt.NDArray[np.int64], spec: LoaderSpec):
        """samples: (N,) numbers in the source. spec.preset must not be random."""
        self.source, self.spec = source, spec
        self.samples: list[int] = samples.tolist()
        starts = range(0, len(samples), spec.batch_size)
        self._batches = [self.samples[start : start + spec.batch_size] for start in starts]

    def __iter__(self) -> Iterator[RawBatch]:
        spec = self.spec
        arguments = _common_arguments(spec.device, spec.batch_size, spec.workers)
        pipeline = pipeline_def(_evaluation_graph)(**arguments, feed=self._feed(), spec=spec)
        pipeline.build()
        for number, samples in enumerate(self._batches):
            end = number + pipeline.prefetch_queue_depth + 1  # including prefetched batches
            suspects = self.samples[number * spec.batch_size : end * spec.batch_size]
            find_faults = functools.partial(_faults, self.source, suspects)
            images, matrices, draws, _ = _run(pipeline, self.source, find_faults)
            yield RawBatch(images, matrices, draws, torch.from_numpy(self._records(samples)))

    def _feed(self) -> Iterator[tuple[list[npt.NDArray], list[npt.NDArray]]]:
        """Yield JPEGs and records of each batch, read while DALI processes the one before."""
        for samples in self._batches:
            jpegs = [self.source.jpeg(sample) for sample in samples]
            for jpeg, sample in zip(jpegs, samples, strict=True):
                require_sane_size(jpeg, self.source.where(sample))
            records = self._records(samples).astype(np.float32)
            yield [np.frombuffer(jpeg, dtype=np.uint8) for jpeg in jpegs], list(records)

    def _records(self, samples: list[int]) -> npt.NDArray[np.floating]:
        return np.stack([self.source.record(sample) for sample in samples])


def decode_pictures(jpegs: list[bytes], device: torch.device) -> list[npt.NDArray[np.uint8]]:
    """(H, W, 3) RGB of each JPEG, decoded as for the crops."""
    graph = pipeline_def(_decode_graph)(
        **_common_arguments(device, len(jpegs), threads=2), gpu=device.type == "cuda"
    )
    graph.build()
    graph.feed_input("jpeg", [np.frombuffer(jpeg, dtype=np.uint8) for jpeg in jpegs])
    (images,) = graph.run()
    return [np.array(image) for image in images.as_cpu()]


def _decode_graph(*, gpu: bool) -> Node:
    return _decode(fn.external_source(name="jpeg", dtype=types.UINT8, ndim=1), gpu)


def _common_arguments(device: torch.device, batch_size: int, threads: int) -> dict[str, Any]:
    return {
        "batch_size": batch_size,
        "num_threads": max(threads, 1),
        "device_id": (device.index or 0) if device.type == "cuda" else None,
        "exec_dynamic": True,
    }


def _run(
    pipeline: Pipeline, source: Source, find_faults: Callable[[], dict[int, str]]
) -> list[torch.Tensor]:
    """The next outputs as torch tensors, without a copy.

    Raises BadSamplesError if find_faults names people whose data made the pipeline fail.
    """
    device = pipeline.device_id
    # The outputs are handed over on this stream, so that the host does not wait for the GPU.
    stream = [] if device is None or device < 0 else [torch.cuda.current_stream(device)]
    try:
        outputs = pipeline.run(*stream)
    except (RuntimeError, ValueError) as error:  # damaged picture; damaged record
        faults = find_faults()
        if not faults:
            raise
        first = min(faults)
        more = f", and {len(faults) - 1} more people" if len(faults) > 1 else ""
        # Not stored in a variable: a reference cycle would keep the pipeline's memory.
        raise BadSamplesError.of(faults, source.where(first), faults[first] + more) from error
    return [torch.from_dlpack(output.as_tensor()) for output in outputs]


def _faults_of_tars_without_good_pictures(split: ShardSet) -> dict[int, str]:
    for number in range(len(split.tars)):
        samples = split.samples_of(number)
        if all(_fault(split, sample) for sample in samples):
            return _faults(split, samples)
    return {}


def _indices_of_good_pictures(split: ShardSet, folder: Path) -> list[Path]:
    """Write index files in which each person has the first good picture of its tar."""
    paths = []
    for number, source in enumerate(split.indices):
        samples = split.samples_of(number)
        good = next(i for i, sample in enumerate(samples) if not _fault(split, sample))
        header, *lines = source.read_text().splitlines()
        words = [line.split(" ") for line in lines]
        # Groups of four: extension, offset, size, name. The second is the picture's.
        changed = [" ".join([*w[:4], *words[good][4:8], *w[8:]]) for w in words]
        paths.append(folder / source.name)
        paths[-1].write_text("\n".join([header, *changed]) + "\n")
    return paths


def _faults(source: Source, samples: list[int]) -> dict[int, str]:
    """Sample -> fault, for the damaged pictures of these samples."""
    found = {sample: _fault(source, sample) for sample in samples}
    return {sample: fault for sample, fault in found.items() if fault}


def _fault(source: Source, sample: int) -> str:
    try:
        check_jpeg(source.jpeg(sample))
    except PictureError as error:
        return str(error)
    except InputError as error:  # not readable
        return error.found
    return ""


def _reason(error: Exception) -> str:
    """The line after "encountered:", or the first one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = lines.index("encountered:") + 1 if "encountered:" in lines else 0
    return lines[min(after, len(lines) - 1)][:300] if lines else repr(error)


def _graph(
    *, shards: ShardSet, indices: list[Path], spec: LoaderSpec, decoder: dict[str, Any]
) -> tuple[Node, Node, Node, Node]:
    """Images NHW3, affines N23, draws ND and records NR, all on the device."""
    shuffle: dict[str, Any] = {}
    if spec.cache_mb and spec.world_size > 1:  # each rank keeps the people that it has cached
        shuffle = {"stick_to_shard": True}
    elif spec.shuffle_buffer:
        shuffle = {"shuffle_after_epoch": True, "shuffle_after_epoch_seed": spec.seed}
    jpeg, record = fn.readers.webdataset(
        name="people",
        paths=[str(path) for path in shards.tars],
        index_paths=[str(path) for path in indices],
        ext=["jpg", "f32"],
        dtypes=[types.UINT8, types.FLOAT],
        missing_component_behavior="error",
        # With mmap, a truncated tar or a bad sector would end the process by SIGBUS.
        dont_use_mmap=True,
        random_shuffle=spec.shuffle_buffer > 0,
        **shuffle,
        initial_fill=max(1, min(spec.shuffle_buffer, len(shards))),
        shard_id=spec.rank,
        num_shards=spec.world_size,
    )
    return _crops(jpeg, record, spec, **decoder)


def _evaluation_graph(
    *, feed: Iterator[tuple[list, list]], spec: LoaderSpec
) -> tuple[Node, Node, Node, Node]:
    jpeg, record = fn.external_source(
        source=feed, num_outputs=2, batch=True, dtype=[types.UINT8, types.FLOAT], ndim=[1, 1]
    )
    return _crops(jpeg, record, spec)


def _decode(jpeg: Node, gpu: bool, **more: Any) -> Node:
    return fn.decoders.image(
        jpeg,
        device="mixed" if gpu else "cpu",
        output_type=types.RGB,
        # Both as OpenCV does: stored pixels, libjpeg-turbo's chroma upsampling.
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
        **more,
    )


def _crops(
    jpeg: Node, record: Node, spec: LoaderSpec, **decoder: Any
) -> tuple[Node, Node, Node, Node]:
    """Images NHW3, affines N23, draws ND and records NR, all on the device."""
    drawn, input_px, gpu = _draw(spec.preset), spec.input_px, spec.device.type == "cuda"
    if spec.preset.princeton_crop:
        upper_left, lower_right = _princeton_corners(record, input_px)
        input_from_image = _princeton_affine(upper_left, lower_right, drawn, input_px)
        # The two `- 0.0` change no value, but saved states contain their operators.
        image = _cut(_decode(jpeg, gpu, **decoder), upper_left - 0.0, lower_right - 0.0)
        image_from_stored = fn.transforms.translation(offset=_float(upper_left))
    else:
        input_from_image = _affine(record, drawn, input_px)
        image = _decode(jpeg, gpu, **decoder)
        image_from_stored = fn.reshape(record[COLUMNS["image_from_stored"]], shape=[2, 3])
    crops = fn.warp_affine(
        image,
        matrix=_from_corners(fn.transforms.combine(image_from_stored, input_from_image)),
        inverse_map=False,
        size=(input_px, input_px),
        interp_type=types.INTERP_LINEAR,
        fill_value=0,
        dtype=types.UINT8,
    )
    draws = fn.stack(*(fn.cast(value, dtype=types.FLOAT) for value in drawn))
    small = (input_from_image, draws, record)
    return (crops, *(node.gpu() if gpu else node for node in small))


def _from_corners(affine: Node) -> Node:
    """T(+0.5) M T(-0.5): the affine as DALI counts pixels."""
    to_centers = fn.transforms.translation(offset=[-0.5, -0.5])
    return fn.transforms.translation(fn.transforms.combine(to_centers, affine), offset=[0.5, 0.5])


def _affine(record: Node, drawn: Draw, input_px: int) -> Node:
    """geometry.input_from_image as a graph."""
    zoom = input_px / (PIXELS_PER_SCALE * record[COLUMNS["scale"]] * drawn.scale)
    middle = (input_px - 1) / 2
    affine = fn.transforms.translation(offset=-record[COLUMNS["center"]])
    affine = fn.transforms.scale(affine, scale=fn.stack(zoom, zoom))
    affine = fn.transforms.rotation(affine, angle=drawn.rotation_deg)
    affine = fn.transforms.scale(affine, scale=_mirror_scale(drawn))
    return fn.transforms.translation(affine, offset=[middle, middle])


def _princeton_corners(record: Node, input_px: int) -> tuple[Node, Node]:
    """princeton.box_corners as a graph: (x, y) of both corners, whole numbers in float64."""
    center = fn.cast(record[COLUMNS["center"]], dtype=types.FLOAT64)
    box_px = PIXELS_PER_SCALE * fn.cast(record[COLUMNS["scale"]], dtype=types.FLOAT64)
    shift = input_px * (-center / box_px + 0.5)
    upper_left = _truncate(-shift * (box_px / input_px))
    lower_right = _truncate((input_px - shift) * (box_px / input_px))
    return upper_left, math.max(lower_right, upper_left + 1.0)


def _cut(image: Node, upper_left: Node, lower_right: Node) -> Node:
    """Cut out the box, black outside the picture, as princeton's code does before it warps."""
    start, end = (fn.cast(corner, dtype=types.INT32) for corner in (upper_left, lower_right))
    return fn.slice(
        image, start=start, end=end, axis_names="WH", out_of_bounds_policy="pad", fill_values=0
    )


def _princeton_affine(upper_left: Node, lower_right: Node, drawn: Draw, input_px: int) -> Node:
    """princeton.input_from_image as a graph: its two affines and its flip combined."""
    size = lower_right - upper_left
    affine = fn.transforms.translation(offset=_float(0.5 - upper_left))
    affine = fn.transforms.scale(affine, scale=_float(input_px / size))
    affine = fn.transforms.translation(affine, offset=[-0.5 - input_px / 2, -0.5 - input_px / 2])
    zoom = 1.0 / drawn.scale
    affine = fn.transforms.scale(affine, scale=fn.stack(zoom, zoom))
    affine = fn.transforms.rotation(affine, angle=drawn.rotation_deg)
    # Princeton rotates about input_px / 2 and mirrors about (input_px - 1) / 2.
    affine = fn.transforms.translation(affine, offset=[0.5, 0.5])
    affine = fn.transforms.scale(affine, scale=_mirror_scale(drawn))
    middle = (input_px - 1) / 2
    return fn.transforms.translation(affine, offset=[middle, middle])


def _mirror_scale(drawn: Draw) -> Node:
    return fn.stack(1.0 - 2.0 * drawn.flip, types.Constant(1.0, dtype=types.FLOAT))


def _truncate(value: Node) -> Node:
    """Toward zero; a cast to an integer would round."""
    return math.floor(math.abs(value)) * (1.0 - 2.0 * fn.cast(value < 0, dtype=types.FLOAT64))


def _float(node: Node) -> Node:
    return fn.cast(node, dtype=types.FLOAT)


def _draw(preset: Preset) -> Draw:
    """augment.draw as a graph: a Draw of nodes, one float per sample."""
    scale = _value(preset.scale)
    flip = _coin(preset.flip_probability)
    drawn = Draw(
        scale=math.pow(2.0, scale) if preset.scale_is_log2 else scale,
        rotation_deg=_value(preset.rotation_deg) * _coin(preset.rotation_probability),
        flip=flip,
        **{name: _constant(getattr(Draw(), name)) for name in Draw._fields[3:]},
    )
    if preset.color == "hsv_if_flipped":
        return drawn._replace(
            hue=flip * _value(augment.HUE_TURNS),
            saturation=1.0 + flip * (_value(augment.SATURATION) - 1.0),
            brightness=flip * _value(augment.BRIGHTNESS),
            contrast=1.0 + flip * (_value(augment.CONTRAST) - 1.0),
        )
    if preset.color == "channel_gain":
        red, green, blue = (_value(augment.CHANNEL_GAIN) for _ in range(3))
        return drawn._replace(red=red, green=green, blue=blue)
    return drawn


def _constant(value: float) -> Node:
    return fn.constant(fdata=value, shape=[], dtype=types.FLOAT)


def _coin(probability: float) -> Node:
    if probability in (0.0, 1.0):
        return _constant(probability)
    return _float(fn.random.coin_flip(probability=probability))


def _value(distribution: Distribution) -> Node:
    low, high = distribution.low, distribution.high
    if low == high:
        return _constant(low)
    if distribution.kind == "uniform":
        return fn.random.uniform(range=[low, high])
    value = fn.random.normal(mean=distribution.mean, stddev=distribution.std)
    return math.clamp(value, low, high)
