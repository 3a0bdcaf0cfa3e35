"""Writes a trained network as ONNX or safetensors, and checks that its outputs stay the same."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of configs/

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import tempfile
import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn

from common.cli import Parser
from common.errors import InputError, run_main
from common.files import write_atomic
from evaluation.estimator import PoseEstimator, read_picture
from evaluation.inference import last_heatmaps
from model.checkpoint import Checkpoint, header, load_checkpoint, trained_network
from model.export import INPUT, KEY, OUTPUT, OnnxNetwork, write_safetensors
from pipelines.codec import Codec
from pipelines.geometry import STRIDE
from pipelines.loader import evaluation_batches, images_on_device
from pipelines.opencv_loader import collate
from pipelines.shard_format import MANIFEST
from pipelines.shards import ShardSet

TOLERANCE = 1e-4
"""Largest difference of a heatmap's pixel between torch and ONNX Runtime; a peak is about 1."""
MAX_PEOPLE = 8
"""Crops that are compared."""
CPU = torch.device("cpu")


class LastStack(nn.Module):
    """The network's last heatmaps, averaged with the mirrored picture's if `flip`.

    RGB in 0..1, (N, 3, S, S) -> heatmaps (N, J, S/4, S/4). network: in eval mode.
    """

    def __init__(self, network: nn.Module, codec: Codec, flip: bool):
        super().__init__()
        self.network, self.codec, self.flip = network, codec, flip
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return last_heatmaps(self.network, images, self.codec, self.flip)


def main(argv: list[str] | None = None) -> None:
    """Read the checkpoint, write what was asked for, compare."""
    options = make_parser().parse_args(argv)
    check_options(options)
    loaded = load_checkpoint(options.checkpoint)
    if options.safetensors:
        weights = trained_network(loaded).state_dict()
        write_safetensors(options.safetensors, weights, header(loaded))
        print(f"wrote {options.safetensors}")
    if options.onnx:
        export_onnx(options, loaded)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        description="Write a trained network as ONNX or safetensors; predict.py and evaluate.py "
        "read both.",
        epilog="example: python tools/export_onnx.py runs/2hg/best.pt --onnx 2hg.onnx --flip",
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="a checkpoint of train.py or of other code")
    add("--onnx", type=Path, metavar="OUT.onnx", help="the graph, for batches of any size")
    add("--safetensors", type=Path, metavar="OUT.safetensors", help="the evaluated weights")
    add("--flip", action="store_true", help="put the flip test into the ONNX graph")
    check_help = "pictures for the comparison with torch; default: from the validation shards"
    add("--check", type=Path, nargs="+", metavar="PICTURE", help=check_help)
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Raise InputError for outputs that cannot be written, before any work is done."""
    if not (options.onnx or options.safetensors):
        raise InputError("command line", "nothing to write", "--onnx or --safetensors", "give one")
    for path, ending, packages in (
        (options.onnx, ".onnx", ("onnx", "onnxscript", "onnxruntime")),
        (options.safetensors, ".safetensors", ("safetensors",)),
    ):
        if path and (path.suffix != ending or path.is_dir()):
            raise InputError(path, "no file of this kind", f"a name in {ending}", "rename it")
        if path and not all(map(importlib.util.find_spec, packages)):
            names = " ".join(packages)
            raise InputError(path, "missing Python packages", names, f"pip install {names}")


def export_onnx(options: argparse.Namespace, loaded: Checkpoint) -> None:
    """Write the graph if its outputs equal torch's. Raises InputError if they do not."""
    estimator = PoseEstimator.from_checkpoint(loaded, device="cpu")
    codec, joints = estimator.codec, estimator.skeleton.joint_count
    network = LastStack(estimator.network, codec, options.flip)
    valid = Path(next(iter(loaded.config.data.weights))) / "valid"
    images, what = images_to_check(options.check, valid, estimator)
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / "network.onnx"
        write_onnx(temporary, network, loaded)
        difference = largest_difference(OnnxNetwork(temporary), network, images)
        if not difference <= TOLERANCE:
            found = f"heatmaps that differ from torch's by {difference:.1e}; nothing was written"
            advice = "try other versions of torch, onnxscript and onnxruntime"
            raise InputError(options.onnx, found, f"at most {TOLERANCE:.0e}", advice)
        write_atomic(options.onnx, temporary.read_bytes())
    size, heat = codec.input_px, codec.input_px // STRIDE
    print(f"wrote {options.onnx}, {'with' if options.flip else 'without'} flip test")
    shapes = f"(N, 3, {size}, {size}) float32 RGB in 0..1 -> {OUTPUT} (N, {joints}, {heat}, {heat})"
    print(f"  {INPUT} {shapes}")
    print(f"  differs from torch by {difference:.1e} at most, on {what}")


def images_to_check(
    paths: list[Path] | None, shards: Path, estimator: PoseEstimator
) -> tuple[Tensor, str]:
    """(N, 3, S, S) RGB in 0..1, and what they are: pictures, people of shards, or noise."""
    if paths:
        pictures = [read_picture(path) for path in paths]
        raw = collate([estimator.crop(image, None, "picture") for image in pictures])
        return images_on_device(raw, CPU), f"{len(pictures)} pictures"
    if not (shards / MANIFEST).is_file():
        size = estimator.codec.input_px
        noise = torch.rand(MAX_PEOPLE, 3, size, size, generator=torch.Generator().manual_seed(0))
        return noise, f"noise, because there is no {shards}; --check PICTURE uses pictures"
    split = ShardSet(shards)
    samples = split.people()[1][:MAX_PEOPLE]
    how = {"loader": "opencv", "device": CPU, "batch_size": MAX_PEOPLE, "workers": 0}
    (raw,) = evaluation_batches(split, samples, estimator.codec, **how)  # type: ignore[arg-type]
    return images_on_device(raw, CPU), f"{len(samples)} people of {shards}"


def write_onnx(path: Path, network: LastStack, loaded: Checkpoint) -> None:
    """Trace the network for any batch size, and write it with the checkpoint's header."""
    # A batch of 1 would become a constant.
    example = torch.zeros(2, 3, network.codec.input_px, network.codec.input_px)
    print("tracing the network ...", file=sys.stderr, flush=True)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # no remarks on optional packages
    with (
        torch.no_grad(),
        warnings.catch_warnings(action="ignore"),
        contextlib.redirect_stdout(io.StringIO()),
    ):
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
    if network.flip:  # programs that read the file must not add a second flip test
        evaluation = replace(loaded.config.eval, flip=False)
        loaded = replace(loaded, config=replace(loaded.config, eval=evaluation))
    program.model.metadata_props[KEY] = json.dumps(header(loaded))
    program.save(str(path), external_data=False)


@torch.no_grad()
def largest_difference(graph: OnnxNetwork, network: LastStack, images_N3HW: Tensor) -> float:
    """Largest difference of a heatmap's pixel, for the whole batch and for its first image."""
    pairs = [(graph(x)[:, 0], network(x)) for x in (images_N3HW, images_N3HW[:1])]
    return max((mine - theirs).abs().max().item() for mine, theirs in pairs)


if __name__ == "__main__":
    run_main(main)
