"""Draws what the network is shown: augmented crops with their joints and heatmaps.

With both loaders, DALI makes a batch and OpenCV repeats its draws, so that their crops can be
compared person by person.
"""

import sys
from pathlib import Path

# `python tools/show_batch.py` puts tools/ on the path, and not the folder that holds configs/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch

from common.cli import Parser, at_least, progress
from common.distributed import choose_device
from common.errors import InputError, run_main
from configs.schema import Config, config_from_dict, load_yaml
from configs.skeleton import Skeleton
from evaluation.visualize import LEFT_BGR, MIDDLE_BGR, RIGHT_BGR, color_of, draw_skeleton
from pipelines import geometry, heatmaps
from pipelines import opencv_loader as opencv_crops
from pipelines.augment import PRESETS, Draw, Preset
from pipelines.codec import Codec
from pipelines.loader import Batch, LoaderName, LoaderSpec, RawBatch, make_batch, train_loader
from pipelines.shard_format import COLUMNS, MANIFEST, unpack_records
from pipelines.shards import ShardSet

TILE_PX, CAPTION_PX, LEGEND_PX = 256, 20, 26
SHEET_SHAPE = 4 / 3
"""Width over height, about: what a screen shows whole."""
INK = (30, 30, 30)

Picture = npt.NDArray[np.uint8]


class Shown(NamedTuple):
    """A batch through one loader."""

    name: str
    raw: RawBatch
    batch: Batch


def main() -> None:
    """Make a batch by each loader, draw it, write the picture. Raises InputError."""
    options = make_parser().parse_args()
    output = Path(options.output)
    if output.suffix.lower() != ".png" or output.is_dir():
        raise InputError(output, "not a .png", "a file name that ends in .png", "name another")
    config = read_config(options.config)
    shards = open_split(Path(options.shards or config.data.shards), options.split)
    preset = PRESETS[options.preset or config.data.preset]
    if not config.data.mirror or options.no_mirror:
        preset = preset._replace(flip_probability=0.0)
    heat = config.heatmaps
    rule = options.rule or heat.rule
    sigma, input_px = options.sigma or heat.sigma, options.input_px or config.data.input_px
    if input_px % 64:
        raise InputError("--input-px", str(input_px), "a multiple of 64", "give 64, 128, 256, ...")
    codec = Codec(
        preset=preset,
        rule=rule,
        sigma=sigma,
        input_px=input_px,
        skeleton=shards.manifest.skeleton,
    )
    device = choose_device(options.device)
    print(f"cutting out {options.people:,} people ...", file=sys.stderr, flush=True)
    shown = make_batches(shards, codec, options.loader, options.people, options.seed, device)
    grey = grey_differences(shown)
    sheet = draw_sheet(shown, grey, codec)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".tmp.png")
    cv2.imwrite(str(temporary), sheet)
    temporary.rename(output)
    if grey is not None:
        print(
            f"{shown[1].name} minus {shown[0].name}, before colours: {grey.mean():.4f} grey levels "
            f"on average, {grey.max():.0f} at most, {len(grey)} people"
        )
    print(f"wrote {output}")


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="show_batch.py",
        description="Draws augmented crops with their joints and heatmaps as one PNG.",
        epilog="example: python tools/show_batch.py --config configs/2hg.yaml --output batch.png",
    )
    # fmt: off
    add = parser.add_argument_group("what to show").add_argument
    add("--shards", metavar="DIR", help="folder of splits, or a split (default: the config's)")
    add("--split", choices=("train", "valid"), default="train", help="default: %(default)s")
    add("--people", type=at_least(1), default=12, help="people (default: %(default)s)")
    add("--seed", type=at_least(0), default=0, help="of order and draws (default: %(default)s)")
    add = parser.add_argument_group("how they are made").add_argument
    add("--config", metavar="FILE", help="take the settings of this run (default: the schema's)")
    add("--preset", choices=tuple(PRESETS), help="augmentation (default: the config's)")
    add("--no-mirror", action="store_true", help="never mirror, as data.mirror: false does")
    add("--loader", choices=("opencv", "dali", "both"), default="opencv",
        help="both: the same draws through each, and the difference (default: %(default)s)")
    add("--rule", choices=("exact", "princeton", "hrnet"), help="of heatmaps (default: config's)")
    add("--sigma", type=float, help="heatmap px at 64 x 64 (default: the config's)")
    add("--input-px", type=at_least(64), help="side of the crop, px (default: the config's)")
    add("--device", choices=("auto", "cuda", "cpu"), default="cpu",
        help="where DALI decodes and crops (default: %(default)s)")
    add = parser.add_argument_group("what to write").add_argument
    add("--output", metavar="PNG", default="batch.png", help="default: %(default)s")
    # fmt: on
    return parser


