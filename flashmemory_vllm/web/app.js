// Asks `flashmemory/status` once a second and draws it. Whatever the server says is put in as text, never as markup.
"use strict";

const POLL_MS = 1000;
const SLOWEST_POLL_MS = 30000;
const ANSWER_MS = 20000;
// Steps of the server wait while strips are made: as many requests as this have one, those that are known for longest.
const MAX_STRIPS = 16;
const KEY = "flashmemory-api-key";
const SVG = "http://www.w3.org/2000/svg";

// A block is a cell of a wrapped strip, in CSS pixels; `pitch` is its width with the gap behind it.
const CELL = { pitch: 6, height: 12, rowGap: 3 };
const SMALL_CELL = { pitch: 3, height: 8, rowGap: 2 };
const MAX_LARGE_CELLS = 4096;

// In the order of the legend. `fill` is the share of the cell's height: see the note on the page.
const STATES = {
  sink: { fill: 1, label: "sink" },
  resident: { fill: 1, label: "resident" },
  recalled: { fill: 1, label: "recalled this cycle" },
  recent: { fill: 1, label: "recent" },
  cached: { fill: 0.5, label: "cached" },
  evicted: { fill: 0.17, label: "evicted" },
};

const HINTS = {
  sink: "one of the first blocks, always resident",
  resident: "chosen or being written, read from its slot",
  recalled: "chosen, fetched from host memory for the latest selection",
  recent: "one of the newest blocks, always resident",
  cached: "not chosen, still has a slot until somebody needs it",
  evicted: "not chosen, in host memory only",
};

