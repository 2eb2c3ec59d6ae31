"use strict";
// From each sub-cache to the next the share of heads that keep a token halves; so do these levels.
const LEVELS = [
  ["l1", 1 / 16, "≤ 1/16"], ["l2", 1 / 8, "≤ 1/8"], ["l3", 1 / 4, "≤ 1/4"],
  ["l4", 1 / 2, "≤ 1/2"], ["l5", 1 - 1e-9, "more"], ["l6", 1, "all"],
];
const CHUNK_TOKENS = 400;
const BIN_PIXELS = 3; // width of a bin of the map: the narrowest that shows more than noise
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const numTokens = data.pieces.length;
const decode = (bits) => Uint8Array.from(atob(bits), (c) => c.charCodeAt(0));
const pairs = data.layers.flatMap(({ heads }, layer) =>
  heads.map(({ bits, starts }, head) => ({ layer, head, starts, bits: decode(bits) })));
const numHeads = Math.max(...data.layers.map(({ heads }) => heads.length));
const number = (n) => n.toLocaleString("en");
const holds = (pair, token) => (pair.bits[token >> 3] >> (token & 7)) & 1;

let chosen = pairs; // those of the selected layer and head
let shares = new Float32Array(numTokens);
let now = null; // the token whose details are shown
let pinned = false;

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

/** Index of the part of the cache in which a head holds a token; -1 if it does not. */
function partOf(pair, token) {
  return holds(pair, token) ? pair.starts.findLastIndex((start) => start <= token) : -1;
}

/** CSS class of a part of the cache: a token in sub-cache i is one of 2**i. */
function partClass(part) {
  if (part < 1) return part ? "none" : "sinks";
  return LEVELS[Math.max(0, LEVELS.length - (data.parts.length - part))][0];
}

function shareClass(share) {
  return share ? LEVELS.find(([, limit]) => share <= limit)[0] : "none";
}

function tokenClass(token) {
  return chosen.length === 1 ? partClass(partOf(chosen[0], token)) : shareClass(shares[token]);
}

function countShares() {
  const counts = new Float32Array(numTokens);
  for (const pair of chosen)
    for (let token = 0; token < numTokens; token++) counts[token] += holds(pair, token);
  shares = counts.map((count) => count / chosen.length);
}

// --- the text ---
// A chunk is plain text until it comes near the window, so a long text costs no more to show.
const chunks = [];
const shown = new Set();

function makeText() {
  const near = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) (isIntersecting ? show : hide)(target);
  }, { rootMargin: "600px" });
  for (let start = 0; start < numTokens; ) {
    let end = Math.min(start + CHUNK_TOKENS, numTokens);
    if (start < data.num_prompt_tokens) end = Math.min(end, data.num_prompt_tokens);
    if (start === data.num_prompt_tokens) $("text").append(element("span", "answer", "answer"));
    const chunk = element("span", data.pieces.slice(start, end).join(""));
    Object.assign(chunk, { first: start, end });
    chunks.push(chunk);
    $("text").append(chunk);
    near.observe(chunk);
    start = end;
  }
}

function show(chunk) {
  if (shown.has(chunk)) return;
  shown.add(chunk);
  const tokens = data.pieces.slice(chunk.first, chunk.end).map((piece, index) => {
    const made = element("span", piece);
    made.dataset.t = chunk.first + index;
    return made;
  });
  chunk.replaceChildren(...tokens);
  paint(chunk);
}

function hide(chunk) {
  if (!shown.delete(chunk)) return;
  chunk.textContent = data.pieces.slice(chunk.first, chunk.end).join("");
}

function paint(chunk) {
  for (const span of chunk.children) {
    const token = Number(span.dataset.t);
    const piece = data.pieces[token];
    const mark = piece.startsWith("\n") ? " break" : piece ? "" : " part";
    span.className = tokenClass(token) + mark + (token === now ? " now" : "");
  }
}

const chunkOf = (token) => chunks.find(({ end }) => token < end);

// --- the map ---
function colours() {
  const style = getComputedStyle(document.documentElement);
  const read = (name) => {
    const hex = style.getPropertyValue(name).trim();
    return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  };
  return Object.fromEntries(["none", "sinks", ...LEVELS.map(([name]) => name)]
    .map((name) => [name, read(name === "none" ? "--page" : `--${name}`)]));
}