def read_config(path: str | None) -> Config:
    """The settings of a run, or the schema's own. Raises InputError."""
    return config_from_dict(load_yaml(path), path) if path else Config()


def open_split(folder: Path, split: str) -> ShardSet:
    """A split, or the one of that name in a folder of splits. Raises InputError."""
    return ShardSet(folder if (folder / MANIFEST).is_file() else folder / split)


def make_batches(
    shards: ShardSet, codec: Codec, loader: str, people: int, seed: int, device: torch.device
) -> list[Shown]:
    """One batch by one loader; or DALI's, after OpenCV's of the same people and draws."""
    first: LoaderName = "opencv" if loader == "opencv" else "dali"
    spec = LoaderSpec(
        loader=first,
        device=device,
        preset=codec.preset,
        input_px=codec.input_px,
        batch_size=people,
        workers=0,
        seed=seed,
    )
    raw = train_loader(shards, spec).next()
    raw = RawBatch(*(part.cpu() for part in raw))
    raws = {first: raw} if loader != "both" else {"opencv": opencv_twin(shards, raw, codec.preset)}
    raws.setdefault(first, raw)
    cpu = torch.device("cpu")
    return [Shown(name, raw, make_batch(raw, codec, cpu)) for name, raw in raws.items()]


def opencv_twin(shards: ShardSet, raw: RawBatch, preset: Preset) -> RawBatch:
    """The crops that OpenCV makes of the people and draws of a batch."""
    sample_of = {float(row): i for i, row in enumerate(shards.records()[:, COLUMNS["row"]])}
    items = []
    for record, drawn in zip(raw.records_NR.numpy(), raw.draws_ND.tolist(), strict=True):
        sample = sample_of[float(record[COLUMNS["row"]])]
        image = opencv_crops.decode(shards.jpeg(sample), shards.where(sample))
        draw = Draw(*drawn)
        fields = unpack_records(record[None])
        crop, matrix = opencv_crops.crop_person(
            image, fields, draw, preset, raw.images_NHW3.shape[1]
        )
        items.append((crop, matrix, draw, record))
    return opencv_crops.collate(items)


def grey_differences(shown: list[Shown]) -> npt.NDArray[np.float32] | None:
    """(N, H, W, 3) absolute differences of the crops of two loaders, 0..255, before colours."""
    if len(shown) == 1:
        return None
    first, second = (one.raw.images_NHW3.float() for one in shown)
    return (second - first).abs().numpy()


def draw_sheet(
    shown: list[Shown], grey_NHW3: npt.NDArray[np.float32] | None, codec: Codec
) -> Picture:
    """The contact sheet (H, W, 3) BGR: a panel a person, under a legend."""
    zoom = 1.0 if grey_NHW3 is None else amplification(grey_NHW3)
    people = progress(range(len(shown[0].batch.rows_N)), "drawing", "people")
    panels = [
        draw_panel(shown, None if grey_NHW3 is None else grey_NHW3[i], zoom, codec, i)
        for i in people
    ]
    height, width = panels[0].shape[:2]
    columns = columns_of(len(panels), width / height)
    panels += [np.full_like(panels[0], 255)] * (-len(panels) % columns)
    rows = [np.hstack(panels[i : i + columns]) for i in range(0, len(panels), columns)]
    names = [*(one.name for one in shown), "heatmaps"]
    names += [] if grey_NHW3 is None else [f"difference x {zoom:.3g} (black: none)"]
    return np.vstack([legend(width * columns, names), *rows])


