"""Writes a trained network as ONNX or safetensors, and checks that it still answers alike."""

import sys
from pathlib import Path

# `python tools/export_onnx.py` puts tools/ on the path, and not the folder of the packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from common.cli import Parser
from common.errors import InputError, run_main
from evaluation.estimator import PoseEstimator, read_picture
from evaluation.inference import last_heatmaps
from model import checkpoint
from model.checkpoint import Checkpoint
from model.export import INPUT, KEY, OUTPUT, OnnxNetwork, write_safetensors
from pipelines.augment import without_augmentation
from pipelines.codec import Codec
from pipelines.geometry import STRIDE
from pipelines.loader import images_on_device
from pipelines.opencv_loader import CropDataset, collate
from pipelines.shard_format import MANIFEST
from pipelines.shards import ShardSet

TOLERANCE = 1e-4
"""Largest difference of a heatmap's pixel between torch and ONNX Runtime; a peak is about 1."""
MOST_PEOPLE = 8
"""Crops that are compared."""


class LastStack(nn.Module):
    """The network with the last stack's heatmaps alone, and the flip test if it is to be inside."""

    def __init__(self, network: nn.Module, codec: Codec, flip: bool):
        """network: in eval mode."""
        super().__init__()
        self.network, self.codec, self.flip = network, codec, flip
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """RGB in 0..1, (N, 3, S, S) -> heatmaps (N, J, S/4, S/4)."""
        return last_heatmaps(self.network, images, self.codec, self.flip)


def main() -> None:
    """Read the checkpoint, write what was asked for, compare."""
    options = make_parser().parse_args()
    check_options(options)
    trained = checkpoint.load_checkpoint(options.checkpoint)
    if options.safetensors:
        network = checkpoint.trained_network(trained)
        options.safetensors.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(options.safetensors, network.state_dict(), checkpoint.header(trained))
        print(f"wrote {options.safetensors}")
    if options.onnx:
        export_onnx(options, trained)


def export_onnx(options: argparse.Namespace, trained: Checkpoint) -> None:
    """Write the graph if it answers as torch does, and say by how much not. Raises InputError."""
    estimator = PoseEstimator.from_checkpoint(options.checkpoint, device="cpu")
    codec, joints = estimator.codec, estimator.skeleton.joint_count
    crops, what = crops_to_check(options, estimator, trained)
    whole = LastStack(estimator.network, codec, options.flip)
    with written_beside(options.onnx) as temporary:
        write_onnx(temporary, whole, trained)
        largest = largest_difference(OnnxNetwork(temporary, joints), whole, crops)
        if not largest <= TOLERANCE:
            raise InputError(
                options.onnx,
                f"heatmaps that differ from torch's by {largest:.1e}; it was not kept",
                f"at most {TOLERANCE:.0e}",
                "try other versions of torch, onnxscript and onnxruntime",
            )
    size, heat = codec.input_px, codec.input_px // STRIDE
    print(f"wrote {options.onnx}, {'with' if options.flip else 'without'} flip test")
    print(f"  {INPUT} (N, 3, {size}, {size}) float32 RGB in 0..1 ->", end=" ")
    print(f"{OUTPUT} (N, {joints}, {heat}, {heat})")
    print(f"  differs from torch by {largest:.1e} at most, on {what}")


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="export_onnx.py",
        description="Write a trained network as ONNX or safetensors; predict.py and evaluate.py "
        "read both.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/export_onnx.py runs/2hg/best.pt --onnx 2hg.onnx --flip",
    )
    parser.add_argument("checkpoint", type=Path, help="of train.py, or of others' code")
    out = parser.add_argument_group("what to write")
    out.add_argument(
        "--onnx", type=Path, metavar="OUT.onnx", help="the graph, for any number of people at once"
    )
    out.add_argument(
        "--safetensors", type=Path, metavar="OUT.safetensors", help="the weights that are evaluated"
    )
    how = parser.add_argument_group("how to make the ONNX")
    how.add_argument(
        "--flip",
        action="store_true",
        help="put the flip test inside: the graph then averages with the mirrored picture itself",
    )
    how.add_argument(
        "--check",
        type=Path,
        nargs="+",
        metavar="PICTURE",
        help="compare with torch on these; default: the first people of the validation shards that "
        "the checkpoint was trained beside, or noise where there are none",
    )
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Refuse what cannot be written before any work is done. Raises InputError."""
    if not (options.onnx or options.safetensors):
        raise InputError("command line", "nothing to write", "--onnx or --safetensors", "give one")
    for path, ending in ((options.onnx, ".onnx"), (options.safetensors, ".safetensors")):
        if path and (path.suffix != ending or path.is_dir()):
            raise InputError(
                path, "another ending, or a folder", f"a name in {ending}", "rename it"
            )
    needed = ["onnx", "onnxscript", "onnxruntime"] if options.onnx else []
    needed += ["safetensors"] if options.safetensors else []
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            "Python packages",
            f"no {', '.join(missing)}",
            "what writes these formats",
            f"pip install {' '.join(missing)}",
        )


def crops_to_check(
    options: argparse.Namespace, estimator: PoseEstimator, trained: Checkpoint
) -> tuple[Tensor, str]:
    """(N, 3, S, S) RGB in 0..1, and what they are. Raises InputError."""
    if options.check:
        pictures = [read_picture(path) for path in options.check]
        raw = collate([estimator.crop(image, None, "picture") for image in pictures])
        return images_on_device(raw, torch.device("cpu")), f"{len(pictures)} pictures"
    folder = Path(trained.config.data.shards) / "valid"
    size = estimator.codec.input_px
    if not (folder / MANIFEST).is_file():
        noise = torch.rand(MOST_PEOPLE, 3, size, size, generator=torch.Generator().manual_seed(0))
        return noise, f"noise, for there is no {folder}; --check PICTURE takes pictures"
    shards = ShardSet(folder)
    samples = shards.people()[1][:MOST_PEOPLE]
    preset = without_augmentation(estimator.codec.preset)
    dataset = CropDataset(shards, preset, size, seed=0)
    raw = collate([dataset[(int(sample), 0)] for sample in samples])
    return images_on_device(raw, torch.device("cpu")), f"{len(samples)} people of {folder}"


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A path to write to, which gets the right name if all went well, and is removed if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    try:
        yield temporary
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_onnx(path: Path, network: LastStack, trained: Checkpoint) -> None:
    """Trace the network with a free number of people, and write it with our facts."""
    # Of another size than 1, which the tracing would take for a constant.
    size = network.codec.input_px
    example = torch.zeros(2, 3, size, size)
    print("tracing the network ...", file=sys.stderr, flush=True)
    with torch.no_grad(), quiet():
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes={"images": {0: torch.export.Dim("people")}},
            verbose=False,
        )
    assert program is not None
    if network.flip:
        # What reads the file must not add a second flip test.
        config = replace(trained.config, eval=replace(trained.config.eval, flip=False))
        trained = replace(trained, config=config)
    program.model.metadata_props[KEY] = json.dumps(checkpoint.header(trained))
    program.save(str(path), external_data=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that it looks for and does not need."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


@torch.no_grad()
def largest_difference(graph: OnnxNetwork, network: LastStack, images_N3HW: Tensor) -> float:
    """Largest difference of a heatmap's pixel, of all at once and of the first person alone."""
    expected = network(images_N3HW)
    whole = (graph(images_N3HW)[:, 0] - expected).abs().max().item()
    first = (graph(images_N3HW[:1])[:, 0] - expected[:1]).abs().max().item()
    return max(whole, first)


if __name__ == "__main__":
    run_main(main)
