"""The page of evaluate.py --report, read as its reader does: in a browser, where there is one."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from browser import Browser, find_chromium
from helpers import make_trainer, people_at, steps, tiny_config

import evaluate
from configs.skeleton import L_WRIST, MPII, R_WRIST, Length, Skeleton
from evaluation import evaluator, html_report, visualize
from evaluation.predictions import as_entries
from evaluation.report import ReferenceRun
from pipelines.annotations import People, read_annotations
from pipelines.coco import object_array

WIDE = (1280, 900)
WIDE_LETTERS = "* { font-family: monospace !important; letter-spacing: 0.06em !important }"
"""Wider than any font that the page is likely to be shown in."""


class Report(NamedTuple):
    page: Path
    own: dict
    """Results of --json, and those of the reference."""
    other: dict
    errors: np.ndarray
    """(5, 16) computed here, NaN where a joint is not annotated."""


@pytest.fixture(scope="module")
def report(tiny_set, tmp_path_factory) -> Report:
    """Of predictions near the annotation, compared with others."""
    folder = tmp_path_factory.mktemp("report")
    people, _ = read_annotations(tiny_set / "annot", "valid")
    words = ["--annotations", tiny_set / "annot" / "valid.h5", "--images", tiny_set / "images"]
    rng, results = np.random.default_rng(5), []
    for name in ("other", "own"):
        spread = rng.gamma(2, 0.2, (5, 16, 1)) * people.normalize[:, None, None]
        found = people.joints + spread * rng.normal(size=(5, 16, 2))
        entries = as_entries(people, found, np.ones((5, 16)))
        (folder / f"{name}_found.json").write_text(json.dumps(entries))
        words += ["--predictions", folder / f"{name}_found.json", "--json", folder / f"{name}.json"]
        if name == "own":
            words += ["--report", folder / "out", "--compare", folder / "other.json"]
        evaluate.main(list(map(str, words)))
        results.append(json.loads((folder / f"{name}.json").read_text())["predictions"])
    distance = np.linalg.norm(found - people.joints, axis=-1) / people.normalize[:, None]
    errors = np.where(people.marked, distance, np.nan)
    return Report(folder / "out" / "index.html", results[1], results[0], errors)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium (apt-get install chromium)")
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def write_page(
    folder: Path, people: People, found: np.ndarray, skeleton: Skeleton, text: str
) -> Path:
    """A report without pictures. text: the name of the result, the checkpoint, the reference."""
    result = evaluator.summary(found, people, skeleton)
    facts, reference = {"checkpoint": text, "remarks": [text]}, ReferenceRun(text, result)
    data = html_report.PredictedPeople(people, found, skeleton, None, np.arange(people.count))
    page = html_report.html_report(facts, {text: result}, reference, data, 24, {})
    (folder / "page.html").write_text(page, "utf-8")
    return folder / "page.html"


def complaints(browser: Browser) -> list[dict]:
    """What a developer's console would show."""
    kinds = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    return [event for event in browser.events if event["method"] in kinds]


def texts(browser: Browser, selector: str) -> list[str]:
    return browser.ask(f"[...document.querySelectorAll({selector!r})].map(e => e.textContent)")


def choose(browser: Browser, select: str, value: object) -> None:
    browser.ask(f"""(() => {{ const s = document.getElementById({select!r});
        s.value = {str(value)!r}; s.dispatchEvent(new Event("change")); }})()""")


def click(browser: Browser, selector: str) -> None:
    browser.ask(f"document.querySelector({selector!r}).click()")


def shown_rows(browser: Browser) -> list[int]:
    rows = "[...document.querySelectorAll('.tile')].map(t => t.dataset.row)"
    return list(map(int, browser.ask(rows)))


def assert_fits(browser: Browser) -> None:
    """Nothing is wider than the window, except what scrolls by itself."""
    page = "document.documentElement"
    assert browser.ask(f"{page}.scrollWidth <= {page}.clientWidth")
    outside = f"""[...document.querySelectorAll("main *")].filter(e => !e.closest(".scroll, svg") &&
        e.getBoundingClientRect().right > {page}.clientWidth).map(e => e.outerHTML.slice(0, 99))"""
    assert browser.ask(outside) == []


