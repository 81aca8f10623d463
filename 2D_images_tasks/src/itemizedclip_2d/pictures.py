"""Attention pictures of a data set's images: everything but the data set.

A data set brings a `PictureSource`; `visualize` loads the model, draws one figure per image and prints the scores.

Axes: T items of one image, H heads, H0, W0 rows and columns of the image, pixels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol

from PIL import Image
from rich.console import Console
from rich.table import Table

from itemizedclip.data.items import check_text
from itemizedclip.evaluation.attention import ItemMaps
from itemizedclip.models.factory import LoadedModel, expect_photographs, load_pretrained
from itemizedclip.models.tokenizers import ClipTokenizer
from itemizedclip.runtime.errors import UserError, reported_errors
from itemizedclip.runtime.files import check_writable
from itemizedclip.runtime.logs import literal, progress_bar, shown
from itemizedclip.runtime.processes import check_device_name, choose_device
from itemizedclip.viewer.explanation import Explanation, explain_input
from itemizedclip.viewer.files import write_pictures
from itemizedclip.viewer.geometry import Upsampling
from itemizedclip.viewer.inputs import photograph_input

DEFAULT_OUTPUT = Path(__file__).parents[1] / "visualize" / "visualizations"

# --- options ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSettings:
    """The model to look into."""

    resume: Path
    """Checkpoint of a run or a released one (.pt, .safetensors)."""

    model: str | None = None
    """Model name or config .json; only for released checkpoints, which do not carry their config."""

    device: str = "auto"
    """auto (a GPU when there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        check_device_name(self.device)


@dataclass(frozen=True)
class SelectionSettings:
    """Which images, and what to ask them."""

    viz_id: str | None = None
    """Images by number, counted from 0, such as 3,17-25; default the first --num-images."""

    num_images: int = 8
    """Number of images without --viz-id."""

    items: str | None = None
    """Texts of your own to ask every image, joined by ';', instead of its items."""

    def __post_init__(self) -> None:
        if self.viz_id is not None:
            parse_numbers(self.viz_id)
        if self.num_images < 1:
            raise UserError(f"--num-images is {self.num_images}; expected at least 1")
        if self.items is not None and not self.own_items:
            raise UserError('--items holds no text; expected such as "a runway;parked planes"')

    @property
    def own_items(self) -> list[str] | None:
        """The texts of --items, or None."""
        if self.items is None:
            return None
        return [text.strip() for text in check_text(self.items, "--items").split(";") if text.strip()]


@dataclass(frozen=True)
class PictureSettings:
    """How the pictures look and where they go."""

    output: Path = DEFAULT_OUTPUT
    """Folder for the pictures."""

    format: Literal["png", "pdf"] = "png"
    """File type."""

    upsampling: Upsampling = "nearest"
    """nearest shows the patches as they are, smooth interpolates between their centres."""

    heads: bool = False
    """Also write a figure with every attention head, NAME_heads."""


@dataclass(frozen=True)
class VisualizeOptions:
    """What every data set's visualisation takes; subclasses add the group `data`."""

    model: ModelSettings
    selection: SelectionSettings = field(default_factory=SelectionSettings)
    pictures: PictureSettings = field(default_factory=PictureSettings)


def parse_numbers(text: str) -> list[range]:
    """Numbers and ranges, both ends included: "3,17-25" → [range(3, 4), range(17, 26)].

    Raises:
        ValueError: anything else.
    """
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,12})(?:\s*-\s*(\d{1,12}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise UserError(f"--viz-id is {text!r}; expected numbers and rising ranges such as 3,17-25")
        ranges.append(range(first, last + 1))
    return ranges


# --- data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """One image to look into.

    Attributes:
        number: of the image in its data set, as --viz-id counts.
        filename: the image's own file name.
        image: RGB, at its own size.
        items: texts to ask, at least one.
    """

    number: int
    filename: str
    image: Image.Image
    items: list[str]

    @property
    def file_stem(self) -> str:
        """<number>_<stem of the file name>, safe as a file name."""
        stem = re.sub(r"[^\w.-]+", "_", PurePosixPath(self.filename).stem)
        return f"{self.number}_{stem[:100]}"


class PictureSource(Protocol):
    """What a data set gives to be looked at."""

    def __len__(self) -> int:
        """How many numbers there are, those of unusable images included."""

    def usable(self) -> Sequence[int]:
        """Numbers of the images that can be shown, rising."""

    def picture(self, number: int) -> Picture:
        """One image; raises BadSampleError with the reason when it cannot be shown."""


def chosen_numbers(selection: SelectionSettings, source: PictureSource) -> list[int]:
    """The images to show, each once.

    Raises:
        ValueError: a number beyond the data set.
    """
    if selection.viz_id is None:
        return list(source.usable()[: selection.num_images])
    ranges = parse_numbers(selection.viz_id)
    beyond = [numbers[-1] for numbers in ranges if numbers[-1] >= len(source)]
    if beyond:
        raise UserError(f"--viz-id asks for image {beyond[0]}; there are {len(source)}, numbered from 0")
    return list(dict.fromkeys(number for numbers in ranges for number in numbers))


# --- drawing ---------------------------------------------------------------------------------------------------------


class Viewer:
    """A model with what it takes to draw pictures of it.

    Args:
        loaded: a model of photographs.
        settings: how pictures look and where they go.
    """

    def __init__(self, loaded: LoadedModel, settings: PictureSettings) -> None:
        self._loaded = loaded
        self._settings = settings

    def explain(self, picture: Picture) -> Explanation:
        """Where the picture's items look."""
        source = photograph_input(picture.filename, picture.image, self._loaded)
        return explain_input(self._loaded, source, picture.items)

    def cut_items(self, picture: Picture) -> list[int]:
        """Items that fill the text tower's whole context, so that their end may be cut off; counted from 1."""
        tokenizer = self._loaded.tokenizer
        if not isinstance(tokenizer, ClipTokenizer):
            return []
        return [k + 1 for k, cut in enumerate(tokenizer.is_truncated(tokenizer(picture.items))) if cut]

    def write(self, picture: Picture, explanation: Explanation) -> list[Path]:
        """Write the picture's figures."""
        path = self._settings.output / f"{picture.file_stem}.{self._settings.format}"
        return write_pictures(explanation, path, upsampling=self._settings.upsampling, heads=self._settings.heads)


def load_viewer(model: ModelSettings, pictures: PictureSettings) -> Viewer:
    """Load the checkpoint onto the device.

    Raises:
        CheckpointError: a checkpoint that cannot be used, or is no model of photographs.
        SetupError: a GPU is asked for that does not exist.
        ValueError: an unknown model name.
    """
    device = choose_device(model.device, 0, 1)
    loaded = load_pretrained(model.resume, config=model.model)
    expect_photographs(loaded, model.resume)
    loaded.model.to(device)
    return Viewer(loaded, pictures)


# --- the command -----------------------------------------------------------------------------------------------------


def visualize(options: VisualizeOptions, open_source: Callable[[], PictureSource], prog: str) -> None:
    """Draw the chosen images, then print the scores and where the pictures are.

    Args:
        options: of any data set.
        open_source: opens the data set; called after the checkpoint proved usable, since it may take longer.
        prog: name of the command in messages.

    Raises:
        SystemExit: 1, after one line on standard error, for what the user can mend.
    """
    output = options.pictures.output
    table = _score_table()
    cut: list[str] = []
    written: list[Path] = []
    with reported_errors(prog):
        viewer = load_viewer(options.model, options.pictures)
        source = open_source()
        numbers = chosen_numbers(options.selection, source)
        check_writable(output, "--output")
        with progress_bar("Drawing") as advance:
            for done, number in enumerate(numbers, start=1):
                picture = source.picture(number)
                explanation = viewer.explain(picture)
                written += viewer.write(picture, explanation)
                _add_scores(table, picture, explanation.maps)
                cut += [f"item {k} of image {number}" for k in viewer.cut_items(picture)]
                advance(done, len(numbers))
    Console().print(table)
    if cut:
        print(f"Longer than the text tower reads, or just as long: {', '.join(cut)}")
    names = written[0].name if len(written) == 1 else f"{written[0].name} … {written[-1].name}"
    print(shown(f"Pictures in {output.resolve()} ({len(written)}): {names}"))


def _score_table() -> Table:
    table = Table(caption="peak: the most attended patch, as a multiple of an even spread")
    table.add_column("image", justify="right")
    table.add_column("", justify="right")
    table.add_column("item", overflow="fold", ratio=1)
    for name in ("TCSim", "nowhere", "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _add_scores(table: Table, picture: Picture, maps: ItemMaps) -> None:
    for k, text in enumerate(picture.items):
        table.add_row(
            str(picture.number) if k == 0 else "",
            str(k + 1),
            literal(text),
            f"{maps.scores[k]:.3f}",
            f"{maps.nowhere[k]:.0%}",
            f"{maps.peaks[k]:.1f}×",
            end_section=k == len(picture.items) - 1,
        )
