"""The command `itemizedclip convert`: a checkpoint from one layout to another.

itemizedclip convert epoch_24.pt --to shared/                                  safetensors and config.json, to share
itemizedclip convert released.pt --model ViT-B-16-ItemizedCLIP --to model.safetensors
itemizedclip convert shared/ --layout released --to released.pt                as the published scripts write and read
itemizedclip convert open_clip_model.safetensors --towers --model ViT-B-16 --to start/     initial weights
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from itemizedclip.models.factory import load_pretrained
from itemizedclip.models.sharing import write_released, write_safetensors, write_shared
from itemizedclip.models.towers import load_towers
from itemizedclip.runtime.errors import UserError, reported_errors
from itemizedclip.runtime.files import check_writable
from itemizedclip.runtime.flags import check, read_flags

PROG = "itemizedclip convert"
DESCRIPTION = (
    "A checkpoint of a run, a released file, a shared folder or a hub name, written in another layout. Adapters are "
    "folded into the weights; the state of the run (optimizer, position) is left behind."
)


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What becomes what."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """Checkpoint of a run, a released one, a shared folder, or hf-hub:owner/name."""

    to: Path
    """A folder, which gets model.safetensors and config.json; a .safetensors file; or, released, a .pt file."""

    layout: Literal["shared", "released"] = "shared"
    """shared: safetensors with the config; released: a .pt as the published scripts write it."""

    model: str | None = None
    """Model name or config .json; only for released checkpoints, which do not carry their config, and for --towers,
    where it may be open_clip's name."""

    towers: bool = False
    """Take the towers of another library (CLIP of open_clip; HLIP, with --model) as initial weights: what they lack,
    the head above all, starts from random weights."""

    text_model: str | None = None
    """BERT folder or hub name whose tokenizer a released checkpoint uses; default: the hub name of its config."""

    def __post_init__(self) -> None:
        suffix = self.to.suffix.lower()
        wanted = (".pt",) if self.layout == "released" else ("", ".safetensors")
        check(
            suffix in wanted or (self.layout == "shared" and self.to.is_dir()),
            f"--to {self.to}: expected a .pt file for --layout released, a folder or a .safetensors file for shared",
        )


def run(options: ConvertOptions) -> list[Path]:
    """Convert; returns what was written.

    Raises:
        UserError: a checkpoint that cannot be used, or a place that cannot be written to.
    """
    is_file = options.to.suffix.lower() in (".pt", ".safetensors") and not options.to.is_dir()
    check_writable(options.to.expanduser().parent if is_file else options.to, "--to")
    if is_file and options.to.resolve() == options.checkpoint.expanduser().resolve():
        raise UserError(f"{options.to}: is the checkpoint itself; give another place with --to")
    if options.towers:
        loaded = load_towers(options.checkpoint, config=options.model)
    else:
        loaded = load_pretrained(options.checkpoint, config=options.model, text_model=options.text_model)
    for note in loaded.notes:
        print(note)
    if options.layout == "released":
        return [write_released(loaded, options.to)]
    return [write_safetensors(loaded, options.to)] if is_file else write_shared(loaded, options.to)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `itemizedclip convert`."""
    with reported_errors(PROG):
        written = run(read_flags(ConvertOptions, argv, prog=PROG, description=DESCRIPTION))
        print(f"written: {', '.join(map(str, written))}")
