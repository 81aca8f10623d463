"""The report: one HTML file that shows an image or study and where each of its items looked.

The file holds everything it needs and reaches for nothing: the page's own scripts and style (`page/`), the pixels or
voxels of every view as they were read, and the attention of every head on the grid of tokens. The browser carries the
attention to the pixels with its canvas; what it needs to know for that is the scale and offset of `Geometry`.

Axes: T items, H heads, S views (series), d h w tokens of a view, D H W voxels of a view (a photograph has D = 1).
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np
from matplotlib import colormaps
from PIL import Image

from itemizedclip.evaluation.calibration import Judgement
from itemizedclip.runtime.errors import UserError
from itemizedclip.viewer.explanation import Explanation
from itemizedclip.viewer.figures import COLOUR_MAP, LEAST_PEAK, MIN_SCALE_TOP
from itemizedclip.viewer.inputs import InputView

SCRIPTS = ("data.js", "planes.js", "paint.js", "standing.js", "opposites.js", "measure.js", "export.js", "app.js")
"""Parts of the page's one script, in this order."""

MOST_LOSSLESS_PIXELS = 4_000_000
"""Larger photographs are stored as JPEG of quality 95, about a fifth of the size."""

LONGEST_SIDE = 8192
"""Larger photographs are shown at this size: browsers refuse to draw pictures beyond some 16,000 pixels."""

MOST_EXACT_VOXELS = 40_000_000
"""HU of larger volumes are stored in steps of one byte (`HU_STEPS`), which halves the page."""

HU_STEPS = np.concatenate(
    [np.arange(-1024, -950, 37), np.arange(-950, -200, 15), np.arange(-200, 300, 4), np.arange(300, 3072, 36)]
)
"""Lowest HU of each of 254 steps: 4 HU wide where soft tissue lies, 15 in lungs, 37 in air, whose noise would be half
of the page, 36 above."""

_MANTISSA_BITS = 12
"""Attention is kept to this many binary digits (1 in 8,000), which halves its size."""


@dataclass(frozen=True)
class Provenance:
    """What a report was made from.

    Attributes:
        model: name of the model's config.
        checkpoint: file name of the weights.
        sha256: of that file, hexadecimal.
        facts: further (name, value) pairs, such as the epoch.
        notes: what was decided while loading, for people.
    """

    model: str
    checkpoint: str
    sha256: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def report_html(
    explanation: Explanation,
    provenance: Provenance,
    *,
    cut_items: Sequence[bool] | None = None,
    judgements: Sequence[Judgement | None] = (),
    ask: str | None = None,
) -> str:
    """The page, complete.

    Args:
        explanation: the image or study and its items; without an item only when `ask` is given.
        provenance: what it was made from.
        cut_items: T, which texts the text tower does not read to their end.
        judgements: T, what calibrated scores mean; empty: nothing is said of it.
        ask: address, relative to the page, that answers further texts (`itemizedclip.viewer.page.serve`).

    Raises:
        ValueError: nothing to show.
    """
    if not explanation.items and ask is None:
        raise UserError("no text to look for; give at least one item")
    source = explanation.source
    blocks: dict[str, str] = {}
    items = described_items(explanation, cut_items, judgements)
    blocks["maps"] = items["maps"].pop("data")
    items["maps"]["block"] = "maps"
    notes = [*source.notes, *provenance.notes]
    views: list[dict[str, Any]] = []
    series = series_of_views(source.views)
    for number, view in enumerate(source.views):
        fitting, reason = _fitting_picture(view)
        notes += [reason] if reason else []
        if _is_rounded(view):
            notes.append(
                f"{view.name}: {view.values.size / 1e6:.0f} million voxels, HU rounded to steps of 4 between −200 and "
                "300, 15 from −950 on, 37 below, 36 above; `itemizedclip explain` writes them exactly, as NIfTI"
            )
        first = next(n for n, other in enumerate(source.views) if other.values is view.values)
        packed = views[first]["values"] if first < number else _packed(fitting, f"view-{number}", blocks)
        views.append(_described_view(fitting) | {"values": packed})
    contents = {
        "ask": ask,
        "grid": [1] * (4 - len(explanation.maps.grid)) + list(explanation.maps.grid),
        "numHeads": explanation.maps.head_nowhere.shape[1],
        "colours": _colour_table(),
        "scaleFloor": MIN_SCALE_TOP,
        "leastPeak": LEAST_PEAK,
        "views": views,
        "series": [{"name": one.name, "views": list(one.views), "labels": list(one.labels)} for one in series],
        "facts": [
            ("input", source.name),
            ("model", provenance.model),
            ("checkpoint", provenance.checkpoint),
            ("SHA-256", provenance.sha256),
            *provenance.facts,
        ],
        "notes": notes,
        "warnings": list(source.warnings),
        **items,
    }
    return _filled_page(source.name, provenance, contents, blocks, may_ask=ask is not None)


