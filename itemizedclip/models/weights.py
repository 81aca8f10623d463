"""Weights from files: runs' checkpoints and released ones, found, read without running anything, renamed and fitted.

Whoever wants a whole model takes `itemizedclip.models.factory.load_pretrained`.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from itemizedclip.models import shards
from itemizedclip.models.archive import DamagedError, is_archive, unusable_tensor, verify_archive
from itemizedclip.models.dual_encoder import DualEncoder
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.files import parse_json, read_json

HUB_PREFIX = "hf-hub:"
"""What a name of a model on the Hugging Face hub begins with."""

SHARED_FILE, CONFIG_FILE = "model.safetensors", "config.json"
"""What a shared model is made of (see `itemizedclip.models.sharing`)."""

HEADER_KEY = "itemizedclip"
"""Under which the header of a .safetensors file carries what config.json says."""

COMPUTED_BUFFERS = ("embeddings.position_ids", "attn_mask")
"""Endings of buffers that library versions add or drop; the model computes its own."""


class CheckpointError(UserError):
    """A checkpoint that cannot be used: the message names the file, what was expected and what to do."""


# --- finding ---


def find_checkpoint(source: str | Path) -> Path:
    """The checkpoint file that a path, a folder or a name on the hub stands for.

    Args:
        source: a .pt or .safetensors file; a run folder, whose newest epoch is taken; a folder with
            `model.safetensors`; or "hf-hub:owner/name" (also "…@revision"), a repository with `model.safetensors` or
            `checkpoint.pt` as this project writes them.

    Raises:
        CheckpointError: a folder without checkpoints, or a repository that cannot be reached or has none.
    """
    if str(source).startswith(HUB_PREFIX):
        return _from_hub(str(source)[len(HUB_PREFIX) :])
    path = Path(source).expanduser()
    if not path.is_dir():
        return path
    if (path / SHARED_FILE).is_file():
        return path / SHARED_FILE
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    numbered = ((re.fullmatch(r"epoch_(\d+)\.pt", file.name), file) for file in folder.glob("*.pt"))
    epochs = {int(match[1]): file for match, file in numbered if match}
    if not epochs:
        raise CheckpointError(f"{path}: a folder without epoch_N.pt; give a run folder, or a checkpoint file")
    return epochs[max(epochs)]


def given_checkpoint(source: Path) -> Path:
    """`find_checkpoint` for what a flag names: hub names and shared folders become their file, all else stays."""
    is_shared = (source / SHARED_FILE).is_file()
    return find_checkpoint(source) if is_shared or str(source).startswith(HUB_PREFIX) else source


def split_hub_name(name: str) -> tuple[str, str | None]:
    """ "owner/name@revision" → repository and revision.

    Raises:
        CheckpointError: no such name.
    """
    repository, _, revision = name.removeprefix(HUB_PREFIX).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise CheckpointError(f"{HUB_PREFIX}{repository}: no name of the hub; expected owner/name")
    return repository, revision or None


def hub_failure(error: Exception) -> str:
    """What the hub's error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, revision = split_hub_name(name)
    try:
        try:
            return Path(hf_hub_download(repository, SHARED_FILE, revision=revision))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):  # no network, which no other name mends
                raise
            return Path(hf_hub_download(repository, "checkpoint.pt", revision=revision))
    except Exception as error:  # no network, no such repository, no such file: the hub raises many types
        raise CheckpointError(
            f"{HUB_PREFIX}{name}: {SHARED_FILE} cannot be fetched ({hub_failure(error)}); without a network, bring "
            "that file and give its path"
        ) from error


# --- reading ---


