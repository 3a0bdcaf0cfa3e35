"""Packs pictures and annotations into tar shards, one person per sample (pipelines/packing.py).

The pictures are stored unchanged, as crops that are smaller and faster to decode
(pipelines/crop_packing.py), or as crops that need no decoding (pipelines/i420.py). An interrupted
run can be continued.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of configs/

import argparse
import hashlib
import shlex
import shutil
import tempfile
import time
from collections import Counter
from typing import get_args

from common.cli import Parser, at_least
from common.errors import InputError, run_main
from common.files import write_atomic
from common.system import usable_cores
from configs.skeleton import MPII, Skeleton, skeleton_yaml
from pipelines.annotations import FORMATS, Boxes, Exif, find_annotations, scored_text
from pipelines.augment import PRESETS
from pipelines.crop_packing import crop_rule
from pipelines.jpeg import QUALITY
from pipelines.object_storage import is_url, require_no_secret
from pipelines.packing import SPLITS, PackingOptions, pack
from pipelines.shard_format import PICTURE_EXTENSIONS, Manifest
from pipelines.shards import ShardSet

DATA = Path("data/mpii")
HOW_TO_GET_DATA = """get MPII as README.md says, or draw people first:
    python tools/make_synthetic.py --output data/synthetic"""
CROP_PRESETS = [name for name, preset in PRESETS.items() if not preset.princeton_crop]


def main(argv: list[str] | None = None) -> int:
    """Pack, then print what was packed. Raises InputError."""
    start = time.monotonic()
    options = parse_options(argv)
    manifests = pack(options)
    if manifests and manifests[0].skeleton != MPII and not options.skeleton:
        folder = Path() if options.url else options.output
        write_skeleton(folder / "skeleton.yaml", manifests[0].skeleton, options.command)
    if manifests:
        print_summary(options, manifests, time.monotonic() - start)
    if options.url:
        shutil.rmtree(options.output, ignore_errors=True)
    return 0


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        description="Packs pictures and annotations of people into tar shards for training.",
        epilog="example: python tools/make_shards.py --splits valid --output data/shards/mpii",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    # fmt: off
    add = parser.add_argument_group("what to pack").add_argument
    add("--annotations", type=Path, default=DATA / "annot",
        help="folder of train.h5 and valid.h5, or of train.json and valid.json in COCO's layout, "
        "or one such file, or mpii_annotations.json(.gz), a DeepLabCut project, Lightning Pose's "
        "CSV, or YOLO-pose's data.yaml")
    add("--format", choices=["auto", *FORMATS], default="auto",
        help="of the annotations; auto: found by a look at the file")
    add("--skeleton", type=Path, metavar="YAML",
        help="the joints, for h5 files of others than MPII's, or to change those that a file names "
        "(docs/custom-data.md)")
    add("--images", type=Path, metavar="FOLDER",
        help=f"folder of the pictures (default: {DATA / 'images'}; for labels of DeepLabCut, "
        "Lightning Pose and YOLO-pose, the folder to which their names are relative)")
    add("--boxes", type=boxes, default="auto", metavar="{auto,keypoints,picture,FILE}",
        help="auto: the labels' boxes, or else the whole picture; keypoints: around the keypoints; "
        "picture: the whole picture; FILE: a CSV with image, x, y, width, height. Not for mpii, h5")
    add("--exif", choices=get_args(Exif), default="auto",
        help="how pictures with an EXIF orientation were labelled: turned, as most programs show "
        "them, or as stored; auto: as their size in the labels or their joints fit, else turned")
    add("--output", default="data/shards/mpii",
        help="folder of the splits, or s3://bucket/folder, for which $TMPDIR needs room")
    add("--splits", nargs="+", choices=SPLITS, default=list(SPLITS),
        help="splits to pack; for a single h5 or COCO file, the split that it holds")
    add = parser.add_argument_group("how").add_argument
    add("--valid-fraction", type=fraction, metavar="F",
        help="splits one annotation file: share of the pictures for valid, such as 0.1")
    add("--people-per-shard", type=at_least(1), default=512, help="people in a tar")
    add("--workers", type=at_least(0), default=usable_cores(), help="processes")
    add("--seed", type=at_least(0), default=0, help="of the order of people")
    add("--skip-bad", action="store_true", help="leave out people whose pictures are bad")
    add("--overwrite", action="store_true", help="replace another packing once the new is complete")
    add("--packing", choices=list(PICTURE_EXTENSIONS), default="original",
        help="original: the JPEG files unchanged; crop: the region that augmentation can sample, "
        "scaled down; raw: as crop, without compression (docs/conventions.md)")
    add("--preset", choices=CROP_PRESETS, default="hrnet",
        help="crop, raw: the training's data.preset; of several, the one with the largest crops")
    add("--person-px", type=at_least(16), default=288,
        help="crop, raw: maximum side of a person's box, px; data.input_px x 1.125 is enough")
    # fmt: on
    return parser


def parse_options(argv: list[str] | None) -> PackingOptions:
    """The command line, with absolute paths. Raises InputError."""
    given = vars(make_parser().parse_args(argv))
    preset, person_px = given.pop("preset"), given.pop("person_px")
    quality = QUALITY if given["packing"] == "crop" else 0
    is_crop = given["packing"] != "original"
    given["crop"] = crop_rule(preset, person_px, quality) if is_crop else None
    annotations, asked = given["annotations"], [each for each in SPLITS if each in given["splits"]]
    if not annotations.exists():
        advice = HOW_TO_GET_DATA if annotations == DATA / "annot" else "give another path"
        raise InputError(annotations, "no such file or folder", "the annotations", advice)
    file, kind = find_annotations(annotations, asked[0], given["format"])
    given["images"] = given["images"] or kind.pictures(file) or DATA / "images"
    if not given["images"].is_dir():
        advice = HOW_TO_GET_DATA if annotations == DATA / "annot" else "give it with --images"
        raise InputError(given["images"], "no such folder", "the folder of pictures", advice)
    stem = file.name.split(".")[0]
    has_splits = kind.has_splits or (annotations.is_dir() and stem in SPLITS)
    if has_splits and given["valid_fraction"]:
        expected = "one file without splits, because of --valid-fraction"
        raise InputError(annotations, "its own splits", expected, "leave --valid-fraction out")
    has_one = len(asked) == 2 and not has_splits and not given["valid_fraction"]
    if has_one and stem not in SPLITS:
        expected = f"one split, or a file named after it: {' or '.join(SPLITS)}"
        advice = "give --splits train, --splits valid, or --valid-fraction"
        raise InputError(file, "one file for two splits", expected, advice)
    given["splits"] = (stem,) if has_one else tuple(asked)
    if is_url(given["output"]):
        given["url"] = given["output"].rstrip("/")
        require_no_secret(given["url"])
        # The same folder at the next start, so that interrupted work continues.
        digest = hashlib.sha256(given["url"].encode()).hexdigest()[:16]
        given["output"] = Path(tempfile.gettempdir()) / f"make_shards-{digest}"
    for name in ("annotations", "images", "output"):
        given[name] = Path(given[name]).resolve()
    words = sys.argv[1:] if argv is None else argv
    return PackingOptions(**given, command=shlex.join(["python", "tools/make_shards.py", *words]))


def fraction(text: str) -> float:
    """An argparse type: a number above 0 and below 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and below 1")
    return value


