// What is taken away from the page: the present view as a picture, the findings as a table.

function download(blob, name) {
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

const fileStem = () => report.facts[0][1].replace(/[^A-Za-z0-9.+-]+/g, "_").slice(0, 60) || "report";

/** Lines of text no wider than a picture; a word that is wider stands alone. */
function wrapped(context, text, width) {
  const lines = [];
  for (const word of text.split(" ")) {
    const longer = lines.length ? `${lines.at(-1)} ${word}` : word;
    if (lines.length && context.measureText(longer).width <= width) lines[lines.length - 1] = longer;
    else lines.push(word);
  }
  return lines;
}

/** The panes as they stand, with letters and scale bar, and below them what they show. */
function pictureOfView() {
  const plane = currentPlane(), slice = sliceOf(plane), pixel = devicePixelRatio, gap = 8 * pixel, line = 18 * pixel;
  const width = panes.reduce((sum, pane) => sum + pane.canvas.width + gap, gap);
  const height = Math.max(...panes.map((pane) => pane.canvas.height));
  const picture = newCanvas(width, 1), font = `${13 * pixel}px system-ui, sans-serif`;
  let context = picture.getContext("2d");
  context.font = font;
  const label = plane.view.labels?.[0] === plane.normal ? plane.view.labels[1][slice] : "";
  const window = windowOf(plane.view);
  const facts = [
    report.facts[0][1], nameOf(plane.view.number), plane.count > 1 ? `${plane.name} ${slice + 1} / ${plane.count}` : "", label,
    window ? `level ${decimal((window.low + window.high) / 2, 0)} width ${decimal(window.high - window.low, 0)}` : "",
  ].filter(Boolean).join(" · ");
  const about = state.chosen.flatMap((item, k) => (item ? [[item, k]] : [])).map(([item, k]) => {
    const attention = item.attention(state.head), name = state.chosen[1] ? `${"AB"[k]}: ` : "";
    const where = isLocalised(attention) ? `peak ${times(attention.peak)}` : `no localisation (peak ${times(attention.peak)})`;
    return `${name}${item.text} · TCSim ${decimal(item.score, 3)} · ${where}${state.isShown ? `, colours 0 to ${times(scaleTop(item))} an even spread` : ", attention hidden"}`;
  });
  const notes = [...report.warnings.map((warning) => `Warning: ${warning}`), "A score is no probability. Research use only, not a medical device."];
  const lines = [facts, ...about, ...notes].flatMap((text) => wrapped(context, text, width - 2 * gap));
  picture.height = height + 2 * gap + lines.length * line + gap;
  context = picture.getContext("2d");
  Object.assign(context, { fillStyle: "#08090a" });
  context.fillRect(0, 0, picture.width, picture.height);
  let x = gap;
  for (const pane of panes) {
    const { canvas } = pane, top = gap + (height - canvas.height) / 2, bottom = top + canvas.height;
    context.drawImage(canvas, x, top);
    Object.assign(context, { font: `bold ${font}`, fillStyle: "#fff", strokeStyle: "#000", lineWidth: 3 * pixel, textBaseline: "middle" });
    const places = [[x + 6 * pixel, (top + bottom) / 2, "left"], [x + canvas.width - 6 * pixel, (top + bottom) / 2, "right"],
      [x + canvas.width / 2, top + 10 * pixel, "center"], [x + canvas.width / 2, bottom - 10 * pixel, "center"]];
    const write = (text, at, y, align) => {
      context.textAlign = align;
      context.strokeText(text, at, y);
      context.fillText(text, at, y);
    };
    places.forEach(([at, y, align], side) => write(plane.letters?.[side] ?? "", at, y, align));
    const bar = scaleBar(plane, canvas.width / pixel);
    if (bar) {
      const right = x + canvas.width - 8 * pixel, y = bottom - 8 * pixel;
      context.fillRect(right - bar.length * pixel, y, bar.length * pixel, 2 * pixel);
      write(bar.text, right - (bar.length * pixel) / 2, y - 9 * pixel, "center");
    }
    x += canvas.width + gap;
  }
  Object.assign(context, { font, fillStyle: "#e4e7eb", textAlign: "left", textBaseline: "alphabetic" });
  lines.forEach((text, k) => context.fillText(text, gap, height + 2 * gap + (k + 0.8) * line));
  return picture;
}

/** One field of a table: quoted where it must be, and never read as a formula by a spreadsheet. */
function csvField(value) {
  const text = typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value ?? "");
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

const rounded = (value, digits) => Number(value.toFixed(digits));

/** Every item with its numbers over all heads; slices, rows and columns count from 1, mm as in NIfTI. */
function tableOfFindings() {
  const head = ["item", "text", "tcsim", "opposite_item", "above_opposite", "calibrated_score", "calibrated_probability", "conformal_set", "is_localised", "peak_times_even", "nowhere_share", "peak_series", "peak_window", "slice", "row", "column",
    "mm_right", "mm_front", "mm_head", "slice_label", ...views.map((_, s) => `share_${nameOf(s)}`)];
  const rows = items.map((item, k) => {
    const attention = item.attention(-1), { shares, nowhere, peak, peakView, peakCell } = attention, view = views[peakView];
    const isFound = isLocalised(attention), plane = new Plane(view, 0, TOKENS);
    const voxel = peakCell.map((cell, axis) => plane.voxelOf(axis, cell));
    const world = view.worldOf(voxel.map((n) => n + 0.5)), label = view.labels?.[1][voxel[view.labels[0]]] ?? "";
    const mm = world?.map((x) => rounded(x, 1)) ?? ["", "", ""];
    const place = isFound ? [seriesList[seriesOf(peakView)].name, labelOf(peakView), ...voxel.map((n) => n + 1), ...mm, label] : Array(9).fill("");
    const against = item.opposite ? [items.indexOf(item.opposite) + 1, rounded(item.score - item.opposite.score, 6)] : ["", ""];
    const { standing } = item;
    const calibrated = standing ? [rounded(standing.score, 6), rounded(standing.probability, 4), standing.truths.join(" or ")] : ["", "", ""];
    return [k + 1, item.text, rounded(item.score, 6), ...against, ...calibrated, isFound ? "yes" : "no", rounded(peak, 3), rounded(nowhere, 4),
      ...place, ...shares.map((share) => rounded(share, 4))];
  });
  return [head, ...rows].map((row) => row.map(csvField).join(",")).join("\r\n") + "\r\n";
}

function listenToExports() {
  $("save-picture").addEventListener("click", () => {
    if (!currentView().isReady) return;
    pictureOfView().toBlob((blob) => download(blob, `${fileStem()}.png`), "image/png");
  });
  // The mark at the start tells spreadsheets that the text is UTF-8.
  $("save-table").addEventListener("click", () => download(new Blob(["\ufeff", tableOfFindings()], { type: "text/csv" }), `${fileStem()}.csv`));
  $("print").addEventListener("click", () => print());
  // What is folded on the screen is read on paper.
  let wasOpen = false;
  addEventListener("beforeprint", () => {
    wasOpen = $("about").open;
    $("about").open = true;
  });
  addEventListener("afterprint", () => ($("about").open = wasOpen));
}
