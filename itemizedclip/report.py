"""The command `itemizedclip report`: one image or study and where each of its items looked, as one HTML file.

    itemizedclip report scene.png --checkpoint epoch_3.pt --items "a small red seven;a large cyan two"
    itemizedclip report STUDY/ --checkpoint epoch_24.pt --items-file report.txt --output study.html
    itemizedclip report scan.nii.gz --checkpoint epoch_80.pt --serve      texts typed into the page
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from itemizedclip.evaluation.report import file_sha256
from itemizedclip.models.factory import LoadedModel, load_pretrained
from itemizedclip.training.distributed import choose_device
from itemizedclip.training.engine import reported_errors
from itemizedclip.training.tracking import logging_to_console
from itemizedclip.viewer.explainer import Explainer
from itemizedclip.viewer.html import Provenance, described_items, report_html
from itemizedclip.viewer.inputs import Explanation, open_input
from itemizedclip.viewer.serve import ASK_PATH, ReportServer

logger = logging.getLogger(__name__)

PROG = "itemizedclip report"
DESCRIPTION = "Show an image or study and where each of its items looked, as one HTML file that needs no network."
DEFAULT_OUTPUT = Path("report.html")
LARGE_PAGE_MIB = 100
"""From this size on browsers take seconds to open a page."""


@dataclass(frozen=True)
class ReportOptions:
    """What to show, by which model, and where the page goes."""

    input: tyro.conf.Positional[Path]
    """An image file, or what the model's family reads: a study folder, a scan."""

    checkpoint: Annotated[Path, tyro.conf.arg(aliases=("--resume",))]
    """Checkpoint of a run or a released one (.pt, .safetensors)."""

    model: str | None = None
    """Model name or config .json; only for released checkpoints, which do not carry their config."""

    items: str | None = None
    """Texts to look for, joined by ';'; default: the input's own items, where it has some."""

    items_file: Path | None = None
    """The same from a file: one text per line, or a .json list of texts."""

    output: Path | None = None
    """The page to write; default report.html, with --serve none."""

    serve: bool = False
    """Serve the page on this machine, with a field for texts of your own; ends with Ctrl-C."""

    port: int = 0
    """Port of --serve; 0: any free one."""

    device: str = "auto"
    """auto (a GPU when there is one), cpu, cuda or cuda:N."""

    normalise_tokens: bool = False
    """L2-normalise image tokens before the head, as published zero-shot evaluation does; changes the third decimal."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"--device is {self.device!r}; expected auto, cpu, cuda or cuda:N")
        if self.items is not None and self.items_file is not None:
            raise ValueError("--items and --items-file: give one of them")
        if self.items is not None and not split_texts(self.items):
            raise ValueError('--items holds no text; expected such as "a runway;parked planes"')
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port is {self.port}; expected 0 (any free one) … 65535")
        if self.port and not self.serve:
            raise ValueError("--port needs --serve")


def split_texts(text: str) -> list[str]:
    """Texts joined by ';', stripped, empties dropped."""
    return [part.strip() for part in text.split(";") if part.strip()]


def read_items_file(path: Path) -> list[str]:
    """Texts of a file: one per line, or a JSON list.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, or no text in it.
    """
    try:
        contents = path.read_text(encoding="utf-8")
        items = json.loads(contents) if path.suffix.lower() == ".json" else contents.splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"--items-file {path}: no such file; expected one text per line, or JSON") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"--items-file {path}: cannot be read ({error}); expected UTF-8 text or JSON") from error
    if not isinstance(items, list) or not all(isinstance(text, str) for text in items):
        raise ValueError(f'--items-file {path}: expected a list of texts such as ["a runway", "parked planes"]')
    texts = [text.strip() for text in items if text.strip()]
    if not texts:
        raise ValueError(f"--items-file {path}: holds no text; write one per line")
    return texts


def provenance_of(loaded: LoadedModel, checkpoint: Path) -> Provenance:
    """What the page says of the model."""
    facts = [("training steps", str(loaded.meta["step"]))] if "step" in loaded.meta else []
    name = str(loaded.config.get("name", "unnamed"))
    return Provenance(name, checkpoint.name, file_sha256(checkpoint), facts, list(loaded.notes))


def write_page(page: str, path: Path) -> Path:
    """Write the page; whoever reads meanwhile sees the old one or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _check_output(path: Path) -> None:
    """Before anything is computed: can the page be written?

    Raises:
        ValueError: a folder, or a place where nothing can be written.
    """
    if path.is_dir():
        raise ValueError(f"--output {path}: is a folder; give a file name such as {path / DEFAULT_OUTPUT.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {path}: cannot write there ({error.strerror}); give another place") from None
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--output {path}: cannot write into {path.parent}; give another place")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `itemizedclip report`."""
    options = tyro.cli(ReportOptions, args=argv, prog=PROG, description=DESCRIPTION)
    with reported_errors(PROG), logging_to_console(0):
        output = options.output or (None if options.serve else DEFAULT_OUTPUT)
        if output is not None:
            _check_output(output)
        own_items = split_texts(options.items) if options.items else None
        if options.items_file is not None:
            own_items = read_items_file(options.items_file)
        device = choose_device(options.device, 0, 1)
        loaded = load_pretrained(options.checkpoint, config=options.model)
        loaded.model.to(device)
        source = open_input(options.input, loaded)
        items = own_items or source.items
        if not items and output is not None:
            raise ValueError(
                f'{options.input}: has no items of its own; give texts by --items "a runway;parked planes" or '
                "--items-file, or type them into the page with --serve and no --output"
            )
        explainer = Explainer(loaded, source, normalise_tokens=options.normalise_tokens)
        explanation, cut = explainer.explain(items), explainer.cut_items(items)
        provenance = provenance_of(loaded, options.checkpoint)
        if items:
            Console().print(score_table(explanation))
        if output is not None:
            write_page(report_html(explanation, provenance, cut_items=cut), output)
            _print_written(output)
        if options.serve:
            serve(report_html(explanation, provenance, cut_items=cut, ask=ASK_PATH), explainer, options.port)


