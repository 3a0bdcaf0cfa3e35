"""Another run to compare with: what its --json says, and whether both were scored on the same."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import InputError
from configs.skeleton import Skeleton
from evaluation import pckh

_COUNTS = ("people", "joints_counted")


class Other(NamedTuple):
    """Another run to compare with."""

    name: str
    """Its checkpoint, step and data, and its file."""
    result: dict[str, Any]
    """A `pckh.summary`, perhaps of an earlier version that had no curves."""


def read_other(path: Path, skeleton: Skeleton) -> Other:
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
    return Other(_name(content, path), result)


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


def doubt(own: dict[str, Any], other: dict[str, Any]) -> str | None:
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