def read_checkpoint(path: str | Path, *, verify: bool = True, mapped: bool = False) -> dict[str, Any]:
    """The contents of a .pt (tensors and plain data only) or .safetensors file, on the CPU.

    Args:
        path: the file.
        verify: compare the file with its checksum first (see `itemizedclip.models.archive`), and refuse weights that
            are not finite; False for a file that was verified just before.
        mapped: let the tensors stay in the file until they are used.

    Raises:
        CheckpointError: no such file, a damaged one, one that would run code when loaded, or weights that no model
            can use.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder; give the .pt file inside" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path}: checkpoint {what}")
    try:
        if path.suffix == ".safetensors":
            loaded: Any = _read_safetensors(path)
        else:
            if verify:
                verify_archive(path)
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_archive(path))
    except DamagedError as error:
        raise CheckpointError(f"{path}: is damaged ({error}); copy it again, or take another checkpoint") from error
    except pickle.UnpicklingError as error:
        # PyTorch's advice to load the file without this protection is not passed on.
        if "nsupported" not in str(error):
            raise CheckpointError(f"{path}: is no checkpoint, or damaged; give a .pt or .safetensors file") from error
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise CheckpointError(
            f"{path}: holds Python objects besides tensors and plain data{what}, which are not loaded because loading "
            "could run code. Save its state_dict alone and use that"
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({type(error).__name__}: {error}); copy it again"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: expected a dict of tensors or of 'state_dict', got {type(loaded).__name__}")
    contents = loaded if isinstance(loaded.get("state_dict"), dict) else {"state_dict": loaded}
    if contents.get("shards") is not None:
        contents = _with_shards(contents, path, verify=verify, mapped=mapped)
    # open_clip's attention masks are −∞ by design; they are not loaded.
    weights = {key: value for key, value in contents["state_dict"].items() if not str(key).endswith(COMPUTED_BUFFERS)}
    problem = unusable_tensor(weights) if verify else None
    if problem:
        raise CheckpointError(f"{path}: cannot be used, {problem}; take another checkpoint")
    return contents


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Tensors under `state_dict`, and what the header or a config.json beside the file says of the model."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(str(path), framework="pt") as file:
        header = file.metadata() or {}
    said: Any = None
    if HEADER_KEY in header:
        said = parse_json(header[HEADER_KEY], source=f"header of {path}", holding="a model config")
    elif path.name == SHARED_FILE and path.with_name(CONFIG_FILE).is_file():
        said = read_json(path.with_name(CONFIG_FILE), holding="a model config")
    # A config.json of another library beside somebody's weights says nothing to us.
    facts = said if isinstance(said, dict) and isinstance(said.get("model_config"), dict) else {}
    return {**facts, "state_dict": load_file(str(path))}


def _with_shards(contents: dict[str, Any], path: Path, *, verify: bool, mapped: bool) -> dict[str, Any]:
    """A checkpoint whose tensors lie in a folder beside it; mapped, they stay there and its states are empty."""
    record, optimizer = contents["shards"], contents.get("optimizer")
    if not shards.check_record(record) or not isinstance(optimizer, dict):
        raise CheckpointError(f"{path}: does not say where its tensors are; it is damaged: take another checkpoint")
    folder = path.parent / record["folder"]
    try:
        if verify:
            shards.verify_shards(folder, record["files"])
        if mapped:
            return contents
        state_dict, state = shards.nested(shards.read_whole(folder))
    except DamagedError as error:
        raise CheckpointError(f"{path}: is damaged ({error}); copy both again, or take another checkpoint") from error
    return {**contents, "state_dict": state_dict, "optimizer": {**optimizer, "state": state}}


def published_names(state_dict: Mapping[str, Tensor], model_keys: set[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Bring released names to this project's: returns the renamed tensors and the keys left out, each with its reason.

    Drops the `module.` and `_orig_mod.` prefixes, renames `image_post2.proj` of old 2D files, leaves out buffers that
    library versions add or drop (`position_ids`, `attn_mask`).
    """
    renamed: dict[str, Tensor] = {}
    skipped: list[str] = []
    old_projections = [key for key in state_dict if key.endswith("image_post.proj")]
    has_both = bool(old_projections) and any(key.endswith("image_post2.proj") for key in state_dict)
    for key, value in state_dict.items():
        if has_both and key in old_projections:
            skipped.append(f"{key} (not in use: image_post2.proj is)")
            continue
        name = key
        while name.startswith(("module.", "_orig_mod.")):
            name = name.partition(".")[2]
        if name not in model_keys:
            if name.endswith(COMPUTED_BUFFERS):
                skipped.append(f"{key} (a buffer this version computes)")
                continue
            if name == "image_post2.proj":
                name = "image_post.proj"
        if name in renamed and not torch.equal(renamed[name], value):
            raise CheckpointError(f"two different tensors claim the parameter {name}; the second is called {key}")
        renamed[name] = value
    return renamed, skipped


def load_weights(model: DualEncoder, state_dict: Mapping[str, Tensor], *, source: str) -> list[str]:
    """Load every parameter strictly; position tables of another size are resampled.

    Args:
        model: the model to fill.
        state_dict: tensors under this project's or the released names.
        source: file name for messages.

    Returns:
        The keys that were not used or were changed, each with the reason; empty when all fitted as they were.

    Raises:
        CheckpointError: missing, unknown or misshapen parameters, all named.
    """
    own = model.state_dict()
    try:
        renamed, skipped = published_names(state_dict, set(own))
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    skipped += _resize_position_tables(model, renamed, own)
    missing = sorted(set(own) - set(renamed))
    unknown = sorted(set(renamed) - set(own))
    misshapen = sorted(
        f"{k} {tuple(renamed[k].shape)} for {tuple(own[k].shape)}"
        for k in set(own) & set(renamed)
        if renamed[k].shape != own[k].shape
    )
    problems = [
        f"{len(keys)} {what}: {', '.join(keys[:4])}{' …' if len(keys) > 4 else ''}"
        for what, keys in (("missing", missing), ("unknown", unknown), ("of another shape", misshapen))
        if keys
    ]
    if problems:
        raise CheckpointError(
            f"{source}: does not fit the model {model.config.get('name', '')} — " + "; ".join(problems) + ". "
            "Give the model the weights were trained with (--model), or the right checkpoint."
        )
    model.load_state_dict({key: renamed[key].to(own[key].dtype) for key in own})
    return skipped


def _resize_position_tables(model: DualEncoder, renamed: dict[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Resample position tables of another length in place; a family may bring its own rule."""
    own_rule: Callable[..., list[str]] | None = getattr(model, "resize_position_tables", None)
    if own_rule is not None:
        return own_rule(renamed)
    from open_clip.model import resize_pos_embed, resize_text_pos_embed  # takes seconds: only here

    notes = []
    tables = {"visual.positional_embedding": resize_pos_embed, "positional_embedding": resize_text_pos_embed}
    for key, resize in tables.items():
        if key in renamed and key in own and renamed[key].shape != own[key].shape:
            before = tuple(renamed[key].shape)
            resize(renamed, model)
            notes.append(f"{key} (resampled from {before} to {tuple(renamed[key].shape)})")
    return notes
