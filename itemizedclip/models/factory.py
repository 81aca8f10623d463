"""Models, tokenizers and transforms by name or config; weights from runs and from released checkpoints.

A config is a JSON object: `embed_dim`, `vision_cfg`, `text_cfg`, optional `head_heads`, `init_logit_scale`,
`init_logit_bias`, `preprocess`. `vision_cfg.tower` names the family ("vit" when absent). Families outside the core
register a DualEncoder subclass under the entry-point group `itemizedclip.models`.
"""

from __future__ import annotations

import copy
import difflib
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import resize_pos_embed, resize_text_pos_embed
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2
from torch import Tensor

from itemizedclip.models import shards
from itemizedclip.models.archive import DamagedError, unusable_tensor, verify_archive
from itemizedclip.models.config import check_common, check_size
from itemizedclip.models.dual_encoder import DualEncoder
from itemizedclip.models.image_text_2d import ItemizedCLIP2D
from itemizedclip.models.lora import fold
from itemizedclip.models.tokenizers import CLIP_VOCABULARY, ClipTokenizer
from itemizedclip.runtime.errors import MissingFileError, UserError, about
from itemizedclip.runtime.fields import brief
from itemizedclip.runtime.files import parse_json, read_json
from itemizedclip.runtime.registry import MissingExtraError, Registry

CONFIG_FOLDER = Path(__file__).parent / "configs"

FAMILIES: Registry[type[DualEncoder]] = Registry("itemizedclip.models", "model family", {"vit": ItemizedCLIP2D})
"""Value of `vision_cfg.tower` → DualEncoder class."""


COMPUTED_BUFFERS = ("embeddings.position_ids", "attn_mask")
"""Endings of buffers that library versions add or drop; the model computes its own."""


class CheckpointError(UserError):
    """A checkpoint that cannot be used: the message names the file, what was expected and what to do."""


# --- configs ---------------------------------------------------------------------------------------------------------


def _config_files() -> dict[str, Path]:
    folders = [CONFIG_FOLDER]
    for name in FAMILIES.names():
        try:
            folder = getattr(FAMILIES.load(name), "config_folder", None)
        except MissingExtraError:
            continue  # a wing whose optional packages are not installed offers no models
        folders += [Path(folder)] if folder else []
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.json"))}


def list_models() -> list[str]:
    """Names that `create_model` and `--model` accept."""
    return sorted(_config_files())


