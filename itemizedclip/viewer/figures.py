"""Figures of attention: the image, and over it, item by item, where the model looked.

The image below an overlay is shown in grey, so colour means attention and nothing else. All overlays of a figure share
one scale from 0 to the largest value, in multiples of an even spread (`ItemMaps.times_uniform`).

Axes: T items, H heads, H0, W0 rows and columns of the image, pixels. Lengths on paper in inches, type in points.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patheffects import withStroke
from matplotlib.textpath import TextToPath
from matplotlib.ticker import MaxNLocator
from PIL import Image

from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.logs import shown

COLOUR_MAP = "inferno"
"""Perceptually uniform, told apart under every common colour blindness, and dark (colourless) where nothing is."""

OVERLAY_OPACITY = 0.3, 0.8
"""At the low and the high end of the scale: the image stays visible where the model did not look."""

MIN_SCALE_TOP = 4.0
"""The colour scale reaches at least this far, so that a map that is nearly even does not look like a finding."""

LEAST_PEAK = 2.0
"""A map whose most attended patch has less than so many times an even share says nothing of a place: "no localisation"
is written instead of colours."""

MIN_DPI = 150.0
MAX_PIXELS = 36_000_000
"""Attention figures show every pixel of the image while the whole figure has no more pixels than this."""

_IMAGE_AREA = 6.5  # square inches of one image
_LONGEST_SIDE = 4.4
_MOST_HEAD_COLUMNS = 9  # the average and eight heads
_MIN_CELL_WIDTH = 2.7  # room for a title above a narrow image
_MIN_HEAD_CELL_WIDTH = 1.0  # room for "nowhere 100 %"
_MAX_WIDTH = 18.0
_MARGIN, _GAP = 0.15, 0.2
_FIGURE_PROPORTION = 1.5  # width : height that the choice of columns aims at
_BAR_HEIGHT = 0.14
_TITLE_PT, _NOTE_PT = 9.0, 8.0
_LINE_SPACING = 1.25
_MAX_TITLE_LINES = 16  # at the narrowest about 600 characters, more than a 100-token text tower reads
_NOTE_COLOUR = "0.35"

_PNG_METADATA: dict[str, Any] = {"Software": None}
_PDF_METADATA: dict[str, Any] = {"Creator": None, "Producer": None, "CreationDate": None}
_METADATA = {".png": _PNG_METADATA, ".pdf": _PDF_METADATA}


def attention_figure(
    image: Image.Image | np.ndarray,
    items: Sequence[str],
    maps: np.ndarray,
    scores: Sequence[float],
    *,
    nowhere: Sequence[float] | None = None,
    peaks: Sequence[float] | None = None,
    masks: np.ndarray | None = None,
    title: str = "image",
    scale_top: float | None = None,
) -> Figure:
    """The image, then one overlay per item with its text and score.

    Args:
        image: RGB picture or uint8 (H0, W0, 3) array, at its own size.
        items: T texts, at least one; wrapped above their overlays.
        maps: (T, H0, W0), multiples of an even spread, NaN where the model saw nothing (`map_to_input`).
        scores: T TCSims.
        nowhere: T shares of attention spent on no patch, 0 … 1; printed when given.
        peaks: T largest multiples (`ItemMaps.peaks`), printed when given: beside a sharper map a weak one is dark.
        masks: bool (T, H0, W0), outlined when given: where each item truly is.
        title: stands above the image, such as a file name.
        scale_top: value of the brightest colour; default the largest of the maps, at least `MIN_SCALE_TOP`.

    Raises:
        ValueError: arguments whose sizes do not fit together.
    """
    _check_items(items)
    pixels = _rgb(image)
    T, size = len(items), pixels.shape[:2]
    _check_shape("maps", maps, (T, *size))
    _check_shape("scores", scores, (T,))
    _check_shape("nowhere", nowhere, (T,))
    _check_shape("peaks", peaks, (T,))
    _check_shape("masks", masks, (T, *size))
    panels = [
        Panel(
            f"{k + 1}. {items[k]}",
            _score_note(scores[k], None if nowhere is None else nowhere[k], None if peaks is None else peaks[k]),
            maps[k],
            None if masks is None else masks[k],
        )
        for k in range(T)
    ]
    first = Panel(title, _size_note(pixels))
    image_size = _fit(size, math.sqrt(_IMAGE_AREA * size[0] / size[1]))
    sheet = Sheet([Block("", [first, *panels])], _choose_columns(1 + T, image_size), image_size)
    finest_dpi = max(MIN_DPI, math.sqrt(MAX_PIXELS / (sheet.width * sheet.height)))
    native_dpi = size[1] / image_size[0]
    return sheet.render(pixels, _scale_top(maps, scale_top), min(max(MIN_DPI, native_dpi), finest_dpi))


def head_figure(
    image: Image.Image | np.ndarray,
    items: Sequence[str],
    maps: np.ndarray,
    scores: Sequence[float],
    *,
    nowhere: np.ndarray,
    title: str = "image",
    scale_top: float | None = None,
) -> Figure:
    """For every item one row: the average over heads, then each head.

    Args:
        image: as for `attention_figure`.
        items: T texts.
        maps: (T, H, H0, W0), multiples of an even spread.
        scores: T TCSims.
        nowhere: (T, H) shares of attention spent on no patch.
        title: stands above the image.
        scale_top: as for `attention_figure`; the default covers all heads.

    Raises:
        ValueError: arguments whose sizes do not fit together.
    """
    _check_items(items)
    pixels = _rgb(image)
    T, size = len(items), pixels.shape[:2]
    num_heads = np.shape(maps)[1] if np.ndim(maps) == 4 else 0
    _check_shape("maps", maps, (T, num_heads, *size))
    _check_shape("scores", scores, (T,))
    _check_shape("nowhere", nowhere, (T, num_heads))
    blocks = [Block("", [Panel(title, _size_note(pixels))])]
    for k in range(T):
        panels = [Panel("all heads", nowhere_note(nowhere[k].mean()), maps[k].mean(0))]
        panels += [Panel(f"head {h + 1}", nowhere_note(nowhere[k, h]), maps[k, h]) for h in range(num_heads)]
        blocks.append(Block(f"{k + 1}. {items[k]}  (TCSim {signed(scores[k])})", panels))
    rows = -(-(1 + num_heads) // _MOST_HEAD_COLUMNS)
    columns = -(-(1 + num_heads) // rows)
    width = (_MAX_WIDTH - 2 * _MARGIN) / _MOST_HEAD_COLUMNS - _GAP
    image_size = _fit(size, width * min(2.0, size[0] / size[1]))
    sheet = Sheet(blocks, columns, image_size, min_cell_width=_MIN_HEAD_CELL_WIDTH)
    return sheet.render(pixels, _scale_top(maps, scale_top), MIN_DPI)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG or PDF, by suffix; equal figures give equal files, which carry no date or program name.

    Raises:
        ValueError: another suffix.
    """
    path = Path(path)
    metadata = _METADATA.get(path.suffix.lower())
    if metadata is None:
        raise UserError(f"{path}: expected a file name that ends in {' or '.join(_METADATA)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.style.context("default"):
        figure.savefig(path, metadata=metadata)
    return path


# --- contents --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """An image with a title and a note above; with `values`, in grey below their colours.

    Attributes:
        title: wrapped.
        note: one line, smaller.
        values: (H0, W0), multiples of an even spread, or None.
        mask: bool (H0, W0), outlined, or None.
        pixels: uint8 (H0, W0, 3); None shows the sheet's image.
        size: height and width in any unit, where pixels are not square.
        marks: letters at the left, right, top and bottom edge, such as R L A P.
    """

    title: str
    note: str
    values: np.ndarray | None = None
    mask: np.ndarray | None = None
    pixels: np.ndarray | None = None
    size: tuple[float, float] | None = None
    marks: tuple[str, str, str, str] = ("", "", "", "")


@dataclass(frozen=True)
class Block:
    """Panels that belong together, under a heading and a smaller line (or none)."""

    heading: str
    panels: list[Panel]
    note: str = ""


def _rgb(image: Image.Image | np.ndarray) -> np.ndarray:
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise UserError(f"image must be RGB, uint8 (H, W, 3), got {pixels.dtype} {pixels.shape}")
    return pixels


def _check_items(items: Sequence[str]) -> None:
    if not items:
        raise UserError("a figure needs at least one item")


def _check_shape(name: str, values: Any, expected: tuple[int, ...]) -> None:
    if values is not None and np.shape(values) != expected:
        raise UserError(f"{name}: expected the shape {expected}, got {np.shape(values)}")


def _scale_top(maps: np.ndarray, chosen: float | None) -> float:
    seen = maps[np.isfinite(maps)]
    return chosen if chosen is not None else max(MIN_SCALE_TOP, float(seen.max(initial=0.0)))


def _size_note(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]} × {pixels.shape[0]} px"


def nowhere_note(share: float) -> str:
    return f"nowhere {100 * share:.0f} %"


def peak_note(peak: float) -> str:
    """The peak, and that it is none where the map is nearly even."""
    return f"peak {peak:.1f}×" + ("" if peak >= LEAST_PEAK else ", no localisation")


def signed(score: float) -> str:
    return f"{score:.3f}".replace("-", "−")


def _score_note(score: float, nowhere: float | None, peak: float | None) -> str:
    parts = [f"TCSim {signed(score)}"]
    if nowhere is not None:
        parts.append(nowhere_note(nowhere))
    if peak is not None:
        parts.append(peak_note(peak))
    return " · ".join(parts)


# --- layout ----------------------------------------------------------------------------------------------------------


def _fit(size: Sequence[int], height: float) -> tuple[float, float]:
    """Width and height of an image on paper: of this height, or less so that no side exceeds `_LONGEST_SIDE`."""
    width = height * size[1] / size[0]
    factor = min(1.0, _LONGEST_SIDE / max(width, height))
    return width * factor, height * factor


def _fit_box(size: tuple[float, float], box: tuple[float, float]) -> tuple[float, float]:
    """Width and height of an image of `size` (height, width) that fills a box of (width, height) one way."""
    factor = min(box[0] / size[1], box[1] / size[0])
    return size[1] * factor, size[0] * factor


def _choose_columns(num_panels: int, image_size: tuple[float, float]) -> int:
    """The number of columns that comes nearest to a well-proportioned figure without many empty places."""
    width, height = max(image_size[0], _MIN_CELL_WIDTH) + _GAP, image_size[1] + 0.8

    def badness(columns: int) -> float:
        rows = -(-num_panels // columns)
        proportion = columns * width / (rows * height)
        empty = rows * columns - num_panels
        return abs(math.log(proportion / _FIGURE_PROPORTION)) + 2 * empty / num_panels

    most = max(1, min(num_panels, int(_MAX_WIDTH / width)))
    return min(range(1, most + 1), key=badness)


class Sheet:
    """Blocks of panels laid out from the top down, then the colour bar and what the signs mean.

    Places are kept in inches from the top left until the height is known.

    Args:
        blocks: what to show.
        columns: panels side by side.
        image_size: width and height of every image; a panel with a `size` of its own fits into it.
        min_cell_width: room for titles above narrower images.
        legend: what colours and signs mean; default as far as the panels use them.
    """

    def __init__(
        self,
        blocks: list[Block],
        columns: int,
        image_size: tuple[float, float],
        *,
        min_cell_width: float = _MIN_CELL_WIDTH,
        legend: str | None = None,
    ) -> None:
        self._image_size = image_size
        self._lines: list[tuple[float, float, str, float, str]] = []  # x, y of the baseline, text, points, colour
        self._images: list[tuple[float, float, Panel]] = []
        cell_width = max(image_size[0], min_cell_width)
        width = 2 * _MARGIN + columns * cell_width + (columns - 1) * _GAP
        self.width = max(width, 2 * _MARGIN + 2 * _MIN_CELL_WIDTH)  # room for the legend
        self.height = _MARGIN
        for block in blocks:
            if block.heading:
                self._paragraph(block.heading, _TITLE_PT, "black")
                if block.note:
                    self._paragraph(block.note, _NOTE_PT, _NOTE_COLOUR)
                self.height += 0.06
            for start in range(0, len(block.panels), columns):
                self._row(block.panels[start : start + columns], cell_width)
        self._bar_top = self.height
        self.height += _BAR_HEIGHT + 0.25
        panels = [panel for block in blocks for panel in block.panels]
        self._paragraph(legend_of(panels) if legend is None else legend, _NOTE_PT, _NOTE_COLOUR)
        self.height += _MARGIN

    def _paragraph(self, text: str, points: float, colour: str) -> None:
        lines = wrap_text(text, self.width - 2 * _MARGIN, points)
        self._add_lines(lines, _MARGIN, self.height, points, colour)
        self.height += len(lines) * _line(points)

    def _add_lines(self, lines: list[str], x: float, top: float, points: float, colour: str) -> None:
        # Line by line on its baseline: a block of text would stand higher or lower with the letters it holds.
        for number, line in enumerate(lines):
            self._lines.append((x, top + number * _line(points) + points / 72, line, points, colour))

    def _row(self, panels: list[Panel], cell_width: float) -> None:
        """Titles of different length all end just above their images."""
        titles = [wrap_text(panel.title, cell_width, _TITLE_PT) for panel in panels]
        notes_top = self.height + max(map(len, titles)) * _line(_TITLE_PT)
        images_top = notes_top + _line(_NOTE_PT) + 0.05
        for column, (panel, lines) in enumerate(zip(panels, titles)):
            x = _MARGIN + column * (cell_width + _GAP)
            self._add_lines(lines, x, notes_top - len(lines) * _line(_TITLE_PT), _TITLE_PT, "black")
            self._add_lines([panel.note], x, notes_top, _NOTE_PT, _NOTE_COLOUR)
            self._images.append((x, images_top, panel))
        self.height = images_top + self._image_size[1] + _GAP

    def render(self, pixels: np.ndarray | None, scale_top: float, dpi: float) -> Figure:
        """The figure of an image (None where every panel has its own), with colours from 0 to `scale_top`."""
        scale = Normalize(0, scale_top)
        with matplotlib.style.context("default"):
            figure = Figure(figsize=(self.width, self.height), dpi=dpi, facecolor="white")
            for x, y, text, points, colour in self._lines:
                place = x / self.width, 1 - y / self.height
                figure.text(*place, text, size=points, color=colour, va="baseline", parse_math=False)
            for x, y, panel in self._images:
                shown = pixels if panel.pixels is None else panel.pixels
                if shown is None:
                    raise UserError(f"panel {panel.title!r} has no pixels, and neither has the sheet")
                width, height = self._image_size if panel.size is None else _fit_box(panel.size, self._image_size)
                _draw_panel(self._axes(figure, x, y, width, height), shown, panel, scale)
            _draw_colour_bar(self._axes(figure, _MARGIN, self._bar_top, 4.0, _BAR_HEIGHT), scale)
        return figure

    def _axes(self, figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
        bottom = 1 - (y + height) / self.height
        return figure.add_axes((x / self.width, bottom, width / self.width, height / self.height))


def legend_of(panels: Sequence[Panel], more_notes: Sequence[str] = ()) -> str:
    """What colours and signs mean, as far as the panels and other notes of a figure use them."""
    notes = [*(panel.note for panel in panels), *more_notes]
    maps = [panel.values for panel in panels if panel.values is not None]
    sentences = ["Colour: attention on a patch, as a multiple of an even spread over all patches (1× = even)."]
    if any("nowhere" in note for note in notes):
        sentences.append("Nowhere: share of the attention that rests on no patch.")
    if any("peak" in note for note in notes):
        sentences.append("Peak: the most attended patch.")
    if any("no localisation" in note for note in notes):
        sentences.append(f"No localisation: no patch has {LEAST_PEAK:g}× an even spread.")
    if not all(np.isfinite(values).all() for values in maps):
        sentences.append("Pale: outside the crop, never seen by the model.")
    if any(panel.mask is not None for panel in panels):
        sentences.append("Outline: where the item is.")
    return " ".join(sentences)


# --- drawing ---------------------------------------------------------------------------------------------------------


def _draw_colour_bar(axes: Axes, scale: Normalize) -> None:
    """The colours as the overlays show them over mid-grey."""
    ramp = np.linspace(0, scale.vmax or 1.0, 256, dtype=np.float32)[None]
    mid_grey = np.full((1, 256, 3), 128, dtype=np.uint8)
    axes.imshow(_overlay(mid_grey, ramp, scale), extent=(0, ramp[0, -1], 0, 1), aspect="auto")
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.tick_params(labelsize=_NOTE_PT, length=2, pad=2, left=False, labelleft=False)
    # The first label starts where the bar starts, in line with the text below.
    axes.get_xticklabels()[0].set_horizontalalignment("left")
    axes.spines[:].set_visible(False)


def _draw_panel(axes: Axes, pixels: np.ndarray, panel: Panel, scale: Normalize) -> None:
    height, width = pixels.shape[:2]
    axes.imshow(pixels if panel.values is None else _overlay(pixels, panel.values, scale), aspect="auto")
    if panel.mask is not None:
        # A frame of background lets the outline close where a mask touches the border.
        framed = np.pad(panel.mask.astype(float), 1)
        rows, columns = np.arange(-1, height + 1), np.arange(-1, width + 1)
        for colour, line_width in (("black", 2.4), ("white", 1.1)):
            axes.contour(columns, rows, framed, levels=[0.5], colors=colour, linewidths=line_width)
    places = (
        (0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"),
        (0.5, 0.98, "center", "top"), (0.5, 0.02, "center", "bottom"),
    )  # fmt: skip
    for text, (x, y, horizontal, vertical) in zip(panel.marks, places):
        if not text:
            continue
        axes.text(
            x, y, text, transform=axes.transAxes, ha=horizontal, va=vertical, size=_NOTE_PT, color="white",
            path_effects=[withStroke(linewidth=1.5, foreground="black")],
        )  # fmt: skip
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    axes.set_axis_off()


def _overlay(pixels: np.ndarray, values: np.ndarray, scale: Normalize) -> np.ndarray:
    """Colours of `values` over the grey image, uint8 (H0, W0, 3); where they are NaN, the image paled."""
    grey = np.asarray(Image.fromarray(pixels).convert("L"), dtype=np.float32)[..., None]
    # Lifted, so that dark pictures keep something to see under the dark end of the colours.
    base = 38 + 0.85 * grey
    heights = np.clip(np.asarray(scale(np.nan_to_num(values)), dtype=np.float32), 0, 1)
    low, high = OVERLAY_OPACITY
    opacity = (low + (high - low) * heights)[..., None]
    colours = colormaps[COLOUR_MAP](heights, bytes=True)[..., :3]
    mixed = np.where(np.isfinite(values)[..., None], (1 - opacity) * base + opacity * colours, 0.3 * base + 178)
    return mixed.astype(np.uint8)


# --- text ------------------------------------------------------------------------------------------------------------


def _line(points: float) -> float:
    return points * _LINE_SPACING / 72


def wrap_text(text: str, width: float, points: float) -> list[str]:
    """Lines of `text` no wider than `width` inches in the default font; ends in "…" after too many lines."""
    text = shown(text)
    characters = max(4, int(width * 72 / (0.4 * points)))
    while True:
        lines = textwrap.wrap(text, characters, max_lines=_MAX_TITLE_LINES, placeholder=" …") or [""]
        if characters == 4 or max(_text_width(line, points) for line in lines) <= width:
            return lines
        characters -= 1


def _text_width(text: str, points: float) -> float:
    width, _, _ = TextToPath().get_text_width_height_descent(text, FontProperties(size=points), ismath=False)
    return width / 72
