// Draws the page from the JSON block in it. Text from the data becomes text nodes, never markup.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const { facts, results, other, skeleton, galleries, people, first_galleries: given } = data;
const names = Object.keys(results);
const own = results[names[0]];
const metric = own.metric;
const length = own.length ? "of the reference length" : "of the head’s length";
const state = { joints: null, label: "", gallery: given[0] ?? "worst", level: "0.5" };
let closeup = -1; // index in the gallery of the enlarged person

const $ = (id) => document.getElementById(id);

/* Making elements */

function add(parent, tag, attributes = {}, ...children) {
  const isDrawing = tag === "svg" || parent?.namespaceURI === "http://www.w3.org/2000/svg";
  const element = isDrawing
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children.map(String));
  parent?.append(element);
  return element;
}

const percent = (rate) => (rate == null ? "–" : (100 * rate).toFixed(2));
const fixed = (value, digits = 2) => (value == null ? "–" : value.toFixed(digits));
const count = (number) => number.toLocaleString("en");

function points(one, another) {
  if (one == null || another == null) return "–";
  const difference = 100 * (one - another);
  const size = Math.abs(difference).toFixed(2);
  return size === "0.00" ? size : (difference < 0 ? "−" : "+") + size;
}

/* The result */

function drawResult() {
  const half = own.pckh["0.5"];
  const joints = own.joint_counts.filter((number) => number).length;
  const source = facts.checkpoint ?? facts.predictions_file ?? names[0];
  if (given.length) $("result").before($("people"));
  document.title = `${given.length ? "Label errors" : `${percent(half.pooled)} % ${metric}@0.5`} · ${source}`;
  $("metric").textContent = `${metric}@0.5, pooled over ${joints} joints`;
  $("headline").textContent = percent(half.pooled);
  $("definition").textContent =
    `of ${count(own.joints_counted)} annotated joints of ${data.scored} were found: ` +
    `the prediction is within half of ${own.length ? "the reference length" : "the head’s length"} of ` +
    `the annotation.` + (own.length ? ` The reference length is ${own.length}.` : "") +
    (own.joints_counted ? ` The mean distance is ${own.pixels.mean.toFixed(2)} px of the picture, the median ${own.pixels.median.toFixed(2)} px.` : "") +
    (own.people_scored < own.people ? " The others have no known length or no annotated joint." : "");
  stat("at 0.1", own.pckh["0.1"].pooled, "a fifth of that distance");
  stat("AUC", own.auc, "mean over thresholds 0 to 0.5");
  stat("visible", own.visible.pooled, `${count(own.visible.joints_counted)} joints, at 0.5`);
  stat("occluded", own.occluded.pooled, `${count(own.occluded.joints_counted)} joints, at 0.5`);
  for (const name of names.slice(1))
    stat(name, results[name].pckh["0.5"].pooled, name === "mean pose" ? "one pose for everybody, at 0.5" : "for comparison, at 0.5");
  if (other) {
    const before = other.result.pckh["0.5"].pooled;
    stat("other run", before, `at 0.5; here ${points(half.pooled, before)} points`);
  }
  drawFacts();
}

function stat(label, rate, note) {
  const box = add($("stats"), "div");
  add(box, "dt", {}, label);
  const value = add(box, "dd", {}, percent(rate));
  add(value, "small", {}, note);
}

function drawFacts() {
  const words = {
    checkpoint: "Checkpoint", predictions_file: "Predictions", step: "Step", data: "People of",
    ground_truth: "Ground truth", flip: "Flip test", loaders: "Crops by",
  };
  for (const [key, label] of Object.entries(words)) {
    if (facts[key] == null) continue;
    const value = facts[key];
    add($("facts"), "dt", {}, label);
    add($("facts"), "dd", {}, value === true ? "yes" : value === false ? "no"
      : typeof value === "number" ? count(value) : [value].flat().join(", "));
  }
  if (other) {
    add($("facts"), "dt", {}, "Other run");
    add($("facts"), "dd", {}, other.name);
    $("warning").textContent = data.warning;
    $("warning").hidden = !data.warning;
  }
  for (const remark of facts.remarks ?? []) add($("remarks"), "li", {}, remark);
}

/* The table of all means */

