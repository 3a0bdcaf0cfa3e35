"""What a split of shards holds, in text: the end of tools/make_shards.py."""

from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt

from configs.skeleton import PIXELS_PER_SCALE, Skeleton
from pipelines.annotations import People
from pipelines.shard_format import unpack_records
from pipelines.shards import ShardSet

BINS = 10
BAR = 40
"""Characters of the longest bar."""
REASONS = 5
"""Kinds of faults that are told apart."""


def summary(folder: Path) -> str:
    """Lines about the people, pictures and joints of one split. folder: of a whole split."""
    shards = ShardSet(folder)
    people, _ = shards.people()
    sizes_N2 = unpack_records(shards.records()).size_N2.astype(int)
    lines = [
        f"{folder}",
        f"  people     {people.count:,} in {len(set(people.images)):,} pictures",
        f"  stored     {_sizes(sizes_N2)}",
        *_left_out(shards.manifest.left_out),
        "",
        *joint_lines(people, shards.manifest.skeleton),
        "",
        *scale_lines(people.scale),
    ]
    return "\n".join(lines)


def _sizes(sizes_N2: npt.NDArray[np.int64]) -> str:
    """The smallest, middle and largest picture of a person, by area."""
    ordered = sizes_N2[np.argsort(sizes_N2.prod(axis=1), kind="stable")]
    low, middle, high = (ordered[i] for i in (0, len(ordered) // 2, -1))
    return (
        f"{low[0]} x {low[1]} px the smallest, {middle[0]} x {middle[1]} the middle one, "
        f"{high[0]} x {high[1]} the largest"
    )


def _left_out(lines: list[str]) -> list[str]:
    """How many people were left out, and why. lines: `row N: picture: fault`."""
    if not lines:
        return ["  left out   nobody"]
    reasons = Counter(line.split(": ", 2)[-1] for line in lines).most_common()
    told = [f"             {count:,} x {reason}" for reason, count in reasons[:REASONS]]
    others = sum(count for _, count in reasons[REASONS:])
    told += [f"             {others:,} for other reasons"] if others else []
    return [f"  left out   {len(lines):,} people, whose rows the manifest names", *told]


def joint_lines(people: People, skeleton: Skeleton) -> list[str]:
    """A line a joint: how many people have it marked, and in how many of those it is visible."""
    width = max(len(name) for name in [*skeleton.names, "all joints"])
    marked = people.marked.mean(axis=0)
    seen = (people.visible & people.marked).sum(axis=0)
    lines = [f"  {'joint':<{width}}    marked   visible of those"]
    for joint, name in enumerate(skeleton.names):
        count = int(people.marked[:, joint].sum())
        lines.append(f"  {name:<{width}}  {marked[joint]:>8.1%}  {_share(int(seen[joint]), count)}")
    total = _share(int(seen.sum()), int(people.marked.sum()))
    return [*lines, f"  {'all joints':<{width}}  {people.marked.mean():>8.1%}  {total}"]


def _share(part: int, whole: int) -> str:
    return f"{part / whole:>8.1%}" if whole else f"{'-':>8}"


def scale_lines(scale_N: npt.NDArray[np.float64]) -> list[str]:
    """A histogram of the boxes' sides, in equal steps of their logarithm."""
    sides = PIXELS_PER_SCALE * scale_N
    low, high = sides.min(), sides.max() * (1 + 1e-9)
    edges = np.geomspace(low, max(high, 1.01 * low), BINS + 1)
    counts, _ = np.histogram(sides, edges)
    lines = [f"  side of the box, px; the middle one is {np.median(sides):,.0f}"]
    for count, start, end in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "#" * int(np.ceil(BAR * count / counts.max()))
        lines.append(f"  {start:>7,.0f} to {end:>6,.0f}  {count:>7,}  {bar}".rstrip())
    return lines
