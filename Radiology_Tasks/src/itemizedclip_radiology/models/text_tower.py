"""The radiology text tower: a plain BERT and its WordPiece tokenizer, from local files or the hub, never remote code.

Axes: N texts, C context length in tokens, D joint width.

BiomedBERT and CXR-BERT are both BERT-base inside; the latter's published class adds heads and asks for remote code,
which is not needed: its encoder weights load into the plain model below, the heads are listed as skipped.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from itemizedclip.models.config import MAX_LAYERS, MAX_WIDTH, block_numbers
from itemizedclip.models.dual_encoder import unfreeze_layer_norms
from itemizedclip.models.recompute import set_recomputing
from itemizedclip.runtime.errors import MissingFileError, UserError
from itemizedclip.runtime.fields import (
    Rule,
    check_fields,
    either,
    nothing,
    number,
    one_of,
    plain_object,
    text,
    whole,
)
from itemizedclip.runtime.files import read_json
from itemizedclip_radiology.models.weight_files import (
    LoadReport,
    assign_parameters,
    find_prefix,
    local_folder,
    read_state_dict,
)

HF_CONFIG_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "type_vocab_size",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
)
"""What of a `config.json` shapes a BERT encoder; everything else in the file is left alone."""

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
TOKENIZER_FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json")
HUB_FILES = ("config.json", *WEIGHT_FILES, *TOKENIZER_FILES)
BUILTIN_VOCABULARY = Path(__file__).parent / "configs" / "builtin_vocab.txt"
"""Letters, digits and common words of radiology reports, for small models without any download."""

PAD_ID = 0
"""Id of `[PAD]` in every BERT vocabulary; columns that hold it are not attended to."""

_FLAG = "--text-model"


# --- tokenizer -------------------------------------------------------------------------------------------------------


class BertTextTokenizer:
    """WordPiece tokenizer: texts → int64 (N, C), `[CLS] … [SEP]` and padding.

    Args:
        backend: the tokenizer; its own truncation and padding settings are replaced.
        context_length: C; longer texts are cut and keep their `[SEP]`.
    """

    pad_id = PAD_ID

    def __init__(self, backend: Tokenizer, context_length: int) -> None:
        ids = [backend.token_to_id(token) for token in ("[PAD]", "[CLS]", "[SEP]")]
        if ids[0] != self.pad_id or None in ids:
            raise UserError(f"not a BERT vocabulary: [PAD], [CLS], [SEP] have ids {ids}, expected 0 and two others")
        self.context_length = context_length
        self._backend = backend
        self._backend.enable_truncation(max_length=context_length)
        self._backend.enable_padding(pad_id=self.pad_id, pad_token="[PAD]", length=context_length)  # noqa: S106  no password
        try:
            self(["a \u2603"])
        except BaseException as error:  # the library raises bare Exception, and its panics are not even that
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise UserError(f"a tokenizer that reads no text ({error})") from None

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._backend.get_vocab_size()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """int64 (N, C), padded with 0."""
        # One by one: the batch call starts threads, which a data-loading worker forked later could not use.
        rows = [self._backend.encode(text).ids for text in ([texts] if isinstance(texts, str) else texts)]
        return torch.tensor(rows, dtype=torch.int64).view(len(rows), self.context_length)

    def is_truncated(self, tokens_NC: Tensor) -> Tensor:
        """bool (N,): texts that fill the whole context; they were cut, or fit to the last token."""
        return tokens_NC[:, self.context_length - 1 :].ne(self.pad_id).any(1)

    def to_json(self) -> str:
        """Everything needed to build it again, for `text_cfg.tokenizer_json` in a checkpoint."""
        return self._backend.to_str()


def load_bert_tokenizer(source: str | Path, context_length: int, *, fetch: bool = True) -> BertTextTokenizer:
    """Tokenizer from a folder, a `vocab.txt` or `tokenizer.json`, a hub name, or "builtin" (no download).

    `vocab.txt` is preferred; a `tokenizer_config.json` beside it may say `do_lower_case` (default true). Without
    `fetch` a hub name is only looked up among what was fetched before.

    Raises:
        FileNotFoundError: no such folder or file, or a hub that cannot be reached.
        ValueError: a file that is not a BERT tokenizer.
    """
    if source == "builtin":
        path = BUILTIN_VOCABULARY
    elif Path(source).expanduser().is_file():
        path = Path(source).expanduser()
    else:
        folder = local_folder(source, TOKENIZER_FILES, flag=_FLAG, fetch=fetch)
        found = [folder / name for name in TOKENIZER_FILES[:2] if (folder / name).is_file()]
        if not found:
            raise MissingFileError(f"{folder}: holds neither vocab.txt nor tokenizer.json: bring one of them there")
        path = found[0]
    try:
        if path.suffix == ".json":
            backend = Tokenizer.from_file(str(path))
        else:
            options = _read_json(path.parent / "tokenizer_config.json", missing={})
            lowercase = bool(options.get("do_lower_case", True))
            # The implementation class is a thin shell around the tokenizer kept here.
            backend = BertWordPieceTokenizer(str(path), lowercase=lowercase)._tokenizer
        return BertTextTokenizer(backend, context_length)
    except FileNotFoundError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(f"{path}: not a BERT tokenizer file ({error})") from error


def create_bert_tokenizer(text_cfg: Mapping[str, Any], *, fetch: bool = False) -> BertTextTokenizer:
    """The tokenizer of a configuration: its `tokenizer_json`, else its `tokenizer`, else that of its `text_model`.

    Args:
        text_cfg: of a model configuration.
        fetch: whether what it names on the hub may be fetched.

    Raises:
        UserError: a tokenizer that is not there, is none, or has more tokens than the tower embeds.
    """
    context_length = text_cfg["context_length"]
    source = text_cfg.get("tokenizer", text_cfg.get("text_model"))
    if "tokenizer_json" in text_cfg:
        try:
            backend = Tokenizer.from_str(text_cfg["tokenizer_json"])
        except Exception as error:  # the tokenizers library raises bare Exception
            raise UserError(f"text_cfg.tokenizer_json is no tokenizer ({error})") from error
        tokenizer = BertTextTokenizer(backend, context_length)
    elif source is not None:
        tokenizer = load_bert_tokenizer(source, context_length, fetch=fetch)
    else:
        raise UserError("text_cfg names no tokenizer: set tokenizer, text_model or tokenizer_json")
    rows = bert_shape(text_cfg["hf_config"])["vocab_size"]
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the text tower embeds {rows}: "
            "use the tokenizer and the BERT of the same folder"
        )
    return tokenizer


# --- configuration ---------------------------------------------------------------------------------------------------


def _read_json(path: Path, *, missing: dict | None = None) -> dict[str, Any]:
    if missing is not None and not path.is_file():
        return missing
    content = read_json(path, holding="part of a BERT model")
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def bert_config_of(source: str | Path, *, fetch: bool = True) -> dict[str, Any]:
    """The shape of the BERT in a folder (its `config.json`), of a `config.json`, or of a hub name."""
    path = Path(source).expanduser()
    if not path.is_file():
        path = local_folder(source, HUB_FILES, flag=_FLAG, fetch=fetch) / "config.json"
    content = _read_json(path)
    if "hidden_size" not in content or "vocab_size" not in content:
        raise UserError(f"{path}: not the config.json of a BERT (no hidden_size or vocab_size)")
    return {key: content[key] for key in HF_CONFIG_KEYS if key in content}


def bert_shape(hf_config: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """The shape that a `text_cfg.hf_config` holds or names; nothing is fetched."""
    return hf_config if isinstance(hf_config, Mapping) else bert_config_of(hf_config, fetch=False)


_RATE = number(0, 0.99)

_SHAPE_RULES: dict[str, Rule] = {
    "vocab_size": whole(4, 10_000_000),
    "hidden_size": whole(1, MAX_WIDTH),
    "num_hidden_layers": whole(1, MAX_LAYERS),
    "num_attention_heads": whole(1, 1024),
    "intermediate_size": whole(1, 64 * MAX_WIDTH),
    "hidden_act": one_of(["gelu", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh"]),
    "hidden_dropout_prob": _RATE,
    "attention_probs_dropout_prob": _RATE,
    "max_position_embeddings": whole(2, 1_000_000),
    "type_vocab_size": whole(1, 1024),
    "initializer_range": number(0, 10),
    "layer_norm_eps": number(1e-30, 1),
    "pad_token_id": whole(0, 0),
}

_TEXT_RULES: dict[str, Rule] = {
    "tower": one_of(["bert"]),
    "hf_config": either(text(), plain_object()),
    "context_length": whole(2, 1_000_000),
    "text_model": either(text(), nothing()),
    "tokenizer": either(text(), nothing()),
    "tokenizer_json": text(longest=100_000_000),
}


def check_text_cfg(text_cfg: Mapping[str, Any], embed_dim: int) -> int:
    """Refuse a `text_cfg` that no tower can be built from; how many parameters and constants it would have.

    Raises:
        UserError: names the field, what it holds and what was expected.
    """
    check_fields(text_cfg, _TEXT_RULES, place="text_cfg", required=("hf_config", "context_length"))
    shape = bert_shape(text_cfg["hf_config"])
    place = "text_cfg.hf_config"
    check_fields(shape, _SHAPE_RULES, place=place, required=("vocab_size", "hidden_size"))
    bert = {**_BERT_DEFAULTS, **shape}
    width, heads = bert["hidden_size"], bert["num_attention_heads"]
    if width % heads:
        raise UserError(f"{place}.hidden_size {width} is not divisible by num_attention_heads {heads}")
    length, positions = text_cfg["context_length"], bert["max_position_embeddings"]
    if length > positions:
        raise UserError(
            f"text_cfg.context_length is {length}, this BERT has positions for {positions} tokens: lower it"
        )
    tables = (bert["vocab_size"] + positions + bert["type_vocab_size"] + 2) * width
    blocks: int = bert["num_hidden_layers"] * block_numbers(width, bert["intermediate_size"])
    return tables + blocks + width * embed_dim


_BERT_DEFAULTS: dict[str, Any] = {
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
}
"""What transformers takes for the shape of a BERT that does not say."""


def with_text_model(config: Mapping[str, Any], source: str | Path) -> dict[str, Any]:
    """A copy of a model config that uses the BERT at `source`: its shape and its tokenizer, in the config itself.

    A checkpoint that stores this config needs no other file for evaluation. Weights are loaded separately, by
    `load_bert_weights`.
    """
    changed = copy.deepcopy(dict(config))
    text_cfg = changed["text_cfg"]
    text_cfg["hf_config"] = bert_config_of(source)
    text_cfg["text_model"] = str(source)
    text_cfg["tokenizer_json"] = load_bert_tokenizer(source, text_cfg["context_length"]).to_json()
    return changed


# --- tower -----------------------------------------------------------------------------------------------------------


class BertTextTower(nn.Module):
    """BERT's last-layer class-token vector, then one bias-free matrix to the joint width.

    Args:
        text_cfg: `hf_config` (a BERT's shape, as in `config.json`, or the path of one) and `context_length`.
        embed_dim: D.

    Cost for N texts of C columns: N·C·85 M multiply-adds at BERT-base, padding included. Columns that are padding in
    every text can be cut beforehand (`itemizedclip.data.batch.trim_padding`): padding is never attended to.
    """

    def __init__(self, text_cfg: Mapping[str, Any], embed_dim: int) -> None:
        super().__init__()
        check_text_cfg(text_cfg, embed_dim)
        hf_config = BertConfig(**bert_shape(text_cfg["hf_config"]), use_cache=False)
        self.context_length: int = text_cfg["context_length"]
        self.transformer = BertModel(hf_config, add_pooling_layer=False)
        self.proj = nn.Linear(hf_config.hidden_size, embed_dim, bias=False)
        nn.init.normal_(self.proj.weight, std=hf_config.hidden_size**-0.5)
        self.locked = False

    def lock(self, *, freeze_layer_norm: bool = True) -> None:
        """Freeze BERT: no gradient, no dropout, whatever mode the model is in. The projection stays trainable.

        Args:
            freeze_layer_norm: False lets its LayerNorms train and its dropout follow the model's mode.
        """
        self.transformer.requires_grad_(False)
        if not freeze_layer_norm:
            unfreeze_layer_norms([self.transformer])
            return
        self.locked = True
        self.transformer.eval()

    def train(self, mode: bool = True) -> BertTextTower:
        """As `nn.Module.train`, but a locked BERT stays in evaluation mode."""
        super().train(mode)
        if self.locked:
            self.transformer.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True, *, keep_attention: bool = False) -> None:
        """Recompute BERT's layers in the backward pass (`models.recompute`)."""
        set_recomputing(self.transformer.encoder.layer, enable, keep_attention=keep_attention)

    def forward(self, tokens_NC: Tensor) -> Tensor:
        """Text features (N, D), not normalised, of int64 tokens (N, C), C up to the context length.

        Raises:
            ValueError: another shape or dtype, or more columns than the context length.
        """
        if tokens_NC.dim() != 2 or tokens_NC.dtype != torch.int64 or tokens_NC.shape[1] > self.context_length:
            raise UserError(
                f"text tokens must be int64 (N, C) with C ≤ {self.context_length}, "
                f"got {tokens_NC.dtype} {tuple(tokens_NC.shape)}"
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.locked):
            hidden = self.transformer(input_ids=tokens_NC, attention_mask=tokens_NC != PAD_ID).last_hidden_state
        return self.proj(hidden[:, 0])


def _bert_names(tensors: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Rename to `BertModel`'s names: (new name → tensor, new name → key in the file); raises ValueError if no BERT."""
    anchor = "embeddings.word_embeddings.weight"
    prefix = find_prefix(tensors, anchor, beside="embeddings.position_embeddings.weight")
    if prefix is None:
        raise UserError(f"{source}: holds no BERT (no key ending in {anchor}): give the weights of a BERT encoder")
    renamed, key_of = {}, {}
    for key, tensor in tensors.items():
        name = key[len(prefix) :] if key.startswith(prefix) else key
        # Files written before PyTorch had LayerNorm carry TensorFlow's names.
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        renamed[name], key_of[name] = tensor, key
    return renamed, key_of


def load_bert_weights(tower: BertTextTower, source: str | Path) -> LoadReport:
    """Load BERT weights from a folder, a weights file or a hub name; the projection keeps its values.

    Keys may carry a prefix (`bert.`); heads, the pooler and the old `embeddings.position_ids` buffer are skipped and
    listed.

    Raises:
        FileNotFoundError: no such folder or file, or a hub that cannot be reached.
        ValueError: no BERT in the file, or one of another size.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        folder = local_folder(source, HUB_FILES, flag=_FLAG)
        found = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
        if not found:
            raise MissingFileError(f"{folder}: holds neither {' nor '.join(WEIGHT_FILES)}: bring one of them there")
        path = found[0]
    renamed, key_of = _bert_names(read_state_dict(path), str(path))
    leftover = assign_parameters(tower.transformer, renamed, source=str(path))
    skipped = {
        key_of[name]: "a buffer this version computes" if name.endswith("position_ids") else "not part of the encoder"
        for name in leftover
    }
    used = [key for key in key_of.values() if key not in skipped]
    return LoadReport(source=str(path), used=used, skipped=skipped, untouched=["proj.weight"])
