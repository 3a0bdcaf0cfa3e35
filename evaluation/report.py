"""Results as text: tables, and the comparison with a reference run."""

from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import InputError
from common.files import read_json
from configs.skeleton import MPII, Skeleton
from evaluation import oks
from pipelines.annotations import scored_text

_MOST_COLUMNS = 16
"""Maximum number of groups in the table."""
_LINE = 100
"""Maximum length of a table's line in characters."""

_NEEDED = {"joint_names", "people_scored", "joints_counted", "truth_sha256", "pckh", "curves"}
"""Keys of a result to compare with."""

Summary = dict[str, Any]
"""A `pckh.summary`."""


def _table(columns: Iterable[str], rows: list[tuple[str, list[str]]]) -> str:
    """Lines of a name and right-aligned cells; rows without cells are headings.

    Columns that do not fit on a line follow in another table below.
    """
    columns, name_width = list(columns), max(len(name) for name, cells in rows if cells) + 2
    ends = accumulate((max(8, len(column)) + 2 for column in columns), initial=name_width - 2)
    fitting = max(1, sum(end <= _LINE for end in ends) - 1)
    columns, rest = columns[:fitting], columns[fitting:]
    lines = []
    for name, cells in [("", columns), *rows]:
        pairs = zip(cells, columns, strict=False)
        line = [f"{cell:>{max(8, len(column))}}" for cell, column in pairs]
        lines.append((name.ljust(name_width) + "  ".join(line)).rstrip())
    if rest:
        others = [(name, cells[fitting:]) for name, cells in rows if cells]
        lines += ["", _table(rest, others)]
    return "\n".join(lines)


def _mean_names(result: Summary) -> dict[str, str]:
    """The means to print, by key. The second and third are published only for MPII's joints."""
    names = {"pooled": "pooled", "unweighted": "mean", "weighted": "weighted"}
    return names if result["joint_names"] == list(MPII.names) else {"pooled": "pooled"}


def results_table(results: dict[str, Summary], skeleton: Skeleton) -> str:
    """PCKh in per cent, one line per result and threshold. results: by name."""
    groups = [name for name, _ in skeleton.groups]
    if len(groups) > _MOST_COLUMNS:
        groups = []
    first = next(iter(results.values()))
    counted = {joint for joint, count in enumerate(first["joint_counts"]) if count}
    grouped = len({joint for _, joints in skeleton.groups for joint in joints} & counted)
    means, titles = _mean_names(first), [f"pooled {len(counted)} (<)"]
    if len(means) > 1:
        titles += [f"mean {grouped} (<)", f"weighted {grouped} (<=)"]
    rows = []
    for name, result in results.items():
        for threshold, score in result["pckh"].items():
            values = [score[mean] for mean in means]
            values.append(result["auc"] if threshold == "0.5" else None)
            values += [score["groups"][group] for group in groups]
            rows.append((f"{name} @{threshold}", list(map(_percent, values))))
    if not groups:
        text = f"The {len(skeleton.groups)} groups of joints are listed with --per-joint."
        rows.append((text, []))
    return _table([*titles, "AUC", *groups], rows)


def oks_table(results: dict[str, Summary]) -> str:
    """COCO's AP and AR in per cent, one line per result. results: by name."""
    if not any(result["oks"] for result in results.values()):
        return "No AP: it needs everybody's area (`area` in COCO's file) and the skeleton's sigmas."
    rows = [(name, list(map(_percent, result["oks"].values()))) for name, result in results.items()]
    return "COCO's AP and AR in %\n\n" + _table(oks.NAMES, rows)


