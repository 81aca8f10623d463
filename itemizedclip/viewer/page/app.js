// The page: one state, and a redraw of whatever shows it.

const report = JSON.parse(blockText("report"));
const $ = (id) => document.getElementById(id);
const [S, ...TOKENS] = report.grid;
const COLOUR_TABLE = bytesOfBase64(report.colours);
const PAGE_STEP = 5;

/** Window presets of Hounsfield units by what is shown: name, width, level. */
const HEAD_PRESETS = [
  ["Brain", 80, 40], ["Subdural", 215, 75], ["Stroke", 40, 40], ["Bone", 2800, 600], ["Blood", 200, 80],
];
const CHEST_PRESETS = [["Lung", 1500, -600], ["Mediastinum", 400, 40], ["Bone", 1800, 400]];
const HU_PRESETS = { head: HEAD_PRESETS, chest: CHEST_PRESETS, "": [...CHEST_PRESETS, ...HEAD_PRESETS.filter(([name]) => name !== "Bone")] };
const AS_THE_MODEL = "As the model";

const views = report.views.map((info, number) => new View(info, number));
const seriesList = report.series; // name, numbers of its views, labels of its windows
const items = [];
const state = {
  view: 0, normal: 0, place: [0.5, 0.5, 0.5], // place: shares of the axes, the same in every series
  chosen: [null, null], // item of each pane; the second is null unless two are compared
  head: -1, isSmooth: true, isShown: true, isGrey: true, isEvenShown: false, isCrossShown: false, isOwnScale: false, opacity: 0.75, threshold: 1,
  isRulerOn: false, ruler: null, // { series, from, to }: places between voxel edges of its views; to is null until it is set
  windows: new Map(), // view number, or "hu" for all of them → { low, high, preset }
};
const scratch = newCanvas(1, 1), sliceCanvas = newCanvas(1, 1);

// --- what the state means ---------------------------------------------------------------------------------------

const currentView = () => views[state.view];
const seriesOf = (number) => seriesList.findIndex((series) => series.views.includes(number));
const labelOf = (number) => {
  const series = seriesList[seriesOf(number)];
  return series.labels[series.views.indexOf(number)];
};
/** Name of a view for people: its series and, where there are several, its window. */
const nameOf = (number) => seriesList[seriesOf(number)].name + (labelOf(number) ? `, ${labelOf(number)} window` : "");
const currentPlane = () => new Plane(currentView(), state.normal, TOKENS);
const sliceOf = (plane) => Math.min(plane.count - 1, Math.floor(state.place[plane.normal] * plane.count));
const windowKey = (view) => (view.unit === "hu" ? "hu" : view.number);
const isVolume = (view) => view.unit !== "rgb";
const decimal = (value, digits) => value.toFixed(digits).replace("-", "−");
const percent = (share) => `${Math.round(100 * share)}\u00a0%`;
const times = (value) => `${value < 10 ? Number(value.toFixed(1)) : Math.round(value)}×`;

function presetsOf(view) {
  const { min, max, low, high } = view.range;
  const full = ["Full range", min, max];
  if (view.unit !== "hu") return [["Auto", low, high], full];
  const seen = view.window ? [[AS_THE_MODEL, ...view.window]] : [];
  return [...seen, ...HU_PRESETS[view.body].map(([name, width, level]) => [name, level - width / 2, level + width / 2]), full];
}

function windowOf(view) {
  if (!isVolume(view)) return null;
  const key = windowKey(view);
  if (!state.windows.has(key)) {
    const [preset, low, high] = presetsOf(view)[0];
    state.windows.set(key, { preset, low, high });
  }
  const window = state.windows.get(key);
  // Each view has a model's window of its own.
  return window.preset === AS_THE_MODEL && view.window ? { ...window, low: view.window[0], high: view.window[1] } : window;
}

/** Whether the attention of an item has a peak, not merely a largest of nearly equal values. */
const isLocalised = (attention) => attention.peak >= report.leastPeak;
/** Attention that is drawn: all, or only what points somewhere. */
const isDrawn = (attention) => state.isShown && (state.isEvenShown || isLocalised(attention));

/** Top of the colour scale of an item. */
function scaleTop(item) {
  const shown = state.isOwnScale ? [item] : items;
  return Math.max(report.scaleFloor, ...shown.filter(Boolean).map((one) => one.attention(state.head).peak));
}

// --- small helpers of the document --------------------------------------------------------------------------------

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria-") || name === "role" || name.startsWith("data-")) made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

function showProblem(error) {
  $("problem").textContent = error.message ?? String(error);
  $("problem").hidden = false;
}