function drawMeans() {
  const columns = names.map((name) => [name, results[name]]);
  if (other) columns.push(["other run", other.result]);
  const head = add($("means"), "thead");
  const top = add(head, "tr"), second = add(head, "tr");
  add(top, "td");
  add(second, "th", { scope: "col" }, metric);
  for (const [name] of columns) {
    add(top, "th", { scope: "colgroup", colspan: 2 }, name);
    for (const threshold of ["0.5", "0.1"]) add(second, "th", { scope: "col" }, `@${threshold}`);
  }
  const groups = add($("means"), "tbody");
  for (const [name, joints] of skeleton.groups) {
    const note = joints.length > 1 ? `${joints.length} joints, ≤` : "≤";
    meansRow(groups, name, "", columns, (score) => score.groups[name], note);
  }
  const grouped = new Set(skeleton.groups.flatMap(([, joints]) => joints)).size;
  const summary = add($("means"), "tbody", { class: "summary" });
  meansRow(summary, `Pooled, ${skeleton.names.length} joints, <`,
    "all joints of all people in one pool (princeton-vl)", columns, (score) => score.pooled);
  meansRow(summary, `Mean of ${grouped} joints, <`,
    "each joint’s rate counts the same (bearpaw, anibali)", columns, (score) => score.unweighted);
  meansRow(summary, `Weighted mean of ${grouped} joints, ≤`,
    "by how often each joint is annotated (HRNet, mmpose)", columns, (score) => score.weighted);
  meansRow(summary, "AUC", "mean of the pooled rate over thresholds 0 to 0.5", columns,
    (score, result, threshold) => (threshold === "0.5" ? result.auc : undefined));
  for (const key of Object.keys(own.oks ?? {}))
    meansRow(summary, key, "COCO’s, of object keypoint similarity", columns,
      (score, result, threshold) => (threshold === "0.5" ? result.oks?.[key] : undefined));
  summary.firstChild.children[1].classList.add("lead");
}

function meansRow(body, label, note, columns, value) {
  const row = add(body, "tr");
  const head = add(row, "th", { scope: "row" }, label);
  if (note) add(head, "small", {}, note);
  for (const [name, result] of columns) {
    for (const threshold of ["0.5", "0.1"]) {
      const rate = value(result.pckh[threshold], result, threshold);
      const id = `${name} ${threshold} ${label}`;
      const kind = threshold === "0.5" ? "first" : "";
      add(row, "td", { class: kind, "data-cell": id }, rate === undefined ? "" : percent(rate));
    }
  }
}

/* Line charts */

function chart(box, series, { x, y, xTicks, yTicks, xText, yText, yTitle, cursor, labelled }) {
  const width = box.clientWidth, height = box.clientHeight;
  const narrow = 18, right = labelled && width > 520 ? 84 : narrow;
  const area = { left: 40, right: width - right, top: 18, bottom: height - 26 };
  const px = (v) => area.left + ((v - x[0]) / (x[1] - x[0])) * (area.right - area.left);
  const py = (v) => area.bottom - ((v - y[0]) / (y[1] - y[0])) * (area.bottom - area.top);
  box.replaceChildren();
  const svg = add(box, "svg", { role: "img", "aria-label": box.dataset.label ?? "" });
  for (const tick of yTicks) {
    add(svg, "line", { class: "grid", x1: area.left, x2: area.right, y1: py(tick), y2: py(tick) });
    add(svg, "text", { x: area.left - 8, y: py(tick) + 4, "text-anchor": "end" }, yText(tick));
  }
  for (const tick of xTicks)
    add(svg, "text", { x: px(tick), y: height - 6, "text-anchor": "middle" }, xText(tick));
  add(svg, "text", { x: 0, y: 8 }, yTitle);
  for (const { xs, ys, kind } of series) add(svg, "path", { class: kind, d: path(xs.map(px), ys.map((v) => v == null ? null : py(v))) });
  if (cursor != null) add(svg, "line", { class: "cursor", x1: px(cursor), x2: px(cursor), y1: area.top, y2: area.bottom });
  if (right > narrow) endLabels(svg, series.filter((s) => s.label), area, py);
  return (clientX) => x[0] + ((clientX - box.getBoundingClientRect().left - area.left) / (area.right - area.left)) * (x[1] - x[0]);
}

function path(xs, ys) {
  let pen = "M";
  return xs.map((x, i) => {
    if (ys[i] == null) { pen = "M"; return ""; }
    const step = `${pen}${x.toFixed(1)} ${ys[i].toFixed(1)}`;
    pen = "L";
    return step;
  }).join("");
}

const shortened = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