def described_items(
    explanation: Explanation, cut_items: Sequence[bool] | None = None, judgements: Sequence[Judgement | None] = ()
) -> dict[str, Any]:
    """Items with their scores and maps, as the page reads them.

    Args:
        explanation: T items.
        cut_items: T, which texts the text tower does not read to their end.
        judgements: T, or none.
    """
    maps = explanation.maps
    cut = [False] * len(explanation.items) if cut_items is None else cut_items
    described = [
        {
            "text": text,
            "score": round(float(maps.scores[k]), 6),
            "headNowhere": [round(share, 6) for share in maps.head_nowhere[k].tolist()],
            "isCut": bool(cut[k]),
            "standing": _described_judgement(judgements[k]) if judgements else None,
        }
        for k, text in enumerate(explanation.items)
    ]
    return {"items": described, "maps": pack_array(_shortened(maps.times_uniform(per_head=True).numpy()))}


def _described_judgement(judgement: Judgement | None) -> dict[str, Any] | None:
    """Where a score stands among the calibration cases, for the page."""
    if judgement is None:
        return None
    return {
        "score": judgement.score,
        "probability": judgement.probability,
        "truths": list(judgement.truths),
        "thresholds": [[wanted, value, judgement.above[wanted]] for wanted, value in judgement.thresholds.items()],
        "below": dict(judgement.below),
    }


@dataclass(frozen=True)
class SeriesOfViews:
    """One series as people count them.

    Attributes:
        name: what the names of its views have in common.
        views: their numbers; several where the model sees one series in several windows.
        labels: what tells them apart, such as "Brain"; one empty text for a single view.
    """

    name: str
    views: tuple[int, ...]
    labels: tuple[str, ...]


def series_of_views(views: Sequence[InputView]) -> list[SeriesOfViews]:
    """The series of a study: views that share their voxels, or say so (`window_of`), are windows of one."""
    numbers: dict[int | str, list[int]] = {}
    for number, view in enumerate(views):
        numbers.setdefault(view.window_of or id(view.values), []).append(number)
    series = []
    for group in numbers.values():
        names = [views[number].name for number in group]
        if len(group) == 1:
            series.append(SeriesOfViews(names[0], (group[0],), ("",)))
            continue
        words = [name.split("_") for name in names]
        same = 0
        while all(same < len(own) - 1 and own[same] == words[0][same] for own in words):
            same += 1
        labels = ("_".join(own[same:]).removesuffix("Window") or "_".join(own[same:]) for own in words)
        series.append(SeriesOfViews("_".join(words[0][:same]) or names[0], tuple(group), tuple(labels)))
    return series


# --- packing ---------------------------------------------------------------------------------------------------------


def pack_array(values: np.ndarray) -> dict[str, Any]:
    """An array as text that a browser unpacks without a library: deflate of byte planes, in base64.

    Integers are stored as they are or as differences along the last axis ("delta"), whichever is smaller: smooth
    pictures are, as differences, and noise on an even ground is not.

    Args:
        values: uint8, int16 or float32.
    """
    values = np.ascontiguousarray(values)
    packed, is_delta = _deflated(values), False
    if values.dtype.kind in "iu":
        # Integers wrap round, so that differences need no more bits than values.
        differences = _deflated(np.diff(values, axis=-1, prepend=np.zeros_like(values[..., :1])))
        packed, is_delta = min((packed, False), (differences, True), key=lambda candidate: len(candidate[0]))
    data = base64.b64encode(packed).decode("ascii")
    return {"type": values.dtype.name, "shape": list(values.shape), "delta": is_delta, "data": data}


def _deflated(values: np.ndarray) -> bytes:
    """All first bytes of the values, then all second ones …, compressed."""
    little_endian = values.astype(values.dtype.newbyteorder("<"), copy=False)
    return zlib.compress(little_endian.reshape(-1).view(np.uint8).reshape(-1, values.dtype.itemsize).T.tobytes())


def _shortened(values: np.ndarray) -> np.ndarray:
    """float32 rounded to `_MANTISSA_BITS` binary digits."""
    drop = 23 - _MANTISSA_BITS
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(1 << (drop - 1))) & np.uint32(0xFFFFFFFF << drop & 0xFFFFFFFF)).view(np.float32)


def _packed(view: InputView, block: str, blocks: dict[str, str]) -> dict[str, Any]:
    """Where the page finds the values of a view, which go into `blocks`."""
    if view.unit == "rgb":
        packed = _packed_picture(view.values)
    elif _is_rounded(view):
        steps, middles = rounded_hu(view.values)
        packed = pack_array(steps) | {"table": middles.tolist()}
    else:
        packed = pack_array(view.values)
    blocks[block] = packed.pop("data")
    return {**packed, "block": block}


def _is_rounded(view: InputView) -> bool:
    return view.unit == "hu" and view.values.size > MOST_EXACT_VOXELS


