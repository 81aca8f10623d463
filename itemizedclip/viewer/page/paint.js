// Drawing: a slice through its window, and the attention over it. The browser's canvas does all resampling.

function newCanvas(width, height) {
  return Object.assign(document.createElement("canvas"), { width, height });
}

/** The slice at one pixel per voxel. */
function paintSlice(canvas, plane, slice, window) {
  const { view, width, height } = plane;
  if (view.unit === "rgb") return view.canvas;
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  const strides = [view.size[1] * view.size[2], view.size[2], 1];
  const step = strides[plane.across], row = strides[plane.down], { low, high } = window;
  const gain = 255 / Math.max(high - low, 1e-6);
  for (let v = 0, i = 0; v < height; v++) {
    for (let u = 0, at = slice * strides[plane.normal] + v * row; u < width; u++, at += step) {
      const grey = Math.min(255, Math.max(0, Math.round((view.array[at] - low) * gain)));
      pixels[i++] = 0xff000000 | (grey << 16) | (grey << 8) | grey;
    }
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

/** Colour of each of 256 steps from 0 to the top of the scale; below the threshold nothing. */
function overlayColours(table, { top, threshold, opacity }) {
  const colours = new Uint32Array(256);
  for (let step = 0; step < 256; step++) {
    if ((step / 255) * top < threshold) continue;
    const alpha = Math.round(255 * opacity * Math.sqrt(step / 255)); // faint where little is
    colours[step] = (alpha << 24) | (table[3 * step + 2] << 16) | (table[3 * step + 1] << 8) | table[3 * step];
  }
  return colours;
}

/**
 * The picture 8 times as large. Browsers weigh neighbours in sixteenths: eight steps per patch need just those, while
 * going to the screen at once shows stairs and shifts the whole by half a stair.
 */
function stretched(small) {
  const large = newCanvas(8 * small.width, 8 * small.height);
  large.getContext("2d").drawImage(small, 0, 0, large.width, large.height);
  return large;
}

/** Take the colours out of a photograph, so that colour means attention and nothing else. */
function paintGrey(context) {
  context.globalCompositeOperation = "saturation";
  context.fillStyle = "#808080";
  context.fillRect(0, 0, context.canvas.width, context.canvas.height);
  context.globalCompositeOperation = "source-over";
}

/** Draw tokens over the slice: the canvas stretches the small picture of them, then each pixel takes its colour. */
function paintTokens(context, scratch, plane, tokens, colours, top, isSmooth) {
  const across = plane.tokens[plane.across], down = plane.tokens[plane.down];
  const small = newCanvas(across, down), smallContext = small.getContext("2d");
  const steps = smallContext.createImageData(across, down);
  for (let i = 0; i < tokens.length; i++) {
    const step = Math.min(255, Math.round((255 * tokens[i]) / top));
    steps.data.set([step, step, step, 255], 4 * i);
  }
  smallContext.putImageData(steps, 0, 0);
  const { width, height } = context.canvas;
  Object.assign(scratch, { width, height });
  const large = scratch.getContext("2d", { willReadFrequently: true });
  large.imageSmoothingEnabled = isSmooth;
  large.setTransform(...plane.transform(width, height));
  const u = plane.seen(plane.across), v = plane.seen(plane.down);
  large.drawImage(isSmooth ? stretched(small) : small, u.start, v.start, u.length, v.length);
  const image = large.getImageData(0, 0, width, height);
  const pixels = new Uint32Array(image.data.buffer);
  for (let i = 0; i < pixels.length; i++) pixels[i] = pixels[i] >>> 24 < 128 ? 0 : colours[pixels[i] & 255];
  large.putImageData(image, 0, 0);
  context.drawImage(scratch, 0, 0);
}

/** Outline in voxels of the plane, light on dark so that it shows on any picture. */
function paintOutline(context, plane, [left, right, top, bottom], dash) {
  const { width, height } = context.canvas, [a, , , d, e, f] = plane.transform(width, height);
  const x = [left * a + e, right * a + e].sort((p, q) => p - q), y = [top * d + f, bottom * d + f].sort((p, q) => p - q);
  const pixel = devicePixelRatio;
  context.setLineDash(dash.map((n) => n * pixel));
  for (const [colour, thickness] of [["rgba(0,0,0,.7)", 3], ["rgba(255,255,255,.9)", 1]]) {
    Object.assign(context, { strokeStyle: colour, lineWidth: thickness * pixel });
    context.strokeRect(x[0], y[0], x[1] - x[0], y[1] - y[0]);
  }
  context.setLineDash([]);
}

/** Where the model's view ends inside the picture, and the patch an item looks at most. */
function paintMarks(context, plane, slice, attention) {
  const { across, down, normal, view } = plane;
  const u = plane.seen(across), v = plane.seen(down);
  const isInside = (range, size) => range.start > 0.5 || range.start + range.length < size - 0.5;
  if (isInside(u, plane.width) || isInside(v, plane.height)) {
    paintOutline(context, plane, [u.start, u.start + u.length, v.start, v.start + v.length], [4, 4]);
  }
  if (!attention || attention.peakView !== view.number || plane.cellOf(normal, slice) !== attention.peakCell[normal]) return;
  const [left, right] = plane.cellEdges(across, attention.peakCell[across]);
  const [top, bottom] = plane.cellEdges(down, attention.peakCell[down]);
  paintOutline(context, plane, [left, right, top, bottom], []);
}