def load_model_config(name_or_path: str | Path) -> dict[str, Any]:
    """The config of a known model, or of a JSON file.

    Raises:
        ValueError: unknown name (lists the known ones) or a file that is not a config.
    """
    path = CONFIG_FOLDER / f"{name_or_path}.json"
    if not path.is_file():
        files = _config_files()
        path = files.get(str(name_or_path), path)
    if not path.is_file():
        path = Path(name_or_path)
        if not path.is_file():
            near = difflib.get_close_matches(str(name_or_path), files, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(
                f"no model named {name_or_path}{hint}; known: {', '.join(sorted(files))}; "
                "or give the path of a config .json"
            )
    config = read_json(path, holding="a model config")
    check_config(config, source=path)
    config.setdefault("name", path.stem)
    checked: dict[str, Any] = config
    return checked


def is_shipped(name_or_path: object) -> bool:
    """Whether a name is that of a config of this project, not of a file of the user's or a stranger's.

    Only what such a config names on the Hugging Face hub is fetched without a flag of its own.
    """
    return isinstance(name_or_path, str) and name_or_path in _config_files()


def check_config(config: Any, *, source: object) -> int:
    """Refuse a config that cannot be built, before anything is.

    Args:
        config: as read from a file or a checkpoint.
        source: whose it is, for messages.

    Returns:
        How many parameters and constants the model would have; 0 from families that do not say.

    Raises:
        UserError: names source, field, what it holds and what was expected.
    """
    with about(f"{source}: model config" if str(source) else "the model config"):
        check_common(config)
        numbers = _family(config).check_config(config)
        check_size(numbers)
    return numbers


def _family(config: Mapping[str, Any]) -> type[DualEncoder]:
    name = config["vision_cfg"].get("tower", "vit")
    if name not in FAMILIES.names():
        raise UserError(
            f"vision_cfg.tower is {brief(name)}; installed families: {', '.join(FAMILIES.names())}. "
            "Run `pip install -e .` in the project so that the wings register theirs."
        )
    return FAMILIES.load(name)


def create_model(config: str | Mapping[str, Any], *, source: object = "") -> DualEncoder:
    """A model with fresh weights from a name, a path or a config.

    Args:
        config: the name or path, or the config itself.
        source: whose the config is, for messages.

    Raises:
        UserError: a config that cannot be built.
    """
    if isinstance(config, str):
        resolved = load_model_config(config)
    else:
        check_config(config, source=source)
        resolved = copy.deepcopy(dict(config))
    return _family(resolved)(resolved)


def create_tokenizer(config: Mapping[str, Any], *, fetch: bool = False, source: object = "") -> Callable[..., Tensor]:
    """The tokenizer a config's text tower was trained with: texts → int64 (N, C); has `pad_id`.

    Args:
        config: of the model.
        fetch: whether a tokenizer that the config names on the Hugging Face hub may be fetched. Not for configs of
            files and checkpoints, whose writers shall not choose what this machine connects to: for them only what
            was fetched before is used.
        source: whose the config is, for messages.

    Raises:
        UserError: a tokenizer that is not there or cannot be used.
    """
    own: Callable[..., Callable[..., Tensor]] | None = getattr(_family(config), "create_tokenizer", None)
    if own is None:
        embedded = config["text_cfg"].get("vocab_size", CLIP_VOCABULARY)
        if embedded < CLIP_VOCABULARY:
            raise UserError(
                f"{source or 'the model config'}: text_cfg.vocab_size is {embedded}; the tokenizer has "
                f"{CLIP_VOCABULARY} entries: no text can be encoded with it"
            )
        return ClipTokenizer(config["text_cfg"]["context_length"])
    with about(source):
        return own(config, fetch=True) if fetch else own(config)


def create_transform(config: Mapping[str, Any], *, is_train: bool) -> Callable[..., Tensor]:
    """open_clip's transform for photographs: PIL image → normalised float (3, H, W).

    Training: RandomResizedCrop of `preprocess.train_scale` (default 0.9–1.0), bicubic, no flip, no colour change.
    Evaluation: shorter side resized, centre crop. Mean and deviation are CLIP's unless `preprocess` says otherwise.
    """
    preprocess = transform_spec(config)
    cfg = PreprocessCfg(
        size=preprocess["image_size"],
        mean=tuple(preprocess["mean"]),
        std=tuple(preprocess["std"]),
        interpolation=preprocess["interpolation"],
        resize_mode=preprocess["resize_mode"],
    )
    augmentation = AugmentationCfg(scale=tuple(preprocess["train_scale"]))
    transform: Callable[..., Tensor] = image_transform_v2(cfg, is_train=is_train, aug_cfg=augmentation)
    return transform


def transform_spec(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `create_transform` does, as plain data for checkpoints and result files."""
    spec = {
        "image_size": config["vision_cfg"]["image_size"],
        "mean": list(OPENAI_DATASET_MEAN),
        "std": list(OPENAI_DATASET_STD),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "train_scale": [0.9, 1.0],
    }
    return spec | dict(config.get("preprocess", {}))


# --- weights ---------------------------------------------------------------------------------------------------------


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
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and _is_archive(path))
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


def _is_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


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
    notes = []
    tables = {"visual.positional_embedding": resize_pos_embed, "positional_embedding": resize_text_pos_embed}
    for key, resize in tables.items():
        if key in renamed and key in own and renamed[key].shape != own[key].shape:
            before = tuple(renamed[key].shape)
            resize(renamed, model)
            notes.append(f"{key} (resampled from {before} to {tuple(renamed[key].shape)})")
    return notes


def _with_text_model(path: str | Path, config: Mapping[str, Any] | None, source: str | Path) -> Mapping[str, Any]:
    """The config with the shape and tokenizer of a text model, by the family's own rule."""
    assert config is not None  # checked before
    change: Callable[..., Mapping[str, Any]] | None = getattr(_family(config), "with_text_model", None)
    if change is None:
        name = config.get("name", "this model")
        raise CheckpointError(f"{path}: {name} has one tokenizer, which is built in; drop --text-model")
    return change(config, source)


HUB_PREFIX = "hf-hub:"
"""What a name of a model on the Hugging Face hub begins with."""

SHARED_FILE, CONFIG_FILE = "model.safetensors", "config.json"
"""What a shared model is made of (see `itemizedclip.models.sharing`)."""

HEADER_KEY = "itemizedclip"
"""Under which the header of a .safetensors file carries what config.json says."""


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


@dataclass
class LoadedModel:
    """A model ready for evaluation.

    Attributes:
        model: in eval mode, on the CPU.
        config: the config it was built from.
        tokenizer: texts → int64 (N, C).
        meta: what the checkpoint says of its run (epoch, step, options, transform, data fingerprint …).
        notes: keys skipped or changed while loading.
        source: the file it came from.
    """

    model: DualEncoder
    config: dict[str, Any]
    tokenizer: Callable[..., Tensor]
    meta: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    source: str = ""

    @property
    def transform(self) -> Callable[..., Tensor]:
        """PIL picture → normalised float (3, H, W), as in evaluation.

        Raises:
            UserError: a model of studies, which are read from their files.
        """
        if self.config["vision_cfg"].get("tower", "vit") != "vit":
            raise UserError("this model reads studies from their files: give paths to score() and explain()")
        return create_transform(self.config, is_train=False)


def load_pretrained(
    path: str | Path, *, config: str | Mapping[str, Any] | None = None, text_model: str | Path | None = None
) -> LoadedModel:
    """A model from a run's checkpoint or from a released one.

    Args:
        path: .pt or .safetensors file, a shared folder, or a name on the hub (`find_checkpoint`).
        config: model name, path or config; needed only when the checkpoint does not carry its own (released files).
        text_model: folder or hub name that a released file's tokenizer comes from, instead of the config's; for
            families whose text tower is a published one.

    Raises:
        CheckpointError: unreadable file, weights that do not fit, no config known, or a text model for a checkpoint
            that carries its own tokenizer, or for a family that has no other.
        FileNotFoundError: a text model that is neither here nor to be had; a checkpoint's own config makes nothing be
            fetched (`create_tokenizer`).
    """
    path = given_checkpoint(Path(path))
    contents = fold(read_checkpoint(path))
    state_dict = contents.pop("state_dict")
    contents.pop("optimizer", None)
    contents.pop("scaler", None)
    own_config = contents.get("model_config")
    if own_config is None and config is None:
        raise CheckpointError(
            f"{path}: carries no model config (a released file?); name the model with --model, "
            f"one of {', '.join(list_models())}"
        )
    chosen: Any = own_config if own_config is not None else config
    fetch = is_shipped(chosen)
    if isinstance(chosen, str) and own_config is None:
        chosen = load_model_config(chosen)
    numbers = check_config(chosen, source=path)
    held = sum(value.numel() for value in state_dict.values() if isinstance(value, Tensor))
    if numbers > 2 * held + _SPARE_NUMBERS:
        raise CheckpointError(
            f"{path}: the model config describes a model of {numbers:,} numbers, the file holds {held:,}; give the "
            "model the weights were trained with (--model), or the right checkpoint"
        )
    if text_model is not None:
        if own_config is not None and _has_tokenizer(own_config):
            raise CheckpointError(f"{path}: carries its own tokenizer; drop --text-model")
        chosen = _with_text_model(path, chosen, text_model)
    model = create_model(chosen, source=path)
    notes = load_weights(model, state_dict, source=str(path))
    tokenizer = create_tokenizer(model.config, fetch=fetch, source=path)
    return LoadedModel(model.eval(), model.config, tokenizer, contents, notes, str(path))


_SPARE_NUMBERS = 10_000_000
"""By how much a model may be larger than twice its file: position tables are resampled, constants are not stored."""


def _has_tokenizer(config: Mapping[str, Any]) -> bool:
    try:
        create_tokenizer(config)
    except MissingFileError:
        return False
    return True
