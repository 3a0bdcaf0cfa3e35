"""Results as text: tables, and the comparison with a reference run."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import InputError
from configs.skeleton import Skeleton
from evaluation import pckh


def table(rows: dict[str, dict[str, Any]], skeleton: Skeleton) -> str:
    """Lines of PCKh in per cent, one a row. rows: a name and a `pckh.summary` each."""
    groups = [name for name, _ in skeleton.groups]
    grouped = len({joint for _, joints in skeleton.groups for joint in joints})
    means = [
        f"pooled {skeleton.joint_count} (<)",
        f"mean {grouped} (<)",
        f"weighted {grouped} (<=)",
        "AUC",
    ]
    label = max(len(name) for name in [*rows, "PCKh@0.5"]) + 6
    columns = [*groups, *means]
    lines = [" " * label + "  ".join(f"{c:>8}" for c in columns)]
    for name, result in rows.items():
        for threshold, score in result["pckh"].items():
            values = [score["groups"][group] for group in groups]
            values += [score["pooled"], score["unweighted"], score["weighted"]]
            values.append(result["auc"] if threshold == "0.5" else None)
            cells = [
                f"{'-' if v is None else format(100 * v, '.2f'):>{max(8, len(c))}}"
                for v, c in zip(values, columns, strict=True)
            ]
            lines.append(f"{name + ' @' + threshold:<{label}}" + "  ".join(cells))
    return "\n".join(lines)


def explain(result: dict[str, Any]) -> str:
    """What was counted, in two lines."""
    seen, hidden = result["visible"], result["occluded"]
    text = (
        f"{result['people']} people, {result['joints_counted']} marked joints. "
        f"Visible ones {_percent(seen['pooled'])} ({seen['joints_counted']}), "
        f"occluded ones {_percent(hidden['pooled'])} ({hidden['joints_counted']}), pooled @0.5."
    )
    if result["people_without_length"]:
        unknown = result["people_without_length"]
        text += f"\n{unknown} people have no known length to divide by and do not count."
    if result["length"]:
        text += f"\nErrors are divided by {result['length']}."
    return text


def details_table(result: dict[str, Any]) -> str:
    """Lines of PCKh in per cent, a joint and then a group of joints a line, with counts."""
    details = result["details"]
    width = max(len(name) for part in details.values() for name in part) + 2
    columns = ("@0.5", "@0.1", "AUC", "visible", "occluded")
    head = "".join(f"{c:>10}" for c in columns) + f"{'joints':>9}{'visible':>9}{'occluded':>9}"
    lines = [" " * width + head]
    for part, what in (("joints", "<"), ("groups", "<=, the mean of their joints' rates")):
        lines.append(f"{part} ({what})")
        for name, row in details[part].items():
            rates = [row[key] for key in ("0.5", "0.1", "auc", "visible", "occluded")]
            cells = [f"{'-' if r is None else format(100 * r, '.2f'):>10}" for r in rates]
            counts = [f"{row['counts'][key]:>9}" for key in ("all", "visible", "occluded")]
            lines.append(f"{name:<{width}}" + "".join(cells + counts))
    return "\n".join(lines)


def gap(first: tuple[str, dict[str, Any]], second: tuple[str, dict[str, Any]]) -> str:
    """The difference of two summaries in percentage points, a line a threshold."""
    lines = [f"gap, {second[0]} minus {first[0]}, percentage points:"]
    for threshold in first[1]["pckh"]:
        parts = [
            f"{mean} {_points(second[1], first[1], threshold, mean)}"
            for mean in ("pooled", "unweighted", "weighted")
        ]
        lines.append(f"  @{threshold}  " + ", ".join(parts))
    return "\n".join(lines)


def _points(a: dict[str, Any], b: dict[str, Any], threshold: str, mean: str) -> str:
    one, other = (result["pckh"][threshold][mean] for result in (a, b))
    return "-" if one is None or other is None else f"{100 * (one - other):+.3f}"


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.2f} %"


_COUNTS = ("people", "joints_counted")


class ReferenceRun(NamedTuple):
    """Another run to compare with."""

    name: str
    """Its checkpoint, step and data, and its file."""
    result: dict[str, Any]
    """A `pckh.summary`, perhaps of an earlier version that had no curves."""


def read_reference(path: Path, skeleton: Skeleton) -> ReferenceRun:
    """The first result of a file of --json. Raises InputError unless it has these joints."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        results = [v for v in content.values() if isinstance(v, dict) and "pckh" in v]
        if not results:
            raise ValueError("no result in it")
        result = results[0]
        _check_numbers(result, skeleton)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        found = f"not readable so ({type(error).__name__}: {error})"
        if isinstance(error, FileNotFoundError):
            found = "no such file"
        elif isinstance(error, json.JSONDecodeError):
            found = f"no JSON ({error})"
        raise InputError(
            path,
            found,
            f"a file that evaluate.py --json wrote, with the {skeleton.joint_count} joints of "
            f"{skeleton.name}",
            "evaluate the other run with --json, and give that file",
        ) from error
    return ReferenceRun(_name(content, path), result)


def _name(content: dict[str, Any], path: Path) -> str:
    step = content.get("step")
    source = content.get("checkpoint") or content.get("predictions_file")
    parts = [str(source)] if source else []
    parts += [f"step {step:,}"] if isinstance(step, int) else []
    parts += [f"on {content['data']}"] if content.get("data") else []
    return f"{', '.join(parts)} ({path})" if parts else str(path)


def _check_numbers(result: dict[str, Any], skeleton: Skeleton) -> None:
    """Raise ValueError, TypeError or KeyError unless everything that is compared is there."""
    if result["joint_names"] != list(skeleton.names):
        raise ValueError(f"joints {', '.join(map(str, result['joint_names'][:4]))}, ...")
    if any(not isinstance(result[count], int) for count in _COUNTS):
        raise TypeError("a count that is no number")
    values = [result["auc"]]
    for score in (result["pckh"][str(threshold)] for threshold in pckh.THRESHOLDS):
        values += [score[mean] for mean in ("pooled", "unweighted", "weighted")]
        values += [score["groups"][name] for name, _ in skeleton.groups]
        values += [score["joints"][joint] for joint in range(skeleton.joint_count)]
    if "curves" in result:  # files of before there were curves have none
        values += [*result["curves"]["thresholds"], *result["curves"]["pooled"]]
    if any(value is not None and not isinstance(value, float | int) for value in values):
        raise TypeError("a rate that is no number")


def data_mismatch(own: dict[str, Any], other: dict[str, Any]) -> str | None:
    """Why the gap between two summaries is not that of their networks; None where it is."""
    sizes = [f"{r['people']:,} people with {r['joints_counted']:,} joints" for r in (other, own)]
    if sizes[0] != sizes[1]:
        return f"The other run was scored on other data: {sizes[0]} there, {sizes[1]} here."
    if "truth_sha256" not in other:
        return (
            "It is not known whether the other run was scored on the same data: its file is older "
            "than that record. Evaluate it again with --json."
        )
    if other["truth_sha256"] != own["truth_sha256"]:
        return (
            f"The other run was scored on other data: {sizes[0]} in both, but other pictures, "
            "places of joints, or lengths to divide by."
        )
    return None
