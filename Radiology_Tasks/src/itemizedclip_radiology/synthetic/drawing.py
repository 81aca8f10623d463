"""Synthetic studies with planted findings: the drawing behind `itemizedclip_radiology.synthetic.cohort`.

A study shows a schematic head (MRI or CT) or chest (CT) and up to three findings. Each kind of finding has a shape and
brightness of its own, and only the series one would look at shows it.

Axes: D depth from head to foot, H rows from front to back, W columns from the patient's right to left. Coordinates z,
y, x run from −1 to 1 over a volume of the model's size.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from itemizedclip.runtime.errors import UserError
from itemizedclip_radiology.data.volumes import Size

GENERATOR_VERSION = 1
"""Raise when a change makes other voxels or items from the same arguments."""

Kind = Literal["mri", "head_ct", "chest_ct"]

MRI_NORMAL_ITEMS = ("no significant abnormalities.", "Study is unremarkable.")
HEAD_CT_NORMAL_ITEMS = ("no significant abnormalities.",)
CHEST_NORMAL_ITEMS = ("no significant abnormalities",)
"""Items of a normal study, exactly as the normal check knows them."""

MAX_FINDINGS = 3
NORMAL_SHARE = 0.25
_MAX_OVERLAP = 0.15
_ATTEMPTS = 12

Array = np.ndarray


@dataclass
class Canvas:
    """One study being drawn.

    Attributes:
        z, y, x: coordinates, broadcastable to (D, H, W).
        tissue: name → bool (D, H, W).
        volumes: series → float32 (D, H, W), grey values 0…1 or HU.
        rng: all random choices of the study.
    """

    z: Array
    y: Array
    x: Array
    tissue: dict[str, Array]
    volumes: dict[str, Array]
    rng: np.random.Generator

    def ball(self, centre: Sequence[float], radius: float | Sequence[float]) -> Array:
        """An ellipsoid: bool (D, H, W)."""
        rz, ry, rx = (radius,) * 3 if isinstance(radius, (int, float)) else radius
        cz, cy, cx = centre
        return ((self.z - cz) / rz) ** 2 + ((self.y - cy) / ry) ** 2 + ((self.x - cx) / rx) ** 2 < 1

    def tube(self, centre: Sequence[float], radius: float) -> Array:
        """A cylinder along z over the whole volume."""
        inside = (self.y - centre[0]) ** 2 + (self.x - centre[1]) ** 2 < radius**2
        return np.broadcast_to(inside, self.shape)

    @property
    def shape(self) -> Size:
        """Voxels (D, H, W)."""
        return self.z.shape[0], self.y.shape[1], self.x.shape[2]

    def uniform(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))


Paint = Array
"""float32 (D, H, W): the new values of a finding's voxels, NaN everywhere else."""


def paint(mask: Array, value: float) -> Paint:
    """One value on a mask."""
    return np.where(mask, np.float32(value), np.float32(np.nan))


def hollow(outer: Array, inner: Array, rim: float, core: float) -> Paint:
    """A rim and a core."""
    return np.where(inner & outer, np.float32(core), paint(outer, rim))


@dataclass(frozen=True)
class Finding:
    """A kind of finding.

    Attributes:
        name: column of the label files where there is one.
        words: its text without the full stop.
        place: what half of its texts add; {side} is left or right.
        series: the series that show it.
        draw: canvas, side (−1 right, +1 left) → its voxels.
    """

    name: str
    words: str
    place: str
    series: tuple[str, ...]
    draw: Callable[[Canvas, int], Paint]

    def text(self, side: str, rng: np.random.Generator) -> str:
        """One wording; zero-shot texts name no place, so training must not always see one."""
        return self.words + (self.place.format(side=side) if rng.random() < 0.5 else "") + "."


@dataclass
class PlantedFinding:
    """One finding of one study.

    Attributes:
        name: see `Finding`.
        item: its text.
        side: left or right of the patient.
        series: names of the series that show it.
        mask: bool (D, H, W).
    """

    name: str
    item: str
    side: str
    series: list[str]
    mask: Array