let isDrawPending = false;
function redraw() {
  if (isDrawPending) return;
  isDrawPending = true;
  requestAnimationFrame(() => {
    isDrawPending = false;
    draw();
  });
}

// --- items --------------------------------------------------------------------------------------------------------

/** One row: the text, its numbers, and how its attention is shared out between the series and nowhere. */
function itemRow(item) {
  const radio = element("input", { type: "radio", name: "item" });
  radio.addEventListener("change", () => choose(item));
  const strip = element("span", { className: "strip", "aria-hidden": "true" });
  const numbers = element("span", { className: "numbers" });
  const number = element("span", { className: "number" }, String(items.indexOf(item) + 1));
  const score = element("span", { className: "score", title: "TCSim: similarity of the text and the image as it sees it" }, decimal(item.score, 3));
  const words = element("span", { className: "text" }, item.text);
  if (item.isCut) words.append(element("span", { className: "cut" }, "longer than the model reads: its end was cut off"));
  const label = element("label", {}, radio, number, words, score, numbers, strip);
  const compare = element("button", { type: "button", className: "quiet compare", "aria-pressed": "false" }, "Compare");
  compare.addEventListener("click", () => compareWith(item));
  const opposed = element("p", { className: "opposed", hidden: true });
  const standing = item.standing ? [element("div", { className: "standing" }, standingBars(item.standing), element("p", {}, standingText(item.standing)))] : [];
  item.row = element("div", { className: "item" }, label, ...standing, opposed, compare);
  Object.assign(item, { radio, strip, numbers, compare, opposed });
  return item.row;
}

function addItems(added) {
  for (const item of added) {
    items.push(item);
    $("item-list").append(itemRow(item));
  }
  for (const item of items) {
    item.opposite = oppositeOf(item);
    item.opposed.hidden = !item.opposite;
    item.opposed.textContent = item.opposite ? opposedText(item, item.opposite) : "";
  }
  arrangeItems();
}

/** In the order chosen; an opposite stands below the item that it denies. */
function arrangeItems() {
  const order = [...items];
  if ($("order").value === "score") order.sort((a, b) => b.score - a.score);
  const shown = new Set();
  for (const item of order) {
    shown.add(item);
    if (item.opposite) shown.add(item.opposite);
  }
  $("item-list").replaceChildren(...[...shown].map((item) => item.row));
}

function drawItem(item) {
  const { shares, nowhere, peak, peakView } = item.attention(state.head);
  const isFound = isLocalised({ peak });
  const where = S > 1 && isFound ? [" in ", element("b", {}, nameOf(peakView))] : [];
  const none = isFound ? [] : [element("b", { className: "even", title: `no patch has ${times(report.leastPeak)} an even spread` }, "no localisation"), " "];
  item.numbers.replaceChildren(
    ...none, element("span", {}, `peak ${times(peak)}`, ...where), " ", element("span", {}, `nowhere ${percent(nowhere)}`),
  );
  item.strip.hidden = S < 2;
  item.strip.replaceChildren(
    ...shares.map((share, s) => {
      const part = element("i", { className: s === state.view ? "part here" : "part", title: `${nameOf(s)} ${percent(share)}` });
      part.style.flexGrow = share;
      return part;
    }),
    element("i", { className: "part none", title: `nowhere ${percent(nowhere)}` }),
  );
  item.strip.lastChild.style.flexGrow = nowhere;
  const place = state.chosen.indexOf(item);
  item.row.dataset.pane = place < 0 ? "" : "AB"[place];
  item.radio.checked = place === 0;
  item.compare.hidden = items.length < 2 || place === 0;
  item.compare.textContent = place === 1 ? "Stop" : "Compare";
  item.compare.setAttribute("aria-label", `${place === 1 ? "Stop comparing" : "Compare"} with: ${item.text}`);
  item.compare.setAttribute("aria-pressed", String(place === 1));
}

function choose(item) {
  state.chosen = [item, state.chosen[1] === item ? null : state.chosen[1]];
  goToPeak(item);
}

function compareWith(item) {
  state.chosen[1] = state.chosen[1] === item ? null : item;
  buildPanes();
  redraw();
}

async function goToPeak(item) {
  const { peakView, peakCell } = item.attention(state.head);
  const view = views[peakView], plane = new Plane(view, 0, TOKENS);
  state.place = peakCell.map((cell, axis) => (plane.voxelOf(axis, cell) + 0.5) / view.size[axis]);
  await showView(peakView, { keepsPlace: false });
  if (view.isReady && state.view === peakView) {
    const voxel = state.place.map((place, axis) => Math.floor(place * view.size[axis]));
    $("readout").textContent = `Middle of the peak's patch: ${describe(currentPlane(), voxel)}`;
  }
}

