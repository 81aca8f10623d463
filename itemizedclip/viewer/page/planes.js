// Cuts through a view: which voxels lie where on the screen, and which token saw them.
// Positions are measured between voxel edges, as in itemizedclip/viewer/maps.py: voxel n covers n … n + 1.

const UNNAMED_PLANES = ["Slice", "Row", "Column"];
const OPPOSITE = { L: "R", R: "L", A: "P", P: "A", S: "I", I: "S" };

class Plane {
  /** The cut of a view across one of its three axes. */
  constructor(view, normal, tokens) {
    this.view = view;
    this.normal = normal;
    [this.across, this.down] = [[2, 1], [2, 0], [1, 0]][normal];
    this.tokens = tokens; // d h w of one series
    this.width = view.size[this.across];
    this.height = view.size[this.down];
    this.count = view.size[normal];
    const spacing = view.spacing ?? [1, 1, 1];
    this.aspect = [this.width * spacing[this.across], this.height * spacing[this.down]];
    // Patients are looked at from their feet or from the front, noses to the left: their right is on our left.
    const toward = view.toward;
    this.flipAcross = toward !== null && "RA".includes(toward[this.across]);
    this.flipDown = toward !== null && "AS".includes(toward[this.down]);
  }

  get name() {
    const { toward } = this.view;
    if (toward === null) return UNNAMED_PLANES[this.normal];
    return { S: "Axial", I: "Axial", A: "Coronal", P: "Coronal" }[toward[this.normal]] ?? "Sagittal";
  }

  /** Letters at the left, right, top and bottom edge, or null when the file does not say. */
  get letters() {
    if (this.view.toward === null) return null;
    const pair = (axis, isFlipped) => {
      const far = this.view.toward[axis];
      return isFlipped ? [far, OPPOSITE[far]] : [OPPOSITE[far], far];
    };
    return [...pair(this.across, this.flipAcross), ...pair(this.down, this.flipDown)];
  }

  /** Where the model's view begins along an axis and how far it reaches, in voxels. */
  seen(axis) {
    const { scale, offset, viewSize } = this.view;
    return { start: offset[axis] / scale[axis], length: viewSize[axis] / scale[axis] };
  }

  /** Token along an axis that saw a voxel; -1 where the model saw nothing. */
  cellOf(axis, voxel) {
    const { start, length } = this.seen(axis);
    const at = (voxel + 0.5 - start) / length;
    return at < 0 || at >= 1 ? -1 : Math.floor(at * this.tokens[axis]);
  }

  /** First and last edge of a token along an axis, in voxels. */
  cellEdges(axis, cell) {
    const { start, length } = this.seen(axis), step = length / this.tokens[axis];
    return [start + cell * step, start + (cell + 1) * step];
  }

  /** The voxel in the middle of a token. */
  voxelOf(axis, cell) {
    const [first, last] = this.cellEdges(axis, cell);
    return Math.min(this.view.size[axis] - 1, Math.max(0, Math.floor((first + last) / 2)));
  }

  /** The tokens that one slice cuts, row by row; smooth: between the two nearest layers. Null: not seen. */
  tokenSlice(map, slice, isSmooth) {
    const { normal, across, down, tokens } = this;
    if (this.cellOf(normal, slice) < 0) return null;
    const { start, length } = this.seen(normal);
    const at = ((slice + 0.5 - start) / length) * tokens[normal] - 0.5;
    const clamp = (layer) => Math.min(tokens[normal] - 1, Math.max(0, layer));
    const first = clamp(isSmooth ? Math.floor(at) : Math.round(at));
    const second = clamp(isSmooth ? Math.floor(at) + 1 : Math.round(at));
    const share = isSmooth ? at - Math.floor(at) : 0;
    const strides = [tokens[1] * tokens[2], tokens[2], 1];
    const base = this.view.number * tokens[0] * strides[0];
    const values = new Float32Array(tokens[across] * tokens[down]);
    for (let v = 0, i = 0; v < tokens[down]; v++) {
      for (let u = 0; u < tokens[across]; u++, i++) {
        const at0 = base + v * strides[down] + u * strides[across];
        values[i] = (1 - share) * map[at0 + first * strides[normal]] + share * map[at0 + second * strides[normal]];
      }
    }
    return values;
  }

  /** Transform from voxel edges of this plane to the pixels of a canvas of this size. */
  transform(width, height) {
    const x = width / this.width, y = height / this.height;
    return [this.flipAcross ? -x : x, 0, 0, this.flipDown ? -y : y, this.flipAcross ? width : 0, this.flipDown ? height : 0];
  }

  /** Voxel at a place of the canvas given in shares of its width and height. */
  voxelAt(x, y, slice) {
    const at = [0, 0, 0];
    at[this.normal] = slice;
    at[this.across] = Math.floor((this.flipAcross ? 1 - x : x) * this.width);
    at[this.down] = Math.floor((this.flipDown ? 1 - y : y) * this.height);
    return at.every((n, axis) => n >= 0 && n < this.view.size[axis]) ? at : null;
  }

  /** Attention of a token at a voxel, or null where the model saw nothing. */
  attentionAt(map, voxel) {
    const cells = voxel.map((n, axis) => this.cellOf(axis, n));
    if (cells.includes(-1)) return null;
    const [d, h, w] = this.tokens;
    return map[((this.view.number * d + cells[0]) * h + cells[1]) * w + cells[2]];
  }

  /** Sum of the attention in every layer of tokens along the normal, with the layer's edges in voxels. */
  profile(map) {
    const [d, h, w] = this.tokens, sums = new Array(this.tokens[this.normal]).fill(0);
    let i = this.view.number * d * h * w;
    for (let z = 0; z < d; z++) for (let y = 0; y < h; y++) for (let x = 0; x < w; x++) sums[[z, y, x][this.normal]] += map[i++];
    return sums.map((sum, cell) => ({ sum, edges: this.cellEdges(this.normal, cell) }));
  }
}
