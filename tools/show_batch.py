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
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from common.cli import Parser, at_least, info, progress
from common.distributed import choose_device
from common.errors import InputError, run_main
from configs.schema import Config, LoaderName, config_from_dict, load_yaml
from configs.skeleton import Skeleton
from evaluation.visualize import LEFT_BGR, MIDDLE_BGR, RIGHT_BGR, TILE_PX, color_of, draw_skeleton
from pipelines import geometry, heatmaps
from pipelines.augment import PRESETS, Draw
from pipelines.codec import Codec, codec_of
from pipelines.loader import Batch, LoaderSpec, RawBatch, make_batch, train_loader
from pipelines.shard_cache import local_folder
from pipelines.shard_format import MANIFEST
from pipelines.shards import ShardSet

SHEET_ASPECT = 4 / 3  # width over height, approximately: what fits a screen
CPU = torch.device("cpu")
LOADERS: tuple[LoaderName, LoaderName] = ("opencv", "dali")

Picture = npt.NDArray[np.uint8]


def main(argv: list[str] | None = None) -> None:
    """Make a batch by each loader, draw it, write the picture. Raises InputError."""
    options = make_parser().parse_args(argv)
    output = Path(options.output)
    if output.suffix.lower() != ".png" or output.is_dir():
        raise InputError(output, "not a .png", "a file name that ends in .png", "give another")
    config = Config()
    if options.config:
        config = config_from_dict(load_yaml(options.config), options.config)
    data, heat = config.data, config.heatmaps
    location = options.shards or next(iter(data.weights))
    folder = local_folder(location, data.cache_dir, data.cache_gb)
    shards = ShardSet(folder if (folder / MANIFEST).is_file() else folder / options.split)
    skeleton = shards.manifest.skeleton
    preset, input_px = options.preset or data.preset, options.input_px or data.input_px
    data = replace(data, preset=preset, input_px=input_px, mirror=data.mirror and skeleton.mirror)
    codec = codec_of(data, replace(heat, sigma=options.sigma or heat.sigma), skeleton)
    if input_px % 64:
        raise InputError("--input-px", f"{input_px}", "a multiple of 64", "give 64, 128, 256, ...")
    names: tuple[LoaderName, ...] = LOADERS if options.loader == "both" else (options.loader,)
    spec = LoaderSpec(
        loader=names[0],
        device=choose_device(options.device),
        preset=codec.preset,
        input_px=codec.input_px,
        batch_size=options.people,
        workers=0,
        shard_window=data.shard_window,
        seed=options.seed,
    )
    info(f"cropping {options.people:,} people ...")
    loaders = [train_loader(shards, replace(spec, loader=name)) for name in names]
    raws = [RawBatch(*(part.cpu() for part in loader.next())) for loader in loaders]
    batches = {name: make_batch(raw, codec, CPU) for name, raw in zip(names, raws, strict=True)}
    grey = None
    if options.loader == "both":
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


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="show_batch.py",
        description="Draws augmented crops with their joints and heatmaps as one PNG.",
        epilog="example: python tools/show_batch.py --config configs/2hg.yaml --output batch.png",
    )
    add = parser.add_argument_group("what to show").add_argument
    add("--shards", metavar="DIR", help="folder or URL of splits, or a split (default: config's)")
    add("--split", choices=("train", "valid"), default="train", help="default: %(default)s")
    add("--people", type=at_least(1), default=12, help="number of people (default: %(default)s)")
    add("--seed", type=at_least(0), default=0, help="of order and draws (default: %(default)s)")
    add = parser.add_argument_group("how it is made").add_argument
    add("--config", metavar="FILE", help="YAML file of settings (default: the schema's)")
    add("--preset", choices=tuple(PRESETS), help="augmentation (default: the config's)")
    both = "both: the same augmentation by each, and the difference (default: %(default)s)"
    add("--loader", choices=(*LOADERS, "both"), default="opencv", help=both)
    add("--sigma", type=float, help="heatmap px at 64 x 64 (default: the config's)")
    add("--input-px", type=at_least(64), help="side of the crop, px (default: the config's)")
    device = "device of DALI (default: %(default)s)"
    add("--device", choices=("auto", "cuda", "cpu"), default="cpu", help=device)
    add = parser.add_argument_group("what to write").add_argument
    add("--output", metavar="PNG", default="batch.png", help="default: %(default)s")
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