// --- series, planes, slices ---------------------------------------------------------------------------------------

/**
 * The place stays where it is in the body: at the same mm where both series are of one frame of reference, otherwise at
 * the same share of every axis. False where the other series does not reach it.
 */
function carryPlace(from, to) {
  if (from === to || !from.frame || from.frame !== to.frame || !from.affine || !to.affine) return true;
  const world = from.worldOf(state.place.map((share, axis) => share * from.size[axis]));
  const shares = to.placeOf(world).map((at, axis) => at / to.size[axis]);
  state.place = shares.map((share) => Math.min(1 - 1e-6, Math.max(0, share)));
  return shares.every((share) => share >= 0 && share <= 1);
}

async function showView(number, { keepsPlace = true } = {}) {
  const from = views[state.view], isSameSeries = seriesOf(number) === seriesOf(state.view);
  const isReached = !keepsPlace || carryPlace(from, views[number]);
  const isOneFrame = from.frame && from.frame === views[number].frame;
  state.view = number;
  const view = views[number];
  if (!view.isReady) $("readout").textContent = `Unpacking ${view.name} …`;
  try {
    await view.load();
  } catch (error) {
    return showProblem(new Error(`${view.name}: cannot be unpacked (${error.message}); make the report again`));
  }
  if (state.view !== number) return; // another series was chosen meanwhile
  buildPanes();
  buildTools();
  centreTab();
  const isGuessed = keepsPlace && !isSameSeries && !isOneFrame && isVolume(view);
  $("readout").textContent = !isReached ? `${nameOf(number)} does not reach this place; its nearest slice is shown.`
    : isGuessed ? "Not known to lie in one frame of reference: the same share of every axis is shown, not the same mm."
    : "Point at the image to read values.";
  redraw();
}

function buildTabs() {
  const tabs = $("tabs");
  tabs.hidden = seriesList.length < 2;
  tabs.replaceChildren(
    ...seriesList.map((series, s) => {
      const meter = element("span", { className: "meter", "aria-hidden": "true" }, element("i"), element("i"));
      const tab = element("button", { type: "button", role: "tab", id: `tab-${s}`, "aria-controls": "series-panel" },
        element("span", { className: "name" }, ...breakable(series.name)), element("span", { className: "share" }), meter);
      tab.addEventListener("click", () => showSeries(s));
      return tab;
    }),
  );
  if (seriesList.length > 1) $("series-panel").setAttribute("role", "tabpanel");
  tabs.addEventListener("keydown", (event) => {
    const current = seriesOf(state.view), last = seriesList.length - 1;
    const steps = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: last };
    if (!(event.key in steps)) return;
    event.preventDefault();
    const next = (steps[event.key] + last + 1) % (last + 1);
    tabs.children[next].focus();
    showSeries(next);
  });
}

/** A name that may be wrapped behind its underscores: nothing of it is cut. */
function breakable(name) {
  return name.split(/(?<=_)/).flatMap((part, k) => (k ? [document.createElement("wbr"), part] : [part]));
}

/** Of several windows of a series the one that the chosen item looks at most. */
function showSeries(s) {
  const { views: numbers } = seriesList[s], shares = state.chosen[0]?.attention(state.head).shares;
  if (numbers.includes(state.view)) return;
  showView(shares ? numbers.reduce((best, number) => (shares[number] > shares[best] ? number : best)) : numbers[0]);
}

/** The model's windows of the current series: each has an attention of its own. */
function buildSeen() {
  const { views: numbers, labels } = seriesList[seriesOf(state.view)];
  $("seen").hidden = numbers.length < 2;
  $("seen-chips").replaceChildren(...numbers.map((number, k) => {
    const button = chip(labels[k], () => {
      if (views[number].window) setWindow({ preset: AS_THE_MODEL, low: views[number].window[0], high: views[number].window[1] });
      showView(number);
    });
    button.append(" ", element("span", { className: "dim" }));
    button.dataset.view = number;
    return button;
  }));
}

function drawSeen(shown) {
  for (const button of $("seen-chips").children) {
    const number = Number(button.dataset.view);
    button.setAttribute("aria-pressed", String(number === state.view));
    button.lastChild.textContent = shown.map((shares) => percent(shares[number])).join(" | ");
  }
}

/** A window that the model saw too brings the attention of that window. */
function choosePreset(preset, low, high) {
  setWindow({ preset, low, high });
  const { views: numbers } = seriesList[seriesOf(state.view)];
  const same = numbers.find((number) => views[number].window?.[0] === low && views[number].window?.[1] === high);
  if (same !== undefined && same !== state.view) showView(same);
}

