"""Shards -> person crops by NVIDIA DALI, on "gpu" or on "cpu". The only file that imports DALI.

One graph serves both devices: read, decode, draw, build the affine, warp. It draws from the same
table of presets as the OpenCV path and hands its draws out, so that the other path can repeat them.
DALI counts from pixel corners, hence the two half-pixel shifts around the affine.
"""

import tempfile
from collections.abc import Iterator
from math import pi
from pathlib import Path
from typing import Any, NamedTuple

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
from pipelines.opencv_loader import RawBatch, Source
from pipelines.shard_format import COLUMNS
from pipelines.shards import ShardSet

Node = Any
"""A DALI data node; one scalar or tensor a sample."""

_READER = "people"
HW_DECODER_LOAD = 0.65
"""DALI's own share of the pictures for the GPU's JPEG engine."""
_MARGIN_PX = 2
"""About a decoded region: a bilinear warp reads the neighbours of what it reaches."""


class Decoder(NamedTuple):
    """How pictures are decoded; the crops are the same."""

    device: str
    """gpu or cpu."""
    hw_load: float = HW_DECODER_LOAD
    roi: bool = False
    cache_mb: int = 0
    width: int = 0
    """Largest picture, px, for which the GPU's JPEG engine sets memory aside; 0 if unknown."""
    height: int = 0


class DaliLoader:
    """Endless batches of one rank's share of a split, as RawBatch on the device.

    state() and the argument of the same name continue the very same sequence.
    """

    def __init__(
        self,
        shards: ShardSet,
        preset: Preset,
        *,
        input_px: int,
        batch_size: int,
        device: torch.device,
        threads: int = 4,
        prefetch: int = 2,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle_buffer: int = 1024,
        state: bytes = b"",
        hw_decoder_load: float = HW_DECODER_LOAD,
        roi: bool = False,
        cache_mb: int = 0,
    ):
        """Build the graph. Raises InputError for a decoder that cannot be.

        shuffle_buffer: people held to draw from; 0 keeps the order of the shards. rank,
        world_size: this process's share of the people. threads: for the CPU's part.
        hw_decoder_load: share of the pictures for the GPU's JPEG engine. roi: decode of an original
        only what the drawn affine reaches. cache_mb: of the GPU's memory for decoded pictures, so
        that they are decoded once; several ranks then keep their people for good.
        """
        self.shards, self.prefetch = shards, prefetch
        decoder = Decoder(_kind(device), hw_decoder_load, roi, cache_mb)
        require_decoder(decoder, shards)
        self._arguments: dict[str, Any] = {
            "batch_size": batch_size,
            "num_threads": threads,
            "device_id": _device_id(device),
            "prefetch_queue_depth": prefetch,
            "seed": seed + rank,
            "exec_dynamic": True,
            "enable_checkpointing": True,
            "shards": shards,
            "preset": preset,
            "input_px": input_px,
            "decoder": decoder,
            "shuffle_seed": seed,
            "rank": rank,
            "world_size": world_size,
            "shuffle_buffer": shuffle_buffer,
        }
        self.pipeline = self._build(shards.indices, state)

    def _build(self, indices: list[Path], state: bytes) -> Pipeline:
        """The pipeline over the shards' tars as these indices tell, standing at `state`."""
        more = {"checkpoint": state} if state else {}
        graph = pipeline_def(_graph)(**self._arguments, indices=indices, **more)
        try:
            graph.build()
        except RuntimeError as error:
            raise InputError(
                self.shards.folder,
                f"DALI cannot build the pipeline: {_reason(error)}",
                "whole shards and a working DALI",
                "python tools/make_shards.py packs them again; "
                "data.loader: opencv does without DALI",
            ) from error
        return graph

    def __iter__(self) -> Iterator[RawBatch]:
        while True:
            yield self.next()

    def next(self) -> RawBatch:
        """The next batch. Raises BadSamplesError; then only `state` of this loader can be used."""
        try:
            outputs = self.pipeline.run(*_stream(self.pipeline))
        except (RuntimeError, ValueError) as error:  # a picture; numbers of a record
            told = _gave_up(error, self.shards, self._failed_samples())
            if isinstance(told, BadSamplesError):
                told.advise_to_skip()
            raise told from error
        return RawBatch(*(torch.from_dlpack(output.as_tensor()) for output in outputs))

    def _failed_samples(self) -> dict[int, str]:
        """What is wrong with the people of the batch that failed, for DALI's message names nobody.

        The same pipeline, with one good picture in everybody's place, tells whose batch it was; it
        fails at once, or because of a batch that was made ahead.
        """
        split = self.shards
        rotten = split.damaged_records()
        if rotten:
            return {split.origin(i): fault for i, fault in rotten.items()}
        sample_of_row = {float(split.record(i)[0]): split.origin(i) for i in range(len(split))}
        with tempfile.TemporaryDirectory() as folder:
            indices = _indices_of_one_picture(split, Path(folder))
            if indices is None:
                return {}
            probe = self._build(indices, self.state())
            for _ in range(self.prefetch + 1):
                *_, records = probe.run(*_stream(probe))
                rows = torch.from_dlpack(records.as_tensor())[:, COLUMNS["row"]].tolist()
                faults = _faults(split, {sample_of_row[row] for row in rows})
                if faults:
                    return faults
        return {}

    def state(self) -> bytes:
        """Where the sequence stands, after the batches handed out so far."""
        return self.pipeline.checkpoint()