function endLabels(svg, series, area, py) {
  const ends = series.filter((s) => s.ys.at(-1) != null)
    .map((s) => ({ label: s.label, y: py(s.ys.at(-1)) })).sort((a, b) => a.y - b.y);
  const gap = 14;
  for (let i = 1; i < ends.length; i++) ends[i].y = Math.max(ends[i].y, ends[i - 1].y + gap);
  let floor = area.bottom + 2;
  for (const end of ends.reverse()) { end.y = Math.min(end.y, floor); floor = end.y - gap; }
  for (const end of ends) add(svg, "text", { x: area.right + 8, y: end.y + 4 }, shortened(end.label, 13));
}

/* Curves over the threshold */

function curveSeries() {
  const { thresholds, pooled, groups } = own.curves;
  const series = [];
  const pair = state.joints?.length > 1 ? state.joints.join() : null;
  for (const [name, joints] of skeleton.groups) {
    const kind = joints.join() === pair ? "picked" : "thin";
    series.push({ name, label: name, kind, xs: thresholds, ys: groups[name] });
  }
  for (const name of names.slice(1)) {
    const curve = results[name].curves;
    series.push({ name, kind: "base", xs: curve.thresholds, ys: curve.pooled });
  }
  if (other) {
    const curve = other.result.curves;
    series.push({ name: "other run, pooled", kind: "other", xs: curve.thresholds, ys: curve.pooled });
  }
  series.push({ name: "pooled", kind: "own", xs: thresholds, ys: pooled });
  if (state.joints?.length === 1) {
    const ys = own.curves.joints[own.joint_names[state.joints[0]]];
    series.push({ name: state.label, kind: "picked", xs: thresholds, ys });
  }
  return series;
}

function drawCurves() {
  const place = Number($("threshold").value);
  const at = own.curves.thresholds[place];
  const series = curveSeries();
  const thresholdAt = chart($("curve"), series, {
    x: [0, 0.5], y: [0, 1], xTicks: [0, 0.1, 0.2, 0.3, 0.4, 0.5], yTicks: [0, 0.25, 0.5, 0.75, 1],
    xText: (t) => t.toFixed(1), yText: (r) => String(100 * r), yTitle: `% found, threshold in parts ${length}`,
    cursor: at, labelled: true,
  });
  $("threshold-value").textContent = at.toFixed(2);
  $("curve").onpointermove = (event) => {
    const next = Math.round(Math.min(0.5, Math.max(0, thresholdAt(event.clientX))) * 100);
    if (next !== Number($("threshold").value)) { $("threshold").value = next; drawCurves(); }
  };
  drawReadout(series, place, at);
}

function drawReadout(series, place, at) {
  const table = $("readout");
  table.replaceChildren();
  const head = add(add(table, "thead"), "tr");
  add(head, "th", { scope: "col" }, "curve");
  add(head, "th", { scope: "col" }, `% at ${at.toFixed(2)}`);
  const body = add(table, "tbody");
  const rank = { own: 0, picked: 1, other: 2, base: 3, thin: 4 };
  for (const { name, kind, ys } of [...series].sort((a, b) => rank[a.kind] - rank[b.kind])) {
    const row = add(body, "tr", kind === "own" || kind === "picked" ? { class: "strong" } : {});
    const label = add(row, "th", { scope: "row" });
    const swatch = add(label, "svg", { class: "swatch", viewBox: "0 0 22 11", "aria-hidden": "true" });
    add(swatch, "line", { class: kind, x1: 0, x2: 22, y1: 6, y2: 6 });
    label.append(name);
    add(row, "td", {}, percent(ys[place]));
  }
}

/* Tables with bars */

function bar(row, marks) {
  const track = add(add(row, "td", { class: "track-cell" }), "div", { class: "track" });
  for (const [kind, from, to] of marks) {
    if (from == null) continue;
    const mark = add(track, "i", { class: kind });
    mark.style.left = `${100 * Math.min(from, 1)}%`;
    if (to != null) mark.style.width = `${100 * (Math.min(to, 1) - Math.min(from, 1))}%`;
  }
}

function headRow(table, labels) {
  const row = add(add(table, "thead"), "tr");
  for (const [label, kind] of labels) add(row, "th", { scope: "col", class: kind ?? "" }, label);
}