def _print_written(output: Path) -> None:
    size_mib = output.stat().st_size / 2**20
    print(f"report {output.resolve()} ({size_mib:.1f} MiB)")
    if size_mib > LARGE_PAGE_MIB:
        print(f"Beyond {LARGE_PAGE_MIB} MiB browsers take seconds to open a page, and some refuse.")


def score_table(explanation: Explanation) -> Table:
    """Scores of the items, for the terminal."""
    maps, views = explanation.maps, explanation.source.views
    table = Table(caption="peak: the most attended patch, as a multiple of an even spread")
    table.add_column("", justify="right")
    table.add_column("item", overflow="fold", ratio=1)
    for name in ("TCSim", "nowhere", "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    if len(views) > 1:
        table.add_column("most in", overflow="fold")
    shares = explanation.share_of_views()
    for k, text in enumerate(explanation.items):
        numbers = [f"{maps.scores[k]:.3f}", f"{maps.nowhere[k]:.0%}", f"{maps.peaks[k]:.1f}×"]
        row = [Text(str(k + 1)), Text(text), *map(Text, numbers)]
        if len(views) > 1:
            most = int(shares[k].argmax())
            row.append(Text(f"{views[most].name} {shares[k][most]:.0%}"))
        table.add_row(*row)
    return table


def serve(page: str, explainer: Explainer, port: int) -> None:
    """Serve the page until Ctrl-C."""

    def answer(items: Sequence[str]) -> dict[str, Any]:
        return described_items(explainer.explain(items), explainer.cut_items(items))

    with ReportServer(page, answer, port) as server:
        print(f"open {server.url}\nOnly this machine can; Ctrl-C ends it.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nended")


if __name__ == "__main__":
    main()