function drawMap() {
  const strip = $("strip");
  const numLayers = data.layers.length;
  const bins = Math.min(numTokens, Math.ceil(strip.clientWidth / BIN_PIXELS) || 600);
  strip.style.height = `${numLayers * Math.max(2, Math.min(9, Math.floor(150 / numLayers)))}px`;
  strip.width = bins;
  strip.height = numLayers;
  const context = strip.getContext("2d");
  const image = context.createImageData(bins, numLayers);
  const palette = colours();
  const one = $("head").value !== "";
  for (let layer = 0; layer < numLayers; layer++) {
    const row = pairs.filter((p) => p.layer === layer && (!one || p.head === Number($("head").value)));
    for (let bin = 0; bin < bins; bin++) {
      const first = Math.floor((bin * numTokens) / bins);
      const end = Math.max(first + 1, Math.floor(((bin + 1) * numTokens) / bins));
      let held = 0;
      for (const pair of row)
        for (let token = first; token < end; token++) held += holds(pair, token);
      const share = row.length ? held / (row.length * (end - first)) : 0;
      image.data.set([...palette[shareClass(share)], 255], 4 * (layer * bins + bin));
    }
  }
  context.putImageData(image, 0, 0);
  const which = one ? `KV head ${$("head").value}` : "all KV heads";
  strip.setAttribute("aria-label", `Share of ${which} that kept each part of the text, a row a layer`);
  const layer = $("layer").value;
  $("row").hidden = layer === "";
  $("row").style.left = `${strip.offsetLeft}px`;
  $("row").style.top = `${strip.offsetTop + ((Number(layer) + 0.5) / numLayers) * strip.offsetHeight}px`;
  placeCursor();
}

function makeTicks() {
  $("first-layer").textContent = "layer 0";
  if (data.layers.length > 1) $("last-layer").textContent = data.layers.length - 1;
  const step = [1, 2, 5].flatMap((n) => [n, n * 10, n * 100, n * 1e3, n * 1e4, n * 1e5])
    .sort((a, b) => a - b).find((n) => n * 8 >= numTokens) || numTokens;
  const ticks = [];
  for (let token = 0; token < numTokens - step / 2; token += step) ticks.push(token);
  ticks.push(numTokens);
  for (const token of ticks) {
    const tick = element("span", token === numTokens ? `${number(token)} tokens` : number(token));
    tick.style.left = `${(100 * token) / numTokens}%`;
    $("ticks").append(tick);
  }
}

function placeCursor() {
  const { offsetLeft, clientLeft, clientWidth, offsetHeight } = $("strip");
  $("cursor").hidden = now === null;
  $("cursor").style.left = `${offsetLeft + clientLeft + ((now + 0.5) / numTokens) * clientWidth}px`;
  $("cursor").style.height = `${offsetHeight}px`;
}

function tokenAt(event) {
  const box = $("strip").getBoundingClientRect();
  const share = (event.clientX - box.left - 1) / (box.width - 2);
  return Math.max(0, Math.min(numTokens - 1, Math.floor(share * numTokens)));
}

// --- one token ---
const cells = new Map();

function makeGrid() {
  $("grid").style.gridTemplateColumns = `auto repeat(${data.layers.length}, minmax(14px, 1fr))`;
  for (let head = 0; head < numHeads; head++) {
    $("grid").append(element("span", `head ${head}`));
    data.layers.forEach((_, layer) => {
      const cell = element("i");
      const pair = pairs.find((p) => p.layer === layer && p.head === head);
      if (pair) cells.set(pair, cell);
      $("grid").append(cell);
    });
  }
}

function look(token) {
  const before = now;
  now = token;
  for (const chunk of new Set([before, token].filter((t) => t !== null).map(chunkOf)))
    if (shown.has(chunk)) paint(chunk);
  const found = new Map();
  for (const [pair, cell] of cells) {
    const part = partOf(pair, token);
    const { name } = data.parts[part] || { name: "not kept" };
    if (part >= 0) found.set(part, (found.get(part) || 0) + 1);
    if (part < 0) cell.removeAttribute("class");
    else cell.className = partClass(part);
    cell.textContent = part < 0 ? "" : part ? data.parts.length - 1 - part : "s";
    cell.title = `layer ${pair.layer}, KV head ${pair.head}: ${name}`;
  }
  const held = [...found.values()].reduce((a, b) => a + b, 0);
  const where = [...found].sort((a, b) => a[0] - b[0])
    .map(([part, count]) => `${data.parts[part].name}: ${number(count)}`).join(", ");
  $("token").replaceChildren(
    `token ${number(token)} `, element("b", JSON.stringify(data.pieces[token])),
    token < data.num_prompt_tokens ? "" : " of the answer",
    element("br"),
    held ? `kept by ${number(held)} of ${number(pairs.length)} heads (${where})`
      : `forgotten by all ${number(pairs.length)} heads`,
  );
  placeCursor();
}

function goTo(token) {
  const chunk = chunkOf(token);
  show(chunk);
  look(token);
  const span = chunk.children[token - chunk.first];
  const covered = getComputedStyle($("tools")).position === "sticky" ? $("tools").offsetHeight : 0;
  const { top, bottom } = span.getBoundingClientRect();
  if (top < covered || bottom > innerHeight)
    scrollBy(0, top - covered - (innerHeight - covered) / 3);
}