def percent(rate: float | None) -> str:
    return "–" if rate is None else f"{100 * rate:.2f}"


def test_the_page_opens_without_a_complaint_and_requests_nothing(report, browser):
    browser.show(report.page, *WIDE)
    assert len(texts(browser, ".tile")) == 5
    assert browser.ask("[...document.images].every(i => i.complete && i.naturalWidth === 256)")
    assert complaints(browser) == []
    asked = [e["params"]["request"]["url"] for e in browser.events
             if e["method"] == "Network.requestWillBeSent"]  # fmt: skip
    assert [url for url in asked if not url.startswith("data:")] == [report.page.as_uri()]
    assert report.page.stat().st_size < 1_000_000
    # And the check would see a complaint and a request:
    browser.ask("fetch('https://example.org/').catch(() => console.error('refused'))")
    assert len(complaints(browser)) >= 2


def mean_cells(*results: dict) -> list[str]:
    """The table of all means, row by row."""
    columns = [(result, threshold) for result in results for threshold in ("0.5", "0.1")]
    cells = [
        percent(result["pckh"][t]["groups"][name])
        for name, _ in MPII.groups
        for result, t in columns
    ]
    for mean in ("pooled", "unweighted", "weighted"):
        cells += [percent(result["pckh"][t][mean]) for result, t in columns]
    return cells + [percent(result["auc"]) if t == "0.5" else "" for result, t in columns]


def test_the_numbers_of_the_page_are_those_of_the_json(report, browser):
    browser.show(report.page, *WIDE)
    own, other = report.own, report.other
    half = own["pckh"]["0.5"]
    means = {half["pooled"], half["unweighted"], half["weighted"], other["pckh"]["0.5"]["pooled"]}
    assert len(means) == 4 and 0 < min(means) < max(means) < 1
    assert texts(browser, "#headline") == [percent(half["pooled"])]
    assert texts(browser, "#means tbody td") == mean_cells(own, other)
    joints, past = own["details"]["joints"].values(), other["pckh"]["0.5"]["joints"]
    bars = [
        [percent(rate) for rate in (row["0.5"], before, row["visible"], row["occluded"])]
        for row, before in zip(joints, past, strict=True)
    ]
    cells = np.array(texts(browser, "#bars tbody td")).reshape(16, 7)
    assert cells[:, [1, 2, 4, 5]].tolist() == bars
    for table, rows, count in (
        ("pairs", own["details"]["groups"].values(), lambda row: row["counts"]["all"]),
        ("sizes", own["by_size"], lambda row: row["people"]),
    ):
        expected = [
            [f"{row['error_quartiles'][1]:.3f}", percent(row["0.5"]), str(count(row))]
            for row in rows
        ]
        cells = np.array(texts(browser, f"#{table} tbody td")).reshape(-1, 4)
        assert cells[:, 1:].tolist() == expected
    rows = [{kind: own[kind]["pooled"] for kind in ("visible", "occluded")}]
    rows += own["details"]["groups"].values()
    cells = np.array(texts(browser, "#occlusion tbody td")).reshape(9, 4)[:, 1:3].tolist()
    assert cells == [[percent(row["visible"]), percent(row["occluded"])] for row in rows]


def test_strings_in_the_data_never_become_markup(tmp_path, browser):
    evil = "</script><script>window.hurt = 1</script><img src=x onerror='hurt=2'>{{ 7*7 }}<!--"
    skeleton = Skeleton("evil", (evil, "b"), (), ((0, 1),), ((evil, (0, 1)),))
    joints = np.full((3, 2, 2), 100.0)
    people = people_at(joints)._replace(images=(evil, "{% raw %}", "$&"))
    page = write_page(tmp_path, people, joints + np.array([1, 2]), skeleton, evil)
    browser.show(page, *WIDE)
    assert len(texts(browser, ".tile")) == 3
    assert browser.ask("window.hurt") is None and complaints(browser) == []
    for selector in ("#facts dd", "#remarks li", "#means tbody th", "#means thead th"):
        assert evil in texts(browser, selector), selector
    assert "img" not in browser.ask("[...document.querySelectorAll('*')].map(e => e.localName)")
    choose(browser, "joint", "0,1")
    click(browser, ".tile")
    browser.resize(360, 780)
    assert_fits(browser)


