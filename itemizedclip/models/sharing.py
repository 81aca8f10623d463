"""A model as files to share, and back: safetensors with the config in its header, config.json, a model card.

    model.safetensors   weights under the released names; its header carries the config: the file alone is enough
    config.json         the same for people and other programs
    README.md           the model card

Nothing of the machine that trained it goes in: no paths, no options of the run.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from itemizedclip.models.factory import LoadedModel
from itemizedclip.models.weights import (
    CONFIG_FILE,
    HEADER_KEY,
    HUB_PREFIX,
    SHARED_FILE,
    CheckpointError,
    hub_failure,
    split_hub_name,
)
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.files import read_json, replacing, write_json, write_text

SHARED_META = ("transform", "metrics", "data_fingerprint", "epoch", "step", "samples_seen")
"""What a shared model tells of its run."""


@dataclass(frozen=True)
class Card:
    """What people should know of a model, beside what its checkpoint says.

    Attributes:
        title: its name.
        licence: identifier as the hub knows them, such as cc-by-nc-4.0.
        training_data: what it was trained on.
        intended_use: what it is for, and what not.
        results: result files of evaluations (results.json).
    """

    title: str
    licence: str = "other"
    training_data: str = ""
    intended_use: str = ""
    results: Sequence[Path] = field(default_factory=tuple)


def shared_config(loaded: LoadedModel) -> dict[str, Any]:
    """Config and facts of a model without anything of its machine."""
    config = copy.deepcopy(loaded.config)
    text = config.get("text_cfg", {})
    if isinstance(text.get("text_model"), str) and text.get("tokenizer_json") and not _is_hub_name(text["text_model"]):
        text["text_model"] = Path(text["text_model"]).name
    meta = {key: loaded.meta[key] for key in SHARED_META if loaded.meta.get(key) not in (None, {}, "")}
    return {"format": 1, "itemizedclip": version("itemizedclip"), "model_config": config, **meta}


def _is_hub_name(text: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None and not text.startswith(".")


def write_safetensors(loaded: LoadedModel, path: Path) -> Path:
    """One file that `load_pretrained` needs nothing beside."""
    from safetensors.torch import save_file

    tensors = {key: value.detach().contiguous().cpu() for key, value in loaded.model.state_dict().items()}
    tensors = _without_shared_memory(tensors)
    header = {HEADER_KEY: json.dumps(shared_config(loaded), ensure_ascii=False), "format": "pt"}
    with replacing(path) as part:
        save_file(tensors, str(part), metadata=header)
    return path


def _without_shared_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    separate = {}
    for key, value in tensors.items():
        separate[key] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return separate


def write_released(loaded: LoadedModel, path: Path) -> Path:
    """A .pt as the published training scripts write it: `state_dict` with the prefix of DDP, no config."""
    state_dict = {f"module.{key}": value.detach().cpu() for key, value in loaded.model.state_dict().items()}
    contents = {
        "epoch": int(loaded.meta.get("epoch", 0)),
        "name": loaded.config.get("name", ""),
        "state_dict": state_dict,
    }
    with replacing(path) as part:
        torch.save(contents, part)
    return path


def write_shared(loaded: LoadedModel, folder: Path, card: Card | None = None) -> list[Path]:
    """A folder as it is shared; the card only where there is one."""
    written = [write_safetensors(loaded, folder / SHARED_FILE), folder / CONFIG_FILE]
    write_json(written[1], shared_config(loaded))
    if card is not None:
        written.append(folder / "README.md")
        write_text(written[2], model_card(loaded, card))
    return written


# --- the card --------------------------------------------------------------------------------------------------------


def model_card(loaded: LoadedModel, card: Card) -> str:
    """The README.md of a repository on the hub."""
    config, meta = loaded.config, loaded.meta
    vision = config["vision_cfg"]
    is_study = loaded.input_kind == "studies"
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters()) / 1e6
    size = vision["volume_size"] if is_study else vision["image_size"]
    shown = "×".join(map(str, size)) if isinstance(size, (list, tuple)) else f"{size}×{size}"
    facts = [
        ("Architecture", f"{config.get('name', type(loaded.model).__name__)}, {parameters:.1f} M parameters"),
        ("Input", f"studies, series of {shown} voxels" if is_study else f"photographs, {shown} pixels"),
        ("Joint width", str(config["embed_dim"])),
        ("Training", _training(meta)),
        ("Training data", card.training_data or "not stated by its author"),
        ("Licence", card.licence),
    ]
    metrics = {**{str(key): value for key, value in dict(meta.get("metrics") or {}).items()}, **_results(card.results)}
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts if value)
    numbers = "\n".join(f"| {name} | {float(value):.4f} |" for name, value in metrics.items())
    measured = f"| measure | value |\n|---|---|\n{numbers}" if numbers else "No evaluation is recorded."
    tags = ["itemizedclip", "medical" if is_study else "vision", "zero-shot-image-classification"]
    listed = "\n".join(f"- {tag}" for tag in tags)
    use = card.intended_use or (
        "Research. Not a medical device: not for diagnosis, treatment or triage."
        if is_study
        else "Zero-shot classification, retrieval and explanation of images of the kind it was trained on."
    )
    name = HUB_PREFIX + (card.title if _is_hub_name(card.title) else "OWNER/NAME")
    return f"""---
license: {card.licence}
library_name: itemizedclip
tags:
{listed}
---

# {card.title}

A vision–language model trained on images that carry several independent text items (ItemizedCLIP).

| | |
|---|---|
{rows}

## Use

```python
import itemizedclip as ic

loaded = ic.load("{name}")
scores = ic.score(loaded, ["{"study/" if is_study else "picture.jpg"}"], ["a finding", "another"])
```

## Intended use

{use}

## Evaluation

{measured}
"""


def _training(meta: Mapping[str, Any]) -> str:
    parts = []
    if meta.get("epoch"):
        parts.append(f"{meta['epoch']} epochs")
    if meta.get("step"):
        parts.append(f"{meta['step']:,} steps")
    if meta.get("samples_seen"):
        parts.append(f"{meta['samples_seen']:,} images seen")
    return ", ".join(parts)


def _results(paths: Sequence[Path]) -> dict[str, float]:
    measures: dict[str, float] = {}
    for path in paths:
        content = read_json(path, holding="results of an evaluation")
        if not isinstance(content, dict) or not isinstance(content.get("metrics"), dict):
            raise UserError(f"{path}: expected a results.json of `itemizedclip evaluate`")
        name = str(content.get("evaluation", path.stem))
        measures |= {
            f"{name}: {key}": value for key, value in content["metrics"].items() if isinstance(value, (int, float))
        }
    return measures


# --- the hub ---------------------------------------------------------------------------------------------------------


def upload(folder: Path, name: str, *, private: bool, message: str) -> str:
    """Send a folder to a repository of the hub, which is made when it is not there.

    Returns:
        the address of the commit.

    Raises:
        CheckpointError: no network, no such owner, or no token that may write.
    """
    repository, revision = split_hub_name(name)
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=str(folder), commit_message=message, revision=revision,
            allow_patterns=[SHARED_FILE, CONFIG_FILE, "README.md"],
        )  # fmt: skip
    except Exception as error:  # the hub raises many types
        raise CheckpointError(
            f"{HUB_PREFIX}{repository}: cannot be uploaded ({hub_failure(error)}); log in with `hf auth login`, or "
            "look at what would be sent with --dry-run"
        ) from error
    return str(commit.commit_url)
