"""HLIP: one vision transformer over all series of a study, whose blocks differ only in how far they attend.

Axes: B studies, S series, D H W voxels, d h w patches of one series, L = S·d·h·w patch tokens, G attention groups,
C trunk width.

A table names the scope of every block (paper: hierarchical attention):
    "slice"   the patches of one depth index of one series, G = S·d groups
    "series"  one series, also called a scan, G = S groups
    "study"   everything, G = 1 group
Brain MRI and head CT: series, series, study, four times over. Chest CT: slice, slice, series, four times over.

Each group carries a class token. From narrow to wide scope the class tokens of the groups that join are averaged, from
wide to narrow the class token is copied to every part.

Cost of one forward pass in multiply-adds: L·12·C² per block for the linear layers (7.1 M per token at C = 768) and
2·L·n·C for attention over groups of n tokens.
    MRI, 10 series of 48×224×224: L = 11,760; 12 blocks linear 1.00 T, 8 series blocks (n = 1,177) 0.17 T, 4 study
    blocks (n = 11,761) 0.85 T, patches 0.02 T: 2.04 T multiply-adds = 4.1 TFLOP; one float32 activation (L, C) is 36 MB
    Chest CT, 112×336×336: L = 2,744; 0.30 T multiply-adds = 0.59 TFLOP; 8.4 MB
A block keeps 16 such activations for the backward pass (6.9 GB per MRI study over 12 blocks), 1 with activation
checkpointing (0.43 GB, plus one block's 0.6 GB while it is recomputed) for a third more time. The fused attention
kernel never stores a score matrix (study scope: 12·L² floats = 6.6 GB).

The patch embedding stays a strided Conv3d: against reshape + matmul it needs the same time forward on the CPU (0.42 s
to 0.40 s for 10 MRI series on one core) and 0.73 of it forward and backward (0.54 s to 0.75 s).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from itemizedclip.models.config import MAX_LAYERS, MAX_SIDE, MAX_WIDTH, block_numbers
from itemizedclip.models.patch_dropout import PatchDropout
from itemizedclip.models.recompute import set_recomputing
from itemizedclip.runtime.errors import UserError, about
from itemizedclip.runtime.fields import Rule, check_fields, number, one_of, several, true_or_false, whole
from itemizedclip_radiology.models.series_names import NAME_LENGTH, SeriesNameEncoder

SCOPES = ("slice", "series", "study")

MAX_VOXELS = 2**28
"""Of one series, 1 GB in float32."""

_VOXELS = several(whole(1, MAX_SIDE), 3)

VISION_RULES: dict[str, Rule] = {
    "tower": one_of(["hlip"]),
    "volume_size": _VOXELS,
    "patch_size": _VOXELS,
    "block_scopes": several(one_of(SCOPES), longest=MAX_LAYERS),
    "width": whole(6, MAX_WIDTH),
    "num_heads": whole(1, 1024),
    "mlp_ratio": number(0.01, 64),
    "drop_path_rate": number(0, 0.99),
    "series_names": true_or_false(),
}
"""What the fields of a model configuration's `vision_cfg` may be."""