function jointRows() {
  return skeleton.names.map((name, j) => {
    const row = own.details.joints[own.joint_names[j]];
    const rate = row[state.level], past = other?.result.pckh[state.level].joints[j] ?? null;
    return { j, name, rate, past, change: rate == null || past == null ? null : rate - past,
      visible: row.visible, occluded: row.occluded, n: row.counts.all };
  });
}

const barColumns = [
  ["name", "joint", ""], [null, "", ""], ["rate", "this run", ""], ["past", "other run", "compared wide"],
  ["change", "change", "compared"], ["visible", "visible @0.5", "wide"], ["occluded", "occluded @0.5", "wide"], ["n", "joints", "wide"],
];
const barOrder = { key: null, falls: true };

function drawBars() {
  const table = $("bars"), focused = document.activeElement?.dataset?.sort;
  table.replaceChildren();
  const columns = barColumns.filter(([, , kind]) => other || !kind.includes("compared"));
  const head = add(add(table, "thead"), "tr");
  for (const [key, label, kind] of columns) {
    if (!key) { add(head, "td"); continue; }
    const sort = barOrder.key === key ? (barOrder.falls ? "descending" : "ascending") : "none";
    const button = add(add(head, "th", { scope: "col", class: kind, "aria-sort": sort }), "button", { type: "button", "data-sort": key }, label);
    button.onclick = () => sortBars(key);
    if (key === focused) button.focus();
  }
  const body = add(table, "tbody");
  for (const row of sortedBars()) barRow(body, row);
}

function barRow(body, { j, name, rate, past, visible, occluded, n }) {
  const line = add(body, "tr", { "data-joint": j, class: state.joints && !state.joints.includes(j) ? "dim" : "" });
  const head = add(line, "th", { scope: "row", title: `${name}, ${skeleton.sides[j]}` });
  add(head, "span", { class: `side ${skeleton.sides[j]}` });
  head.append(name);
  bar(line, [["fill", 0, rate], ["mark", past]]);
  add(line, "td", { "data-cell": `bar ${name}` }, percent(rate));
  if (other) {
    add(line, "td", { class: "wide" }, percent(past));
    const change = points(rate, past);
    add(line, "td", { class: { "+": "up", "−": "down" }[change[0]] ?? "" }, change);
  }
  add(line, "td", { class: "wide" }, percent(visible));
  add(line, "td", { class: "wide" }, percent(occluded));
  add(line, "td", { class: "wide" }, count(n));
}

function sortBars(key) {
  const falls = barOrder.key === key ? !barOrder.falls : key !== "name";
  Object.assign(barOrder, { key, falls });
  drawBars();
}

function sortedBars() {
  const { key, falls } = barOrder, rows = jointRows();
  if (!key) return rows;
  const known = rows.filter((r) => r[key] != null), unknown = rows.filter((r) => r[key] == null);
  known.sort((a, b) => (a[key] < b[key] ? -1 : a[key] > b[key] ? 1 : 0) * (falls ? -1 : 1));
  return [...known, ...unknown];
}

function drawOcclusion() {
  const table = $("occlusion"), groups = own.details.groups;
  headRow(table, [["", ""], ["", ""], ["visible"], ["occluded"], ["occluded of all", "wide"]]);
  const body = add(table, "tbody");
  const all = { visible: own.visible.pooled, occluded: own.occluded.pooled,
    counts: { all: own.joints_counted, occluded: own.occluded.joints_counted } };
  for (const [name, { visible, occluded, counts }] of [["all joints", all], ...Object.entries(groups)]) {
    const row = add(body, "tr", name === "all joints" ? { class: "strong rule" } : {});
    add(row, "th", { scope: "row", title: name }, name);
    const both = visible != null && occluded != null ? [Math.min(visible, occluded), Math.max(visible, occluded)] : [null, null];
    bar(row, [["joint", ...both], ["dot hollow", occluded], ["dot full", visible]]);
    add(row, "td", {}, percent(visible));
    add(row, "td", {}, percent(occluded));
    const hidden = add(row, "td", { class: "wide" });
    add(hidden, "small", {}, `${count(counts.occluded)} of ${count(counts.all)}`);
  }
}

