// The lens's figures: small multiples, one row a layer. Colours are the style sheet's.

import { el, svg, visible } from "./dom.js";

const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}\u00a0%`;
const total = (values) => values.reduce((sum, value) => sum + value, 0);
const mean = (values) => (values.length ? total(values) / values.length : 0);
const KINDS = { window: "window", csa: "CSA", hca: "HCA", full: "full" };

// What else was likely: for the token itself and for the one behind it.
export function alternatives(figures, text) {
  const here = `token ${figures.position}`;
  return el("section", { class: "alternatives", "aria-label": "Log-probabilities" },
    likely(`${here} was chosen from`, figures.before, text, figures.token),
    likely(`token ${figures.position + 1} is chosen from`, figures.next, text, null));
}

function likely(title, found, text, token) {
  if (!found) return el("div", {}, el("h4", {}, title), el("p", { class: "note" }, "nothing stands before it"));
  const rows = [...found.top];
  if (token !== null && !rows.some((row) => row.token === token)) rows.push({ token, logprob: found.logprob });
  const facts = [`entropy ${found.entropy.toFixed(2)} nats`];
  if (token !== null) facts.push(`rank ${found.rank}`);
  return el("div", {}, el("h4", {}, title, el("small", {}, ` ${facts.join(", ")}`)),
    el("table", { class: "likely" },
      el("thead", {}, el("tr", {}, el("th", {}, "token"), el("th", {}, ""), el("th", {}, "p"), el("th", {}, "ln p"))),
      el("tbody", {}, ...rows.map((row) => el("tr", { class: row.token === token ? "own" : null },
        el("td", {}, el("code", {}, visible(text(row.token)))),
        el("td", { class: "share" }, bar(Math.exp(row.logprob))),
        el("td", {}, percent(Math.exp(row.logprob))),
        el("td", {}, row.logprob.toFixed(2)))))));
}

const bar = (share) => svg("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
  svg("rect", { x: 0, y: 0, width: 100 * share, height: 10, class: "likely-bar" }));

// Attention, experts and mixing of every layer. `textOf(position)` is a token's text.
export function layers(figures, textOf) {
  const streams = figures.layers.some((layer) => layer.mhc);
  const heads = ["layer", "compressed entries over the context", "window", "heads", "experts", ...(streams ? ["mHC"] : [])];
  const rows = figures.layers.map((layer) => el("div", { class: "layer", role: "row" },
    cell("layer", label(layer)),
    cell("context", context(layer, figures.position, textOf)),
    cell("window", windowRow(layer, figures.position, textOf)),
    cell("heads", headShares(layer)),
    cell("experts", experts(layer)),
    streams ? cell("mhc", mixing(layer)) : null));
  return el("section", { class: "layers", "aria-label": "Layers" }, key(),
    el("div", { class: `table${streams ? "" : " plain"}`, role: "table" },
      el("div", { class: "layer head", role: "row" }, ...heads.map((head) => el("div", { role: "columnheader" }, head))),
      ...rows, axes(figures, streams)));
}

const cell = (name, ...children) => el("div", { class: `cell ${name}`, role: "cell" }, ...children);

function key() {
  const mark = (name, text) => el("span", {}, el("i", { class: `mark ${name}` }), ` ${text}`);
  return el("p", { class: "legend" }, mark("window", "window"), mark("entries", "compressed entries"), mark("sink", "sink"),
    mark("experts", "experts"), mark("mhc", "stream mixing"),
    el("span", { class: "unit" }, "Bars: share of attention in %, mean over the heads, each row to its own largest. Line below: entries that could be seen, dark where attended. Shaded: the window."));
}

function label(layer) {
  return el("div", {}, el("b", {}, String(layer.layer)), ` ${KINDS[layer.kind]}`, el("small", {}, `${layer.routing} routed`));
}

// A picture with its line of text. While the pointer is over a part, the line says what `tell` knows
// of the place (fractions of width and height, from the left and from the top).
function plot(width, height, label, shapes, line, tell, name = "plot") {
  const text = el("small", {}, line);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", class: name, role: "img", "aria-label": label }, ...shapes);
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const inside = (value) => Math.min(Math.max(value, 0), 0.999999);
    text.textContent = tell(inside((event.clientX - box.left) / box.width), inside((event.clientY - box.top) / box.height)) || line;
  });
  picture.addEventListener("pointerleave", () => { text.textContent = line; });
  return el("div", {}, picture, text);
}

// Many rectangles as one shape: [x, y, width, height] each.
const boxes = (rectangles, attributes) =>
  svg("path", { ...attributes, d: rectangles.map(([x, y, w, h]) => `M${short(x)} ${short(y)}h${short(w)}v${short(h)}h${short(-w)}z`).join("") });
const short = (x) => String(Math.round(x * 1000) / 1000);

// One bar an entry, over the tokens that it stands for.
function context(layer, position, textOf) {
  const { entries } = layer;
  if (!entries) return el("span", { class: "none" }, "no compressed entries");
  const { index, weight, ratio } = entries;
  const length = position + 1;
  const share = percent(mean(layer.heads.entries));
  const largest = weight.reduce((most, value) => Math.max(most, value), 1e-9);
  const width = 0.94 * Math.max(ratio, length / 400);
  const what = layer.kind === "csa"
    ? `${index.length} of ${entries.visible} entries chosen`
    : `${entries.visible} ${entries.visible === 1 ? "entry" : "entries"}, all seen`;
  const where = index.length
    ? `largest ${percent(largest)} at token ${index[weight.indexOf(largest)] * ratio}`
    : "none is closed yet";
  const begins = layer.window ? layer.window.first : length;
  const shapes = [
    boxes([[begins, 0, length - begins, 38]], { class: "shade" }),
    boxes([[0, 35, entries.visible * ratio, 3]], { class: "seen" }),
    boxes(index.map((entry, i) => [entry * ratio, 34 * (1 - weight[i] / largest), width, (34 * weight[i]) / largest]), { class: "entries" }),
    boxes(index.map((entry) => [entry * ratio, 35, Math.max(0.94 * ratio, length / 1000), 3]), { class: "entries" }),
  ];
  const tell = (x) => {
    const i = nearest(index, (x * length) / ratio - 0.5);
    if (i < 0) return "";
    const first = index[i] * ratio;
    const score = entries.score ? `, index score ${entries.score[i].toFixed(3)}` : "";
    const tokens = ratio === 1 ? `token ${first}` : `tokens ${first} to ${first + ratio - 1}`;
    return `${percent(weight[i], 2)} · ${tokens}${score} · ${snippet(first, ratio, textOf)}`;
  };
  return plot(length, 38, `Layer ${layer.layer}, ${what}, ${share} of attention, ${where}`, shapes, `${share} · ${what} · ${where}`, tell);
}

// Where in ascending numbers the one closest to x stands; -1 where there is none.
function nearest(numbers, x) {
  let [low, high] = [0, numbers.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (numbers[middle] < x) low = middle + 1;
    else high = middle;
  }
  if (low === numbers.length) return low - 1;
  return low > 0 && x - numbers[low - 1] < numbers[low] - x ? low - 1 : low;
}

function snippet(first, count, textOf) {
  const shown = Array.from({ length: Math.min(count, 12) }, (_, i) => textOf(first + i)).join("");
  return `“${visible(shown)}${count > 12 ? "…" : ""}”`;
}

function windowRow(layer, position, textOf) {
  if (!layer.window) return el("span", { class: "none" }, "no window");
  const { first, weight } = layer.window;
  const share = percent(mean(layer.heads.window));
  const largest = weight.reduce((most, value) => Math.max(most, value), 1e-9);
  const most = first + weight.indexOf(largest);
  const bars = weight.map((value, i) => [i + 0.1, 38 * (1 - value / largest), 0.8, (38 * value) / largest]);
  const tell = (x) => {
    const i = Math.floor(x * weight.length);
    return `${percent(weight[i], 2)} · token ${first + i} · “${visible(textOf(first + i))}”`;
  };
  return plot(weight.length, 38, `Layer ${layer.layer}, window of tokens ${first} to ${position}, ${share} of attention, largest at ${most}`,
    [boxes(bars, { class: "window" })], `${share} · largest ${percent(largest)} at token ${most}`, tell);
}

// A stacked bar a head: window, entries, sink.
function headShares(layer) {
  const parts = ["window", "entries", "sink"];
  const count = layer.heads.sink.length;
  const before = Array(count).fill(0);
  const shapes = parts.map((part) => boxes(layer.heads[part].map((share, head) => {
    before[head] += share;
    return [before[head] - share, head + 0.08, share, 0.84];
  }), { class: part }));
  const told = (head) => parts.map((part) => `${part} ${percent(layer.heads[part][head])}`).join(", ");
  const means = parts.map((part) => `${part} ${percent(mean(layer.heads[part]))}`).join(", ");
  return plot(1, count, `Layer ${layer.layer}, ${count} heads, on average ${means}`, shapes,
    `sink ${percent(mean(layer.heads.sink))}`, (x, y) => `head ${Math.floor(y * count)}: ${told(Math.floor(y * count))}`);
}

// A cell an expert, shaded by the router's score; those that were taken have a mark.
function experts(layer) {
  const { index, weight, scores } = layer.experts;
  const count = scores.length;
  const largest = scores.reduce((most, value) => Math.max(most, value), 1e-9);
  const gap = count > 64 ? 0 : 0.06;
  const levels = Array.from({ length: 11 }, () => []);
  scores.forEach((score, expert) => levels[Math.round((10 * score) / largest)].push([expert + gap, 0, 1 - 2 * gap, 24]));
  const wide = Math.max(1 - 2 * gap, count / 60);
  const shapes = [
    ...levels.map((cells, level) => boxes(cells, { class: "expert", "fill-opacity": (0.08 + 0.05 * level).toFixed(2) })),
    boxes(index.map((expert) => [expert + gap, 27, wide, 11]), { class: "expert" }),
  ];
  const told = index.map((expert, i) => `${expert}\u00a0×\u00a0${weight[i].toFixed(2)}`).join(" · ");
  const tell = (x) => {
    const expert = Math.floor(x * count);
    const at = index.indexOf(expert);
    return `expert ${expert}: score ${scores[expert].toFixed(3)}${at >= 0 ? `, weight ${weight[at].toFixed(3)}` : ""}`;
  };
  return plot(count, 38, `Layer ${layer.layer}, experts by weight: ${told}`, shapes, told, tell);
}

// How the streams are mixed before attention and before the experts: from row to column.
function mixing(layer) {
  if (!layer.mhc) return null;
  return el("div", { class: "pair" }, matrix(layer.mhc.attention, `layer ${layer.layer}, before attention`),
    matrix(layer.mhc.experts, `layer ${layer.layer}, before experts`));
}

function matrix(values, name) {
  const size = values.length;
  const cells = values.flatMap((row, from) => row.map((value, to) =>
    boxes([[to + 0.04, from + 0.04, 0.92, 0.92]], { class: "stream", "fill-opacity": Math.min(1, 0.06 + 0.94 * value).toFixed(3) })));
  const told = values.map((row) => row.map((value) => value.toFixed(2)).join(" ")).join("; ");
  return plot(size, size, `Mixing of streams, ${name}: ${told}`, cells, "", (x, y) => {
    const [from, to] = [Math.floor(y * size), Math.floor(x * size)];
    return `${from} to ${to}: ${values[from][to].toFixed(2)}`;
  }, "matrix");
}

function axes(figures, streams) {
  const { position, layers: rows } = figures;
  const windowed = rows.find((layer) => layer.window);
  const axis = (from, middle, to) => el("div", { class: "axis-labels" }, el("span", {}, from), el("span", {}, middle), el("span", {}, to));
  const most = rows[0].experts.scores.length - 1;
  return el("div", { class: "layer axes", role: "row" }, cell("layer"),
    cell("context", axis("0", "token", String(position))),
    cell("window", windowed ? axis(String(windowed.window.first), "token", String(position)) : ""),
    cell("heads", axis("0", "share", "100 %")),
    cell("experts", axis("0", "expert", String(most))),
    streams ? cell("mhc", el("div", { class: "axis-labels" }, el("span", {}, "attn"), el("span", {}, "experts"))) : null);
}
