"""Shards -> person crops by NVIDIA DALI, on a GPU or a CPU. The only file that imports DALI.

One graph serves both devices: read, decode, build the affine, warp. Draws come from the same code
as in the OpenCV loader and are returned, so that the OpenCV loader can repeat them. numpy makes
them for a whole batch, and the graph has as few operators as possible, because DALI needs about
20 us for each small operator and batch. DALI's origin is a pixel's corner, hence the two half-pixel
shifts around the affine.

A saved state names the graph's operators. After a change of the graph, older checkpoints cannot be
resumed with DALI.
"""

import functools
import itertools
import re
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.pipeline import Pipeline

from common.errors import InputError
from configs.skeleton import PIXELS_PER_SCALE
from pipelines import geometry
from pipelines.augment import Draw, draw_batch
from pipelines.i420 import NEUTRAL_CHROMA, planes_to_rgb
from pipelines.jpeg import BadSamplesError, PictureError, check_jpeg, require_sane_size
from pipelines.object_storage import StorageError
from pipelines.opencv_loader import (
    LoaderSpec,
    RawBatch,
    Source,
    batches_in_order,
    halves_large_pictures,
)
from pipelines.shard_cache import Key
from pipelines.shard_format import COLUMNS, PICTURE_EXTENSIONS, unpack_records
from pipelines.shards import ShardSet, read_ahead

CPU = torch.device("cpu")
_REMOTE = b"people of object storage"
"""Prefix of the saved states of loaders that read object storage."""
_PREFETCHED = 4
"""Maximum number of batches that DALI has begun and not returned."""

Node = Any
"""A DALI data node; one scalar or tensor per sample."""

_NO_MEMORY = re.compile(
    "Can't allocate|allocation failed|bad_alloc|ALLOCATOR_FAILURE|MemoryAllocation|out of memory"
)
"""Messages of DALI, C++, nvJPEG and CUDA about memory."""


class DaliLoader:
    """Endless batches of one rank's share of a split, on the device.

    `DaliLoader(shards, spec, batches, loader.state())` continues the sequence after that many.
    """

    def __init__(self, shards: ShardSet, spec: LoaderSpec, first_step: int = 0, state: bytes = b""):
        """first_step: number of the first batch; a batch's draws are a function of its number."""
        self.shards, self.step = shards, first_step
        decoder: dict[str, Any] = {}
        if spec.device.type == "cuda":
            decoder["preallocate_width_hint"] = shards.manifest.max_width
            decoder["preallocate_height_hint"] = shards.manifest.max_height
        if spec.cache_mb:
            decoder |= {"cache_size": spec.cache_mb, "cache_type": "threshold"}
        self._pictures: _RemotePictures | None = None
        tars, indices, find_picture = shards.tars, shards.indices, None
        reader_state, state = _split_state(state)
        if shards.cache:
            self._pictures = _RemotePictures(shards, spec, reader_state)
            tars, indices = self._pictures.files, self._pictures.indices
            find_picture = self._pictures.picture
        self._arguments = _common_arguments(spec.device, spec.batch_size, spec.workers) | {
            "seed": spec.seed + spec.rank,
            "enable_checkpointing": True,
            "tars": tars,
            "extension": shards.components[1],
            "people": len(shards),
            "spec": spec,
            "decoder": decoder,
            "find_picture": find_picture,
            "halvings": _most_halvings(shards, range(len(shards)), spec),
        }
        self.pipeline = self._build(indices, state)

    def _build(self, indices: list[Path], state: bytes) -> Pipeline:
        """Build the pipeline on the shards' tars with these index files, at `state`."""
        more = {"checkpoint": state} if state else {}
        steps = itertools.count(self.step)
        graph = pipeline_def(_graph)(**self._arguments, indices=indices, steps=steps, **more)
        try:
            graph.build()
        except RuntimeError as error:
            _raise_if_out_of_memory(graph, error)
            if "might come from another pipeline" in str(error):
                where, found = "DALI's state in the checkpoint", "saved by other operators"
                expected = "the same version, packing and location (folder or object storage)"
                advice = "use these, or resume with --data.loader opencv"
                raise InputError(where, found, expected, advice) from error
            found = f"DALI cannot build the pipeline: {_reason(error)}"
            expected, advice = "undamaged shards and a working DALI", "use --data.loader opencv"
            raise InputError(self.shards.folder, found, expected, advice) from error
        return graph

    def next(self) -> RawBatch:
        """The next batch. Raises BadSamplesError, after which only `state` can be used."""
        if self._pictures:
            self._pictures.advance()
        batch = _run(self.pipeline, self.shards, self._find_faults)
        self.step += 1
        return batch

    def _find_faults(self) -> dict[int, str]:
        """Find the damaged people of a batch that failed; DALI's message does not name them.

        If all records are undamaged, the same pipeline is run with a good picture for each person:
        its records name the people of this batch and of the prefetched ones. Raises InputError if
        there is no memory for a second pipeline.
        """
        split = self.shards
        if self._pictures:
            return self._pictures.find_faults()
        faults = split.damaged_records() or _faults_of_tars_without_good_pictures(split)
        if not faults:
            sample_of_row = {float(split.record(i)[0]): i for i in range(len(split))}
            with tempfile.TemporaryDirectory() as folder:
                probe = self._build(_indices_of_good_pictures(split, Path(folder)), self.state())
                for _ in range(probe.prefetch_queue_depth + 1):
                    rows = _run(probe, split, dict).records_NR[:, 0].tolist()
                    faults |= _faults(split, [sample_of_row[row] for row in rows])
        return {split.origin(sample): fault for sample, fault in faults.items()}

    def state(self) -> bytes:
        """The position after the batches returned so far."""
        state = self.pipeline.checkpoint()
        return self._pictures.state() + state if self._pictures else state