class DaliEvaluationLoader:
    """People of any source in a given order, without augmentation: training's graph, fed by hand.

    Iterating gives RawBatches on the device, the last one shorter if need be; records stay on the
    CPU as the source gives them.
    """

    def __init__(
        self,
        source: Source,
        samples: npt.NDArray[np.int64],
        preset: Preset,
        *,
        input_px: int,
        batch_size: int,
        device: torch.device,
        threads: int = 4,
    ):
        """samples: (N,) numbers in the source. preset: without randomness. threads: of the CPU."""
        self.source, self.samples, self.preset = source, samples, preset
        self.input_px, self.batch_size = input_px, batch_size
        self.device, self.threads = device, threads

    def __iter__(self) -> Iterator[RawBatch]:
        pipeline = pipeline_def(_evaluation_graph)(
            batch_size=self.batch_size,
            num_threads=self.threads,
            device_id=_device_id(self.device),
            exec_dynamic=True,
            feed=self._feed(),
            preset=self.preset,
            input_px=self.input_px,
            device=_kind(self.device),
        )
        pipeline.build()
        for number, samples in enumerate(self._batches()):
            try:
                outputs = pipeline.run(*_stream(pipeline))
            except RuntimeError as error:
                ahead = self._batches()[number : number + pipeline.prefetch_queue_depth + 1]
                faults = _faults(self.source, set(np.concatenate(ahead).tolist()))
                raise _gave_up(error, self.source, faults) from error
            images, matrices, draws, _ = (torch.from_dlpack(o.as_tensor()) for o in outputs)
            yield RawBatch(images, matrices, draws, torch.from_numpy(self._records(samples)))

    def _batches(self) -> list[npt.NDArray[np.int64]]:
        starts = range(0, len(self.samples), self.batch_size)
        return [self.samples[start : start + self.batch_size] for start in starts]

    def _feed(self) -> Iterator[tuple[list[npt.NDArray], list[npt.NDArray]]]:
        """JPEGs and records of one batch after another, read while DALI works on the last."""
        for samples in self._batches():
            pictures = [(self.source.jpeg(int(s)), self.source.where(int(s))) for s in samples]
            for jpeg, where in pictures:
                require_sane_size(jpeg, where)
            jpegs = [np.frombuffer(jpeg, dtype=np.uint8) for jpeg, _ in pictures]
            yield jpegs, list(self._records(samples).astype(np.float32))

    def _records(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
        return np.stack([self.source.record(int(s)) for s in samples])


def decode_pictures(jpegs: list[bytes], device: torch.device) -> list[npt.NDArray[np.uint8]]:
    """(H, W, 3) RGB of each JPEG, decoded as the crops' graph decodes. Raises InputError."""
    graph = pipeline_def(_decode_graph)(
        batch_size=len(jpegs),
        num_threads=2,
        device_id=_device_id(device),
        device=_kind(device),
    )
    graph.build()
    graph.feed_input("jpeg", [np.frombuffer(jpeg, dtype=np.uint8) for jpeg in jpegs])
    try:
        (images,) = graph.run()
    except RuntimeError as error:
        raise InputError("DALI", _reason(error), "JPEGs", "check the pictures") from error
    images = images.as_cpu() if device.type == "cuda" else images
    return [np.array(image) for image in images]


def _kind(device: torch.device) -> str:
    """The device as DALI calls it."""
    return "gpu" if device.type == "cuda" else "cpu"


def _device_id(device: torch.device) -> int | None:
    return (device.index or 0) if device.type == "cuda" else None


def _decode_graph(*, device: str) -> Node:
    return _decode(fn.external_source(name="jpeg", dtype=types.UINT8, ndim=1), Decoder(device))


def require_decoder(decoder: Decoder, shards: ShardSet) -> None:
    """Raise InputError unless these pictures can be decoded so."""
    if decoder.cache_mb and decoder.device != "gpu":
        raise InputError(
            "data.cache_mb", f"{decoder.cache_mb}, and DALI on the CPU", "0: the cache is a GPU's",
            "set data.cache_mb to 0",
        )  # fmt: skip
    if decoder.roi and (decoder.cache_mb or shards.manifest.crop):
        other = "a decoder cache, which holds whole pictures" if decoder.cache_mb else "crops"
        raise InputError(
            shards.folder, f"decoding of regions, and {other}", "original pictures, no cache",
            "decode whole pictures",
        )  # fmt: skip


def _decode(jpeg: Node, decoder: Decoder, region: tuple[Node, Node] | None = None) -> Node:
    """The picture, or of it the region (first and last corner, whole px x, y)."""
    arguments: dict[str, Any] = {
        "device": "mixed" if decoder.device == "gpu" else "cpu",
        "output_type": types.RGB,
        # Both pinned to OpenCV's behaviour: stored pixels, libjpeg-turbo's chroma upsampling.
        "adjust_orientation": False,
        "jpeg_fancy_upsampling": True,
    }
    if decoder.device == "gpu":
        arguments["hw_decoder_load"] = decoder.hw_load
        arguments["preallocate_width_hint"] = decoder.width
        arguments["preallocate_height_hint"] = decoder.height
    if decoder.cache_mb:
        arguments |= {"cache_size": decoder.cache_mb, "cache_type": "threshold"}
    if region is None:
        return fn.decoders.image(jpeg, **arguments)
    start, end = (fn.cast(corner, dtype=types.INT32) for corner in region)
    return fn.decoders.image_slice(jpeg, start=start, end=end, axis_names="WH", **arguments)


def _stream(pipeline: Pipeline) -> list[torch.cuda.Stream]:
    """On a GPU, the stream on which the outputs are handed over, so that the host can go on."""
    device = pipeline.device_id
    return [] if device is None or device < 0 else [torch.cuda.current_stream(device)]


def _indices_of_one_picture(split: ShardSet, folder: Path) -> list[Path] | None:
    """Indices that give everybody of a tar its first good picture; None if one has none."""
    made = []
    for number, source in enumerate(split.indices):
        samples = split.samples_of(number)
        good = next((i for i, s in enumerate(samples) if not _fault(split, s)), None)
        if good is None:
            return None
        header, *lines = source.read_text().splitlines()
        words = [line.split(" ") for line in lines]
        # Groups of four: extension, offset, size, name; the picture's is the second.
        changed = [" ".join([*w[:4], *words[good][4:8], *w[8:]]) for w in words]
        made.append(folder / source.name)
        made[-1].write_text("\n".join([header, *changed]) + "\n")
    return made


def _faults(source: Source, samples: set[int]) -> dict[int, str]:
    """What is wrong with the pictures of these samples, for those in which something is."""
    found = {sample: _fault(source, sample) for sample in sorted(samples)}
    return {sample: fault for sample, fault in found.items() if fault}


def _fault(source: Source, sample: int) -> str:
    try:
        check_jpeg(source.jpeg(sample))
    except PictureError as error:
        return error.reason
    except InputError as error:  # not there, or not readable
        return error.found
    return ""


def _gave_up(error: Exception, source: Source, faults: dict[int, str]) -> InputError:
    """The error of a pipeline that ended, and of the people whose pictures ended it."""
    if faults:
        first = min(faults)
        more = f", and {len(faults) - 1} more people" if len(faults) > 1 else ""
        return BadSamplesError.of(faults, source.where(first), faults[first] + more)
    return InputError(
        getattr(source, "folder", "DALI"),
        f"DALI gave up: {_reason(error)}",
        "a batch; the pictures of this one are sound",
        "look for memory that ran out, or take data.loader (evaluate.py: --loader) opencv",
    )


def _reason(error: Exception) -> str:
    """The line after "encountered:", or the first one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = lines.index("encountered:") + 1 if "encountered:" in lines else 0
    return lines[min(after, len(lines) - 1)][:300] if lines else repr(error)


def _graph(
    *,
    shards: ShardSet,
    indices: list[Path],
    preset: Preset,
    input_px: int,
    decoder: Decoder,
    shuffle_seed: int,
    rank: int,
    world_size: int,
    shuffle_buffer: int,
) -> tuple[Node, Node, Node, Node]:
    """Images NHW3, affines N23, draws ND and records NR, all on the device."""
    shuffle: dict[str, Any] = {}
    if decoder.cache_mb and world_size > 1:  # what a rank has cached it must meet again
        shuffle = {"stick_to_shard": True}
    elif shuffle_buffer:
        shuffle = {"shuffle_after_epoch": True, "shuffle_after_epoch_seed": shuffle_seed}
    jpeg, record = fn.readers.webdataset(
        name=_READER,
        paths=[str(path) for path in shards.tars],
        index_paths=[str(path) for path in indices],
        ext=["jpg", "f32"],
        dtypes=[types.UINT8, types.FLOAT],
        missing_component_behavior="error",
        # A tar that is cut off, or a bad sector, would end the process by SIGBUS if it were mapped.
        dont_use_mmap=True,
        random_shuffle=shuffle_buffer > 0,
        **shuffle,
        initial_fill=max(1, min(shuffle_buffer, len(shards))),
        shard_id=rank,
        num_shards=world_size,
    )
    largest = shards.manifest
    decoder = decoder._replace(width=largest.max_width, height=largest.max_height)
    return _crops(jpeg, record, preset, input_px, decoder)


def _evaluation_graph(
    *, feed: Iterator[tuple[list, list]], preset: Preset, input_px: int, device: str
) -> tuple[Node, Node, Node, Node]:
    jpeg, record = fn.external_source(
        source=feed, num_outputs=2, batch=True, dtype=[types.UINT8, types.FLOAT], ndim=[1, 1]
    )
    return _crops(jpeg, record, preset, input_px, Decoder(device))


def _crops(
    jpeg: Node, record: Node, preset: Preset, input_px: int, decoder: Decoder
) -> tuple[Node, Node, Node, Node]:
    """Images NHW3, affines N23, draws ND and records NR, all on the device."""
    drawn, device = _draw(preset), decoder.device
    if preset.princeton_crop:
        upper_left, lower_right = _princeton_corners(record, input_px)
        input_from_image = _princeton_affine(upper_left, lower_right, drawn, input_px)
        region = _inside(upper_left, lower_right, record) if decoder.roi else None
        image = _decode(jpeg, decoder, region)
        first = region[0] if region else 0.0
        image = _cut(image, upper_left - first, lower_right - first)
        image_from_stored = fn.transforms.translation(offset=_float(upper_left))
    elif decoder.roi:
        input_from_image = _affine(record, drawn, input_px)
        region = _inside(*_reached(record, drawn, input_px), record)
        image = _decode(jpeg, decoder, region)
        image_from_stored = fn.transforms.translation(offset=_float(region[0]))
    else:
        input_from_image = _affine(record, drawn, input_px)
        image = _decode(jpeg, decoder)
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
    return (crops, *(node.gpu() if device == "gpu" else node for node in small))


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


def _reached(record: Node, drawn: Draw, input_px: int) -> tuple[Node, Node]:
    """Corners (x, y) of the upright box about what `_affine` reaches in the image, px."""
    scale = record[COLUMNS["scale"]]
    half = 0.5 * PIXELS_PER_SCALE * scale * drawn.scale  # of the square, edge to edge
    turn = drawn.rotation_deg * (pi / 180)
    half = half * (math.abs(math.cos(turn)) + math.abs(math.sin(turn))) + _MARGIN_PX
    return record[COLUMNS["center"]] - half, record[COLUMNS["center"]] + half


def _inside(first: Node, last: Node, record: Node) -> tuple[Node, Node]:
    """Whole corners of a box, cut at the picture's borders; at least a pixel is left."""
    size = record[COLUMNS["size"]]
    start = math.min(math.max(math.floor(_float(first)), 0.0), size - 1.0)
    end = math.max(math.min(math.ceil(_float(last)) + 1.0, size), start + 1.0)
    return start, end


def _cut(image: Node, upper_left: Node, lower_right: Node) -> Node:
    """The box alone, black outside the picture: what lies around it never reaches its input."""
    start, end = (fn.cast(corner, dtype=types.INT32) for corner in (upper_left, lower_right))
    return fn.slice(
        image, start=start, end=end, axis_names="WH", out_of_bounds_policy="pad", fill_values=0
    )


def _princeton_affine(upper_left: Node, lower_right: Node, drawn: Draw, input_px: int) -> Node:
    """princeton.input_from_image as a graph: its two maps and its flip made one."""
    size = lower_right - upper_left
    affine = fn.transforms.translation(offset=_float(0.5 - upper_left))
    affine = fn.transforms.scale(affine, scale=_float(input_px / size))
    affine = fn.transforms.translation(affine, offset=[-0.5 - input_px / 2, -0.5 - input_px / 2])
    zoom = 1.0 / drawn.scale
    affine = fn.transforms.scale(affine, scale=fn.stack(zoom, zoom))
    affine = fn.transforms.rotation(affine, angle=drawn.rotation_deg)
    # It turns about input_px / 2 and mirrors about (input_px - 1) / 2.
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
    """augment.draw as a graph: a Draw of nodes, one float a sample."""
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
