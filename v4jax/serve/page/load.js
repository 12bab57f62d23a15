// Load and latency from /metrics, every two seconds while the page is seen.

import { byId, el, svg } from "./dom.js";
import { ask, savedKey } from "./server.js";

const EVERY = 2000; // ms
const KEPT = 45; // samples in the curve: a minute and a half

let before = null;
const rates = [];

// {name: [[labels text, value], ...]} of Prometheus' text format.
export function parse(text) {
  const found = {};
  for (const line of text.split("\n")) {
    const cut = /^([A-Za-z_:][\w:]*)(\{.*\})?\s+(\S+)/.exec(line);
    if (cut) (found[cut[1].replace(/^v4jax_/, "")] ??= []).push([cut[2] || "", Number(cut[3])]);
  }
  return found;
}

const sum = (found, name) => (found[name] || []).reduce((total, [, value]) => total + value, 0);

// The middle of what a histogram took in since `earlier`; null where it took nothing.
export function median(found, earlier, name) {
  const counts = new Map();
  for (const [from, sign] of [[found, 1], [earlier || {}, -1]]) {
    for (const [labels, value] of from[`${name}_bucket`] || []) {
      const bound = Number(/le="([^"]*)"/.exec(labels)?.[1].replace("+Inf", "Infinity"));
      counts.set(bound, (counts.get(bound) || 0) + sign * value);
    }
  }
  const bounds = [...counts.keys()].sort((a, b) => a - b);
  const all = counts.get(Infinity) || 0;
  let low = 0;
  let under = 0;
  for (const bound of bounds) {
    const upTo = counts.get(bound);
    if (all > 0 && upTo >= all / 2) {
      if (bound === Infinity) return low;
      return low + ((bound - low) * (all / 2 - under)) / (upTo - under);
    }
    [low, under] = [bound, upTo];
  }
  return null;
}

function show(found, seconds) {
  // Both are counted token by token, output_tokens_total at the end of each answer.
  const made = sum(found, "time_to_first_token_seconds_count") + sum(found, "inter_token_seconds_count");
  const rate = before && seconds > 0 ? (made - before.made) / seconds : null;
  if (rate !== null) rates.push(Math.max(rate, 0));
  if (rates.length > KEPT) rates.shift();
  const since = before?.first;
  const first = median(found, since, "time_to_first_token_seconds")
    ?? median(found, null, "time_to_first_token_seconds");
  const between = median(found, since, "inter_token_seconds")
    ?? median(found, null, "inter_token_seconds");
  const cells = [
    ["running", String(sum(found, "slots_busy")), ""],
    ["waiting", String(sum(found, "queue_depth")), ""],
    ["output", rate === null ? "–" : rate.toFixed(rate < 10 ? 1 : 0), "tokens/s"],
    ["first token", milliseconds(first), "ms"],
    ["between tokens", milliseconds(between), "ms"],
  ];
  byId("load").replaceChildren(
    ...cells.map(([name, value, unit]) =>
      el("div", {}, el("dt", {}, name), el("dd", {}, value, el("small", {}, unit && ` ${unit}`)))),
    el("div", { class: "curve" }, curve()),
  );
  before = { made, first: found };
}

const milliseconds = (seconds) =>
  seconds === null ? "–" : (seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0);

function curve() {
  const [width, height] = [90, 24];
  const most = Math.max(...rates, 1);
  const x = (i) => width - (rates.length - 1 - i) * (width / (KEPT - 1));
  const points = rates.map((rate, i) => `${x(i).toFixed(1)},${(height - 1 - (rate / most) * (height - 3)).toFixed(1)}`);
  return svg("svg", { width, height, role: "img", "aria-label": `Output of the last ${KEPT * 2} seconds, at most ${most.toFixed(0)} tokens a second` },
    svg("line", { x1: 0, x2: width, y1: height - 0.5, y2: height - 0.5, class: "axis" }),
    svg("polyline", { points: points.join(" "), class: "curve-line" }));
}

let last = null;
let refusedKey = null; // that may not read the metrics

async function tick(needsKey) {
  if (document.hidden || savedKey() === refusedKey || (needsKey && !savedKey())) return;
  try {
    const text = await (await ask("/metrics")).text();
    const now = performance.now();
    show(parse(text), last === null ? 0 : (now - last) / 1000);
    last = now;
  } catch (error) {
    if (error.status === 401 || error.status === 403) refusedKey = savedKey();
    byId("load").replaceChildren(el("div", {}, el("dt", {}, "load"), el("dd", {}, "not readable")));
  }
}

export function begin(server) {
  tick(server.keys);
  setInterval(() => tick(server.keys), EVERY);
}