class _RemotePictures:
    """Gives DALI the pictures of a split in object storage.

    DALI's reader opens all tars when it is built. So it reads placeholder tars that contain only
    the records, in the same order and with the same draws, and a Python function in the graph
    returns the picture of each row. A second pipeline, with a reader only, runs ahead and tells
    which tars to fetch.
    """

    def __init__(self, shards: ShardSet, spec: LoaderSpec, state: bytes):
        """state: saved state of an earlier reader, or empty."""
        self._shards = shards
        self._folder = tempfile.TemporaryDirectory(prefix="records_")
        self.files, self.indices = shards.write_placeholder_tars(Path(self._folder.name))
        rows = unpack_records(shards.records()).row_N.tolist()
        self._sample_of_row = {row: sample for sample, row in enumerate(rows)}
        self._failure: InputError | None = None
        self._recent: deque[int] = deque(maxlen=8 * spec.batch_size)
        """The last samples, including those of prefetched batches."""
        self._reader = pipeline_def(_read)(
            **_common_arguments(CPU, spec.batch_size, threads=1),
            seed=spec.seed + spec.rank,
            enable_checkpointing=True,
            tars=self.files,
            indices=self.indices,
            extension=shards.components[1],
            people=len(shards),
            spec=spec,
            **({"checkpoint": state} if state else {}),
        )
        self._reader.build()
        self._states = deque([state or self._reader.checkpoint()])
        """The reader's states after the batches returned so far, and after each planned batch."""
        self._ahead = iter(read_ahead(shards, self._batches(), behind=_PREFETCHED))

    def _batches(self) -> Iterator[list[Key]]:
        while True:
            rows, _ = self._reader.run()
            self._states.append(self._reader.checkpoint())
            yield [(self._sample_of_row[_row(np.array(row))], 0) for row in rows]

    def advance(self) -> None:
        """Release the tars of old batches, and fetch those of later batches."""
        next(self._ahead)
        self._states.popleft()

    def state(self) -> bytes:
        """The reader's position after the batches returned so far."""
        return _REMOTE + len(self._states[0]).to_bytes(4, "little") + self._states[0]

    def picture(self, row_4: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The bytes of a person's picture. row_4: bytes of a float32, the annotation's row."""
        sample = self._sample_of_row[_row(row_4)]
        self._recent.append(sample)
        try:
            return np.frombuffer(_picture(self._shards, sample), dtype=np.uint8)
        except InputError as error:  # DALI replaces it by its own error
            self._failure = error
            raise

    def find_faults(self) -> dict[int, str]:
        """The damaged people among the last samples. Raises the StorageError that ended a batch."""
        if isinstance(self._failure, StorageError):
            raise self._failure
        faults = _faults(self._shards, list(self._recent))
        return {self._shards.origin(sample): fault for sample, fault in faults.items()}


def _row(row_4: npt.NDArray[np.uint8]) -> float:
    return float(row_4.view("<f4")[0])


def _split_state(state: bytes) -> tuple[bytes, bytes]:
    """The states of _RemotePictures, empty if there was none, and of the pipeline."""
    if not state.startswith(_REMOTE):
        return b"", state
    start = len(_REMOTE) + 4
    end = start + int.from_bytes(state[len(_REMOTE) : start], "little")
    return state[start:end], state[end:]


class DaliEvaluationLoader:
    """People of any source in a given order, without augmentation.

    Iterating gives RawBatches on the device; the last may be shorter. Records stay on the CPU, in
    the source's precision.
    """

    def __init__(self, source: Source, samples: npt.NDArray[np.int64], spec: LoaderSpec):
        """samples: (N,) numbers in the source. spec.preset must not be random."""
        self.source, self.spec = source, spec
        self.samples: list[int] = samples.tolist()
        self._batches = batches_in_order(samples, spec.batch_size)

    def __iter__(self) -> Iterator[RawBatch]:
        spec = self.spec
        arguments = _common_arguments(spec.device, spec.batch_size, spec.workers)
        arguments |= {"feed": self._feed(), "spec": spec, "raw": _is_raw(self.source)}
        arguments["halvings"] = _most_halvings(self.source, self.samples, spec)
        pipeline = pipeline_def(_evaluation_graph)(**arguments)
        for number, keys in enumerate(self._batches):
            end = number + pipeline.prefetch_queue_depth + 1  # including prefetched batches
            suspects = self.samples[number * spec.batch_size : end * spec.batch_size]
            find_faults = functools.partial(_faults, self.source, suspects)
            batch = _run(pipeline, self.source, find_faults)
            yield batch._replace(records_NR=torch.from_numpy(self._records(keys)))

    def _feed(self) -> Iterator[tuple[list[npt.NDArray], npt.NDArray, npt.NDArray, npt.NDArray]]:
        """Yield pictures, records, draws and affines of each batch."""
        for keys in read_ahead(self.source, self._batches):
            pictures = [
                np.frombuffer(_picture(self.source, sample), dtype=np.uint8) for sample, _ in keys
            ]
            records = self._records(keys).astype(np.float32)
            yield pictures, records, *_with_affines(np.tile(Draw(), (len(keys), 1)), self.spec)

    def _records(self, keys: list[Key]) -> npt.NDArray[np.floating]:
        return np.stack([self.source.record(sample) for sample, _ in keys])


def _is_raw(source: Source) -> bool:
    return isinstance(source, ShardSet) and source.is_raw


def _picture(source: Source, sample: int) -> bytes:
    """The stored picture of one person. Raises InputError."""
    if isinstance(source, ShardSet) and source.is_raw:
        return source.component(sample, source.components[1])
    jpeg = source.jpeg(sample)
    require_sane_size(jpeg, source.where(sample))
    return jpeg


def _common_arguments(device: torch.device, batch_size: int, threads: int) -> dict[str, Any]:
    return {
        "batch_size": batch_size,
        "num_threads": max(threads, 1),
        "device_id": (device.index or 0) if device.type == "cuda" else None,
        "exec_dynamic": True,
    }


def _run(pipeline: Pipeline, source: Source, find_faults: Callable[[], dict[int, str]]) -> RawBatch:
    """The next outputs, without a copy of crops that are RGB.

    Raises InputError if there is not enough memory, and BadSamplesError if find_faults names people
    whose data made the pipeline fail.
    """
    device = pipeline.device_id
    # The outputs are handed over on this stream, so that the host does not wait for the GPU.
    stream = [] if device is None or device < 0 else [torch.cuda.current_stream(device)]
    try:
        outputs = pipeline.run(*stream)
    except (RuntimeError, ValueError) as error:  # damaged picture; damaged record
        _raise_if_out_of_memory(pipeline, error)
        faults = find_faults()
        if not faults:
            raise
        first = min(faults)
        more = f", and {len(faults) - 1} more people" if len(faults) > 1 else ""
        # Not stored in a variable: a reference cycle would keep the pipeline's memory.
        raise BadSamplesError.of(faults, source.where(first), faults[first] + more) from error
    *planes, matrices, draws, records = (torch.from_dlpack(x.as_tensor()) for x in outputs)
    return RawBatch(planes_to_rgb(*planes) if planes[1:] else planes[0], matrices, draws, records)


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
    advice = "reduce data.batch_size (and raise optim.accumulate), eval.batch_size or data.cache_mb"
    raise InputError(where, found, expected, f"{advice}, or pack crops") from error


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
    """Why the stored picture cannot be used; empty if it can."""
    try:
        picture = _picture(source, sample)
        if not _is_raw(source):
            check_jpeg(picture)
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
    *,
    tars: list[Path],
    indices: list[Path],
    people: int,
    steps: Iterator[int],
    spec: LoaderSpec,
    decoder: dict[str, Any],
    extension: str,
    find_picture: Callable[[npt.NDArray], npt.NDArray] | None,
    halvings: int,
) -> tuple[Node, ...]:
    """The outputs of `_crops`."""
    picture, record = _read(
        tars=tars, indices=indices, extension=extension, people=people, spec=spec
    )
    draws, augmentation = fn.external_source(
        # Not DALI's own batch number, which is wrong after an error.
        source=lambda _: _draw(spec, next(steps)),
        num_outputs=2,
        dtype=types.FLOAT,
        ndim=[1, 2],
    )
    if find_picture:
        picture = fn.python_function(picture, function=find_picture)
    raw = extension == PICTURE_EXTENSIONS["raw"]
    return _crops((picture, record, draws, augmentation), spec, halvings, raw=raw, **decoder)


def _read(
    *, tars: list[Path], indices: list[Path], extension: str, people: int, spec: LoaderSpec
) -> tuple[Node, Node]:
    """Pictures and records. people: number of people in the tars."""
    shuffle: dict[str, Any] = {}
    if spec.cache_mb and spec.world_size > 1:  # each rank keeps the people that it has cached
        shuffle = {"stick_to_shard": True}
    elif spec.shuffle_buffer:
        shuffle = {"shuffle_after_epoch": True, "shuffle_after_epoch_seed": spec.seed}
    picture, record = fn.readers.webdataset(
        name="people",
        paths=[str(path) for path in tars],
        index_paths=[str(path) for path in indices],
        ext=[extension, "f32"],
        dtypes=[types.UINT8, types.FLOAT],
        missing_component_behavior="error",
        # With mmap, a truncated tar or a bad sector would end the process by SIGBUS.
        dont_use_mmap=True,
        random_shuffle=spec.shuffle_buffer > 0,
        **shuffle,
        initial_fill=max(1, min(spec.shuffle_buffer, people)),
        shard_id=spec.rank,
        num_shards=spec.world_size,
    )
    return picture, record


def _evaluation_graph(
    *, feed: Iterator[tuple[list, ...]], spec: LoaderSpec, raw: bool, halvings: int
) -> tuple[Node, ...]:
    inputs = fn.external_source(
        source=feed,
        num_outputs=4,
        dtype=[types.UINT8, types.FLOAT, types.FLOAT, types.FLOAT],
        ndim=[1, 1, 1, 2],
    )
    return _crops(inputs, spec, halvings, raw=raw)


def _decode(jpeg: Node, gpu: bool, **more: Any) -> Node:
    # Whole pictures, not regions: on a GPU, nvImageCodec 0.9 can combine regions with this chroma
    # upsampling only from nvJPEG 13.2 on (CUDA 13.3). Before, it uses another decoder silently.
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
    inputs: tuple[Node, Node, Node, Node],
    spec: LoaderSpec,
    halvings: int,
    *,
    raw: bool,
    **decoder: Any,
) -> tuple[Node, ...]:
    """Crops, affines N23, draws ND and records NR, all on the device.

    inputs: picture, record, draw and its affine (see `_with_affines`) of each person. The crops
    are images NHW3 or, for raw pictures, Y (N, H, W, 1) and chroma (N, 2, H / 2, W / 2, 1).
    halvings: the largest `geometry.halvings` of all people; 0 for raw pictures.
    """
    picture, record, draws, augmentation = inputs
    gpu = spec.device.type == "cuda"
    planes = _planes(picture, record, gpu) if raw else [_decode(picture, gpu, **decoder)]
    if spec.preset.princeton_crop:
        upper_left, size = _princeton_box(record)
        planes = [_cut(planes[0], upper_left, size)]
        zoom = fn.transforms.scale(scale=spec.input_px / size)
        from_image = [fn.transforms.translation(offset=0.5 - upper_left), zoom]
        from_picture = [zoom]
    else:
        box = fn.transforms.translation(offset=-record[COLUMNS["center"]])
        from_image = [fn.transforms.scale(box, scale=1.0 / record[COLUMNS["scale"]])]
        image_from_stored = fn.reshape(record[COLUMNS["image_from_stored"]], shape=[2, 3])
        from_picture = [_shift(-0.5), image_from_stored, *from_image]
        if halvings:
            planes[0], stored_from_half = _halved(planes[0], record, halvings, spec)
            from_picture.insert(0, stored_from_half)
    input_from_image = fn.transforms.combine(*from_image, augmentation)
    matrix = fn.transforms.combine(*from_picture, augmentation, _shift(0.5))
    crops = [_warp(planes[0], matrix, spec.input_px)]
    if raw:
        # Measured between corners, the sides of chroma are half as long as those of Y.
        halved = matrix * types.Constant(np.array([1, 1, 0.5], dtype=np.float32))
        crops.append(_warp(planes[1], halved, spec.input_px // 2, outside=NEUTRAL_CHROMA))
    small = (input_from_image, draws, record)
    return (*crops, *(node.gpu() if gpu else node for node in small))


def _planes(picture: Node, record: Node, gpu: bool) -> list[Node]:
    """Y (H, W, 1), and Cb and Cr (2, h, w, 1) as two frames, of a raw picture (i420.py)."""
    size = fn.cast(record[COLUMNS["size"]], dtype=types.INT32)
    width, height, one, two = size[0], size[1], types.Constant(1), types.Constant(2)
    half = (size + 1) // 2
    pixels = width * height
    picture = picture.gpu() if gpu else picture
    y = fn.reshape(picture[:pixels], shape=fn.stack(height, width, one), layout="HWC")
    shape = fn.stack(two, half[1], half[0], one)
    return [y, fn.reshape(picture[pixels:], shape=shape, layout="FHWC")]


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


def _most_halvings(source: Source, samples: Iterable[int], spec: LoaderSpec) -> int:
    """The largest `geometry.halvings` of these people's boxes."""
    if _is_raw(source) or not halves_large_pictures(spec.preset):
        return 0
    records = unpack_records(np.stack([source.record(sample) for sample in samples]))
    image_px = PIXELS_PER_SCALE * records.scale_N / spec.input_px
    stored = geometry.shrink_of(records.image_from_stored_N23)
    return int(geometry.halvings(image_px * stored).max())


def _halved(image: Node, record: Node, most: int, spec: LoaderSpec) -> tuple[Node, Node]:
    """The picture halved as geometry.halvings says (at most `most` times), and the affine from the
    halved picture to the stored one, px counted from the corner."""
    affine = record[COLUMNS["image_from_stored"]]
    stored = 1 / math.sqrt(math.abs(affine[0] * affine[4] - affine[1] * affine[3]))
    shrink = record[COLUMNS["scale"]] * (PIXELS_PER_SCALE / spec.input_px) * stored
    halvings = math.ceil(math.log2(shrink) - geometry.SAME_SHRINK) - 1
    before = size = fn.cast(image.shape()[0:2], dtype=types.FLOAT)
    for done in range(most):
        is_due = fn.cast(halvings > done, dtype=types.FLOAT)
        size = is_due * math.max(math.floor(size / 2), 1.0) + (1 - is_due) * size
        image = fn.resize(image, size=size, interp_type=types.INTERP_LINEAR, antialias=False)
    ratio = before / size
    return image, fn.transforms.scale(scale=fn.stack(ratio[1], ratio[0]))


def _shift(pixels: float) -> Node:
    return types.Constant(geometry.translation(pixels, pixels)[:2].astype(np.float32))


def _princeton_box(record: Node) -> tuple[Node, Node]:
    """The upper left corner and the size of princeton.box_corners, (2,) px, computed in float64."""
    half = types.Constant(np.array([[-0.5], [0.5]]) * PIXELS_PER_SCALE)
    corners = record[COLUMNS["center"]] + half * record[COLUMNS["scale"]]
    # Toward zero; a cast to an integer would round.
    whole = math.ceil(math.min(corners, 0.0)) + math.floor(math.max(corners, 0.0))
    corners = fn.cast(whole, dtype=types.INT32)
    upper_left = corners[0]
    return upper_left, math.max(corners[1] - upper_left, 1)


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


def _draw(spec: LoaderSpec, step: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The draws of a rank's batch, (N, 10), and their affines, (N, 2, 3)."""
    rng = np.random.default_rng([spec.seed, spec.rank, step])
    return _with_affines(draw_batch(spec.preset, [rng], spec.batch_size), spec)


def _with_affines(
    draws_ND: npt.NDArray[np.float64], spec: LoaderSpec
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The draws, and the affine of each, (N, 2, 3).

    The affines map to input px from (image px - the box's centre) / scale or, with princeton's
    crop, from crop px counted from the crop's corner.
    """
    scale, degrees, flip = draws_ND[:, :3].T
    zoom, start, end = spec.input_px / (PIXELS_PER_SCALE * scale), 0.0, (spec.input_px - 1) / 2
    if spec.preset.princeton_crop:
        # Princeton rotates about input_px / 2 and mirrors about (input_px - 1) / 2.
        zoom, start, end = 1 / scale, spec.input_px / 2 + 0.5, spec.input_px / 2
    cosine, sine = zoom * np.cos(np.deg2rad(degrees)), zoom * np.sin(np.deg2rad(degrees))
    linear = np.stack([cosine, -sine, sine, cosine], axis=1).reshape(-1, 2, 2)
    affine = np.concatenate([linear, end - start * linear.sum(axis=2, keepdims=True)], axis=2)
    mirrored = flip > 0
    affine[mirrored, 0] = [0, 0, spec.input_px - 1] - affine[mirrored, 0]
    return draws_ND.astype(np.float32), affine.astype(np.float32)