@pytest.mark.parametrize("style", ["", WIDE_LETTERS])
@pytest.mark.parametrize("width", [360, 800, 1000])
def test_no_width_needs_scrolling_sideways_in_any_font(width, style, report, browser):
    browser.show(report.page, width, 780)
    browser.ask(f"document.head.append(Object.assign(document.createElement('style'), "
                f"{{textContent: {style!r}}}))")  # fmt: skip
    choose(browser, "joint", 0)
    assert_fits(browser)
    links = "[...document.querySelectorAll('nav a')].map(a => a.getBoundingClientRect())"
    assert browser.ask(f"{links}.every(p => p.width && p.height && p.right <= {width})")


def test_everything_can_be_done_from_the_keyboard(report, browser):
    browser.show(report.page, 700, 900)
    browser.press("/", 191, "/")
    assert browser.ask("document.activeElement.id") == "joint"
    place = "[...document.querySelectorAll('.tile')].indexOf(document.activeElement)"
    browser.ask("document.querySelector('.tile').focus()")
    edges = browser.ask(
        "[...document.querySelectorAll('.tile')].map(t => t.getBoundingClientRect().left)"
    )
    columns = len(set(edges))
    assert 1 < columns < 5
    for key, code, expected in (("ArrowRight", 39, 1), ("ArrowLeft", 37, 0), ("ArrowLeft", 37, 0),
                                ("ArrowDown", 40, columns), ("ArrowUp", 38, 0), ("End", 35, 4),
                                ("Home", 36, 0)):  # fmt: skip
        browser.press(key, code)
        assert browser.ask(place) == expected, key
    browser.press("Enter", 13, "\r")
    assert browser.ask("document.getElementById('closeup').open")
    assert len(texts(browser, "#closeup-joints tbody tr")) == 16
    browser.press("ArrowRight", 39)
    browser.press("Escape", 27)
    assert not browser.ask("document.getElementById('closeup').open")
    assert browser.ask(place) == 1


def test_a_joint_filters_people_and_sorts_them_by_its_error(report, browser):
    browser.show(report.page, *WIDE)
    means = np.nanmean(report.errors, axis=1)
    falling = np.argsort(-means).tolist()
    assert shown_rows(browser) == falling
    assert texts(browser, ".error") == [f"{means[row]:.2f}" for row in falling]
    annotated = np.isfinite(report.errors).sum(axis=0)
    joint = int(np.flatnonzero(annotated < 5)[0])
    errors = report.errors[:, joint]
    expected = [row for row in np.argsort(-errors).tolist() if np.isfinite(errors[row])]
    choose(browser, "joint", joint)
    assert shown_rows(browser) == expected and 0 < len(expected) < 5
    assert texts(browser, ".error") == [f"{errors[row]:.2f}" for row in expected]
    assert browser.ask("document.querySelectorAll('#bars tr.dim').length") == 15
    assert MPII.names[joint] in texts(browser, "#readout tbody th")
    assert browser.ask("document.querySelectorAll('.tile .ring').length") == len(expected)
    click(browser, "#gallery input[value=joint]")
    assert shown_rows(browser) == expected[:4]
    choose(browser, "joint", f"{R_WRIST},{L_WRIST}")
    pair = np.nanmean(report.errors[:, [R_WRIST, L_WRIST]], axis=1)
    click(browser, "#gallery input[value=worst]")
    known = [row for row in np.argsort(-pair).tolist() if np.isfinite(pair[row])]
    assert shown_rows(browser) == known


