"use strict";
// What Python packed into the page, as typed arrays; items with their attention.
// Axes: S series (views), H heads, d h w tokens of a series, D H W voxels of a view (a photograph has D = 1).

const ARRAY_TYPES = { uint8: Uint8Array, int16: Int16Array, float32: Float32Array };

function bytesOfBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text.trim());
  const characters = atob(text.trim());
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return bytes;
}

async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Undo `pack_array` of html.py: inflate, join the byte planes, add up the differences along the last axis. */
async function unpackArray({ type, shape, delta, data }) {
  const planes = await inflate(bytesOfBase64(data));
  const Values = ARRAY_TYPES[type];
  const bytesEach = Values.BYTES_PER_ELEMENT;
  const count = planes.length / bytesEach;
  const bytes = bytesEach === 1 ? planes : new Uint8Array(planes.length);
  for (let p = 0; bytesEach > 1 && p < bytesEach; p++) {
    for (let i = 0, to = p, from = p * count; i < count; i++, to += bytesEach) bytes[to] = planes[from + i];
  }
  const values = new Values(bytes.buffer, 0, count);
  if (delta) {
    const row = shape[shape.length - 1];
    for (let i = 0; i < count; i++) if (i % row) values[i] += values[i - 1];
  }
  return values;
}

function blockText(id) {
  return document.getElementById(id).textContent;
}

const unpackedBlocks = new Map(); // windows of one series share their voxels

/** HU of values that are stored as numbers of steps, and their range: one pass, as these volumes are large. */
function inTable(steps, table) {
  const known = Int16Array.from(table), array = new Int16Array(steps.length);
  let first = table.length, last = 0;
  for (let i = 0; i < steps.length; i++) {
    const step = steps[i];
    array[i] = known[step];
    if (step < first) first = step;
    if (step > last) last = step;
  }
  return { array, range: { min: known[first], max: known[last], low: known[first], high: known[last] } };
}

/** The values of a block with their range, unpacked once. */
function unpackedBlock(values) {
  if (!unpackedBlocks.has(values.block)) {
    const unpacking = unpackArray({ ...values, data: blockText(values.block) });
    unpackedBlocks.set(values.block, unpacking.then((steps) => {
      return values.table ? inTable(steps, values.table) : { array: steps, range: rangeOf(steps) };
    }));
  }
  return unpackedBlocks.get(values.block);
}

/** One picture or series, or one window of it: its values are unpacked when it is first shown. */
class View {
  constructor(info, number) {
    Object.assign(this, info); // name unit size spacing toward window scale offset viewSize values body affine frame labels
    this.number = number;
    this.ready = null;
    this.isReady = false;
  }

  /** mm (right, front, head) of a place between voxel edges; null when the file does not say. */
  worldOf(at) {
    return this.affine?.map((row) => row[3] + row[0] * (at[0] - 0.5) + row[1] * (at[1] - 0.5) + row[2] * (at[2] - 0.5)) ?? null;
  }

  /** The place between voxel edges at some mm: Cramer's rule on the affine. */
  placeOf(world) {
    const m = this.affine, rest = world.map((x, row) => x - m[row][3]);
    const det = (a, b, c) => a[0] * (b[1] * c[2] - b[2] * c[1]) - b[0] * (a[1] * c[2] - a[2] * c[1]) + c[0] * (a[1] * b[2] - a[2] * b[1]);
    const columns = [0, 1, 2].map((axis) => m.map((row) => row[axis])), whole = det(...columns);
    return [0, 1, 2].map((axis) => det(...columns.map((column, k) => (k === axis ? rest : column))) / whole + 0.5);
  }

  load() {
    this.ready ??= this.#load();
    return this.ready;
  }

  async #load() {
    if (this.unit === "rgb") {
      const picture = new Blob([bytesOfBase64(blockText(this.values.block))], { type: this.values.type });
      const bitmap = await createImageBitmap(picture, { colorSpaceConversion: "none" });
      this.canvas = newCanvas(this.size[2], this.size[1]);
      this.canvas.getContext("2d", { willReadFrequently: true }).drawImage(bitmap, 0, 0);
    } else {
      Object.assign(this, await unpackedBlock(this.values));
    }
    this.isReady = true;
  }

  /** Grey value or HU of a voxel, or [r, g, b]. */
  valueAt([d, h, w]) {
    if (this.unit === "rgb") return [...this.canvas.getContext("2d").getImageData(w, h, 1, 1).data.slice(0, 3)];
    return this.array[(d * this.size[1] + h) * this.size[2] + w];
  }
}

/** Smallest and largest value, and the grey levels between which nearly all of what is not background lies. */
function rangeOf(array) {
  let min = array[0], max = array[0];
  for (const value of array) {
    if (value < min) min = value;
    if (value > max) max = value;
  }
  const counts = new Float64Array(max - min + 1);
  for (const value of array) counts[value - min]++;
  counts[0] = 0; // the background
  const total = counts.reduce((sum, count) => sum + count, 0);
  const quantile = (share) => {
    let sum = 0;
    for (let level = 0; level < counts.length; level++) if ((sum += counts[level]) >= share * total) return min + level;
    return max;
  };
  const [low, high] = total ? [quantile(0.01), quantile(0.995)] : [min, max];
  return low < high ? { min, max, low, high } : { min, max, low: min, high: max };
}

/** One text with the attention of its heads, in multiples of an even spread: (H, S, d, h, w). */
class Item {
  constructor(info, headMaps, grid) {
    Object.assign(this, info); // text score headNowhere isCut
    this.grid = grid;
    this.numTokens = grid.reduce((product, n) => product * n, 1);
    this.headMaps = headMaps;
    this.known = new Map();
  }

  /** Attention of one head, or of all averaged (-1), with its peak and how it is shared out. */
  attention(head) {
    if (!this.known.has(head)) this.known.set(head, this.#attention(head));
    return this.known.get(head);
  }

  #attention(head) {
    const L = this.numTokens, H = this.headNowhere.length;
    let map = this.headMaps.subarray(head * L, (head + 1) * L);
    if (head < 0) {
      map = new Float32Array(L);
      for (let i = 0; i < L; i++) {
        let sum = 0;
        for (let h = 0; h < H; h++) sum += this.headMaps[h * L + i];
        map[i] = sum / H;
      }
    }
    const [S, d, h, w] = this.grid, perView = L / S;
    const shares = new Array(S).fill(0);
    let peakAt = 0;
    for (let i = 0; i < L; i++) {
      shares[Math.floor(i / perView)] += map[i] / L;
      if (map[i] > map[peakAt]) peakAt = i;
    }
    const inView = peakAt % perView;
    const nowhere = head < 0 ? this.headNowhere.reduce((sum, share) => sum + share, 0) / H : this.headNowhere[head];
    return {
      map, shares, nowhere, peak: map[peakAt], peakView: Math.floor(peakAt / perView),
      peakCell: [Math.floor(inView / (h * w)), Math.floor(inView / w) % h, inView % w],
    };
  }
}

async function itemsOf(packed, grid) {
  if (!packed.items.length) return [];
  const maps = await unpackArray({ ...packed.maps, data: packed.maps.data ?? blockText(packed.maps.block) });
  const each = maps.length / packed.items.length;
  return packed.items.map((info, k) => new Item(info, maps.subarray(k * each, (k + 1) * each), grid));
}
