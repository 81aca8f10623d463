"""The command `itemizedclip export`: a model for programs without PyTorch.

itemizedclip export epoch_30.pt --format onnx --to model/
cd model && python example.py picture.jpg "a red roof"        needs onnxruntime, tokenizers, numpy and pillow
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from itemizedclip.models.factory import load_pretrained
from itemizedclip.models.onnx import export_onnx, largest_difference
from itemizedclip.runtime.errors import UserError, reported_errors
from itemizedclip.runtime.files import check_writable
from itemizedclip.runtime.flags import read_flags

PROG = "itemizedclip export"
DESCRIPTION = (
    "Both towers and the head as ONNX graphs, with the tokenizer and a program of 30 lines that uses them without "
    "PyTorch. The number of images, series, texts and tokens is free."
)

MAX_DIFFERENCE = 1e-4
"""Between the graphs and PyTorch, on the CPU; more is refused."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Which model, and where it goes."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """Checkpoint of a run or a released one (.pt, .safetensors)."""

    to: Path
    """Folder for the graphs."""

    format: Literal["onnx"] = "onnx"
    """What to write."""

    model: str | None = None
    """Model name or config .json; only for released checkpoints, which do not carry their config."""

    text_model: str | None = None
    """BERT folder or hub name whose tokenizer a released checkpoint uses; default: the hub name of its config."""

    compare: bool = True
    """Run the graphs once in onnxruntime and compare them with PyTorch."""


def run(options: ExportOptions) -> list[Path]:
    """Export, compare.

    Raises:
        UserError: a checkpoint that cannot be used, packages that are missing, or graphs that compute something else.
    """
    folder = check_writable(options.to, "--to")
    loaded = load_pretrained(options.checkpoint, config=options.model, text_model=options.text_model)
    written = export_onnx(loaded, folder)
    sizes = ", ".join(f"{path.name} ({path.stat().st_size / 1e6:.1f} MB)" for path in written)
    print(f"written to {folder}: {sizes}")
    if options.compare:
        difference = largest_difference(loaded, folder)
        print(f"largest difference from PyTorch in onnxruntime on the CPU: {difference:.1e}")
        if difference > MAX_DIFFERENCE:
            raise UserError(
                f"{folder}: the graphs differ from PyTorch by {difference:.1e}, more than {MAX_DIFFERENCE:g}; do not "
                "use them, and report the versions of torch, onnxscript and onnxruntime"
            )
    return written


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `itemizedclip export`."""
    with reported_errors(PROG):
        run(read_flags(ExportOptions, argv, prog=PROG, description=DESCRIPTION))