@pytest.mark.slow
def test_the_joints_are_sorted_by_a_column_and_the_slider_reads_the_curves(report, browser):
    browser.show(report.page, *WIDE)
    rates = dict(zip(MPII.names, report.own["pckh"]["0.5"]["joints"], strict=True))
    for order, sign in (("descending", -1), ("ascending", 1)):
        click(browser, "#bars [data-sort=rate]")
        names = texts(browser, "#bars tbody th")
        assert [rates[name] for name in names] == sorted(rates.values(), key=lambda r: sign * r)
        assert browser.ask(f"document.querySelectorAll('#bars [aria-sort={order}]').length") == 1
    curves = report.own["curves"]
    browser.ask("document.getElementById('threshold').focus()")
    for _ in range(3):
        browser.press("ArrowLeft", 37)
    assert texts(browser, "#threshold-value") == ["0.47"]
    choose(browser, "joint", R_WRIST)
    names, cells = texts(browser, "#readout tbody th"), texts(browser, "#readout tbody td")
    rows = dict(zip(names, cells, strict=True))
    assert rows["r_wrist"] == percent(curves["joints"]["r_wrist"][47])
    assert rows["pooled"] == percent(curves["pooled"][47])
    assert rows["wrist"] == percent(curves["groups"]["wrist"][47])
    assert rows["other run, pooled"] == percent(report.other["curves"]["pooled"][47])


@pytest.mark.slow
def test_dark_mode_layers_and_colors(report, browser):
    """Dark follows the system; layers can be hidden; colors are the pictures'."""
    for scheme, paper in (("light", "rgb(251, 250, 248)"), ("dark", "rgb(20, 23, 26)")):
        browser.show(report.page, *WIDE, scheme)
        assert browser.ask("getComputedStyle(document.body).backgroundColor") == paper
    for side in ("right", "left", "middle"):
        for what, style in ((f".found .{side}", "stroke"), (f".key.{side}", "backgroundColor")):
            found = browser.ask(f"getComputedStyle(document.querySelector('{what}')).{style}")
            assert found == f"rgb{visualize.color_of(side)[::-1]}", what
    for layer in ("found", "truth"):
        display = f"getComputedStyle(document.querySelector('.figure .{layer}')).display"
        assert browser.ask(display) != "none"
        click(browser, f"#show-{layer}")
        assert browser.ask(display) == "none"


@pytest.mark.slow
@pytest.mark.parametrize("same", [True, False])
def test_a_reference_on_other_data_has_a_warning(same, report, tiny_set, tmp_path, browser):
    """And without --images there are skeletons alone."""
    folder, valid = report.page.parents[1], tiny_set / "annot" / "valid.h5"
    content = json.loads((folder / "other.json").read_text())
    if not same:
        content["predictions"]["truth_sha256"] = "0" * 64
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    words = ["--predictions", folder / "own_found.json", "--annotations", valid, "--compare", other]
    evaluate.main(list(map(str, [*words, "--report", tmp_path / "p.html"])))
    browser.show(tmp_path / "p.html", *WIDE)
    name = f"predictions_file {folder / 'other_found.json'}, data {valid} ({other})"
    assert name in texts(browser, "#facts dd")
    assert ("other pictures" in texts(browser, "#warning")[0]) == (not same)
    assert browser.ask("document.getElementById('warning').offsetHeight > 0") == (not same)
    assert browser.ask("document.images.length") == 0
    assert browser.ask("document.querySelectorAll('.tile .found line').length") == 5 * 15
    assert complaints(browser) == []


@pytest.mark.slow
@pytest.mark.parametrize(("length", "metric"), [(None, "PCKh"), (Length((), 0.4), "PCK")])
def test_the_metric_has_its_name_and_people_without_a_length_are_dashes(
    length, metric, tmp_path, browser
):
    people = people_at(np.zeros((2, 16, 2)), normalize=0.0)
    skeleton = MPII._replace(length=length)
    page = write_page(tmp_path, people, people.joints, skeleton, "network")
    browser.show(page, *WIDE)
    text = browser.ask("document.title + document.body.innerText")
    assert f"{metric}@0.5, pooled over 0 joints" in text
    assert metric == "PCKh" or "PCKh" not in text
    assert texts(browser, "#headline") == ["–"] and texts(browser, ".tile") == []
    assert complaints(browser) == []


