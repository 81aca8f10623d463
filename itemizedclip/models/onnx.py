"""Models as ONNX graphs, which other programs run without PyTorch: two towers and the head.

    image.onnx   images (B, 3, H, W), or of studies (1, S, 1, D, H, W) and series_names (1, S, 110)
                 → global (B, D), tokens (B, L, D)
    text.onnx    text (M, C) token ids, padded with 0 → features (M, D)
    head.onnx    items (M, D), tokens (B, L, D) → scores (B, M), attention (B, M, L), nowhere (B, M)
    tokenizer.json, model.json, example.py

B, S, M, C and L may be anything. `scores` is TCSim, `attention` the mean over the heads, `nowhere` what an item gives
to the zero token.

Axes: B images, S series, M texts, C text tokens, L image tokens, D joint width.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from itemizedclip.models.dual_encoder import DualEncoder
from itemizedclip.models.factory import LoadedModel, transform_spec
from itemizedclip.models.item_attention import ItemAttention
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.files import replacing, write_json, write_text
from itemizedclip.runtime.registry import MissingExtraError

OPSET = 20
"""Version of the ONNX operators."""

GREY_MEAN, GREY_STD = 0.449, 0.226
"""What volumes between 0 and 1 are normalised with, as in training."""

FILES = ("image.onnx", "text.onnx", "head.onnx")
"""The graphs of a folder."""


class _Image(nn.Module):
    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, series_names: Tensor | None = None) -> tuple[Tensor, Tensor]:
        features = self.model.encode_image(images, series_names=series_names)
        return features.global_BD, features.tokens_BLD


class _Text(nn.Module):
    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, text: Tensor) -> Tensor:
        return self.model.encode_text(text)


class _Head(nn.Module):
    """TCSim with its attention, in operations that every runtime has."""

    def __init__(self, head: ItemAttention) -> None:
        super().__init__()
        self.head = head

    def forward(self, items: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        projected = self.head.project(tokens)
        items_BMD = items[None].expand(tokens.shape[0], -1, -1)
        maps = self.head.attention_weights(items_BMD, projected)
        weights = torch.cat((maps.tokens, maps.nowhere[..., None]), dim=-1)
        pooled_BHMd = torch.matmul(weights, projected.values)
        B, H, M, d = pooled_BHMd.shape
        embeddings = self.head.attn.out_proj(pooled_BHMd.transpose(1, 2).reshape(B, M, H * d))
        scores = F.cosine_similarity(embeddings, items_BMD, dim=-1)
        return scores, maps.tokens.mean(1), maps.nowhere.mean(1)


def export_onnx(loaded: LoadedModel, folder: Path) -> list[Path]:
    """Write a model's three graphs and what a program needs to use them.

    Args:
        loaded: a model on the CPU, in evaluation mode.
        folder: gets the files; it is there.

    Returns:
        the files written.

    Raises:
        MissingExtraError: the exporter's packages are not installed.
        UserError: a model that cannot be exported.
    """
    model = loaded.model.float().eval()
    config = loaded.config
    is_study = loaded.input_kind == "studies"
    B, S, M, L = (torch.export.Dim(name, min=1, max=2**15) for name in ("B", "S", "M", "L"))
    context = int(getattr(loaded.tokenizer, "context_length"))  # noqa: B009  every tokenizer of ours has it
    # The graph takes the whole length too; the exporter, though, takes a slice of all columns for a case of its own.
    C = torch.export.Dim("C", min=2, max=context - 1)
    images, names = _example_images(loaded)
    width = model.head.width
    if is_study:
        inputs: tuple[Tensor, ...] = (images,) if names is None else (images, names)
        shapes: tuple[Any, ...] = ({1: S},) if names is None else ({1: S}, {1: S})
        input_names = ["images"] if names is None else ["images", "series_names"]
    else:
        inputs, shapes, input_names = (images,), ({0: B},), ["images"]
    text = loaded.tokenizer(["a text of several words", "another", "a third"])[:, : min(16, context - 1)]
    written = [
        _write(_Image(model), inputs, shapes, input_names, ["global", "tokens"], folder / FILES[0]),
        _write(_Text(model), (text,), ({0: M, 1: C},), ["text"], ["features"], folder / FILES[1]),
        _write(
            _Head(model.head),
            (torch.randn(3, width), torch.randn(2, 7, width)),
            ({0: M}, {0: B, 1: L}),
            ["items", "tokens"],
            ["scores", "attention", "nowhere"],
            folder / FILES[2],
        ),
    ]
    to_json = getattr(loaded.tokenizer, "to_json", None)
    if to_json is None:
        raise UserError(f"the tokenizer of {config.get('name', 'this model')} cannot be written as a file")
    write_text(folder / "tokenizer.json", to_json())
    write_json(folder / "model.json", _description(loaded, is_study, names is not None, context))
    example = Path(__file__).parent / ("onnx_example_study.txt" if is_study else "onnx_example.txt")
    write_text(folder / "example.py", example.read_text(encoding="utf-8"))
    return [*written, folder / "tokenizer.json", folder / "model.json", folder / "example.py"]


def _example_images(loaded: LoadedModel) -> tuple[Tensor, Tensor | None]:
    """An input of the model's kind; names where it reads the names of series."""
    vision = loaded.config["vision_cfg"]
    if loaded.input_kind == "photographs":
        size = vision["image_size"]
        h, w = (size, size) if isinstance(size, int) else size
        return torch.randn(2, 3, h, w), None
    images = torch.randn(1, 3, 1, *vision["volume_size"])
    if not loaded.reads_series_names:
        return images, None
    names = torch.zeros(1, 3, 110, dtype=torch.int64)
    names[..., :4] = torch.tensor([[1, 24, 27, 46], [2, 24, 27, 46], [3, 24, 27, 46]])
    return images, names