def counts_text(result: Summary) -> str:
    """How many people and joints a result counts, and what errors are divided by."""
    visible, occluded = (
        f"{_percent(part['pooled'], ' %')} ({part['joints_counted']})"
        for part in (result["visible"], result["occluded"])
    )
    text = (
        f"{scored_text(result['people_scored'], result['people'])}, "
        f"{result['joints_counted']:,} annotated joints. "
        f"Visible ones {visible}, occluded ones {occluded}, pooled @0.5."
    )
    if result["people_scored"] < result["people"]:
        text += "\nThe others have no known length to divide by, or no annotated joint."
    if result["length"]:
        text += f"\nErrors are divided by {result['length']}."
    mean, median = result["pixels"]["mean"], result["pixels"]["median"]
    return text + f"\nErrors in px of the picture: mean {mean:.2f}, median {median:.2f}."


def calibration_text(facts: dict[str, Any]) -> str:
    """The expected calibration error before and after."""
    before, after = (facts["calibration_error"][when] for when in ("before", "after"))
    return (
        f"expected calibration error {before:.4f}, with the table {after:.4f} "
        f"({facts['folds']}-fold cross-validation over {facts['people']:,} people)"
    )


def details_table(result: Summary) -> str:
    """PCKh in per cent and counts, one line per joint and per group of joints."""
    details = result["details"]
    columns = ("@0.5", "@0.1", "AUC", "visible", "occluded", "joints", "visible", "occluded")
    rows: list[tuple[str, list[str]]] = []
    for part, what in (("joints", "<"), ("groups", "<=, the mean of their joints' rates")):
        rows.append((f"{part} ({what})", []))
        for name, row in details[part].items():
            cells = [_percent(row[key]) for key in ("0.5", "0.1", "auc", "visible", "occluded")]
            rows.append((name, cells + list(map(str, row["counts"].values()))))
    return _table(columns, rows)


def gap_text(first: tuple[str, Summary], second: tuple[str, Summary]) -> str:
    """The difference of two named results in percentage points, one line per threshold."""
    lines = [f"gap, {second[0]} minus {first[0]}, percentage points:"]
    for threshold, before in first[1]["pckh"].items():
        parts = []
        for mean, label in _mean_names(first[1]).items():
            a, b = before[mean], second[1]["pckh"][threshold][mean]
            parts.append(f"{label} {'-' if a is None or b is None else f'{100 * (b - a):+.3f}'}")
        lines.append(f"  @{threshold}  " + ", ".join(parts))
    return "\n".join(lines)


def _percent(rate: float | None, unit: str = "") -> str:
    return "-" if rate is None else f"{100 * rate:.2f}{unit}"


class ReferenceRun(NamedTuple):
    """Results of an earlier evaluation, to compare with."""

    name: str
    """Its checkpoint, step and data, and its file."""
    result: Summary


def read_reference(path: Path, skeleton: Skeleton) -> ReferenceRun:
    """The first result of a file that --json wrote. Raises InputError if it has other joints."""
    expected = f"a file that this evaluate.py --json wrote, for the joints of {skeleton.name}"
    advice = "evaluate the other run with --json, and give that file"
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(path, f"no JSON file ({error})", expected, advice) from error
    found = content.values() if isinstance(content, dict) else ()
    results = [value for value in found if isinstance(value, dict) and value.keys() >= _NEEDED]
    if not results:
        raise InputError(path, "no result in it", expected, advice)
    result, names = results[0], list(skeleton.names)
    if result["joint_names"] != names:
        joints = ", ".join(map(str, result["joint_names"][:4]))
        raise InputError(path, f"joints {joints}, ...", expected, advice)
    facts = ("checkpoint", "predictions_file", "step", "data")
    name = ", ".join(f"{key} {content[key]}" for key in facts if key in content)
    return ReferenceRun(f"{name} ({path})", result)


def data_mismatch(own: Summary, reference: Summary) -> str | None:
    """A warning if two summaries were computed on different data, so their gap means little."""
    if own["truth_sha256"] == reference["truth_sha256"]:
        return None
    there, here = (
        f"{scored_text(r['people_scored'], r['people'])} with {r['joints_counted']:,} joints"
        for r in (reference, own)
    )
    how = f"{there} there, {here} here."
    if there == here:
        how = f"{there} in both, but other pictures, joint positions, or lengths to divide by."
    return f"The other run was scored on other data: {how}"