function drawTabs() {
  const shown = state.chosen.filter(Boolean).map((item) => item.attention(state.head).shares);
  const current = seriesOf(state.view);
  const shareOf = (shares, s) => seriesList[s].views.reduce((sum, number) => sum + shares[number], 0);
  drawSeen(shown);
  [...$("tabs").children].forEach((tab, s) => {
    const isCurrent = s === current;
    tab.setAttribute("aria-selected", String(isCurrent));
    tab.tabIndex = isCurrent ? 0 : -1;
    tab.querySelector(".share").textContent = shown.map((shares) => percent(shareOf(shares, s))).join(" | ");
    tab.querySelectorAll(".meter i").forEach((bar, k) => {
      bar.hidden = !shown[k];
      bar.style.width = shown[k] ? `${100 * shareOf(shown[k], s)}%` : "0";
    });
  });
  if (seriesList.length > 1) $("series-panel").setAttribute("aria-labelledby", `tab-${current}`);
}

/** Where the tabs are one row to be pushed sideways, the current one comes into sight. */
function centreTab() {
  const tabs = $("tabs"), tab = tabs.children[seriesOf(state.view)];
  tabs.scrollLeft = tab.offsetLeft - tabs.offsetLeft - (tabs.clientWidth - tab.offsetWidth) / 2;
}

function chip(text, act) {
  const button = element("button", { type: "button" }, text);
  button.addEventListener("click", act);
  return button;
}

/** Planes and window presets of the current view; drawTools keeps them up to date. */
function buildTools() {
  const view = currentView();
  $("grey-field").hidden = isVolume(view);
  $("cross-field").hidden = $("ruler-field").hidden = !isVolume(view);
  buildSeen();
  $("tools").hidden = $("presets").hidden = $("planes").hidden = $("window").hidden = !isVolume(view);
  if (!isVolume(view)) return;
  $("planes").replaceChildren(
    ...[0, 1, 2].map((normal) => chip(new Plane(view, normal, TOKENS).name, () => {
      state.normal = normal;
      redraw();
    })),
  );
  $("presets").replaceChildren(
    ...presetsOf(view).map(([preset, low, high]) => chip(preset, () => choosePreset(preset, low, high))),
  );
}

function drawTools(view) {
  if (!isVolume(view)) return;
  const { preset, low, high } = windowOf(view), { min, max } = view.range;
  [...$("planes").children].forEach((button, normal) => button.setAttribute("aria-pressed", String(normal === state.normal)));
  for (const button of $("presets").children) button.setAttribute("aria-pressed", String(button.textContent === preset));
  Object.assign($("level"), { min: Math.min(min, low), max: Math.max(max, high), value: Math.round((low + high) / 2) });
  Object.assign($("width"), { max: Math.max(max - min, Math.ceil(high - low)), value: Math.round(high - low) });
  const unit = view.unit === "hu" ? " HU" : "";
  $("level-value").textContent = `${decimal(Math.round((low + high) / 2), 0)}${unit}`;
  $("width-value").textContent = `${Math.round(high - low)}${unit}`;
}

function setWindow(window) {
  state.windows.set(windowKey(currentView()), window);
  redraw();
}

function setLevelAndWidth(level, width) {
  const half = Math.max(1, width) / 2;
  setWindow({ preset: null, low: level - half, high: level + half });
}

function setSlice(slice) {
  const plane = currentPlane(), clamped = Math.min(plane.count - 1, Math.max(0, slice));
  state.place[plane.normal] = (clamped + 0.5) / plane.count;
  redraw();
}

function stepSlice(step) {
  setSlice(sliceOf(currentPlane()) + step);
}

