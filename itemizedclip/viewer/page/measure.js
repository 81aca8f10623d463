// The crosshair and the ruler: places in a series, by pointer and by keys.

/** Shares of the three axes → place between voxel edges of a view. */
const edgesOf = (view, shares) => shares.map((share, axis) => share * view.size[axis]);

/** A step of the crosshair to where an arrow points on the screen; says what lies there. */
function stepCross(key) {
  const plane = currentPlane(), [axis, sign] = {
    ArrowLeft: [plane.across, plane.flipAcross ? 1 : -1], ArrowRight: [plane.across, plane.flipAcross ? -1 : 1],
    ArrowUp: [plane.down, plane.flipDown ? 1 : -1], ArrowDown: [plane.down, plane.flipDown ? -1 : 1],
  }[key];
  const count = plane.view.size[axis], voxel = Math.min(count - 1, Math.max(0, Math.floor(state.place[axis] * count) + sign));
  state.place[axis] = (voxel + 0.5) / count;
  showCross(true);
  sayPlace();
}

function showCross(isShown) {
  state.isCrossShown = isShown;
  $("cross").checked = isShown;
  redraw();
}

/** What lies at the crosshair, to those who hear the page too. */
function sayPlace() {
  const { view } = currentPlane();
  $("readout").setAttribute("aria-live", "polite");
  $("readout").textContent = describe(currentPlane(), edgesOf(view, state.place).map((at, axis) => Math.min(view.size[axis] - 1, Math.floor(at))));
}

// --- ruler --------------------------------------------------------------------------------------------------------

/** One end of the ruler at the crosshair, then the other; a third time begins anew. */
function measureAtCross() {
  const at = edgesOf(currentView(), state.place), { ruler } = state;
  const isSecond = ruler && !ruler.to && ruler.series === seriesOf(state.view);
  state.ruler = isSecond ? { ...ruler, to: at } : { series: seriesOf(state.view), from: at, to: null };
  showCross(true);
}

/** Drawn from where the pointer went down to where it is. */
function dragRuler(start, canvas) {
  const place = (event) => {
    const box = canvas.getBoundingClientRect(), plane = currentPlane(), at = [0, 0, 0];
    const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
    at[plane.normal] = sliceOf(plane) + 0.5;
    at[plane.across] = Math.min(1, Math.max(0, plane.flipAcross ? 1 - x : x)) * plane.width;
    at[plane.down] = Math.min(1, Math.max(0, plane.flipDown ? 1 - y : y)) * plane.height;
    return at;
  };
  const from = place(start);
  followPointer(start, canvas, (event) => {
    state.ruler = { series: seriesOf(state.view), from, to: place(event) };
    redraw();
  });
}

/** What a ruler measures, for people; "" while it has one end. */
function rulerLength({ spacing }, { from, to }) {
  if (!to) return "";
  const along = to.map((at, axis) => (at - from[axis]) * (spacing ? spacing[axis] : 1));
  return spacing ? `${decimal(Math.hypot(...along), 1)} mm` : `${decimal(Math.hypot(...along), 1)} voxels (the file says no size)`;
}

/** The ends that lie in this slice, and the line between them if both do. */
function paintRuler(context, plane, slice) {
  const { ruler } = state;
  if (!ruler || ruler.series !== seriesOf(plane.view.number)) return;
  const { width, height } = context.canvas, [a, , , d, e, f] = plane.transform(width, height), pixel = devicePixelRatio;
  const ends = [ruler.from, ruler.to].filter((at) => at && Math.min(plane.count - 1, Math.floor(at[plane.normal])) === slice)
    .map((at) => [at[plane.across] * a + e, at[plane.down] * d + f]);
  for (const [colour, thickness] of [["rgba(0,0,0,.7)", 4], ["#ffd84d", 2]]) {
    Object.assign(context, { strokeStyle: colour, lineWidth: thickness * pixel });
    context.beginPath();
    for (const [x, y] of ends) {
      context.moveTo(x - 5 * pixel, y - 5 * pixel);
      context.lineTo(x + 5 * pixel, y + 5 * pixel);
      context.moveTo(x - 5 * pixel, y + 5 * pixel);
      context.lineTo(x + 5 * pixel, y - 5 * pixel);
    }
    if (ends.length === 2) {
      context.moveTo(...ends[0]);
      context.lineTo(...ends[1]);
    }
    context.stroke();
  }
  if (ends.length < 2) return;
  const text = rulerLength(plane.view, ruler), isLeft = ends[1][0] > width / 2;
  Object.assign(context, {
    font: `bold ${13 * pixel}px system-ui, sans-serif`, fillStyle: "#ffd84d", strokeStyle: "#000", lineWidth: 3 * pixel,
    textAlign: isLeft ? "right" : "left", textBaseline: "bottom",
  });
  const at = [ends[1][0] + (isLeft ? -8 : 8) * pixel, Math.max(16 * pixel, ends[1][1] - 6 * pixel)];
  context.strokeText(text, ...at);
  context.fillText(text, ...at);
}

function drawRulerNote(view) {
  const { ruler } = state, isOf = ruler && ruler.series === seriesOf(view.number);
  $("ruler-note").hidden = !isOf;
  if (!isOf) return;
  const spans = ruler.to && Math.floor(ruler.to[state.normal]) !== Math.floor(ruler.from[state.normal]);
  $("ruler-text").textContent = ruler.to ? `Ruler: ${rulerLength(view, ruler)}${spans ? ", from one slice to another" : ""}` : "Ruler: one end is set; press M at the other";
}

/** Calls `go` for the press and every move until the pointer is let go. */
function followPointer(start, canvas, go) {
  const stop = () => {
    for (const [name, act] of Object.entries(acts)) canvas.removeEventListener(name, act);
  };
  const acts = { pointermove: go, pointerup: stop, pointercancel: stop };
  go(start);
  if (start.isPrimary) canvas.setPointerCapture(start.pointerId);
  for (const [name, act] of Object.entries(acts)) canvas.addEventListener(name, act);
}