def test_cocos_ap_and_the_distance_in_pixels_are_on_the_page(tmp_path, browser):
    people = people_at(np.full((2, 16, 2), 50.0))._replace(
        area=np.full(2, 1e4), ignored=object_array([[], []])
    )
    found = people.joints + np.array([[[3.0, 4.0]], [[0.0, 7.0]]])  # 5 and 7 px away
    page = write_page(tmp_path, people, found, MPII._replace(sigmas=(0.1,) * 16), "network")
    browser.show(page, *WIDE)
    assert (
        "mean distance is 6.00 px of the picture, the median 6.00 px" in texts(browser, "main")[0]
    )
    rows = dict(
        zip(texts(browser, "#means .summary th"), texts(browser, "#means .summary tr"), strict=True)
    )
    (ap,) = (row for name, row in rows.items() if name.startswith("APCOCO"))
    # At 0.95 only the first is found, with precision 1 at recalls 0, 0.01, ..., 0.5.
    assert f"{100 * (9 + 51 / 101) / 10:.2f}" in ap and complaints(browser) == []


@pytest.mark.slow
def test_a_checkpoint_makes_a_page_with_pictures(tiny_shards, tmp_path, browser):
    trainer = make_trainer(tiny_config(tiny_shards), tmp_path / "run")
    steps(trainer, 2)
    trainer.save(["best.pt"])
    words = ["--checkpoint", tmp_path / "run", "--workers", 0, "--batch-size", 5, "--json",
             tmp_path / "n.json", "--report", tmp_path / "out"]  # fmt: skip
    evaluate.main(list(map(str, words)))
    numbers = json.loads((tmp_path / "n.json").read_text())
    browser.show(tmp_path / "out" / "index.html", *WIDE)
    assert texts(browser, "#means tbody td") == mean_cells(numbers["network"], numbers["mean pose"])
    assert browser.ask("document.images.length") == 5 and complaints(browser) == []


def test_galleries_hold_the_worst_the_median_and_the_best():
    errors = np.array(
        [[0.3, 0.3], [0.1, 0.1], [np.nan, np.nan], [0.5, np.nan], [0.2, 0.6], [0, 0.1]]
    )
    chosen = html_report.choose_people(errors, 2)  # means 0.3, 0.1, -, 0.5, 0.4, 0.05
    assert chosen["worst"] == [3, 4] and chosen["best"] == [1, 5]
    assert chosen["median"] == [4, 0]
    assert chosen["0"] == [3, 0, 4, 1] and chosen["1"] == [4, 0, 1, 5]
    assert html_report.choose_people(np.ones((9, 133)), 2)["132"] == []  # no room for so many


def test_the_risk_curve_and_given_galleries_are_shown(tmp_path, browser):
    people = people_at(np.random.default_rng(0).uniform(20, 180, (4, 16, 2)))
    coverage = [i / 100 for i in range(1, 101)]
    calibration = {
        "folds": 5, "people": 4, "coverage": coverage,
        "calibration_error": {"before": 0.25, "after": 0.0123},
        "risk": {"before": coverage, "after": [c / 2 for c in coverage]},
    }  # fmt: skip
    found = people.joints + np.arange(4)[:, None, None]
    results = {"network": evaluator.summary(found, people, MPII)}
    data = html_report.PredictedPeople(people, found, MPII, None, np.arange(4))
    page, galleries = tmp_path / "page.html", {"exchanged": [1, 3, 0]}
    facts = {"calibration": calibration}
    page.write_text(html_report.html_report(facts, results, None, data, 2, galleries), "utf-8")
    browser.show(page, *WIDE)
    assert shown_rows(browser) == [1, 3, 0]
    assert texts(browser, "#gallery label")[:2] == ["exchanged", "Worst"]
    click(browser, "#gallery input[value=worst]")
    assert shown_rows(browser) == [3, 2]
    (note,) = texts(browser, "#calibration-note")
    assert "0.0123" in note and "0.2500" in note
    paths = "[...document.querySelectorAll('#risk path')].map(p => p.getBBox().height)"
    thin, own = browser.ask(paths)
    assert thin == pytest.approx(2 * own, rel=0.01) and own > 50
    assert complaints(browser) == []