@dataclass(frozen=True)
class HLIPConfig:
    """Size and attention table of one trunk; its fields are the keys of a model configuration's `vision_cfg`.

    Attributes:
        volume_size: voxels (D, H, W) of one series, for which the position table is made; other sizes resample it.
        patch_size: voxels (depth, height, width) of one patch.
        block_scopes: for each block "slice", "series" or "study"; its length is the number of blocks.
        width: C.
        num_heads: attention heads of a block.
        mlp_ratio: hidden width of a block's MLP over C.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 at the first. A dropped row is one
            attention group (one series in a series block), as the blocks see groups as rows.
        series_names: whether a vector of each series' name is added to its tokens.
    """

    volume_size: tuple[int, int, int]
    patch_size: tuple[int, int, int]
    block_scopes: tuple[str, ...]
    width: int = 768
    num_heads: int = 12
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.2
    series_names: bool = False

    def __post_init__(self) -> None:
        for name in ("volume_size", "patch_size", "block_scopes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("volume_size", "patch_size"):
            value = getattr(self, name)
            if len(value) != 3 or not all(isinstance(n, int) and n > 0 for n in value):
                raise UserError(f"{name} must be three positive voxel counts (D, H, W), got {value}")
        if any(n % p for n, p in zip(self.volume_size, self.patch_size)):
            raise UserError(f"volume_size {self.volume_size} is not a multiple of patch_size {self.patch_size}")
        unknown = sorted(set(self.block_scopes) - set(SCOPES))
        if unknown or not self.block_scopes:
            raise UserError(f"block_scopes must name one of {', '.join(SCOPES)} per block, got {unknown or 'none'}")
        if self.width % self.num_heads:
            raise UserError(f"width {self.width} is not divisible by num_heads {self.num_heads}")
        if self.width % 6:
            raise UserError(f"width {self.width} is not divisible by 6, as the 3-D sine/cosine position table needs")
        if not 0 <= self.drop_path_rate < 1:
            raise UserError(f"drop_path_rate must lie in [0, 1), got {self.drop_path_rate}")

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> HLIPConfig:
        """From a configuration's `vision_cfg`; raises ValueError for keys that do not exist."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise UserError(f"vision_cfg has unknown keys {unknown}; HLIP knows {sorted(known)}")
        return cls(**options)

    @classmethod
    def checked(cls, vision_cfg: Mapping[str, Any]) -> HLIPConfig:
        """From a `vision_cfg` that may hold anything; raises UserError that names the field."""
        required = ("volume_size", "patch_size", "block_scopes")
        check_fields(vision_cfg, VISION_RULES, place="vision_cfg", required=required)
        with about("vision_cfg"):
            config = cls.from_dict({key: value for key, value in vision_cfg.items() if key != "tower"})
        if math.prod(config.volume_size) > MAX_VOXELS:
            raise UserError(f"vision_cfg.volume_size is {config.volume_size}; expected at most {MAX_VOXELS:,} voxels")
        return config

    @property
    def num_numbers(self) -> int:
        """Parameters of a trunk of this size, without its series-name encoder."""
        blocks = len(self.block_scopes) * block_numbers(self.width, int(self.width * self.mlp_ratio))
        tables = math.prod(self.patch_size) + math.prod(self.grid_size)
        return blocks + tables * self.width + 4 * self.width

    @property
    def grid_size(self) -> tuple[int, int, int]:
        """(d, h, w), patches of one series of the configured size."""
        d, h, w = (n // p for n, p in zip(self.volume_size, self.patch_size))
        return d, h, w


class StudyTokens(NamedTuple):
    """Trunk output: `tokens` (B, 1 + L, C), the class token first and then the patch tokens ordered as `grid`."""

    tokens: Tensor
    grid: tuple[int, int, int, int]
    """(S, d, h, w) with S·d·h·w = L."""


class PatchEmbed3D(nn.Module):
    """Cuts one-channel volumes into patches and projects each to C numbers."""

    def __init__(self, patch_size: tuple[int, int, int], width: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(1, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, volumes_N1DHW: Tensor) -> Tensor:
        """(N, 1, D, H, W) → (N, d, h, w, C)."""
        return self.proj(volumes_N1DHW).permute(0, 2, 3, 4, 1)


def regroup(tokens: Tensor, *, num_studies: int, num_groups: int) -> Tensor:
    """Split or join attention groups: (B·G, 1 + n, C) → (B·G', 1 + n', C), the class token first.

    Groups that join average their class tokens, parts of a group that splits each get a copy of its class token.
    One group count must divide the other, so that groups nest.
    """
    old_groups = tokens.shape[0] // num_studies
    if old_groups == num_groups:
        return tokens
    C = tokens.shape[-1]
    class_tokens = tokens[:, 0].view(num_studies, old_groups, C)
    patches = tokens[:, 1:].reshape(num_studies * num_groups, -1, C)
    if num_groups < old_groups:
        class_tokens = class_tokens.view(num_studies, num_groups, old_groups // num_groups, C).mean(2)
    else:
        class_tokens = class_tokens.repeat_interleave(num_groups // old_groups, dim=1)
    return torch.cat((class_tokens.reshape(num_studies * num_groups, 1, C), patches), dim=1)


def sincos_table_1d(num_positions: int, width: int) -> Tensor:
    """(num_positions, width): sines in the first half of the columns, cosines in the second, ωᵢ = 10000^(−2i/width)."""
    frequencies = 10000 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1).float()


def sincos_table_3d(grid: tuple[int, int, int], width: int) -> Tensor:
    """(1, d, h, w, width): a third of the columns each for the column, row and depth index."""
    d, h, w = (sincos_table_1d(n, width // 3) for n in grid)
    table = torch.cat(
        (
            w[None, None, :, :].expand(*grid, -1),
            h[None, :, None, :].expand(*grid, -1),
            d[:, None, None, :].expand(*grid, -1),
        ),
        dim=-1,
    )
    return table[None]


def resample_position_table(table: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Position table (1, d, h, w, C) at another grid, trilinear, cell centres aligned (align_corners off)."""
    if tuple(table.shape[1:4]) == tuple(grid):
        return table
    moved = F.interpolate(table.float().permute(0, 4, 1, 2, 3), size=grid, mode="trilinear", align_corners=False)
    return moved.permute(0, 2, 3, 4, 1).to(table.dtype)


class HLIP(nn.Module):
    """The trunk, under the released parameter names.

    The position table `spatial_posemb` is fixed (sine/cosine, or MAE's plus a sine/cosine of the depth index), as in
    the released models: a parameter of the layout without gradient.
    """

    def __init__(self, config: HLIPConfig) -> None:
        super().__init__()
        self.config = config
        C = config.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, C))
        self.spatial_posemb = nn.Parameter(sincos_table_3d(config.grid_size, C), requires_grad=False)
        self.patch_embed = PatchEmbed3D(config.patch_size, C)
        layer_norm = partial(nn.LayerNorm, eps=1e-6)
        depth = len(config.block_scopes)
        rates = [config.drop_path_rate * index / max(1, depth - 1) for index in range(depth)]
        self.blocks = nn.ModuleList(
            Block(
                dim=C,
                num_heads=config.num_heads,
                mlp_ratio=config.mlp_ratio,
                qkv_bias=True,
                norm_layer=layer_norm,  # type: ignore[arg-type]
                drop_path=rate,
            )
            for rate in rates
        )
        self.norm = layer_norm(C)
        self.serienameencoder: SeriesNameEncoder | None = None
        self.sne_proj: nn.Linear | None = None
        if config.series_names:
            self.serienameencoder = SeriesNameEncoder()
            self.sne_proj = nn.Linear(SeriesNameEncoder.width, C)
        self.patch_dropout = PatchDropout()
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Truncated normals of std 0.02, zero biases; the series-name encoder keeps PyTorch's defaults."""
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for root in (self.blocks, self.patch_embed):
            for module in root.modules():
                if isinstance(module, nn.Linear | nn.Conv3d):
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    def set_grad_checkpointing(self, enable: bool = True, *, keep_attention: bool = False) -> None:
        """Recompute each block in the backward pass instead of keeping its activations (`models.recompute`)."""
        set_recomputing(self.blocks, enable, keep_attention=keep_attention)

    def forward(self, volumes: Tensor, series_names: Tensor | None = None) -> StudyTokens:
        """Class token and patch tokens after the final norm.

        Args:
            volumes: float (B, S, 1, D, H, W), normalised; any S ≥ 1, D H W multiples of the patch size.
            series_names: int64 (B, S, 110) codes, exactly when the trunk was built with `series_names`.

        Raises:
            ValueError: a shape or the presence of `series_names` does not fit the trunk.
        """
        grid = self._check_input(volumes, series_names)
        B, S = volumes.shape[:2]
        x = self.patch_embed(volumes.flatten(0, 1)).unflatten(0, (B, S))
        x = x + resample_position_table(self.spatial_posemb, grid)
        if self.serienameencoder is not None and self.sne_proj is not None:
            x = x + self.sne_proj(self.serienameencoder(series_names))[:, :, None, None, None]
        num_groups = {"slice": S * grid[0], "series": S, "study": 1}
        if self.training and self.patch_dropout.share:
            # Equally many of each of the smallest groups, so that groups still join and split evenly.
            narrowest = max(num_groups[scope] for scope in self.config.block_scopes)
            x = self.patch_dropout(x.reshape(B * narrowest, -1, x.shape[-1]))
        # Start as one group per study; the first block's regroup copies the class token to every group.
        x = torch.cat((self.cls_token.expand(B, -1, -1), x.reshape(B, -1, x.shape[-1])), dim=1)
        for block, scope in zip(self.blocks, self.config.block_scopes):
            x = regroup(x, num_studies=B, num_groups=num_groups[scope])
            x = block(x)
        x = regroup(x, num_studies=B, num_groups=1)
        return StudyTokens(self.norm(x), (S, *grid))

    def _check_input(self, volumes: Tensor, series_names: Tensor | None) -> tuple[int, int, int]:
        """The grid (d, h, w) of these volumes, or ValueError."""
        shape = tuple(volumes.shape)
        if volumes.dim() != 6 or shape[2] != 1 or shape[1] < 1:
            raise UserError(f"volumes must be (B, S, 1, D, H, W), one channel and at least one series, got {shape}")
        patch_size = self.config.patch_size
        if any(n < p or n % p for n, p in zip(shape[3:], patch_size)):
            raise UserError(
                f"volumes of {'×'.join(map(str, shape[3:]))} voxels do not divide into patches of "
                f"{'×'.join(map(str, patch_size))}: crop or pad each axis to a multiple"
            )
        if self.serienameencoder is None and series_names is not None:
            raise UserError("this model takes no series names (vision_cfg.series_names is false): pass None")
        if self.serienameencoder is not None:
            expected = (*shape[:2], NAME_LENGTH)
            if series_names is None:
                raise UserError(f"this model is conditioned on series names: pass series_names, int64 {expected}")
            if tuple(series_names.shape) != expected:
                got = tuple(series_names.shape)
                raise UserError(f"series_names must be (B, S, {NAME_LENGTH}) = {expected}, got {got}")
        d, h, w = (n // p for n, p in zip(shape[3:], patch_size))
        return d, h, w
