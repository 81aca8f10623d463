"""The command `itemizedclip report`: one image or study and where each of its items looked, as one HTML file.

itemizedclip report scene.png --checkpoint epoch_3.pt --items "a small red seven;a large cyan two"
itemizedclip report STUDY/ --checkpoint epoch_24.pt --items-file report.txt --output study.html
itemizedclip report scan.nii.gz --checkpoint epoch_80.pt --serve      texts typed into the page
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from itemizedclip.commands.questions import QuestionOptions, items_to_ask, score_table
from itemizedclip.evaluation.calibration import Calibration, calibration_of
from itemizedclip.models.factory import LoadedModel, load_pretrained
from itemizedclip.models.weights import given_checkpoint
from itemizedclip.runtime.errors import UserError, reported_errors
from itemizedclip.runtime.files import file_sha256, write_text
from itemizedclip.runtime.flags import read_flags
from itemizedclip.runtime.logs import logging_to_console, shown
from itemizedclip.runtime.precision import resolve_precision
from itemizedclip.runtime.processes import choose_device
from itemizedclip.viewer.explanation import Explainer
from itemizedclip.viewer.inputs import open_input
from itemizedclip.viewer.page.html import Provenance, described_items, report_html
from itemizedclip.viewer.page.serve import ASK_PATH, ReportServer

logger = logging.getLogger(__name__)

PROG = "itemizedclip report"
DESCRIPTION = "Show an image or study and where each of its items looked, as one HTML file that needs no network."
DEFAULT_OUTPUT = Path("report.html")
REMEDY = (
    'give texts by --items "a runway;parked planes" or --items-file, or type them into the page with --serve and no '
    "--output"
)
LARGE_PAGE_MIB = 100
"""From this size on browsers take seconds to open a page."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions(QuestionOptions):
    """What to show, by which model, and where the page goes."""

    input: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INPUT")]
    """An image file, or what the model's family reads: a study folder, a scan."""

    output: Path | None = None
    """The page to write; default report.html, with --serve none."""

    serve: bool = False
    """Serve the page on this machine, with a field for texts of your own; ends with Ctrl-C."""

    port: int = 0
    """Port of --serve; 0: any free one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.port <= 65535:
            raise UserError(f"--port is {self.port}; expected 0 (any free one) … 65535")
        if self.port and not self.serve:
            raise UserError("--port needs --serve")


def provenance_of(loaded: LoadedModel, checkpoint: Path) -> Provenance:
    """What the page says of the model."""
    facts = [("training steps", str(loaded.meta["step"]))] if "step" in loaded.meta else []
    name = str(loaded.config.get("name", "unnamed"))
    return Provenance(name, checkpoint.name, file_sha256(checkpoint), facts, list(loaded.notes))


def _check_output(path: Path) -> None:
    """Before anything is computed: can the page be written?

    Raises:
        ValueError: a folder, or a place where nothing can be written.
    """
    if path.is_dir():
        raise UserError(f"--output {path}: is a folder; give a file name such as {path / DEFAULT_OUTPUT.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {path}: cannot write there ({error.strerror}); give another place") from None
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--output {path}: cannot write into {path.parent}; give another place")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `itemizedclip report`."""
    options = read_flags(ReportOptions, argv, prog=PROG, description=DESCRIPTION)
    with reported_errors(PROG), logging_to_console(0):
        output = options.output or (None if options.serve else DEFAULT_OUTPUT)
        if output is not None:
            _check_output(output)
        texts = options.texts
        device = choose_device(options.device, 0, 1)
        options = replace(options, checkpoint=given_checkpoint(options.checkpoint))
        loaded = load_pretrained(options.checkpoint, config=options.model, text_model=options.text_model)
        loaded.model.to(device)
        source = options.of_study.open(options.input, lambda path, choice: open_input(path, loaded, choice))
        items = texts or source.items
        if output is not None:
            items = items_to_ask(texts, options.input, source, remedy=REMEDY)
        precision = resolve_precision(options.precision, device)
        explainer = Explainer(
            loaded, source, normalise_tokens=options.normalise_tokens, autocast_dtype=precision.autocast_dtype
        )
        explanation, cut = explainer.explain(items), explainer.cut_items(items)
        provenance = provenance_of(loaded, options.checkpoint)
        provenance.facts.append(("precision", precision.name))
        calibration = calibration_of(options.checkpoint)
        judgements = [] if calibration is None else explainer.judged(calibration, items)
        if items:
            Console().print(score_table(explanation, judgements))
        if output is not None:
            write_text(output, report_html(explanation, provenance, cut_items=cut, judgements=judgements))
            _print_written(output)
        if options.serve:
            page = report_html(explanation, provenance, cut_items=cut, judgements=judgements, ask=ASK_PATH)
            serve(page, explainer, options.port, calibration)


def _print_written(output: Path) -> None:
    size_mib = output.stat().st_size / 2**20
    print(shown(f"report {output.resolve()} ({size_mib:.1f} MiB)"))
    if size_mib > LARGE_PAGE_MIB:
        print(f"Beyond {LARGE_PAGE_MIB} MiB browsers take seconds to open a page, and some refuse.")


def serve(page: str, explainer: Explainer, port: int, calibration: Calibration | None = None) -> None:
    """Serve the page until Ctrl-C."""

    def answer(items: Sequence[str]) -> dict[str, Any]:
        judgements = [] if calibration is None else explainer.judged(calibration, items)
        return described_items(explainer.explain(items), explainer.cut_items(items), judgements)

    with ReportServer(page, answer, port) as server:
        print(f"open {server.url}\nOnly this machine can; Ctrl-C ends it.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nended")


if __name__ == "__main__":
    main()
