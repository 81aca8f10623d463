"""The commands `itemizedclip push` and `itemizedclip pull`: models on the Hugging Face hub.

itemizedclip push epoch_24.pt --to me/my-model --licence cc-by-nc-4.0 --training-data "…" --dry-run
itemizedclip pull me/my-model --to my-model/
itemizedclip evaluate own --checkpoint hf-hub:me/my-model --output results.json …
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from itemizedclip.models.factory import load_pretrained
from itemizedclip.models.sharing import Card, upload, write_shared
from itemizedclip.models.weights import CONFIG_FILE, HUB_PREFIX, find_checkpoint, split_hub_name
from itemizedclip.runtime.errors import reported_errors
from itemizedclip.runtime.files import check_writable
from itemizedclip.runtime.flags import read_flags


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """What is shared, where, and what its card says."""

    checkpoint: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
    """Checkpoint of a run, a released one, or a shared folder."""

    to: str
    """Repository on the hub, owner/name; made when it is not there."""

    licence: Annotated[str, tyro.conf.arg(aliases=("--license",))] = "other"
    """Licence, by the hub's identifiers, such as apache-2.0 or cc-by-nc-4.0."""

    training_data: str = ""
    """What it was trained on, for the card."""

    intended_use: str = ""
    """What it is for and what not, for the card; default: research, and no medical device."""

    results: tuple[Path, ...] = ()
    """Result files of `itemizedclip evaluate`, whose measures the card lists."""

    private: bool = False
    """A repository that only you see, when it is made."""

    dry_run: bool = False
    """Write what would be sent to --folder, send nothing."""

    folder: Path | None = None
    """Keep the files here; default: a temporary folder, with --dry-run NAME here."""

    model: str | None = None
    """Model name or config .json; only for released checkpoints, which do not carry their config."""

    text_model: str | None = None
    """BERT folder or hub name whose tokenizer a released checkpoint uses; default: the hub name of its config."""


@dataclass(frozen=True, kw_only=True)
class PullOptions:
    """What is fetched, and where it goes."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    """Repository on the hub, owner/name or owner/name@revision."""

    to: Path
    """Folder for the files."""


def push(options: PushOptions) -> str:
    """Write the shared files and send them; returns the address of the commit, or the folder of a dry run.

    Raises:
        UserError: no such name, a checkpoint that cannot be used, or a hub that refuses.
    """
    repository, _ = split_hub_name(options.to)
    loaded = load_pretrained(options.checkpoint, config=options.model, text_model=options.text_model)
    card = Card(repository, options.licence, options.training_data, options.intended_use, options.results)
    with tempfile.TemporaryDirectory() as temporary:
        default = Path(repository.partition("/")[2]) if options.dry_run else Path(temporary)
        folder = check_writable(options.folder or default, "--folder")
        written = write_shared(loaded, folder, card)
        listed = ", ".join(f"{path.name} ({path.stat().st_size / 1e6:.1f} MB)" for path in written)
        if options.dry_run:
            print(f"{folder}: {listed}; would be sent to {repository}, nothing was sent")
            return str(folder)
        address = upload(folder, options.to, private=options.private, message="Model, config and card")
        print(f"sent to {address}: {listed}")
        return address


def pull(options: PullOptions) -> list[Path]:
    """Fetch a shared model into a folder.

    Raises:
        CheckpointError: no network, or no such repository.
    """
    folder = check_writable(options.to, "--to")
    weights = find_checkpoint(HUB_PREFIX + options.name.removeprefix(HUB_PREFIX))
    loaded = load_pretrained(weights)  # what cannot be used is not kept
    written = [folder / weights.name]
    shutil.copyfile(weights, written[0])
    if weights.with_name(CONFIG_FILE).is_file():
        written.append(folder / CONFIG_FILE)
        shutil.copyfile(weights.with_name(CONFIG_FILE), written[1])
    print(f"{loaded.config.get('name', 'model')}: {', '.join(map(str, written))}")
    return written


def main_push(argv: Sequence[str] | None = None) -> None:
    """Entry point of `itemizedclip push`."""
    described = "A model with its config and card to the Hugging Face hub. --dry-run shows what would be sent."
    with reported_errors("itemizedclip push"):
        push(read_flags(PushOptions, argv, prog="itemizedclip push", description=described))


def main_pull(argv: Sequence[str] | None = None) -> None:
    """Entry point of `itemizedclip pull`."""
    described = "A model from the Hugging Face hub into a folder, which every command takes as --checkpoint."
    with reported_errors("itemizedclip pull"):
        pull(read_flags(PullOptions, argv, prog="itemizedclip pull", description=described))