def _description(loaded: LoadedModel, is_study: bool, reads_names: bool, context: int) -> dict[str, Any]:
    """What a program has to know besides the graphs."""
    if is_study:
        vision = loaded.config["vision_cfg"]
        image = {
            "kind": "study",
            "volume_size": list(vision["volume_size"]),
            "patch_size": list(vision["patch_size"]),
            "mean": GREY_MEAN,
            "std": GREY_STD,
            "reads_series_names": reads_names,
            "transform": dict(loaded.meta.get("transform") or {}),
        }
    else:
        image = {"kind": "photograph", "patch_size": loaded.config["vision_cfg"]["patch_size"]}
        image |= transform_spec(loaded.config)
    text = {"context_length": context, "pad_id": int(getattr(loaded.tokenizer, "pad_id", 0))}
    return {
        "name": loaded.config.get("name", ""),
        "image": image,
        "text": text,
        "logit_scale": float(loaded.model.logit_scale.detach().exp()),
        "logit_bias": float(loaded.model.logit_bias.detach()),
        "source": Path(loaded.source).name,
    }


@torch.no_grad()
def _write(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    shapes: tuple[Any, ...],
    input_names: list[str],
    output_names: list[str],
    path: Path,
) -> Path:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError("exporting needs the packages onnx and onnxscript: pip install -e '.[onnx]'") from error
    before = logging.root.level
    logging.disable(logging.WARNING)  # the exporter's notes on operators that are not ours
    try:
        with warnings.catch_warnings(), replacing(path) as part:
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                inputs,
                str(part),
                input_names=input_names,
                output_names=output_names,
                dynamic_shapes=shapes,
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    finally:
        logging.disable(logging.NOTSET)
        logging.root.setLevel(before)
    return path


@torch.no_grad()
def largest_difference(loaded: LoadedModel, folder: Path) -> float:
    """Between the scores, attention and features of the model and of its exported graphs in onnxruntime, on the CPU.

    Random inputs, of other sizes than the export looked at; features are compared relative to their largest value.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingExtraError("comparing needs the package onnxruntime: pip install -e '.[onnx]'") from error
    run = {
        name: onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"]).run for name in FILES
    }
    model, generator = loaded.model, torch.Generator().manual_seed(0)
    images, names = _example_images(loaded)
    # One series, or one picture, less.
    images, names = (images[:1], None) if names is None and images.dim() == 4 else (images[:, :2], names)
    images = torch.randn(images.shape, generator=generator)
    inputs = {"images": images.numpy()}
    if names is not None:
        names = names[:, :2]
        inputs["series_names"] = names.numpy()
    features = model.encode_image(images, series_names=names)
    text = loaded.tokenizer(["one", "two words", "three words more", "and again", "five"])
    items = model.encode_text(text)
    expected = [features.global_BD, features.tokens_BLD, items, *_Head(model.head)(items, features.tokens_BLD)]
    got = [*run["image.onnx"](None, inputs), *run["text.onnx"](None, {"text": text.numpy()})]
    got += run["head.onnx"](None, {"items": got[2], "tokens": got[1]})
    largest = 0.0
    for number, (one, other) in enumerate(zip(expected, got)):
        scale = float(one.abs().max()) if number < 3 else 1.0
        largest = max(largest, float((one - torch.from_numpy(other)).abs().max()) / scale)
    return largest