def boxes(text: str) -> Boxes:
    """An argparse type: a word, or the path of a file."""
    words: dict[str, Boxes] = {word: word for word in ("auto", "keypoints", "picture")}
    return words.get(text, Path(text))


def write_skeleton(path: Path, skeleton: Skeleton, command: str) -> None:
    """Write the labels' joints to a YAML file that the user can change."""
    write_atomic(path, skeleton_yaml(skeleton).encode())
    print(f"{path} describes the joints; after a change, pack again:")
    print(f"  {command} --skeleton {shlex.quote(str(path))} --overwrite")
    pairs = [f"{skeleton.names[a]} and {skeleton.names[b]}" for a, b in skeleton.flip_pairs]
    if pairs:
        print(f"  left-right pairs: {', '.join(pairs)}")
    if not skeleton.mirror:
        print("  The labels do not say which joints are left-right pairs, so training does not")
        print("  mirror pictures. To mirror them, fill in flip_pairs and set mirror: true")
    print()


def print_summary(options: PackingOptions, manifests: list[Manifest], seconds: float) -> None:
    """Print what was packed and the next command."""
    for manifest in manifests:
        text = summary(options.output / manifest.split)
        print(f"{options.location}/{manifest.split}: {text}", end="\n\n")
    print(f"{seconds:.1f} s with {options.workers} worker(s)")
    location = shlex.quote(options.location)
    if not all((options.output / split).is_dir() for split in SPLITS) and "train" in options.splits:
        print("next: pack the split valid too (--splits valid), or share one file with both splits")
        print("      (--valid-fraction 0.1 into another --output)")
    elif "train" in options.splits:
        print(f"next: python train.py --config configs/2hg.yaml --data.shards {location}", end="")
        is_mpii = manifests[0].skeleton == MPII
        preset = options.crop.preset if options.crop else None if is_mpii else "hrnet"
        print(f" --data.preset {preset} --heatmaps.rule exact" if preset else "")
        print("      (sizes and steps for MPII on a GPU; configs/ has smaller ones)")
    else:
        print(f"next: python evaluate.py --checkpoint PATH --shards {location}")


def summary(folder: Path) -> str:
    """Text about the people, pictures and joints of one packed split."""
    shards = ShardSet(folder)
    people, _ = shards.people()
    size = sum(shard.bytes for shard in shards.manifest.shards)
    lines = [
        f"{people.count:,} people in {len(shards.tars)} shard(s), {size / 1e6:,.1f} MB",
        f"  scored     {scored_text(people.scored.sum(), people.count)}"
        " (with a length to divide errors by, and a marked joint)",
        f"  pictures   {len(set(people.images)):,}",
    ]
    left_out = shards.manifest.left_out  # lines of `row N: picture: fault`
    reasons = Counter(line.split(": ", 2)[-1] for line in left_out).most_common(5)
    if left_out:
        lines.append(f"  left out   {len(left_out):,} people for their pictures (in the manifest)")
    lines += [f"             {count:,} x {reason}" for reason, count in reasons]
    if assumed := shards.manifest.skeleton.assumed_left:
        lines.append(f"  left       {', '.join(assumed)} (assumed: the first of each flip pair)")
    marked, visible = people.marked, (people.visible & people.marked).sum()
    of_these = visible / max(marked.sum(), 1)
    lines.append(f"  joints     {marked.mean():.1%} marked, {of_these:.1%} of these visible")
    names = shards.manifest.skeleton.names
    if never := [name for j, name in enumerate(names) if not marked[:, j].any()]:
        lines.append(f"             never marked: {', '.join(never)}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