function drawErrors() {
  const pairs = Object.entries(own.details.groups).map(([name, row]) => ({ name, ...row, n: row.counts.all }));
  const sizes = own.by_size.map((row) => ({
    name: `${Math.round(row.from_px)}–${Math.round(row.to_px)} px`, ...row, n: row.people }));
  const longest = Math.max(0.05, ...[...pairs, ...sizes].map((row) => row.error_quartiles[2] ?? 0)) * 1.05;
  errorTable($("pairs"), pairs, longest, "joints");
  errorTable($("sizes"), sizes, longest, "people");
  for (const note of document.querySelectorAll(".unit-note")) note.textContent = `Errors in parts ${length}; the grey tracks end at ${fixed(longest)}.`;
}

function errorTable(table, rows, longest, unit) {
  headRow(table, [["", ""], ["", ""], ["median"], ["@0.5"], [unit]]);
  const body = add(table, "tbody");
  for (const { name, error_quartiles: [low, middle, high], n, ...row } of rows) {
    const line = add(body, "tr");
    add(line, "th", { scope: "row", title: name }, name);
    const scale = (value) => (value == null ? null : value / longest);
    bar(line, [["band", scale(low), scale(high)], ["tick", scale(middle)]]);
    add(line, "td", {}, fixed(middle, 3));
    add(line, "td", {}, percent(row["0.5"]));
    add(line, "td", {}, count(n));
  }
}

function drawSorted() {
  const ys = [...own.person_error_percentiles];
  if (ys[0] == null) return;
  // If the last percentiles are far larger than all others, the chart ends above the 98th.
  const last = ys.at(-1), top = Math.max(0.1, 1.1 * (last > 1.5 * ys[98] ? ys[98] : last));
  const xs = ys.map((_, i) => i), out = ys.findIndex((v) => v > top);
  if (out > 0) {
    const exit = out - 1 + (top - ys[out - 1]) / (ys[out] - ys[out - 1]);
    xs.splice(out, Infinity, exit);
    ys.splice(out, Infinity, top);
    $("sorted-cut").textContent = `The line leaves the frame at ${exit.toFixed(1)} %; the worst person’s error is ${fixed(last)}.`;
  }
  const step = [0.05, 0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10, 20, 50].find((s) => top / s <= 6) ?? 100;
  const yTicks = Array.from({ length: Math.floor(top / step) + 1 }, (_, i) => i * step);
  chart($("sorted"), [{ kind: "own", xs, ys }], {
    x: [0, 100], y: [0, top], xTicks: [0, 25, 50, 75, 100], yTicks,
    xText: (v) => `${v} %`, yText: (v) => fixed(v, Number.isInteger(10 * step) ? 1 : 2), yTitle: `mean error, in parts ${length}`,
  });
}

function drawRisk() {
  const { calibration } = facts;
  if (!calibration) return;
  const { coverage, risk, calibration_error: error } = calibration;
  $("calibration").hidden = false;
  $("calibration-note").textContent =
    `The share of joints with an error of 0.5 or more, among the joints with the highest scores: scores are the ` +
    `calibrated probabilities, or the heights of peaks (thin line). The expected calibration error is ` +
    `${fixed(error.after, 4)}, without calibration ${fixed(error.before, 4)} ` +
    `(${calibration.folds}-fold cross-validation over ${count(calibration.people)} people).`;
  chart($("risk"), [{ kind: "thin", xs: coverage, ys: risk.before }, { kind: "own", xs: coverage, ys: risk.after }], {
    x: [0, 1], y: [0, 1], xTicks: [0, 0.25, 0.5, 0.75, 1], yTicks: [0, 0.25, 0.5, 0.75, 1],
    xText: (c) => String(100 * c), yText: (r) => String(100 * r), yTitle: "% wrong, over the % of joints that are kept",
  });
}

/* People */

function errorOf(person) {
  if (!state.joints) return person.error;
  const known = state.joints.map((j) => person.errors[j]).filter((e) => e != null);
  return known.length ? known.reduce((sum, e) => sum + e, 0) / known.length : null;
}

function shownPeople() {
  const chosen = state.gallery === "joint"
    ? [...new Set(state.joints.flatMap((j) => galleries[j]))] : galleries[state.gallery];
  const rows = chosen.filter((row) => errorOf(people[row]) != null);
  return given.includes(state.gallery) ? rows : rows.sort((a, b) => errorOf(people[b]) - errorOf(people[a]) || a - b);
}