function drawSlices(plane, slice) {
  const isStack = plane.count > 1;
  $("slices").hidden = !isStack;
  if (!isStack) return;
  Object.assign($("slice"), { max: plane.count - 1, value: slice });
  $("slice-label").textContent = `${plane.name} ${slice + 1} / ${plane.count}`;
  const peaks = peakSlices(plane);
  const isPeak = peaks.some(([first, last]) => first <= slice && slice <= last);
  const label = plane.view.labels?.[0] === plane.normal ? plane.view.labels[1][slice] : "";
  $("slice-note").textContent = [isPeak ? "slice of the peak" : "", label].filter(Boolean).join(" · ");
  $("slice").setAttribute("aria-valuetext", `${slice + 1} of ${plane.count}${isPeak ? ", slice of the peak" : ""}`);
  const bars = [], shown = state.chosen.filter(Boolean);
  shown.forEach((item, k) => {
    const layers = plane.profile(item.attention(state.head).map);
    const most = Math.max(...layers.map((layer) => layer.sum), 1e-9);
    for (const { sum, edges } of layers) {
      const [from, to] = edges.map((edge) => (100 * Math.min(plane.count - 1, Math.max(0, edge - 0.5))) / (plane.count - 1));
      const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      const height = (100 * sum) / most, inset = (to - from) * 0.06, width = Math.max(0, to - from - 2 * inset) / shown.length;
      const facts = { x: from + inset + k * width, width, y: 100 - height, height, class: "ab"[k] };
      for (const [name, value] of Object.entries(facts)) bar.setAttribute(name, value);
      bars.push(bar);
    }
  });
  peaks.forEach(([first, last, name]) => {
    const middle = (100 * (first + last)) / 2 / (plane.count - 1);
    const mark = document.createElementNS("http://www.w3.org/2000/svg", "line");
    const facts = { x1: middle, x2: middle, y1: 0, y2: 100, class: `peak ${name}`, "vector-effect": "non-scaling-stroke" };
    for (const [key, value] of Object.entries(facts)) mark.setAttribute(key, value);
    bars.push(mark);
  });
  $("profile").replaceChildren(...bars);
}

/** First and last slice of the peak of every item on show that peaks in this view, with the name of its pane. */
function peakSlices(plane) {
  return state.chosen.flatMap((item, k) => {
    const attention = item?.attention(state.head);
    if (!item || attention.peakView !== plane.view.number || !isLocalised(attention)) return [];
    const [from, to] = plane.cellEdges(plane.normal, attention.peakCell[plane.normal]);
    // Slices whose middle lies within the patch, as cellOf has it.
    const first = Math.max(0, Math.ceil(from - 0.5)), last = Math.min(plane.count - 1, Math.ceil(to - 0.5) - 1);
    return first <= last ? [[first, last, "ab"[k]]] : [];
  });
}

// --- panes --------------------------------------------------------------------------------------------------------

let panes = [];

/** One picture, or two side by side; kept as they are while their number stays the same. */
function buildPanes() {
  const count = state.chosen[1] ? 2 : 1;
  $("panes").dataset.count = count;
  if (panes.length === count) return;
  panes = Array.from({ length: count }, (_, k) => buildPane(k));
  $("panes").replaceChildren(...panes.map((pane) => pane.box));
  panes.forEach((pane) => resizes.observe(pane.well));
}

function buildPane(k) {
  const canvas = element("canvas", { role: "img" });
  const letters = ["left", "right", "top", "bottom"].map((side) => element("span", { className: `letter ${side}`, "aria-hidden": "true" }));
  const cross = ["upright", "level"].map((way) => element("i", { className: `cross ${way}`, "aria-hidden": "true", hidden: true }));
  const scale = element("span", { className: "scale", role: "img", "aria-label": "Scale bar", hidden: true });
  const even = element("p", { className: "even-note", role: "status", hidden: true });
  const well = element("div", { className: "well", tabIndex: 0, role: "group" }, canvas, ...letters, even, scale, ...cross);
  well.setAttribute("aria-label", "Image: arrow keys change the slice, Shift and arrow keys move the crosshair, M measures from one place of it to another, P goes to the peak, O hides the attention");
  const title = element("p", { className: "title" });
  const peak = element("button", { type: "button", className: "quiet" }, "Go to peak");
  peak.addEventListener("click", () => goToPeak(state.chosen[k]));
  const pane = { k, canvas, well, letters, even, scale, cross, title, peak, box: element("figure", { className: "pane" }, element("figcaption", {}, title, peak), well) };
  listenTo(pane);
  return pane;
}