const byId = (id) => document.getElementById(id);
const count = (number) => number.toLocaleString("en");
const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)} %` : "–");

let latest = null;
let failures = 0;
let timer = 0;

function element(name, { text, ...attributes } = {}, ...children) {
  const made = document.createElement(name);
  return filled(made, text, attributes, children);
}

function drawing(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), undefined, attributes, children);
}

function filled(made, text, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

function drawLegend() {
  for (const [state, { fill, label }] of Object.entries(STATES)) {
    const height = 12 * fill;
    const swatch = drawing("rect", { class: `fill-${state}`, width: 10, height, y: 12 - height });
    const key = drawing("svg", { viewBox: "0 0 10 12", "aria-hidden": "true" }, swatch);
    byId("legend").append(element("li", { title: HINTS[state] }, key, element("span", { text: label })));
  }
}

// Path of each state: a rectangle for each run, cut where the strip wraps. The gaps between cells are a mask.
function stripPaths(runs, perRow, cell) {
  const paths = new Map();
  let position = 0;
  for (const [state, length] of runs) {
    const height = cell.height * STATES[state].fill;
    const end = position + length;
    let path = paths.get(state) ?? "";
    while (position < end) {
      const row = Math.floor(position / perRow);
      const next = Math.min(end, (row + 1) * perRow);
      const width = (next - position) * cell.pitch;
      const y = row * (cell.height + cell.rowGap) + cell.height - height;
      path += `M${(position % perRow) * cell.pitch} ${y}h${width}v${height}h-${width}z`;
      position = next;
    }
    paths.set(state, path);
  }
  return paths;
}

function totals(runs) {
  const sums = {};
  for (const [state, length] of runs) sums[state] = (sums[state] ?? 0) + length;
  return Object.keys(STATES)
    .filter((state) => sums[state])
    .map((state) => `${count(sums[state])} ${STATES[state].label}`)
    .join(" · ");
}

function drawStrip(svg, runs, name, width) {
  const numBlocks = runs.reduce((sum, [, length]) => sum + length, 0);
  const cell = numBlocks > MAX_LARGE_CELLS ? SMALL_CELL : CELL;
  const perRow = Math.max(1, Math.floor(width / cell.pitch));
  const rows = Math.max(1, Math.ceil(numBlocks / perRow));
  svg.setAttribute("width", perRow * cell.pitch);
  svg.setAttribute("height", rows * (cell.height + cell.rowGap) - cell.rowGap);
  svg.setAttribute("aria-label", `${name}: ${totals(runs)}`);
  svg.style.setProperty("--pitch", `${cell.pitch}px`);
  const paths = [...stripPaths(runs, perRow, cell)];
  svg.replaceChildren(...paths.map(([state, d]) => drawing("path", { class: `fill-${state}`, "data-state": state, d })));
}

function makeRequest(id) {
  const head = element("header", {}, element("h3"), element("p", { class: "dim value" }));
  return element("article", { class: "request", "data-request": id }, head);
}

function describe(request, step) {
  if (request.phase === "prefill")
    return `prefill ${count(request.num_tokens)} of ${count(request.prefill_tokens)} tokens`;
  const chosen = request.selection_step === null ? "" : ` · chosen ${count(step - request.selection_step)} steps ago`;
  const share = percent(request.resident_blocks, request.num_blocks);
  const blocks = `${count(Math.round(request.resident_blocks))} of ${count(request.num_blocks)} blocks resident (${share})`;
  return `${count(request.num_tokens)} tokens · ${blocks}${chosen}`;
}

function drawRequest(article, request, step) {
  article.dataset.step = step;
  article.querySelector("h3").textContent = request.request_id;
  article.querySelector("h3").title = request.engine_request_id;
  article.querySelector("header p").textContent = describe(request, step);
  const strips = request.strips ?? [];
  const groups = article.querySelectorAll(".group");
  if (request.strips === null) groups.forEach((group) => group.remove());
  for (let index = groups.length; index < strips.length; index += 1)
    article.append(
      element("div", { class: "group" }, drawing("svg", { class: "strip", role: "img" }), element("p", { class: "counts" })),
    );
  article.querySelectorAll(".group").forEach((group, index) => {
    const runs = strips[index];
    const name = strips.length > 1 ? `layer group ${index}` : "blocks";
    drawStrip(group.querySelector("svg"), runs, name, byId("requests").clientWidth);
    group.querySelector("p").textContent =
      (strips.length > 1 ? `${name}: ` : "") + totals(runs);
  });
}

function drawRequests(status) {
  const known = new Map();
  for (const article of byId("requests").children) known.set(article.dataset.request, article);
  const articles = status.requests.map((request) => {
    const article = known.get(request.engine_request_id) ?? makeRequest(request.engine_request_id);
    known.delete(request.engine_request_id);
    if (!article.isConnected) byId("requests").append(article);
    drawRequest(article, request, status.step);
    return article;
  });
  for (const gone of known.values()) gone.remove();
  byId("empty").hidden = articles.length > 0;
  byId("num-requests").textContent = articles.length ? count(articles.length) : "";
}

// Parts of one bar, in its order: name of the fill, number.
function gauge(name, parts, total, detail) {
  let x = 0;
  const bars = parts.map(([fill, number]) => {
    const width = total ? (100 * number) / total : 0;
    const bar = drawing("rect", { class: `fill-${fill}`, x, width, height: 1 });
    x += width;
    return bar;
  });
  const svg = drawing("svg", { viewBox: "0 0 100 1", preserveAspectRatio: "none", "aria-hidden": "true" }, ...bars);
  const label = element("p", { class: "name" }, element("span", { text: name }), element("span", { class: "value", text: detail }));
  return element("div", { class: "gauge" }, label, svg);
}

function drawGauges({ memory, native_blocks_used, native_blocks_total }) {
  const { slots_used, slots_pinned, slots_total, host_blocks_used, host_blocks_total } = memory;
  const cached = slots_used - slots_pinned;
  const native = gauge(
    "Windows and states",
    [["held", native_blocks_used]],
    native_blocks_total,
    `${count(native_blocks_used)} of ${count(native_blocks_total)} (${percent(native_blocks_used, native_blocks_total)})`,
  );
  byId("gauges").replaceChildren(
    gauge(
      "Device slots",
      [["held", slots_pinned], ["cached", cached]],
      slots_total,
      `${count(slots_pinned)} held + ${count(cached)} cached of ${count(slots_total)}`,
    ),
    gauge(
      "Host blocks",
      [["held", host_blocks_used]],
      host_blocks_total,
      `${count(host_blocks_used)} of ${count(host_blocks_total)} (${percent(host_blocks_used, host_blocks_total)})`,
    ),
    ...(native_blocks_total ? [native] : []),
  );
}

function drawSelections(selections) {
  byId("selections").hidden = selections.length === 0;
  byId("no-selections").hidden = selections.length > 0;
  byId("selections").tBodies[0].replaceChildren(
    ...selections.map((selection) =>
      element(
        "tr",
        {},
        element("td", { class: "number", text: count(selection.step) }),
        element("td", { class: "id", text: selection.request_id, title: selection.engine_request_id }),
        element("td", { class: "number", text: count(selection.chosen_blocks) }),
        element("td", { class: "number", text: selection.first ? "first" : count(selection.changed_blocks) }),
        element("td", { class: "number", text: count(selection.recalled_blocks) }),
        element("td", selection.late ? { class: "late", text: "late" } : { text: "yes" }),
      ),
    ),
  );
}

function draw() {
  if (latest === null) return;
  byId("facts").textContent =
    `step ${count(latest.step)} · ${latest.block_size} tokens a block · engine ${latest.engine} · rank ${latest.rank}`;
  drawGauges(latest);
  drawRequests(latest);
  drawSelections(latest.selections);
}

function show(state, text) {
  const connection = byId("connection");
  // A live region: the same words again would be read out again.
  if (connection.textContent !== text) connection.textContent = text;
  connection.dataset.state = state;
  byId("content").classList.toggle("stale", state === "error");
  byId("content").hidden = latest === null;
}

/** The server's answer; null where there is no connection, or none of it in time. */
async function ask(key) {
  try {
    const response = await fetch(`flashmemory/status?strips=${MAX_STRIPS}`, {
      headers: key ? { Authorization: `Bearer ${key}` } : {},
      cache: "no-store",
      signal: AbortSignal.timeout(ANSWER_MS),
    });
    return { status: response.status, ok: response.ok, text: await response.text() };
  } catch {
    return null;
  }
}

/** Draws an answer; gives what is wrong with it, or null. */
function take({ ok, status, text }) {
  try {
    const body = JSON.parse(text);
    if (!ok) return body.error?.message ?? body.detail ?? `status ${status}`;
    latest = body;
    byId("content").hidden = false;
    draw();
    return null;
  } catch (error) {
    if (!ok) return `status ${status}`;
    // The server is there: its answer, or what is done with it here, is wrong.
    latest = null;
    return `the answer cannot be shown: ${error.message}`;
  }
}

async function poll() {
  const key = sessionStorage.getItem(KEY);
  const answer = await ask(key);
  if (answer?.status === 401) return askForKey(key);
  const trouble = answer === null ? "server does not answer" : take(answer);
  failures = trouble === null ? 0 : failures + 1;
  if (trouble === null) show("live", "live");
  else show("error", `${trouble} · trying again in ${pollMs() / 1000} s`);
  schedule();
}

function schedule() {
  clearTimeout(timer);
  timer = document.hidden ? 0 : setTimeout(poll, pollMs());
}

function pollMs() {
  return Math.min(SLOWEST_POLL_MS, POLL_MS * 2 ** Math.max(0, failures - 1));
}

function askForKey(refused) {
  sessionStorage.removeItem(KEY);
  latest = null;
  show("error", refused ? "this key is not right" : "needs a key");
  byId("key-form").hidden = false;
  byId("key").focus();
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("key").value);
  byId("key").value = "";
  byId("key-form").hidden = true;
  show("connecting", "connecting");
  poll();
});

// A page that nobody sees asks nothing.
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && byId("key-form").hidden) poll();
});
window.addEventListener("resize", draw);

drawLegend();
show("connecting", "connecting");
poll();