function drawPeople() {
  const rows = shownPeople();
  $("tiles").replaceChildren();
  rows.forEach((row, place) => {
    const person = people[row];
    const tile = add($("tiles"), "button", { type: "button", class: "tile", "data-row": row,
      "aria-label": description(person), tabindex: place ? -1 : 0 });
    figure(add(tile, "div", { class: "figure" }), person);
    const caption = add(tile, "div", { class: "caption", "aria-hidden": "true" });
    add(caption, "span", { class: "error" }, fixed(errorOf(person)));
    add(caption, "span", {}, foundText(person));
    tile.onclick = () => openCloseup(place);
  });
  const what = state.joints ? `error of ${state.label}` : "mean error";
  $("status").textContent = rows.length
    ? `${rows.length} people; below each the ${what}, in parts ${length}, and the joints found at 0.5.`
    : "Nobody here has this joint annotated.";
  $("ring-key").hidden = !state.joints;
}

function foundText(person) {
  const known = person.errors.filter((e) => e != null);
  return `${known.filter((e) => e < 0.5).length} of ${known.length}`;
}

function description(person) {
  const who = person.person < 0 ? "" : `, person ${person.person}`;
  return `${person.picture}${who}: error ${fixed(errorOf(person))}, ${foundText(person)} joints found`;
}

function figure(box, person) {
  if (person.jpeg) add(box, "img", { src: `data:image/jpeg;base64,${person.jpeg}`, alt: "", width: data.tile_px, height: data.tile_px });
  const svg = add(box, "svg", { viewBox: `-0.5 -0.5 ${data.tile_px} ${data.tile_px}`, "aria-hidden": "true" });
  const picked = (...joints) => !state.joints || joints.some((j) => state.joints.includes(j));
  const truth = add(svg, "g", { class: "truth" }), found = add(svg, "g", { class: "found" });
  const limbs = skeleton.limbs.filter(([a, b]) => person.marked[a] && person.marked[b]);
  for (const kind of ["under", ""])
    for (const [a, b] of limbs) segment(truth, person.truth[a], person.truth[b], `${kind} ${picked(a, b) ? "" : "dim"}`);
  for (const [a, b] of skeleton.limbs) segment(found, person.found[a], person.found[b], `${limbSide(a, b)} ${picked(a, b) ? "" : "dim"}`);
  skeleton.names.forEach((_, j) => {
    const shade = picked(j) ? "" : "dim";
    if (person.marked[j]) spot(truth, person.truth[j], 3.2, `${skeleton.sides[j]} ${person.visible[j] ? "" : "hidden"} ${shade}`);
    spot(found, person.found[j], 3.4, `${skeleton.sides[j]} ${shade}`);
  });
  for (const j of state.joints ?? []) {
    if (person.errors[j] == null) continue;
    spot(svg, person.truth[j], person.length / 2, "ring");
    segment(svg, person.truth[j], person.found[j], "miss");
  }
}

function segment(parent, [x1, y1], [x2, y2], kind) {
  add(parent, "line", { class: kind, x1, y1, x2, y2 });
}

function spot(parent, [cx, cy], r, kind) {
  add(parent, "circle", { class: kind, cx, cy, r });
}

function limbSide(a, b) {
  const sides = new Set([skeleton.sides[a], skeleton.sides[b]].filter((side) => side !== "middle"));
  return sides.size === 1 ? [...sides][0] : "middle";
}

/* One person, enlarged */

function openCloseup(place) {
  const rows = shownPeople();
  closeup = (place + rows.length) % rows.length;
  const person = people[rows[closeup]];
  $("closeup-title").textContent = $("closeup-title").title = person.picture + (person.person < 0 ? "" : `, person ${person.person}`);
  $("closeup-facts").textContent = `Mean error ${fixed(person.error, 3)}, ${foundText(person)} joints found at 0.5; ` +
    `the box is ${Math.round(person.box_px)} px wide. ${closeup + 1} of ${rows.length}.`;
  $("closeup-picture").replaceChildren();
  figure(add($("closeup-picture"), "div", { class: "figure" }), person);
  const table = $("closeup-joints");
  table.replaceChildren();
  headRow(table, [["joint"], ["error"], [""]]);
  const body = add(table, "tbody");
  const order = person.errors.map((e, j) => [e, j]).sort((a, b) => (b[0] ?? -1) - (a[0] ?? -1));
  for (const [error, j] of order) {
    const row = add(body, "tr", state.joints?.includes(j) ? { class: "strong" } : {});
    const head = add(row, "th", { scope: "row" });
    add(head, "span", { class: `side ${skeleton.sides[j]}` });
    head.append(skeleton.names[j]);
    add(row, "td", {}, fixed(error, 3));
    add(row, "td", {}, error == null ? "does not count" : (error < 0.5 ? "found" : "missed") + (person.visible[j] ? "" : ", occluded"));
  }
  if (!$("closeup").open) $("closeup").showModal();
}