function listenTo(pane) {
  const { well, canvas } = pane;
  let rolled = 0;
  well.addEventListener("wheel", (event) => {
    if (currentPlane().count < 2 || event.ctrlKey) return;
    event.preventDefault();
    rolled += event.deltaMode === 0 ? event.deltaY : 40 * event.deltaY;
    const steps = Math.trunc(rolled / 40);
    rolled -= 40 * steps;
    if (steps) stepSlice(steps);
  }, { passive: false });
  well.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.shiftKey && event.key.startsWith("Arrow") && isVolume(currentView())) {
      event.preventDefault();
      return stepCross(event.key);
    }
    const act = {
      ArrowUp: () => stepSlice(-1), ArrowLeft: () => stepSlice(-1), ArrowDown: () => stepSlice(1), ArrowRight: () => stepSlice(1),
      PageUp: () => stepSlice(-PAGE_STEP), PageDown: () => stepSlice(PAGE_STEP),
      Home: () => setSlice(0), End: () => setSlice(currentPlane().count - 1),
      p: () => state.chosen[pane.k] && goToPeak(state.chosen[pane.k]), o: toggleAttention,
      ...(isVolume(currentView()) ? { c: () => showCross(!state.isCrossShown), m: measureAtCross } : {}),
    }[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    const needsSlices = event.key.length > 1;
    if (!act || (needsSlices && currentPlane().count < 2)) return;
    event.preventDefault();
    act();
  });
  canvas.addEventListener("pointermove", (event) => readOut(event, canvas));
  canvas.addEventListener("pointerdown", (event) => {
    readOut(event, canvas);
    if (state.isRulerOn && isVolume(currentView())) return dragRuler(event, canvas);
    if (state.isCrossShown && isVolume(currentView())) return moveCross(event, canvas);
    if (event.pointerType === "mouse" && event.button === 0 && isVolume(currentView())) dragWindow(event, canvas);
  });
  canvas.addEventListener("dblclick", () => {
    if (!isVolume(currentView())) return;
    state.windows.delete(windowKey(currentView()));
    setWindow(windowOf(currentView()));
  });
}

/** Sideways changes the width, up and down the level, as on a reading station. */
function dragWindow(start, canvas) {
  const view = currentView(), { low, high } = windowOf(view);
  const perPixel = Math.max(0.25, Math.min(high - low, view.range.max - view.range.min) / 300);
  const move = (event) => setLevelAndWidth(
    (low + high) / 2 + (event.clientY - start.clientY) * perPixel, high - low + (event.clientX - start.clientX) * perPixel,
  );
  followPointer(start, canvas, (event) => event !== start && move(event));
}

