"""An explanation on disk: pictures for people, NIfTI volumes for viewers of scans, JSON for programs.

Axes: T items, H heads, S series, H0 W0 pixels of a photograph.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from itemizedclip.runtime.errors import UserError
from itemizedclip.viewer.explanation import Explanation
from itemizedclip.viewer.figures import LEAST_PEAK, attention_figure, head_figure, save_figure
from itemizedclip.viewer.geometry import Upsampling, map_to_input
from itemizedclip.viewer.inputs import InputView
from itemizedclip.viewer.volumes import (
    file_names,
    montage_figure,
    place_of_token,
    slabs_by_attention,
    write_attention_volumes,
    write_volume,
)

ITEMS_PER_MONTAGE = 8
"""More items than these go to further montages, each a page to look at."""

_HEAD_IMAGE_PIXELS = 640
"""Longest side of the image in a figure of all heads, whose panels are small and many."""


@dataclass(frozen=True)
class ExplanationFiles:
    """What is written of an explanation, and how it looks."""

    format: Literal["png", "pdf"] = "png"
    """File type of pictures."""

    upsampling: Upsampling = "smooth"
    """nearest shows the patches as they are, smooth interpolates between their centres."""

    heads: bool = False
    """Also show every attention head: a figure of a photograph, NIfTI volumes of a study."""

    slices: int = 4
    """Studies: overlays per item in the montage."""

    nifti: bool = True
    """Studies: write attention as NIfTI, one volume per item and series."""

    dicom: bool = False
    """Studies from DICOM: also write attention as DICOM, which refers to the source series: one Parametric Map per item
    and series, one SEG per series of what lies above --seg-threshold."""

    seg_threshold: float = 3.0
    """Attention from which a voxel belongs to the segment of an item, in multiples of an even spread."""

    def __post_init__(self) -> None:
        if not self.seg_threshold > 0:
            raise UserError(f"--seg-threshold is {self.seg_threshold}; expected more than 0, such as 3")
        if self.slices < 1:
            raise UserError(f"--slices is {self.slices}; expected at least 1")


def write_explanation(
    explanation: Explanation,
    folder: Path,
    settings: ExplanationFiles,
    facts: Mapping[str, Any],
    *,
    with_images: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write pictures, volumes and explanation.json into a folder; returns all paths, the JSON last.

    Args:
        explanation: of a photograph or a study.
        folder: made when missing.
        settings: what to write.
        facts: plain data for the JSON, such as the checkpoint's name.
        with_images: also write the series of a study as NIfTI, for inputs that are no NIfTI files themselves.
        on_progress: called with (done, to do) while volumes are written.
    """
    if len(explanation.maps.grid) == 2:
        path = folder / f"attention.{settings.format}"
        written = write_pictures(explanation, path, upsampling=settings.upsampling, heads=settings.heads)
    else:
        written = _write_montages(explanation, folder, settings)
        if settings.nifti:
            volumes = folder / "volumes"
            written += write_attention_volumes(
                explanation, volumes, mode=settings.upsampling, per_head=settings.heads, on_progress=on_progress
            )
            if with_images:
                written += _write_images(explanation, volumes)
        if settings.dicom:
            from itemizedclip.viewer.dicom import DicomOrigin, write_dicom

            origin = DicomOrigin(str(facts.get("model", "")), str(facts.get("checkpoint_sha256", "")))
            written += write_dicom(
                explanation, folder / "dicom", origin, mode=settings.upsampling, threshold=settings.seg_threshold
            )
    path = folder / "explanation.json"
    content = describe(explanation) | dict(facts) | {"files": [str(p.relative_to(folder)) for p in written]}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
    return [*written, path]