/* Events */

function focusTile(tile) {
  for (const each of $("tiles").children) each.tabIndex = each === tile ? 0 : -1;
  tile.focus();
}

function moveInTiles(event) {
  const tiles = [...$("tiles").children], place = tiles.indexOf(document.activeElement);
  const columns = getComputedStyle($("tiles")).gridTemplateColumns.split(" ").length;
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -place, End: tiles.length - 1 - place };
  const next = tiles[place + steps[event.key]];
  if (place < 0 || !(event.key in steps)) return;
  event.preventDefault();
  if (next) focusTile(next);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if ($("closeup").open) {
    if (event.key === "ArrowRight") openCloseup(closeup + 1);
    if (event.key === "ArrowLeft") openCloseup(closeup - 1);
  } else if (event.key === "/") {
    event.preventDefault();
    $("joint").focus();
  }
}

function choices(box, name, options, chosen, onChange) {
  for (const [value, label] of options) {
    const holder = add(box, "label");
    const input = add(holder, "input", { type: "radio", name, value });
    input.checked = value === chosen;
    input.onchange = () => onChange(value);
    add(holder, "span", {}, label);
  }
}

function fillJointSelect() {
  add($("joint"), "option", { value: "" }, "all joints");
  const several = skeleton.groups.filter(([, joints]) => joints.length > 1);
  const pairs = add(several.length ? $("joint") : null, "optgroup", { label: "Pairs" });
  for (const [name, joints] of several) add(pairs, "option", { value: joints.join() }, name);
  const singles = add($("joint"), "optgroup", { label: "Joints" });
  skeleton.names.forEach((name, j) => add(singles, "option", { value: j }, name));
}

function chooseJoint() {
  const select = $("joint");
  state.joints = select.value ? select.value.split(",").map(Number) : null;
  state.label = select.selectedOptions[0].textContent;
  const input = document.querySelector("#gallery input[value=joint]");
  input.disabled = !state.joints || !state.joints.some((j) => galleries[j].length);
  input.nextSibling.textContent = state.joints ? `Worst ${state.label}` : "Worst of a joint";
  if (input.disabled && state.gallery === "joint") {
    state.gallery = "worst";
    document.querySelector("#gallery input[value=worst]").checked = true;
  }
  drawCurves();
  drawBars();
  drawPeople();
}

function listen() {
  $("joint").onchange = chooseJoint;
  $("threshold").oninput = drawCurves;
  for (const layer of ["found", "truth"])
    $(`show-${layer}`).onchange = () => document.body.classList.toggle(`no-${layer}`, !$(`show-${layer}`).checked);
  choices($("gallery"), "gallery", [...given.map((name) => [name, name]), ["worst", "Worst"], ["median", "Median"], ["best", "Best"], ["joint", "Worst of a joint"]],
    state.gallery, (value) => { state.gallery = value; drawPeople(); });
  choices($("level"), "level", [["0.5", "0.5"], ["0.1", "0.1"]], "0.5", (value) => { state.level = value; drawBars(); });
  $("tiles").onkeydown = moveInTiles;
  document.addEventListener("keydown", onKey);
  $("previous").onclick = () => openCloseup(closeup - 1);
  $("next").onclick = () => openCloseup(closeup + 1);
  $("close").onclick = () => $("closeup").close();
  $("closeup").onclick = (event) => { if (event.target === $("closeup")) $("closeup").close(); };
  $("closeup").onclose = () => focusTile($("tiles").children[closeup]);
}

function main() {
  $("joints-note").textContent = `${metric} of each joint in per cent` + (other ? "; the upright mark is the other run." : ".");
  $("occlusion-metric").textContent = metric;
  $("curve").dataset.label = `${metric} over thresholds 0 to 0.5; the table beside it has the values`;
  $("risk").dataset.label = "Share of wrong joints over the share of joints kept";
  $("sorted").dataset.label = "Mean error of people, sorted";
  fillJointSelect();
  listen();
  drawResult();
  drawMeans();
  drawOcclusion();
  drawErrors();
  chooseJoint();
  new ResizeObserver(() => { drawCurves(); drawSorted(); drawRisk(); }).observe($("curve"));
}

main();
