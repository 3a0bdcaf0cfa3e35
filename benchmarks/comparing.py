"""Results of two runs against each other, and results as a bar chart."""

import json
from pathlib import Path
from typing import Any

from common.errors import InputError

SAME_PLACE = ("device", "processor", "cores")


def read_report(path: Path) -> dict[str, Any]:
    """A report that --json wrote. Raises InputError."""
    try:
        report = json.loads(path.read_text())
        if not isinstance(report, dict) or "world" not in report:
            raise ValueError("no `world` in it")
    except (OSError, ValueError) as error:
        raise InputError(
            path, f"not readable ({error})", "a file that --json wrote", "name another file"
        ) from error
    return report


def compare(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Lines that say of each case whether its ratio to the first of its suite has moved.

    Rates of two runs are not compared: the machine may have been busier. A ratio has moved when
    the spreads over the rounds have nothing in common.
    """
    lines = ["against the older run: ratio to the suite's first line, then and now"]
    there = [old["world"].get(key) for key in SAME_PLACE]
    if there != [new["world"].get(key) for key in SAME_PLACE]:
        lines.append(f"  another machine: {', '.join(map(str, there))}; ratios may differ by that")
    for suite in suites_of(new):
        before = {case["name"]: case for case in old.get(suite, [])}
        now = {case["name"]: case for case in new[suite]}
        width = max(map(len, now))
        lines.append(f"{suite}, ratio to `{next(iter(now))}`")
        if before and next(iter(before)) != next(iter(now)):
            lines.append(f"  the older run divides by `{next(iter(before))}`; not compared")
            continue
        for name, case in now.items():
            lines.append(f"  {name:<{width}}  {_moved(before.get(name), case)}")
        lines += [f"  {name:<{width}}  gone" for name in before if name not in now]
    return "\n".join(lines)


def _moved(old: dict[str, Any] | None, new: dict[str, Any]) -> str:
    if old is None:
        return f"new        {new['ratio']:.2f} x"
    change = f"{old['ratio']:.2f} -> {new['ratio']:.2f} x"
    if new["ratio_low"] > old["ratio_high"]:
        return f"faster     {change}"
    if new["ratio_high"] < old["ratio_low"]:
        return f"SLOWER     {change}"
    return f"unchanged  {change}"


def suites_of(report: dict[str, Any]) -> list[str]:
    """Names of the suites that a report holds."""
    return [
        name
        for name, cases in report.items()
        if isinstance(cases, list) and cases and "ratio" in cases[0]
    ]


def draw_chart(report: dict[str, Any], path: Path) -> None:
    """Write a PNG: a panel a suite, a bar a case, the spread over the rounds as a line."""
    try:
        import matplotlib
    except ImportError as error:
        raise InputError(
            "--chart", "matplotlib is not installed", "matplotlib", "pip install matplotlib"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    suites = suites_of(report)
    heights = [len(report[suite]) + 1.5 for suite in suites]
    figure, axes = pyplot.subplots(
        len(suites), 1, figsize=(9, 0.36 * sum(heights)), height_ratios=heights, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, suite in zip(axes[:, 0], suites, strict=True):
        cases = report[suite][::-1]
        rates = [case["median"] for case in cases]
        spread = [[case["median"] - case["low"] for case in cases],
                  [case["high"] - case["median"] for case in cases]]  # fmt: skip
        bars = axis.barh([case["name"] for case in cases], rates, xerr=spread, color="#4878a8")
        labels = [f"{case['ratio']:.2f} x" for case in cases]
        axis.bar_label(bars, labels, padding=4, fontsize=8)
        axis.set_title(f"{suite}, people/s on {report['world']['processor']}", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
