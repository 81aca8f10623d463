"""What commands share that ask a model about one image or study: which model, which texts, how the scores are printed.

Axes: T items.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.table import Table
from rich.text import Text

from itemizedclip.data.items import check_text
from itemizedclip.data.jsonl import read_own
from itemizedclip.evaluation.calibration import Judgement
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.files import read_json, read_lines
from itemizedclip.runtime.logs import literal, shown
from itemizedclip.runtime.processes import check_device_name
from itemizedclip.viewer.explanation import Explanation
from itemizedclip.viewer.inputs import ModelInput, SeriesChoice, SeriesListed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SeriesSettings:
    """Which series of a study are read; a photograph has none."""

    series: tuple[str, ...] = ()
    """Read only series whose name, number or file holds one of these words (MRI: T1, FLAIR; DICOM: 4)."""

    exclude_series: tuple[str, ...] = ()
    """Do not read series whose name, number or file holds one of these words."""

    list_series: bool = False
    """Show the series that INPUT holds, and end."""

    fill_nan: bool = False
    """Put the lowest value of a series (air) where a voxel has no finite value, such as outside the field of view."""

    def open(
        self, path: Path, opener: Callable[[Path, SeriesChoice], ModelInput], *, keep_headers: bool = False
    ) -> ModelInput:
        """Read an input by `opener`, say what must be known; ends the command after a list of series."""
        choice = SeriesChoice(self.series, self.exclude_series, self.list_series, self.fill_nan, keep_headers)
        try:
            opened = opener(path, choice)
        except SeriesListed as listed:
            print(shown(listed))
            raise SystemExit(0) from None
        if self.list_series:
            print(shown(f"{path}: holds no series; --list-series is for studies"))
            raise SystemExit(0)
        for warning in opened.warnings:
            logger.warning(warning)
        for note in opened.notes:
            logger.info(note)
        return opened


@dataclass(frozen=True, kw_only=True)
class QuestionOptions:
    """The model, and the texts to ask it; commands add what they show and where it goes."""

    checkpoint: Annotated[Path, tyro.conf.arg(aliases=("--resume",))]
    """Checkpoint of a run or a released one (.pt, .safetensors)."""

    model: str | None = None
    """Model name or config .json; only for released checkpoints, which do not carry their config."""

    text_model: str | None = None
    """BERT folder or hub name whose tokenizer a released checkpoint uses; default: the hub name of its config."""

    items: str | None = None
    """Texts to look for, joined by ';'; default: the input's own items, where it has some."""

    items_file: Path | None = None
    """The same from a file: one text per line, a .json list of texts, or the .jsonl of your data that lists INPUT."""

    device: str = "auto"
    """auto (a GPU when there is one), cpu, cuda or cuda:N."""

    precision: Literal["fp32", "amp_bf16", "auto"] = "auto"
    """Of the towers; scores and maps are always float32. auto: bfloat16 where the device computes it (docs/training.md
    says what that does to scores)."""

    normalise_tokens: bool = False
    """L2-normalise image tokens before the head, as published zero-shot evaluation does; changes the third decimal."""

    of_study: Annotated[SeriesSettings, tyro.conf.arg(name="")] = field(default_factory=SeriesSettings)

    def __post_init__(self) -> None:
        check_device_name(self.device)
        check_texts_flags("items", self.items, self.items_file, example="a runway;parked planes")

    @property
    def texts(self) -> list[str]:
        """The texts given by flags; read here, where a file that cannot be read is one message."""
        if self.items_file is None:
            return split_texts(self.items or "")
        source: Path | None = getattr(self, "input", None)
        if self.items_file.suffix.lower() == ".jsonl" and source is not None:
            return items_of_input(self.items_file, source)
        return read_items_file(self.items_file)


def items_to_ask(texts: list[str], path: Path, source: ModelInput, *, remedy: str) -> list[str]:
    """The texts given, else the own items of the input that was read from `path`.

    Raises:
        ValueError: neither; `remedy` says what to do.
    """
    items = texts or source.items
    if not items:
        raise UserError(f"{path}: has no items of its own; {remedy}")
    return items


def check_texts_flags(flag: str, texts: str | None, file: Path | None, *, example: str) -> None:
    """Texts by one flag, or by --FLAG-file, or not at all.

    Raises:
        ValueError: both, or no text between the semicolons.
    """
    if texts is not None and file is not None:
        raise UserError(f"--{flag} and --{flag}-file: give one of them")
    if texts is not None and not split_texts(check_text(texts, f"--{flag}")):
        raise UserError(f'--{flag} holds no text; expected such as "{example}"')


def split_texts(text: str) -> list[str]:
    """Texts joined by ';', stripped, empties dropped."""
    return [part.strip() for part in text.split(";") if part.strip()]


def read_items_file(path: Path) -> list[str]:
    """Texts of a file: one per line, or a JSON list.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, or no text in it.
    """
    holding = 'a list of texts such as ["a runway", "parked planes"]'
    if path.suffix.lower() == ".json":
        items = read_json(path, holding=holding)
        if not isinstance(items, list) or not all(isinstance(text, str) for text in items):
            raise UserError(f"{path}: expected {holding}")
        texts = [text.strip() for text in items if text.strip()]
    else:
        texts = read_lines(path, holding="one text per line, or JSON")
    if not texts:
        raise UserError(f"{path}: holds no text; write one per line")
    return texts


def items_of_input(path: Path, source: Path) -> list[str]:
    """The items that a file of own data has for an image, or for the study whose folder holds its series.

    Raises:
        UserError: not such a file, or one that does not list the input.
    """
    file, wanted = read_own(path), source.expanduser().resolve()
    for entry in file.entries:
        paths = [(file.root / name).resolve() for name in ([entry.image] if entry.image else entry.series.values())]
        if wanted in paths or any(wanted in one.parents for one in paths if entry.series):
            return list(entry.items)
    raise UserError(f"{path}: has no entry of {source}; give texts by --items")


def score_table(explanation: Explanation, judgements: Sequence[Judgement | None] = ()) -> Table:
    """Scores of the items, for the terminal; with judgements (one per item) what calibrated scores mean."""
    maps, views = explanation.maps, explanation.source.views
    table = Table(caption="peak: the most attended patch, as a multiple of an even spread")
    table.add_column("", justify="right")
    table.add_column("item", overflow="fold", ratio=1)
    for name in ("TCSim", "nowhere", "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    is_calibrated = any(judgements)
    if is_calibrated:
        for name in ("probability", "conformal set"):
            table.add_column(name, justify="right", no_wrap=True)
    if len(views) > 1:
        table.add_column("most in", overflow="fold")
    shares = explanation.share_of_views()
    for k, text in enumerate(explanation.items):
        numbers = [f"{maps.scores[k]:.3f}", f"{maps.nowhere[k]:.0%}", f"{maps.peaks[k]:.1f}×"]
        row: list[str | Text] = [str(k + 1), literal(text), *numbers]
        if is_calibrated:
            own = judgements[k]
            row += ["–", "–"] if own is None else [f"{own.probability:.0%}", _words(own)]
        if len(views) > 1:
            most = int(shares[k].argmax())
            row.append(literal(f"{views[most].name} {shares[k][most]:.0%}"))
        table.add_row(*row)
    return table


def _words(own: Judgement) -> str:
    return {0: "like neither", 2: "undecided"}.get(len(own.truths)) or own.truths[0]