@dataclass
class SyntheticStudy:
    """One rendered study.

    Attributes:
        volumes: series → float32 (D, H, W), grey values 0…1 or HU.
        findings: what was planted, empty for a normal study.
        items: text items, one per finding, or the sentence of a normal study.
    """

    volumes: dict[str, Array]
    findings: list[PlantedFinding]
    items: list[str]

    @property
    def names(self) -> set[str]:
        """Names of the planted findings."""
        return {finding.name for finding in self.findings}


# --- heads -----------------------------------------------------------------------------------------------------------

MRI_SERIES: Mapping[str, tuple[float, float, float]] = {
    "AX_T1": (0.50, 0.15, 0.05),
    "AX_T2": (0.40, 0.85, 0.05),
    "AX_FLAIR": (0.45, 0.12, 0.05),
    "AX_DWI": (0.35, 0.12, 0.02),
    "AX_T1_POST": (0.48, 0.15, 0.05),
    "AX_SWI": (0.42, 0.50, 0.05),
}
"""Series → grey values of brain, fluid, skull."""

BLOOD, BONE, BRAIN = (f"MPR-AX_HEAD-protocol_{window}Window" for window in ("Blood", "Bone", "Brain"))
HEAD_CT_SERIES: Mapping[str, tuple[float, float, float]] = {
    BLOOD: (0.35, 0.20, 1.0),
    BONE: (0.20, 0.18, 0.9),
    BRAIN: (0.50, 0.30, 1.0),
}

_PLAIN_SERIES = ("AX_T1", "AX_T2")
"""Series without findings; a study may lack one of them."""


def _head(canvas: Canvas, series: Mapping[str, tuple[float, float, float]]) -> None:
    """Brain, ventricles, skull, in every series."""
    tall, wide = canvas.uniform(0.86, 0.92), canvas.uniform(0.74, 0.80)
    radius = np.sqrt((canvas.z / 1.4) ** 2 + (canvas.y / tall) ** 2 + (canvas.x / wide) ** 2)
    brain, skull = radius < 0.86, (radius >= 0.88) & (radius < 1.0)
    ventricle = {side: canvas.ball((0, 0.0, side * 0.14), (0.7, 0.30, 0.09)) for side in (-1, 1)}
    canvas.tissue.update(brain=brain, skull=skull, radius=radius, right=ventricle[-1], left=ventricle[1])
    soft = _smooth_noise(canvas)
    for name, (brain_grey, fluid_grey, skull_grey) in series.items():
        grey = np.zeros(canvas.shape, dtype=np.float32)
        grey[brain] = brain_grey + 0.06 * soft[brain]
        grey[ventricle[-1] | ventricle[1]] = fluid_grey
        grey[skull] = skull_grey
        canvas.volumes[name] = grey
    if BRAIN in canvas.volumes:
        canvas.volumes[BRAIN][_midline(canvas, 0.0)] = 0.8


def _midline(canvas: Canvas, bulge: float) -> Array:
    """The falx: a thin sheet between the hemispheres, pushed sideways by `bulge` in its middle."""
    position = bulge * np.exp(-((canvas.y / 0.4) ** 2))
    return (abs(canvas.x - position) < 0.035) & (abs(canvas.y) < 0.7) & canvas.tissue["brain"]


def _spot_in_brain(canvas: Canvas, side: int) -> tuple[float, float, float]:
    """A point well inside one hemisphere, beside the ventricle."""
    return canvas.uniform(-0.45, 0.45), canvas.uniform(-0.4, 0.4), side * canvas.uniform(0.34, 0.42)


def _blob(canvas: Canvas, side: int, radius: tuple[float, float], value: float) -> Paint:
    size = canvas.uniform(*radius)
    return paint(canvas.ball(_spot_in_brain(canvas, side), (2 * size, size, size)) & canvas.tissue["brain"], value)