/** First and last token of the selection in the text, if there is one. */
function selectedTokens() {
  const selection = getSelection();
  if (selection.isCollapsed || !$("text").contains(selection.anchorNode)) return null;
  const range = selection.getRangeAt(0);
  const inside = ({ firstChild }) => {
    if (!firstChild) return false;
    const own = document.createRange();
    own.selectNodeContents(firstChild);
    return range.compareBoundaryPoints(Range.END_TO_START, own) < 0
      && range.compareBoundaryPoints(Range.START_TO_END, own) > 0;
  };
  const found = chunks.filter((chunk) => range.intersectsNode(chunk)).flatMap((chunk) =>
    shown.has(chunk)
      ? [...chunk.children].filter(inside).map(({ dataset }) => Number(dataset.t))
      : [chunk.first, chunk.end - 1]);
  return found.length ? [found[0], found.at(-1)] : null;
}

function countSelected() {
  const found = selectedTokens();
  if (!found) return $("selected").replaceChildren();
  const [first, last] = found;
  let held = 0, whole = 0;
  for (const pair of pairs) {
    let own = 0;
    for (let token = first; token <= last; token++) own += holds(pair, token);
    held += own;
    whole += own === last - first + 1;
  }
  const share = (100 * held) / (pairs.length * (last - first + 1));
  $("selected").textContent = `selected tokens ${number(first)} to ${number(last)}: kept by `
    + `${share.toFixed(1)}% of the heads; ${number(whole)} kept all of them`;
}

// --- what stands above ---
function makeSummary() {
  const counts = new Uint32Array(numTokens);
  for (const pair of pairs)
    for (let token = 0; token < numTokens; token++) counts[token] += holds(pair, token);
  const none = counts.filter((count) => !count).length;
  const all = counts.filter((count) => count === pairs.length).length;
  const each = data.parts.reduce((sum, { size }) => sum + size, 0);
  const percent = (n) => `${number(n)} (${((100 * n) / numTokens).toFixed(1)}%)`;
  $("model").textContent = `${data.model}: ${data.summary}`;
  for (const [term, value] of [
    ["tokens computed", number(numTokens)],
    ["kept by each head", percent(each)],
    [`kept by all ${number(pairs.length)} KV heads`, percent(all)],
    ["forgotten by all", percent(none)],
    ["reach", `${number(data.reach)} tokens`],
    ["answer", JSON.stringify(data.answer)],
  ]) {
    const entry = element("div");
    entry.append(element("dt", term), element("dd", value));
    $("summary").append(entry);
  }
  for (const { name, size, span } of data.parts) {
    const row = element("tr");
    const [first, last] = span ? span.map(number) : ["", ""];
    for (const cell of [name, number(size), first, last]) row.append(element("td", cell));
    $("parts").tBodies[0].append(row);
  }
}

function makeSelects() {
  const fill = (id, all, names) => {
    $(id).append(new Option(all, ""), ...names.map((name, i) => new Option(name, i)));
    $(id).addEventListener("change", choose);
  };
  fill("layer", "all", data.layers.map(({ name }, i) => `${i} (${name})`));
  fill("head", "all", Array.from({ length: numHeads }, (_, i) => `${i}`));
}

function makeLegends() {
  const one = chosen.length === 1;
  const fill = (id, title, entries) => $(id).replaceChildren(title,
    ...entries.map(([name, label]) => element("span", label, name)));
  fill("shares", one ? "map: share that is kept" : "share of heads that kept it",
    [["none", "none"], ...LEVELS.map(([name, , label]) => [name, label])]);
  fill("kept-in", one ? "text: kept in" : "", !one ? [] :
    [...data.parts.map(({ name }, part) => [partClass(part), name]), ["none", "forgotten"]]);
}

function choose() {
  const [layer, head] = [$("layer").value, $("head").value];
  chosen = pairs.filter((pair) =>
    (layer === "" || pair.layer === Number(layer)) && (head === "" || pair.head === Number(head)));
  countShares();
  makeLegends();
  drawMap();
  for (const chunk of shown) paint(chunk);
}

makeSummary();
makeSelects();
makeTicks();
makeGrid();
makeText();
choose();
look(0);

$("text").addEventListener("pointermove", (event) => {
  const token = event.target.dataset.t;
  if (token !== undefined && !pinned && Number(token) !== now) look(Number(token));
});
$("text").addEventListener("click", (event) => {
  const token = event.target.dataset.t;
  if (token === undefined) return;
  pinned = !(pinned && Number(token) === now);
  look(Number(token));
});
$("text").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step) return;
  event.preventDefault();
  pinned = true;
  goTo(Math.max(0, Math.min(numTokens - 1, (now ?? 0) + step)));
});
document.addEventListener("selectionchange", countSelected);
$("strip").addEventListener("pointermove", (event) => { if (!pinned) look(tokenAt(event)); });
$("strip").addEventListener("click", (event) => { pinned = true; goTo(tokenAt(event)); });
addEventListener("resize", drawMap);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);
addEventListener("beforeprint", () => chunks.forEach(show));
