"""Draws augmented crops with their joints and heatmaps, as the network gets them.

Both loaders make the same people with the same draws, so that their crops can be compared.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of configs/

from dataclasses import replace

import cv2
import numpy as np
import numpy.typing as npt
import torch
from jsonargparse import ArgumentParser
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from common.cli import at_least, info, progress
from common.distributed import choose_device
from common.errors import InputError, run_main
from configs.schema import LoaderName, add_config_options, parse_config
from configs.skeleton import Skeleton
from evaluation.visualize import LEFT_BGR, MIDDLE_BGR, RIGHT_BGR, TILE_PX, color_of, draw_skeleton
from pipelines import geometry, heatmaps
from pipelines.augment import Draw
from pipelines.codec import Codec, codec_of
from pipelines.loader import Batch, LoaderSpec, TrainLoader, choose_loader, make_batch
from pipelines.opencv_loader import RawBatch
from pipelines.shard_cache import local_folder
from pipelines.shards import ShardSet

SHEET_ASPECT = 4 / 3  # width over height, approximately: what fits a screen
CPU = torch.device("cpu")
LOADERS: tuple[LoaderName, ...] = ("opencv", "dali")

Picture = npt.NDArray[np.uint8]


def main(arguments: list[str] | None = None) -> None:
    """Make a batch by each loader, draw it, write the picture. Raises InputError."""
    words = sys.argv[1:] if arguments is None else arguments
    config, options = parse_config(make_parser(), words)
    output, people = Path(options["output"]), options["people"]
    if output.suffix.lower() != ".png" or output.is_dir():
        raise InputError(output, "not a .png", "a file name that ends in .png", "give another")
    data, device = config.data, choose_device(config.train.device)
    folder = local_folder(next(iter(data.weights)), data.cache_dir, data.cache_gb)
    shards = ShardSet(folder / options["split"])
    skeleton = shards.manifest.skeleton
    data = replace(data, mirror=data.mirror and skeleton.mirror)
    codec = codec_of(data, config.heatmaps, skeleton)
    names = LOADERS if options["both_loaders"] else (choose_loader(data.loader, device),)
    spec = LoaderSpec(
        loader=names[0],
        device=device,
        preset=codec.preset,
        input_px=codec.input_px,
        batch_size=people,
        workers=0,
        shard_window=data.shard_window,
        seed=config.train.seed,
    )
    info(f"cropping {people:,} people ...")
    loaders = [TrainLoader(shards, replace(spec, loader=name)) for name in names]
    raws = [RawBatch(*(part.cpu() for part in loader.next())) for loader in loaders]
    batches = {name: make_batch(raw, codec, CPU) for name, raw in zip(names, raws, strict=True)}
    grey = None
    if len(raws) == 2:
        first, second = (raw.images_NHW3.float() for raw in raws)
        grey = (second - first).abs().numpy()
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet = draw_sheet(batches, raws[0].draws_ND, grey, codec)
    FigureCanvasAgg(sheet).print_png(output)
    if grey is not None:
        print(
            f"{names[1]} minus {names[0]}, before colours: {grey.mean():.4f} "
            f"grey levels on average, {grey.max():.0f} at most, {len(grey)} people"
        )
    print(f"wrote {output}")


def make_parser() -> ArgumentParser:
    """The command line: that of train.py, and what to draw."""
    parser = ArgumentParser(
        exit_on_error=False,
        description="Draws augmented crops with their joints and heatmaps as one PNG.",
        epilog="example: python tools/show_batch.py --config configs/2hg.yaml --output batch.png",
    )
    add = parser.add_argument
    add("--output", default="batch.png", help="the PNG to write")
    add("--people", type=at_least(1), default=12, help="number of people")
    add("--split", choices=("train", "valid"), default="train", help="of the shards")
    both = "the same augmentation by both loaders, and the difference"
    add("--both_loaders", action="store_true", help=both)
    add_config_options(parser)
    return parser


def draw_sheet(
    batches: dict[LoaderName, Batch],
    draws_ND: torch.Tensor,
    grey_NHW3: npt.NDArray[np.float32] | None,
    codec: Codec,
) -> Figure:
    """A panel for each person, with the draw above it, and a legend.

    batches: of the same people. draws: of these. grey: absolute differences of the crops of two
    loaders, 0..255, before colours.
    """
    batch = next(iter(batches.values()))
    # Makes the largest difference white; usually it is a grey level or two.
    zoom = 1.0 if grey_NHW3 is None else 255 / max(1.0, float(grey_NHW3.max()))
    people = len(batch.rows_N)
    tiles = len(batches) + 1 + (grey_NHW3 is not None)
    columns = max(1, round((SHEET_ASPECT * people / tiles) ** 0.5))
    rows = -(-people // columns)
    figure = Figure(figsize=(2.6 * tiles * columns, 2.85 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for person in progress(range(people), "drawing", "people"):
        drawings = [draw_crop(each, codec, person) for each in batches.values()]
        drawings.append(draw_heatmaps(batch, codec.skeleton, person))
        drawn = Draw(*draws_ND[person].tolist())
        text = f"row {int(batch.rows_N[person])}   box x {drawn.scale:.2f}"
        text += f"   {drawn.rotation_deg:+.1f} deg" + ("   mirrored" if drawn.flip else "")
        if grey_NHW3 is not None:
            drawings.append(enlarge((zoom * grey_NHW3[person]).astype(np.uint8)[..., ::-1]))
            mean, largest = grey_NHW3[person].mean(), grey_NHW3[person].max()
            text += f"   difference: mean {mean:.4f}, largest {largest:.0f}"
        panels[person].imshow(np.hstack(drawings)[..., ::-1])
        panels[person].set_title(text, fontsize=8)
    for panel in panels:
        panel.axis("off")
    names = [*batches, "heatmaps"]
    names += [] if grey_NHW3 is None else [f"difference x {zoom:.3g} (black: none)"]
    sides = (("right", RIGHT_BGR), ("left", LEFT_BGR), ("middle", MIDDLE_BGR))
    patches = [
        Patch(color=(red / 255, green / 255, blue / 255), label=f"the person's {side}")
        for side, (blue, green, red) in sides
    ]
    figure.legend(handles=patches, loc="outside upper left", ncols=3, title=", ".join(names))
    return figure


def draw_crop(batch: Batch, codec: Codec, person: int) -> Picture:
    """The crop as the network gets it, with the joints that have a target."""
    image = (batch.images_N3HW[person].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    tile = enlarge(image[..., ::-1])
    zoom = TILE_PX / codec.input_px
    to_middle = geometry.translation(0.5, 0.5)
    tile_from_input = geometry.translation(-0.5, -0.5) @ geometry.scaling(zoom, zoom) @ to_middle
    tile_from_heat = tile_from_input @ np.linalg.inv(heatmaps.heat_from_input(codec.rule))
    joints = geometry.transform(tile_from_heat, batch.joints_NJ2[person].double().numpy())
    draw_skeleton(tile, joints, batch.has_target_NJ[person].numpy(), codec.skeleton, 2)
    return tile


def draw_heatmaps(batch: Batch, skeleton: Skeleton, person: int) -> Picture:
    """All heatmaps over the grey crop, each joint's in the colour of its side."""
    image = batch.images_N3HW[person].mean(dim=0).numpy()
    heat = batch.heat_NJHW[person].numpy()
    colored = np.zeros((*heat.shape[1:], 3))
    for side, one in zip(skeleton.sides, heat, strict=True):
        colored = np.maximum(colored, one[..., None] * np.array(color_of(side)))
    background = 90.0 * cv2.resize(image, (TILE_PX, TILE_PX))[..., None]
    tile = cv2.resize(colored, (TILE_PX, TILE_PX), interpolation=cv2.INTER_NEAREST) + background
    return np.clip(tile, 0, 255).astype(np.uint8)


def enlarge(image_HW3: Picture) -> Picture:
    """A crop resized to a tile, without blurring its pixels."""
    how = cv2.INTER_NEAREST if image_HW3.shape[0] <= TILE_PX else cv2.INTER_AREA
    tile = cv2.resize(np.ascontiguousarray(image_HW3), (TILE_PX, TILE_PX), interpolation=how)
    return tile.astype(np.uint8, copy=False)


if __name__ == "__main__":
    run_main(main)