def _stroke(canvas: Canvas, side: int) -> Paint:
    """A wedge of one hemisphere, from the ventricle to the skull."""
    front = canvas.uniform(-0.1, 0.25)
    sector = (canvas.y > front + 0.3 * (canvas.x * side - 0.3)) & (canvas.x * side > 0.26) & (abs(canvas.z) < 0.6)
    return paint(sector & canvas.tissue["brain"], 0.95)


def _rimmed_blob(canvas: Canvas, side: int, share: float, rim: float, core: float) -> Paint:
    """A blob whose core takes `share` of its radius."""
    centre, size = _spot_in_brain(canvas, side), canvas.uniform(0.22, 0.28)
    outer = canvas.ball(centre, (2 * size, size, size)) & canvas.tissue["brain"]
    return hollow(outer, canvas.ball(centre, (2 * share * size, share * size, share * size)), rim, core)


def _at_skull(canvas: Canvas, side: int, depth: float) -> tuple[float, float, float]:
    """A point of the brain's surface at one side, `depth` of the way from the skull to the middle."""
    angle = canvas.uniform(-0.8, 0.8)
    shrink = 0.86 * (1 - depth)
    return canvas.uniform(-0.3, 0.3), 0.88 * shrink * np.sin(angle), side * 0.77 * shrink * np.cos(angle)


def _meningioma(canvas: Canvas, side: int) -> Paint:
    size = canvas.uniform(0.19, 0.24)
    return paint(canvas.ball(_at_skull(canvas, side, 0.18), (2 * size, size, size)) & canvas.tissue["brain"], 1.0)


def _metastases(canvas: Canvas, side: int) -> Paint:
    mask = np.zeros(canvas.shape, dtype=bool)
    for _ in range(6):
        cz, cy, cx = canvas.uniform(-0.6, 0.6), canvas.uniform(-0.5, 0.5), side * canvas.uniform(0.28, 0.50)
        mask |= canvas.ball((cz, cy, cx), (0.18, 0.09, 0.09))
    return paint(mask & canvas.tissue["brain"], 1.0)


def _white_matter(canvas: Canvas, side: int) -> Paint:
    around = canvas.ball((0, 0, side * 0.14), (0.85, 0.46, 0.21)) & ~canvas.tissue["left"] & ~canvas.tissue["right"]
    return paint(around & (canvas.x * side > 0.02), 0.85)


def _ventricle(canvas: Canvas, side: int) -> Paint:
    return paint(canvas.tissue["left" if side > 0 else "right"], 0.95)


def _subdural(canvas: Canvas, side: int) -> Paint:
    tissue = canvas.tissue
    return paint(tissue["brain"] & (tissue["radius"] > 0.70) & (canvas.x * side > 0.22) & (abs(canvas.z) < 0.7), 0.95)


def _epidural(canvas: Canvas, side: int) -> Paint:
    lens = canvas.ball(_at_skull(canvas, side, 0.0), (0.6, 0.34, 0.26))
    return paint(lens & canvas.tissue["brain"], 0.95)


def _subarachnoid(canvas: Canvas, side: int) -> Paint:
    tissue = canvas.tissue
    folds = np.sin(canvas.y * 24 + 3 * canvas.z) > 0.1
    return paint(tissue["brain"] & (tissue["radius"] > 0.42) & folds & (canvas.x * side > 0.24), 0.9)


def _fracture(canvas: Canvas, side: int) -> Paint:
    """A gap in the skull and a fragment pushed inwards."""
    at = canvas.uniform(-0.4, 0.4)
    cz, cy, cx = canvas.uniform(-0.3, 0.3), 0.6 * at, side * 0.48 * np.sqrt(1 - at**2)
    fragment = canvas.ball((cz, cy, cx), (0.6, 0.24, 0.22)) & canvas.tissue["brain"]
    gap = canvas.ball((cz, cy * 1.5, cx * 1.6), (0.6, 0.14, 0.25)) & canvas.tissue["skull"]
    return np.where(fragment, np.float32(1.0), paint(gap, 0.02))


def _midline_shift(canvas: Canvas, side: int) -> Paint:
    moved, straight = _midline(canvas, 0.28 * side), _midline(canvas, 0.0)
    return np.where(moved, np.float32(0.95), paint(straight & (abs(canvas.y) < 0.5), 0.5))