/** The crosshair goes to the pointer and follows it: the slices of the other planes and series with it. */
function moveCross(start, canvas) {
  followPointer(start, canvas, (event) => {
    const box = canvas.getBoundingClientRect(), plane = currentPlane();
    const voxel = plane.voxelAt((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height, sliceOf(plane));
    if (!voxel) return;
    for (const axis of [plane.across, plane.down]) state.place[axis] = (voxel[axis] + 0.5) / plane.view.size[axis];
    redraw();
  });
}

function drawCross(pane, plane, [width, height]) {
  const left = (pane.well.clientWidth - width) / 2, top = (pane.well.clientHeight - height) / 2;
  const share = (axis, isFlipped) => (isFlipped ? 1 - state.place[axis] : state.place[axis]);
  const [upright, level] = pane.cross;
  upright.hidden = level.hidden = !state.isCrossShown || !isVolume(plane.view);
  Object.assign(upright.style, { left: `${left + share(plane.across, plane.flipAcross) * width}px`, top: `${top}px`, height: `${height}px` });
  Object.assign(level.style, { top: `${top + share(plane.down, plane.flipDown) * height}px`, left: `${left}px`, width: `${width}px` });
}

/** Place, value and attention under the pointer. */
function readOut(event, canvas) {
  const box = canvas.getBoundingClientRect(), plane = currentPlane();
  if (!plane.view.isReady) return;
  const voxel = plane.voxelAt((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height, sliceOf(plane));
  $("readout").removeAttribute("aria-live");
  if (voxel) $("readout").textContent = describe(plane, voxel);
}

function describe(plane, voxel) {
  const { view } = plane, [d, h, w] = voxel, value = view.valueAt(voxel);
  const parts = isVolume(view)
    ? [`slice ${d + 1}, row ${h + 1}, column ${w + 1}`, view.unit === "hu" ? `${view.values.table ? "about " : ""}${decimal(value, 0)} HU` : `grey ${value}`]
    : [`row ${h + 1}, column ${w + 1}`, `RGB ${value.join(" ")}`];
  const world = view.worldOf(voxel.map((n) => n + 0.5));
  if (world) parts.push(`${world.map((mm, axis) => `${["LR", "PA", "IS"][axis][mm < 0 ? 0 : 1]} ${Math.abs(mm).toFixed(1)}`).join(" ")} mm`);
  if (view.labels?.[1][voxel[view.labels[0]]]) parts.push(view.labels[1][voxel[view.labels[0]]]);
  state.chosen.forEach((item, k) => {
    if (!item) return;
    const attention = plane.attentionAt(item.attention(state.head).map, voxel);
    const who = state.chosen[1] ? `attention ${"AB"[k]}` : "attention";
    parts.push(attention === null ? "not seen by the model" : `${who} ${attention.toFixed(2)}×`);
  });
  return parts.join(" · ");
}

const SCALE_BARS = [100, 50, 20, 10, 5, 2, 1]; // mm

/** Longest round length that takes at most a third of the picture. */
function scaleBar(plane, width) {
  if (!plane.view.spacing) return null;
  const perMm = width / plane.aspect[0], mm = SCALE_BARS.find((length) => length * perMm <= width / 3);
  return mm ? { length: mm * perMm, text: mm < 10 ? `${mm} mm` : `${mm / 10} cm` } : null;
}

function drawScale(pane, plane, width) {
  const bar = scaleBar(plane, width);
  pane.scale.hidden = !bar;
  if (!bar) return;
  pane.scale.style.width = `${bar.length}px`;
  pane.scale.textContent = bar.text;
}

function drawPane(pane, plane, slice) {
  const { well, canvas } = pane, item = state.chosen[pane.k];
  const room = [well.clientWidth, well.clientHeight], [wide, tall] = plane.aspect;
  const scale = Math.min(room[0] / wide, room[1] / tall);
  const size = [Math.max(1, wide * scale), Math.max(1, tall * scale)];
  canvas.style.width = `${size[0]}px`;
  canvas.style.height = `${size[1]}px`;
  Object.assign(canvas, { width: Math.round(size[0] * devicePixelRatio), height: Math.round(size[1] * devicePixelRatio) });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.setTransform(...plane.transform(canvas.width, canvas.height));
  context.drawImage(paintSlice(sliceCanvas, plane, slice, windowOf(plane.view)), 0, 0, plane.width, plane.height);
  context.resetTransform();
  if (state.isGrey && state.isShown && item && !isVolume(plane.view)) paintGrey(context);
  const attention = item?.attention(state.head);
  const tokens = item && isDrawn(attention) ? plane.tokenSlice(attention.map, slice, state.isSmooth) : null;
  if (tokens) {
    const top = scaleTop(item);
    const colours = overlayColours(COLOUR_TABLE, { top, threshold: state.threshold, opacity: state.opacity });
    paintTokens(context, scratch, plane, tokens, colours, top, state.isSmooth);
  }
  paintMarks(context, plane, slice, item && state.isShown && isLocalised(attention) ? attention : null);
  paintRuler(context, plane, slice);
  drawScale(pane, plane, size[0]);
  drawCross(pane, plane, size);
  pane.even.hidden = !item || !state.isShown || isLocalised(attention);
  pane.even.textContent = `No localisation: no patch has ${times(report.leastPeak)} an even spread`;
  pane.peak.disabled = Boolean(item) && !isLocalised(attention);
  pane.letters.forEach((letter, side) => (letter.textContent = plane.letters?.[side] ?? ""));
  const where = plane.count > 1 ? `, ${plane.name} ${slice + 1} of ${plane.count}` : "";
  canvas.setAttribute("aria-label", `${nameOf(plane.view.number)}${where}${item ? `; attention of: ${item.text}` : ""}`);
  pane.peak.hidden = !item || (plane.count < 2 && S < 2);
  pane.title.replaceChildren();
  if (state.chosen[1]) pane.title.append(element("b", { className: `badge ${"ab"[pane.k]}` }, "AB"[pane.k]), " ");
  pane.title.append(item ? item.text : "No item yet");
  pane.title.title = item ? item.text : ""; // long texts are cut on the screen
}

function draw() {
  const plane = currentPlane();
  items.forEach(drawItem);
  drawTabs();
  drawLegend();
  if (!plane.view.isReady) return;
  const slice = sliceOf(plane);
  drawTools(plane.view);
  drawSlices(plane, slice);
  drawRulerNote(plane.view);
  for (const pane of panes) drawPane(pane, plane, slice);
}

const resizes = new ResizeObserver(redraw);

// --- controls of the attention ------------------------------------------------------------------------------------

function drawLegend() {
  const shown = state.chosen.filter(Boolean);
  const tops = shown.length ? shown.map(scaleTop) : [report.scaleFloor];
  const context = $("legend").getContext("2d"), image = context.createImageData(256, 1);
  for (let i = 0; i < 256; i++) {
    const isHidden = (i / 255) * tops[0] < state.threshold;
    image.data.set([...COLOUR_TABLE.subarray(3 * i, 3 * i + 3), isHidden ? 50 : 255], 4 * i);
  }
  context.putImageData(image, 0, 0);
  const isTwo = state.isOwnScale && tops.length > 1;
  $("ticks").replaceChildren(
    ...[0, 0.5, 1].map((share) => element("span", {}, isTwo ? tops.map((top) => times(share * top)).join(" | ") : times(share * tops[0]))),
  );
  $("legend-note").textContent = `× an even spread${isTwo ? ", A | B" : ""}`;
  const highest = Math.max(...tops);
  $("threshold").max = highest.toFixed(1);
  $("threshold-value").textContent = times(state.threshold);
  $("opacity-value").textContent = percent(state.opacity);
}

function toggleAttention() {
  state.isShown = !state.isShown;
  $("show").checked = state.isShown;
  redraw();
}

function listenToControls() {
  const on = (id, event, act) => $(id).addEventListener(event, () => (act($(id)), redraw()));
  on("opacity", "input", (field) => (state.opacity = field.value / 100));
  on("threshold", "input", (field) => (state.threshold = Number(field.value)));
  on("head", "change", (field) => (state.head = Number(field.value)));
  on("scale", "change", (field) => (state.isOwnScale = field.value === "own"));
  on("upsampling", "change", (field) => (state.isSmooth = field.value === "smooth"));
  on("show", "change", (field) => (state.isShown = field.checked));
  on("even", "change", (field) => (state.isEvenShown = field.checked));
  on("cross", "change", (field) => (state.isCrossShown = field.checked));
  on("ruler", "change", (field) => (state.isRulerOn = field.checked));
  on("ruler-away", "click", () => (state.ruler = null));
  on("grey", "change", (field) => (state.isGrey = field.checked));
  on("order", "change", arrangeItems);
  on("slice", "input", (field) => setSlice(Number(field.value)));
  const level = () => setLevelAndWidth(Number($("level").value), Number($("width").value));
  on("level", "input", level);
  on("width", "input", level);
  $("head").append(element("option", { value: "-1" }, `average of ${report.numHeads}`));
  for (let h = 0; h < report.numHeads; h++) $("head").append(element("option", { value: String(h) }, `head ${h + 1}`));
  const themes = ["auto", "light", "dark"];
  $("theme").addEventListener("click", () => {
    const next = themes[(themes.indexOf(document.documentElement.dataset.theme ?? "auto") + 1) % 3];
    document.documentElement.dataset.theme = next;
    $("theme").textContent = `Theme: ${next}`;
  });
}

function showFacts() {
  for (const [name, value] of report.facts) $("facts").append(element("dt", {}, name), element("dd", {}, value));
  $("notes").append(...report.notes.map((note) => element("li", {}, note)));
  $("warning-list").append(...report.warnings.map((text) => element("li", {}, text)));
  $("warnings").hidden = report.warnings.length === 0;
}

// --- free text, when the page is served ---------------------------------------------------------------------------

async function ask(texts) {
  const answer = await fetch(report.ask, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ items: texts }),
  });
  const contents = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
  if (!answer.ok) throw new Error(contents.error);
  return itemsOf(contents, report.grid);
}