def write_pictures(explanation: Explanation, path: Path, *, upsampling: Upsampling, heads: bool = False) -> list[Path]:
    """The figures of a photograph: `path`, and with `heads` one of every attention head beside it, NAME_heads."""
    view, maps = explanation.source.views[0], explanation.maps
    figure = attention_figure(
        view.values,
        explanation.items,
        map_to_input(maps.times_uniform(), view.geometry, upsampling),
        maps.scores.tolist(),
        nowhere=maps.nowhere.tolist(),
        peaks=maps.peaks.tolist(),
        title=explanation.source.name,
    )
    written = [save_figure(figure, path)]
    if heads:
        image = Image.fromarray(view.values)
        image.thumbnail((_HEAD_IMAGE_PIXELS, _HEAD_IMAGE_PIXELS))
        geometry = view.geometry.of_resized_input((image.height, image.width))
        figure = head_figure(
            image,
            explanation.items,
            map_to_input(maps.times_uniform(per_head=True), geometry, upsampling),
            maps.scores.tolist(),
            nowhere=maps.head_nowhere.numpy(),
            title=explanation.source.name,
        )
        written.append(save_figure(figure, path.with_stem(f"{path.stem}_heads")))
    return written


def _write_montages(explanation: Explanation, folder: Path, settings: ExplanationFiles) -> list[Path]:
    T = len(explanation.items)
    starts = range(0, T, ITEMS_PER_MONTAGE)
    written = []
    for page, start in enumerate(starts, start=1):
        items = list(range(start, min(start + ITEMS_PER_MONTAGE, T)))
        figure = montage_figure(explanation, items, num_slices=settings.slices, mode=settings.upsampling)
        name = f"montage_{page}" if len(starts) > 1 else "montage"
        written.append(save_figure(figure, folder / f"{name}.{settings.format}"))
    return written


def _write_images(explanation: Explanation, folder: Path) -> list[Path]:
    """The series themselves; voxels that several views show in different windows are written once.

    Maps of a sheared NIfTI file lie over that file, not over the straight voxels that were made of it.
    """
    views = explanation.source.views
    first_of = {id(_of_file(view)): n for n, view in reversed(list(enumerate(views)))}
    return [
        write_volume(_of_file(view), view, folder / f"image__{name}.nii.gz")
        for n, (view, name) in enumerate(zip(views, file_names([view.name for view in views])))
        if first_of[id(_of_file(view))] == n and (view.file_grid is None or view.file_grid.sheared is None)
    ]


def _of_file(view: InputView) -> np.ndarray:
    """The voxels as the file has them, not as they are scaled for the screen."""
    return view.values if view.original is None else view.original


def describe(explanation: Explanation) -> dict[str, Any]:
    """Scores and places of every item, plain data; voxels count from 0."""
    source, maps = explanation.source, explanation.maps
    is_study = len(maps.grid) == 4
    shares_TS = explanation.share_of_views().tolist()
    items = []
    for k, text in enumerate(explanation.items):
        entry: dict[str, Any] = {
            "item": text,
            "score": float(maps.scores[k]),
            "nowhere": float(maps.nowhere[k]),
            "peak_times_uniform": float(maps.peaks[k]),
            "is_localised": bool(maps.peaks[k] >= LEAST_PEAK),
        }
        token = int(maps.weights[k].argmax())
        if is_study:
            place = place_of_token(explanation, token)
            entry["peak"] = {
                "series": source.views[place.view].name,
                "slice_row_column": list(place.voxel),
                "file_voxel": None if place.file_voxel is None else list(place.file_voxel),
                "world_mm_ras": None if place.world_mm is None else list(place.world_mm),
            }
            entry["share_of_series"] = [
                {"series": view.name, "share": share} for view, share in zip(source.views, shares_TS[k])
            ]
            entry["slices"] = [
                {"series": source.views[slab.view].name, "slice": slab.middle, "share": slab.share}
                for slab in slabs_by_attention(explanation, k)[:10]
            ]
        else:
            entry["peak"] = {"row_column": _pixel_of_token(explanation, token)}
        items.append(entry)
    return {
        "input": source.name,
        "series": [view.name for view in source.views] if is_study else [],
        "items": items,
        "warnings": list(source.warnings),
        "notes": list(source.notes),
    }


def _pixel_of_token(explanation: Explanation, token: int) -> list[int]:
    """Row and column of a photograph's pixel in the middle of a token."""
    geometry = explanation.source.views[0].geometry
    cell = np.unravel_index(token, explanation.maps.grid)
    sizes = [size / n for size, n in zip(geometry.view_size, explanation.maps.grid)]
    centre = geometry.to_input([(float(at) + 0.5) * size for at, size in zip(cell, sizes)])
    return [min(max(int(x), 0), n - 1) for x, n in zip(centre, geometry.input_size)]