def _brain(name: str, words: str, series: str, draw: Callable[[Canvas, int], Paint]) -> Finding:
    return Finding(name, words, " in the {side} hemisphere", (series,), draw)


def _bleed(name: str, adjective: str, draw: Callable[[Canvas, int], Paint]) -> Finding:
    words = f"Intracranial hemorrhage with {adjective} hemorrhage"
    return Finding(name, words, ", bleeding in {side} side", (BLOOD,), draw)


MRI_FINDINGS = (
    _brain("Stroke", "Acute stroke", "AX_DWI", _stroke),
    _brain("Glioma", "Glioma", "AX_FLAIR", lambda c, s: _rimmed_blob(c, s, 0.6, 0.95, 0.02)),
    _brain("Meningioma", "Meningioma", "AX_T1_POST", _meningioma),
    _brain("Metastasis", "Metastasis", "AX_T1_POST", _metastases),
    _brain("Cavernoma", "Cavernoma", "AX_SWI", lambda c, s: _rimmed_blob(c, s, 0.8, 0.0, 1.0)),
    _brain("White matter", "White matter disease", "AX_FLAIR", _white_matter),
)

HEAD_CT_FINDINGS = (
    _bleed("IPH", "intraparenchymal", lambda c, s: _blob(c, s, (0.25, 0.30), 0.95)),
    _bleed("IVH", "intraventricular", _ventricle),
    _bleed("SDH", "subdural", _subdural),
    _bleed("EDH", "epidural", _epidural),
    _bleed("SAH", "subarachnoid", _subarachnoid),
    Finding("Fracture", "Skull fracture", " in {side} side", (BONE,), _fracture),
    Finding("MassEffect", "Mass effect", "", (BRAIN,), lambda c, s: _blob(c, s, (0.24, 0.28), 1.0)),
    Finding("MidlineShift", "Midline shift", "", (BRAIN,), _midline_shift),
)
BLEEDS = ("IPH", "IVH", "SDH", "EDH", "SAH")

# --- chests ----------------------------------------------------------------------------------------------------------

CHEST_SERIES = "chest"
LUNG_HU, SOFT_HU, AIR_HU = -780.0, 40.0, -1000.0
_HEART = (0.15, -0.12, 0.14)
_HEART_RADIUS = 0.24
_AORTA = (0.24, 0.13)


def _chest(canvas: Canvas) -> None:
    """Body, lungs, heart, aorta, spine."""
    body = np.broadcast_to((canvas.y / 0.70) ** 2 + (canvas.x / 0.90) ** 2 < 1, canvas.shape)
    skin = np.broadcast_to((canvas.y / 0.62) ** 2 + (canvas.x / 0.82) ** 2 > 1, canvas.shape)
    lung = {side: canvas.ball((0, 0, side * 0.42), (1.1, 0.50, 0.32)) for side in (-1, 1)}
    heart = canvas.ball(_HEART, (0.5, _HEART_RADIUS, _HEART_RADIUS))
    for side in lung:
        lung[side] = lung[side] & ~heart
    canvas.tissue.update(right=lung[-1], left=lung[1], heart=heart, body=body)
    hu = np.full(canvas.shape, AIR_HU, dtype=np.float32)
    hu[body] = SOFT_HU
    hu[body & skin] = -100.0
    soft = _smooth_noise(canvas)
    for inside in lung.values():
        hu[inside] = LUNG_HU + 25 * soft[inside]
    hu[canvas.tube((0.48, 0.0), 0.10)] = 400.0
    hu[canvas.tube(_AORTA, 0.07)] = 60.0
    canvas.volumes[CHEST_SERIES] = hu


def _lung(canvas: Canvas, side: int) -> Array:
    return canvas.tissue["left" if side > 0 else "right"]