function listenToQuestions() {
  if (!report.ask) return;
  $("ask").hidden = false;
  $("ask").addEventListener("submit", async (event) => {
    event.preventDefault();
    const texts = $("ask-text").value.split(";").map((text) => text.trim()).filter(Boolean);
    const status = $("ask-status"), button = $("ask").querySelector("button");
    if (!texts.length) {
      status.textContent = "Type what to look for, such as: a small red seven";
      return;
    }
    button.disabled = true;
    status.className = "";
    status.textContent = "Looking …";
    try {
      const added = await ask(texts);
      addItems(added);
      choose(added[0]);
      added[0].row.scrollIntoView({ block: "nearest" });
      status.textContent = `Added ${added.length === 1 ? "one item" : `${added.length} items`}.`;
      $("ask-text").value = "";
    } catch (error) {
      status.className = "wrong";
      status.textContent = error instanceof TypeError ? "The server does not answer; is the command still running?" : error.message;
    }
    button.disabled = false;
  });
}

// --- start --------------------------------------------------------------------------------------------------------

async function start() {
  if (typeof DecompressionStream === "undefined" || !CSS.supports("color", "light-dark(#fff, #000)")) {
    throw new Error("This browser is too old for the report; use one from the middle of 2024 or later.");
  }
  showFacts();
  listenToControls();
  listenToQuestions();
  listenToExports();
  buildTabs();
  addItems(await itemsOf({ items: report.items, maps: report.maps }, report.grid));
  if (items.length) {
    state.chosen[0] = items[0];
    await goToPeak(items[0]);
  } else {
    await showView(0);
  }
  addEventListener("resize", redraw);
  document.documentElement.dataset.ready = "yes";
}

start().catch(showProblem);