def columns_of(panels: int, shape: float) -> int:
    """The number of columns that brings the sheet nearest to its shape. shape: of a panel."""
    shapes = [c * shape / -(-panels // c) for c in range(1, panels + 1)]
    return int(np.argmin(np.abs(np.log(np.array(shapes) / SHEET_SHAPE)))) + 1


def amplification(grey_NHW3: npt.NDArray[np.float32]) -> float:
    """The factor that makes the largest difference white; they are a grey level or two at most."""
    return 255 / max(1.0, float(grey_NHW3.max()))


def draw_panel(
    shown: list[Shown],
    grey_HW3: npt.NDArray[np.float32] | None,
    zoom: float,
    codec: Codec,
    person: int,
) -> Picture:
    """One person's tiles side by side, with the draw below. zoom: factor on the difference."""
    tiles = [draw_crop(one.batch, codec, person) for one in shown]
    tiles.append(draw_heatmaps(shown[0].batch, codec.skeleton, person))
    drawn = Draw(*shown[0].raw.draws_ND[person].tolist())
    caption = f"row {int(shown[0].batch.rows_N[person])}   box x {drawn.scale:.2f}"
    caption += f"   {drawn.rotation_deg:+.1f} deg" + ("   mirrored" if drawn.flip else "")
    if grey_HW3 is not None:
        tiles.append(enlarge((zoom * grey_HW3).astype(np.uint8)[..., ::-1]))
        caption += f"   difference: mean {grey_HW3.mean():.4f}, largest {grey_HW3.max():.0f}"
    strip = np.full((CAPTION_PX, TILE_PX * len(tiles), 3), 255, dtype=np.uint8)
    write(strip, caption, 4, 14)
    panel = np.vstack([np.hstack(tiles), strip])
    return cv2.copyMakeBorder(panel, 2, 2, 2, 2, cv2.BORDER_CONSTANT, value=(255, 255, 255))  # type: ignore[return-value]


def draw_crop(batch: Batch, codec: Codec, person: int) -> Picture:
    """The crop as the network sees it, with the joints that have a target."""
    image = (batch.images_N3HW[person].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    tile = enlarge(image[..., ::-1])
    zoom = TILE_PX / codec.input_px
    to_middle = geometry.translation(0.5, 0.5)
    tile_from_input = geometry.translation(-0.5, -0.5) @ geometry.scaling(zoom, zoom) @ to_middle
    tile_from_heat = tile_from_input @ np.linalg.inv(heatmaps.heat_from_input(codec.rule))
    joints = geometry.transform(tile_from_heat, batch.joints_NJ2[person].double().numpy())
    draw_skeleton(tile, joints, batch.drawn_NJ[person].numpy(), codec.skeleton, 2)
    return tile


def draw_heatmaps(batch: Batch, skeleton: Skeleton, person: int) -> Picture:
    """All maps over the grey crop: each joint's in the colour of its side."""
    image = batch.images_N3HW[person].mean(dim=0).numpy()
    heat = batch.heat_NJHW[person].numpy()
    colored = np.zeros((*heat.shape[1:], 3))
    for side, one in zip(skeleton.sides, heat, strict=True):
        colored = np.maximum(colored, one[..., None] * np.array(color_of(side)))
    background = 90.0 * cv2.resize(image, (TILE_PX, TILE_PX))[..., None]
    tile = cv2.resize(colored, (TILE_PX, TILE_PX), interpolation=cv2.INTER_NEAREST) + background
    return np.clip(tile, 0, 255).astype(np.uint8)


def enlarge(image_HW3: Picture) -> Picture:
    """A tile of a crop, whose pixels stay sharp."""
    how = cv2.INTER_NEAREST if image_HW3.shape[0] <= TILE_PX else cv2.INTER_AREA
    size = (TILE_PX, TILE_PX)
    return cv2.resize(np.ascontiguousarray(image_HW3), size, interpolation=how)  # type: ignore[return-value]


def legend(width: int, names: list[str]) -> Picture:
    """What the tiles and the colours are."""
    strip = np.full((LEGEND_PX, width, 3), 255, dtype=np.uint8)
    x = write(strip, ", ".join(names) + "  |  the person's", 6, 17) + 8
    for name, color in (("right", RIGHT_BGR), ("left", LEFT_BGR), ("middle", MIDDLE_BGR)):
        dark = tuple(int(0.8 * channel) for channel in color)
        x = write(strip, name, x, 17, dark) + 8
    return strip


def write(picture: Picture, text: str, x: int, y: int, color: tuple[int, ...] = INK) -> int:
    """Write a line whose baseline is y, and return where it ends."""
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, 0.4
    cv2.putText(picture, text, (x, y), font, scale, color, 1, cv2.LINE_AA)
    return x + cv2.getTextSize(text, font, scale, 1)[0][0]


if __name__ == "__main__":
    run_main(main)