def _in_lung(canvas: Canvas, side: int, margin: float = 0.0) -> tuple[float, float, float]:
    """A point inside one lung."""
    x = 0.42 + (0.0 if margin > 0.15 else canvas.uniform(-0.08, 0.08))
    return canvas.uniform(-0.45, 0.45), canvas.uniform(-0.22, 0.22), side * x


def _lung_ball(canvas: Canvas, side: int, radius: tuple[float, float], hu: float) -> Paint:
    size = canvas.uniform(*radius)
    return paint(canvas.ball(_in_lung(canvas, side, size), (1.5 * size, size, size)) & _lung(canvas, side), hu)


def _airways(canvas: Canvas, side: int, outer: float, inner: float, count: int) -> Paint:
    """Tubes along z with walls of tissue and cores of air."""
    walls, cores = np.zeros(canvas.shape, dtype=bool), np.zeros(canvas.shape, dtype=bool)
    first = canvas.uniform(-0.05, 0.05)
    for number in range(count):
        centre = (first + (number - (count - 1) / 2) * 2.6 * outer, side * (0.40 + 0.05 * (-1) ** number))
        walls |= canvas.tube(centre, outer)
        cores |= canvas.tube(centre, inner)
    within = _lung(canvas, side) & (abs(canvas.z) < 0.6)
    return hollow(walls & within, cores, 0.0, AIR_HU)


def _atelectasis(canvas: Canvas, side: int) -> Paint:
    at = canvas.uniform(0.35, 0.5)
    return paint(_lung(canvas, side) & (abs(canvas.z - at - 0.5 * canvas.y) < 0.14), 0.0)


def _mosaic(canvas: Canvas, side: int) -> Paint:
    cells = np.floor(canvas.z * 2.5) + np.floor(canvas.y * 5) + np.floor(canvas.x * 5)
    return np.where(cells % 2 == 0, paint(_lung(canvas, side), -960.0), paint(_lung(canvas, side), -620.0))


def _fibrosis(canvas: Canvas, side: int) -> Paint:
    streaks = np.sin(18 * canvas.x * side + 14 * canvas.y) > 0.2
    return paint(_lung(canvas, side) & (canvas.z < -0.35) & streaks, -300.0)


def _septa(canvas: Canvas, side: int) -> Paint:
    lines = (np.mod(canvas.y, 0.17) < 0.045) | (np.mod(canvas.x, 0.17) < 0.045)
    return paint(_lung(canvas, side) & (canvas.z > 0.15) & lines, -250.0)


def _coronary(canvas: Canvas, side: int) -> Paint:
    spots = np.zeros(canvas.shape, dtype=bool)
    cz, cy, cx = _HEART
    for angle in (-1.2, 0.0, 1.2):
        turned = angle + canvas.uniform(-0.2, 0.2) + (0.0 if side > 0 else np.pi)
        centre = (cz + 0.3 * angle / 1.2, cy + 0.19 * np.sin(turned), cx + 0.19 * np.cos(turned))
        spots |= canvas.ball(centre, (0.14, 0.06, 0.06))
    return paint(spots, 900.0)


def _cardiomegaly(canvas: Canvas, side: int) -> Paint:
    size = _HEART_RADIUS * canvas.uniform(1.6, 1.75)
    return paint(canvas.ball((_HEART[0], _HEART[1], _HEART[2]), (0.8, size, size)) & (canvas.y < 0.2), 45.0)


def _pericardial(canvas: Canvas, side: int) -> Paint:
    outer = canvas.ball(_HEART, (0.62, _HEART_RADIUS + 0.08, _HEART_RADIUS + 0.08))
    return paint(outer & ~canvas.tissue["heart"], 250.0)


def _hernia(canvas: Canvas, side: int) -> Paint:
    centre = (0.62, 0.17, canvas.uniform(-0.10, -0.04))
    return hollow(canvas.ball(centre, (0.30, 0.15, 0.15)), canvas.ball(centre, (0.2, 0.09, 0.09)), 30.0, -900.0)


def _arterial(canvas: Canvas, side: int) -> Paint:
    wall = canvas.tube(_AORTA, 0.085) & ~canvas.tube(_AORTA, 0.04)
    return paint(wall & ((canvas.x - _AORTA[1]) * side > 0) & (abs(canvas.z) < 0.7), 900.0)