def rounded_hu(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """HU in steps of one byte.

    Args:
        values: int16.

    Returns:
        uint8 numbers of steps in the shape of `values`, and int16 (254,), the HU that each stands for: its middle.
        Values below or above all steps count as the lowest or the highest.
    """
    limits = np.iinfo(np.int16)
    numbers = np.searchsorted(HU_STEPS, np.arange(limits.min, limits.max + 1), side="right") - 1
    table = np.clip(numbers, 0, len(HU_STEPS) - 1).astype(np.uint8)
    middles = (HU_STEPS + np.append(HU_STEPS[1:], 3072)) // 2
    # As unsigned numbers int16 count from 0 up, then the negative ones.
    return np.roll(table, limits.min)[values.view(np.uint16)], middles.astype(np.int16)


def _described_view(view: InputView) -> dict[str, Any]:
    """What the page knows of a view, but for its values."""
    geometry = view.geometry
    size = geometry.input_size
    lacking = 3 - len(size)
    return {
        "name": view.name,
        "unit": view.unit,
        "size": [1] * lacking + list(size),
        "spacing": None if view.spacing_mm is None else [float(step) for step in view.spacing_mm],
        "window": None if view.window_hu is None else list(view.window_hu),
        "toward": None if view.affine is None else _directions(view.affine),
        "scale": [1.0] * lacking + list(geometry.scale),
        "offset": [0.0] * lacking + list(geometry.offset),
        "viewSize": [1] * lacking + list(geometry.view_size),
        "body": view.body,
        "affine": None if view.affine is None else [[float(x) for x in row] for row in view.affine[:3]],
        "frame": view.frame,
        "labels": None if view.slice_labels is None else [view.slice_labels.axis, list(view.slice_labels.texts)],
    }


def _fitting_picture(view: InputView) -> tuple[InputView, str]:
    """A photograph as large as browsers draw it, and what was done to it; other views as they are."""
    if view.unit != "rgb":
        return view, ""
    height, width = view.values.shape[:2]
    if max(height, width) > LONGEST_SIDE:
        picture = Image.fromarray(view.values)
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        geometry = view.geometry.of_resized_input((picture.height, picture.width))
        smaller = replace(view, values=np.asarray(picture), geometry=geometry)
        return smaller, f"{view.name}: {width}×{height} pixels, shown at {picture.width}×{picture.height}, as JPEG"
    if height * width > MOST_LOSSLESS_PIXELS:
        return view, f"{view.name}: stored as JPEG, its colours are not exact"
    return view, ""


def _packed_picture(values: np.ndarray) -> dict[str, Any]:
    kind = "png" if math.prod(values.shape[:2]) <= MOST_LOSSLESS_PIXELS else "jpeg"
    buffer = io.BytesIO()
    if kind == "png":
        Image.fromarray(values).save(buffer, "png", optimize=True)
    else:
        Image.fromarray(values).save(buffer, "jpeg", quality=95, subsampling=0)
    return {"type": f"image/{kind}", "data": base64.b64encode(buffer.getvalue()).decode("ascii")}


def _directions(affine: np.ndarray) -> list[str] | None:
    """Where each voxel axis leads, by the nearest of L R P A I S; None for an affine that leads nowhere."""
    # Only volumes have an affine, and whoever reads volumes has nibabel.
    from nibabel.orientations import aff2axcodes

    codes = aff2axcodes(affine)
    return None if None in codes else list(codes)


def _colour_table() -> str:
    """256 RGB triples of the figures' colour map, in base64."""
    table = colormaps[COLOUR_MAP](np.arange(256), bytes=True)[:, :3]
    return base64.b64encode(np.ascontiguousarray(table).tobytes()).decode("ascii")


# --- page ------------------------------------------------------------------------------------------------------------


def content_policy(script: str, style: str, *, may_ask: bool) -> str:
    """Content-Security-Policy of a page: its own script and style by hash, pictures it holds, no network.

    Args:
        script: the page's script.
        style: the page's style.
        may_ask: whether it may send requests to the server it came from.
    """

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"

    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {digest(script)}",
            f"style-src {digest(style)}",
            "img-src data: blob:",
            f"connect-src {chr(39)}{'self' if may_ask else 'none'}{chr(39)}",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def _filled_page(
    name: str, provenance: Provenance, contents: dict[str, Any], blocks: dict[str, str], *, may_ask: bool
) -> str:
    page = files("itemizedclip.viewer.page")
    script = "\n" + "\n".join((page / part).read_text(encoding="utf-8") for part in SCRIPTS)
    style = (page / "page.css").read_text(encoding="utf-8")
    line = f"Model {provenance.model} · checkpoint {provenance.checkpoint} · SHA-256 {provenance.sha256[:12]}…"
    return Template((page / "page.html").read_text(encoding="utf-8")).substitute(
        policy=html.escape(content_policy(script, style, may_ask=may_ask)),
        title=html.escape(f"{name}: where each item looked"),
        name=html.escape(name),
        provenance=html.escape(line),
        style=style,
        script=script,
        # Only letters, digits, + / = stand in a block.
        blocks="\n".join(f'<script type="text/plain" id="{key}">{data}</script>' for key, data in blocks.items()),
        report=_json_for_html(contents),
    )


def _json_for_html(contents: Any) -> str:
    """JSON that no text inside can end early: `<` and `&` are written as escapes, which JSON reads back."""
    text = json.dumps(contents, ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
