"""Initial trunk weights from a 2-D MAE ViT: the same blocks, a patch kernel and a position table grown into 3-D.

Axes: C trunk width, p q r patch size in voxels (depth, height, width), d h w patch grid.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from itemizedclip.runtime.errors import MissingFileError, UserError
from itemizedclip_radiology.models.hlip import HLIP, sincos_table_1d
from itemizedclip_radiology.models.weight_files import LoadReport, local_folder, read_state_dict

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def inflate_patch_kernel(kernel: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """2-D colour kernel (C, 3, 16, 16) → 3-D grey kernel (C, 1, p, q, r).

    Averaged over the channels, repeated over depth, and scaled by channels/depth, so that a volume whose slices all
    show one grey photograph gives exactly the patch embedding of that photograph (three equal channels there). This is
    the published initialisation (channels summed, divided by depth). In-plane sizes other than the kernel's are
    interpolated bicubically, as published.
    """
    depth, *in_plane = patch_size
    if list(kernel.shape[-2:]) != in_plane:
        kernel = F.interpolate(kernel, size=in_plane, mode="bicubic")
    grey = kernel.mean(1, keepdim=True) * (kernel.shape[1] / depth)
    return grey[:, :, None].expand(-1, -1, depth, -1, -1).clone()


def inflate_position_table(table: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """2-D table without class row (1, h₀·w₀, C) → (1, d, h, w, C): resampled in-plane, plus a sine/cosine of depth."""
    d, h, w = grid
    C = table.shape[-1]
    in_plane = resample_abs_pos_embed(table, new_size=[h, w], num_prefix_tokens=0).view(1, 1, h, w, C)
    return in_plane + sincos_table_1d(d, C).to(table).view(1, d, 1, 1, C)


def mae_weights_file(source: str | Path) -> Path:
    """The weights file that `source` names: itself, or the one in a folder or hub repository."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    folder = local_folder(source, _HUB_FILES, flag="--image-weights")
    found = [folder / name for name in _HUB_FILES if (folder / name).is_file()]
    if not found:
        raise MissingFileError(f"{folder}: holds neither {' nor '.join(_HUB_FILES)}: give the weights file itself")
    return found[0]


@torch.no_grad()
def load_mae_weights(trunk: HLIP, source: str | Path) -> LoadReport:
    """Start the trunk from MAE ViT weights (timm's or MAE's naming, which agree).

    Blocks and final norm are copied. The class token takes up its own row of the 2-D position table, which the 3-D
    trunk does not add. Patch kernel and position table are inflated as described above. Decoder, mask token and
    classifier are skipped; series-name parameters are untouched.

    Args:
        trunk: gets the weights; depth and width must be the file's.
        source: `.pth`, `.pt`, `.bin` or `.safetensors` file, a folder, or a hub name.

    Returns:
        what happened to every key.

    Raises:
        FileNotFoundError: no such file, or a hub that cannot be reached.
        ValueError: not a ViT, or one of another size; nothing has been loaded then.
    """
    path = mae_weights_file(source)
    tensors = read_state_dict(path)
    own = trunk.state_dict()
    if "cls_token" not in tensors or "patch_embed.proj.weight" not in tensors or "pos_embed" not in tensors:
        raise UserError(f"{path}: not a ViT in MAE's naming (lacks cls_token, pos_embed or patch_embed.proj.weight)")
    report = LoadReport(source=str(path))
    new: dict[str, Tensor] = {}
    table = tensors["pos_embed"].float()
    if table.shape[-1] != own["cls_token"].shape[-1]:
        raise UserError(f"{path}: width {table.shape[-1]}, the trunk has width {own['cls_token'].shape[-1]}")
    has_class_row = int(table.shape[1] ** 0.5) ** 2 != table.shape[1]
    for key, tensor in tensors.items():
        if key == "pos_embed":
            new["spatial_posemb"] = inflate_position_table(table[:, int(has_class_row) :], trunk.config.grid_size)
        elif key == "cls_token":
            new[key] = tensor + table[:, :1] if has_class_row else tensor
        elif key == "patch_embed.proj.weight":
            new[key] = inflate_patch_kernel(tensor.float(), trunk.config.patch_size)
        elif key in own:
            new[key] = tensor
        else:
            report.skipped[key] = "not part of the encoder"
            continue
        report.used.append(key)
    report.untouched = [name for name in own if name not in new]
    lacking = [name for name in report.untouched if not name.startswith(("serienameencoder.", "sne_proj."))]
    misshapen = [f"{n} {tuple(t.shape)} for {tuple(own[n].shape)}" for n, t in new.items() if t.shape != own[n].shape]
    if lacking or misshapen:
        raise UserError(f"{path}: does not fit this trunk: lacks {lacking[:3]}, of another shape {misshapen[:3]}")
    trunk.load_state_dict(new, strict=False)
    return report