def _effusion(canvas: Canvas, side: int) -> Paint:
    level = canvas.uniform(0.05, 0.15)
    return paint(_lung(canvas, side) & (canvas.y > level) & (canvas.z > -0.3), 10.0)


def _emphysema(canvas: Canvas, side: int) -> Paint:
    return paint(_lung(canvas, side) & (canvas.z < canvas.uniform(0.0, 0.2)) & (canvas.y < 0.1), AIR_HU)


def _on_side(name: str, words: str, draw: Callable[[Canvas, int], Paint]) -> Finding:
    return Finding(name, f"Findings consistent with {words}", " in the {side} lung", (CHEST_SERIES,), draw)


def _central(name: str, words: str, draw: Callable[[Canvas, int], Paint]) -> Finding:
    return Finding(name, f"Findings consistent with {words}", "", (CHEST_SERIES,), draw)


CHEST_FINDINGS = (
    _on_side("Emphysema", "emphysema", _emphysema),
    _on_side("Atelectasis", "atelectasis", _atelectasis),
    _on_side("Lung nodule", "nodules or nodular density", lambda c, s: _lung_ball(c, s, (0.11, 0.14), 60.0)),
    _on_side("Lung opacity", "opacity", lambda c, s: _lung_ball(c, s, (0.24, 0.28), -450.0)),
    _on_side("Pulmonary fibrotic sequela", "pulmonary fibrotic sequela", _fibrosis),
    _on_side("Pleural effusion", "pleural effusion", _effusion),
    _on_side("Mosaic attenuation pattern", "mosaic attenuation pattern", _mosaic),
    _on_side("Peribronchial thickening", "peribronchial thickening", lambda c, s: _airways(c, s, 0.07, 0.03, 4)),
    _on_side("Consolidation", "consolidation", lambda c, s: _lung_ball(c, s, (0.28, 0.32), 30.0)),
    _on_side("Bronchiectasis", "bronchiectasis or bronchiectatic changes", lambda c, s: _airways(c, s, 0.13, 0.09, 2)),
    _on_side("Interlobular septal thickening", "interlobular septal thickening", _septa),
    _central("Cardiomegaly", "cardiomegaly", _cardiomegaly),
    _central("Pericardial effusion", "pericardial effusion", _pericardial),
    _central("Coronary artery wall calcification", "coronary artery wall calcification", _coronary),
    _central("Hiatal hernia", "hiatal hernia", _hernia),
    _central("Arterial wall calcification", "arterial wall calcification", _arterial),
)

FINDINGS: Mapping[Kind, tuple[Finding, ...]] = {
    "mri": MRI_FINDINGS,
    "head_ct": HEAD_CT_FINDINGS,
    "chest_ct": CHEST_FINDINGS,
}

# --- one study -------------------------------------------------------------------------------------------------------


def _smooth_noise(canvas: Canvas) -> Array:
    """float32 (D, H, W), about −1…1, varying over an eighth of the volume."""
    coarse = torch.from_numpy(canvas.rng.uniform(-1, 1, (1, 1, 4, 9, 9)).astype(np.float32))
    return F.interpolate(coarse, size=canvas.shape, mode="trilinear", align_corners=True)[0, 0].numpy()


def find_finding(kind: Kind, name: str) -> Finding:
    """The finding of that name.

    Raises:
        ValueError: there is none; lists the known ones.
    """
    for finding in FINDINGS[kind]:
        if finding.name == name:
            return finding
    known = ", ".join(finding.name for finding in FINDINGS[kind])
    raise UserError(f"no finding {name!r} among those of {kind}; expected one of {known}")


