"""Models, tokenizers and transforms by name or config; whole models from checkpoints (weights: `models.weights`).

A config is a JSON object: `embed_dim`, `vision_cfg`, `text_cfg`, optional `head_heads`, `init_logit_scale`,
`init_logit_bias`, `preprocess`. `vision_cfg.tower` names the family ("vit" when absent). Families outside the core
register a DualEncoder subclass under the entry-point group `itemizedclip.models`.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from itemizedclip.models.config import check_common, check_size
from itemizedclip.models.dual_encoder import DualEncoder
from itemizedclip.models.lora import fold
from itemizedclip.models.tokenizers import CLIP_VOCABULARY, ClipTokenizer
from itemizedclip.models.weights import CheckpointError, given_checkpoint, load_weights, read_checkpoint
from itemizedclip.runtime.errors import MissingFileError, UserError, about
from itemizedclip.runtime.fields import brief
from itemizedclip.runtime.files import read_json
from itemizedclip.runtime.registry import MissingExtraError, Registry

CONFIG_FOLDER = Path(__file__).parent / "configs"

FAMILIES: Registry[type[DualEncoder]] = Registry(
    "itemizedclip.models", "model family", {"vit": "itemizedclip.models.image_text_2d:ItemizedCLIP2D"}
)
"""Value of `vision_cfg.tower` → DualEncoder class."""


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
        numbers = family_of(config).check_config(config)
        check_size(numbers)
    return numbers


def family_name(config: Mapping[str, Any]) -> str:
    """The family a config belongs to, as registered (any value, in a config that was not checked)."""
    name: str = config["vision_cfg"].get("tower", "vit")
    return name


def family_of(config: Mapping[str, Any]) -> type[DualEncoder]:
    """The class of a config's models, which says what they read (`input_kind`, `reads_series_names`).

    Raises:
        UserError: no such family is installed.
    """
    name = family_name(config)
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
    return family_of(resolved)(resolved)


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
    own: Callable[..., Callable[..., Tensor]] | None = getattr(family_of(config), "create_tokenizer", None)
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
    from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2  # takes seconds: only here

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
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    spec = {
        "image_size": config["vision_cfg"]["image_size"],
        "mean": list(OPENAI_DATASET_MEAN),
        "std": list(OPENAI_DATASET_STD),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "train_scale": [0.9, 1.0],
    }
    return spec | dict(config.get("preprocess", {}))


# --- whole models ----------------------------------------------------------------------------------------------------


def _with_text_model(path: str | Path, config: Mapping[str, Any] | None, source: str | Path) -> Mapping[str, Any]:
    """The config with the shape and tokenizer of a text model, by the family's own rule."""
    assert config is not None  # checked before
    change: Callable[..., Mapping[str, Any]] | None = getattr(family_of(config), "with_text_model", None)
    if change is None:
        name = config.get("name", "this model")
        raise CheckpointError(f"{path}: {name} has one tokenizer, which is built in; drop --text-model")
    return change(config, source)


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
    def input_kind(self) -> Literal["photographs", "studies"]:
        """What the model reads."""
        return family_of(self.config).input_kind

    @property
    def reads_series_names(self) -> bool:
        """Whether it is conditioned on the names of a study's series."""
        return family_of(self.config).reads_series_names(self.config)

    @property
    def transform(self) -> Callable[..., Tensor]:
        """PIL picture → normalised float (3, H, W), as in evaluation.

        Raises:
            UserError: a model of studies, which are read from their files.
        """
        if self.input_kind != "photographs":
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


def expect_photographs(loaded: LoadedModel, source: object) -> None:
    """Refuse a model of studies where photographs are read.

    Raises:
        CheckpointError: names `source`, the checkpoint.
    """
    if loaded.input_kind != "photographs":
        raise CheckpointError(
            f"{source}: holds a {type(loaded.model).__name__}, which reads volumes; expected a model of photographs, "
            "such as ViT-B-16-ItemizedCLIP"
        )