def render_study(
    kind: Kind,
    *,
    seed: int,
    stream: str,
    index: int,
    size: Size,
    saved_size: Size | None = None,
    findings: Sequence[str] | None = None,
    choose_from: Sequence[str] | None = None,
) -> SyntheticStudy:
    """Draw one study; the same arguments give the same study.

    Args:
        kind: what is shown.
        seed, stream, index: which study; streams (such as "train" and "valid") share nothing.
        size: voxels (D, H, W) that the schematic body fills.
        saved_size: voxels of the volumes, centred on it; rows and columns beyond `size` are margin, more slices are
            thinner ones (head) or margin (chest). Default `size`.
        findings: names of the findings to plant; default a random choice.
        choose_from: random choices are made among these; default all of the kind.

    Raises:
        ValueError: an unknown finding, or a size below 8.
    """
    if min(size) < 8:
        raise UserError(f"size is {size}; expected at least 8 voxels along each axis")
    generator = np.random.default_rng([GENERATOR_VERSION, seed, zlib.crc32(f"{kind}/{stream}".encode()), index])
    canvas = _empty_canvas(kind, size, saved_size or size, generator)
    if kind == "chest_ct":
        _chest(canvas)
    else:
        _head(canvas, _series_of_study(kind, generator))
    if findings is None:
        findings = _choose_findings([f.name for f in FINDINGS[kind]] if choose_from is None else choose_from, generator)
    planted = [p for name in findings if (p := _plant(canvas, find_finding(kind, name))) is not None]
    noise = 12.0 if kind == "chest_ct" else 0.02
    for name, volume in canvas.volumes.items():
        shown = volume + noise * generator.standard_normal(volume.shape, dtype=np.float32)
        canvas.volumes[name] = np.rint(shown) if kind == "chest_ct" else np.clip(shown, 0, 1)
    items = [finding.item for finding in planted]
    if not planted:
        sentences = {"mri": MRI_NORMAL_ITEMS, "head_ct": HEAD_CT_NORMAL_ITEMS, "chest_ct": CHEST_NORMAL_ITEMS}[kind]
        items = [sentences[int(generator.integers(len(sentences)))]]
    return SyntheticStudy(canvas.volumes, planted, items)


def _empty_canvas(kind: Kind, size: Size, saved_size: Size, generator: np.random.Generator) -> Canvas:
    reference = size if kind == "chest_ct" else (saved_size[0], *size[1:])
    axes = [(np.arange(n) - (n - 1) / 2) / (m / 2) for n, m in zip(saved_size, reference)]
    z, y, x = np.meshgrid(*(axis.astype(np.float32) for axis in axes), indexing="ij", sparse=True)
    shift = generator.uniform(-0.04, 0.04, 3).astype(np.float32)
    return Canvas(z - shift[0], y - shift[1], x - shift[2], {}, {}, generator)


def _series_of_study(kind: Kind, generator: np.random.Generator) -> dict[str, tuple[float, float, float]]:
    if kind == "head_ct":
        return dict(HEAD_CT_SERIES)
    absent = [name for name in _PLAIN_SERIES if generator.random() < 0.3]
    return {name: greys for name, greys in MRI_SERIES.items() if name not in absent}


def _choose_findings(names: Sequence[str], generator: np.random.Generator) -> list[str]:
    if generator.random() < NORMAL_SHARE:
        return []
    count = int(generator.integers(1, min(MAX_FINDINGS, len(names)) + 1))
    return [names[i] for i in generator.choice(len(names), size=count, replace=False)]


def _plant(canvas: Canvas, finding: Finding) -> PlantedFinding | None:
    """Draw a finding where it hides little of those before it; None when it finds no such place."""
    taken = canvas.tissue.setdefault("taken", np.zeros(canvas.shape, dtype=bool))
    for _ in range(_ATTEMPTS):
        side = 1 if canvas.rng.random() < 0.5 else -1
        values = finding.draw(canvas, side)
        mask = ~np.isnan(values)
        if mask.any() and (mask & taken).sum() <= _MAX_OVERLAP * mask.sum():
            break
    else:
        return None
    mask &= ~taken
    taken |= mask
    for series in finding.series:
        canvas.volumes[series][mask] = values[mask]
    word = "left" if side > 0 else "right"
    return PlantedFinding(finding.name, finding.text(word, canvas.rng), word, list(finding.series), mask)
