"""Series names as numbers: the character code and the encoder that turns a name into one vector.

Axes: B studies, S series, N names, P character positions (110), E name width (256).

A series name such as ``AX_FLAIR`` or ``MPR-AX_HEAD-protocol_BoneWindow`` is all that tells one series of a study from
another, so its vector is added to every patch token of that series (paper: whole-study encoder; the encoder follows
Prima's series-name encoder). Parameter names are those of the released checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from itemizedclip.models.weights import CheckpointError
from itemizedclip.runtime.errors import UserError
from itemizedclip_radiology.models.pickled_module import read_pickled_module
from itemizedclip_radiology.models.weight_files import LoadReport, assign_parameters, find_prefix, read_state_dict

ALPHABET = "abcdefghijklmnopqrstuvwxyz_+-0123456789.*(),"
"""Characters with a code of their own: position in this string + 1."""

PAD = 0
UNKNOWN = len(ALPHABET) + 1
"""Code of any other character: space, `/`, `=`, anything outside ASCII."""
TERMINATOR = len(ALPHABET) + 2
NUM_CODES = len(ALPHABET) + 3
NAME_LENGTH = 110
"""P: at most 109 characters and the terminator."""

_CODES = {character: position + 1 for position, character in enumerate(ALPHABET)}


def encode_series_name(name: str) -> Tensor:
    """Character codes of one series name: int64 (110,).

    The name is cut to 109 characters and lower-cased; the terminator and zeros follow.

    Raises:
        TypeError: `name` is not a string.
    """
    if not isinstance(name, str):
        raise TypeError(f"a series name must be a string, got {type(name).__name__}: {name!r}")
    longest = NAME_LENGTH - 1
    # Lower-casing can lengthen a name (one code point may become two), so it is cut again.
    characters = name[:longest].lower()[:longest]
    codes = torch.zeros(NAME_LENGTH, dtype=torch.int64)
    codes[: len(characters) + 1] = torch.tensor([_CODES.get(c, UNKNOWN) for c in characters] + [TERMINATOR])
    return codes


def encode_series_names(names: Sequence[str]) -> Tensor:
    """Character codes of the S series of one study, in order: int64 (S, 110).

    Raises:
        TypeError: `names` is one string instead of a sequence of strings.
        ValueError: `names` is empty.
    """
    if isinstance(names, str):
        raise TypeError(f"expected a sequence of series names, got the single string {names!r}: put it in a list")
    if not names:
        raise UserError("expected at least one series name, got none")
    return torch.stack([encode_series_name(name) for name in names])


def check_name_codes(names_NP: Tensor) -> None:
    """Refuse codes that `encode_series_name` cannot have produced.

    Raises:
        ValueError: not int64 in 0 … 46, or a row without exactly one terminator followed by padding only.
    """
    remedy = "encode names with itemizedclip_radiology.models.series_names.encode_series_names"
    if names_NP.dtype != torch.int64:
        raise UserError(f"series names must be int64 character codes, got {names_NP.dtype}: {remedy}")
    if names_NP.numel() and not 0 <= int(names_NP.min()) <= int(names_NP.max()) < NUM_CODES:
        raise UserError(f"series name codes must lie in 0 … {NUM_CODES - 1}: {remedy}")
    is_terminator = names_NP == TERMINATOR
    # Characters before the terminator and padding after it: exactly the positions up to the terminator are non-zero.
    ends_once = is_terminator.sum(-1) == 1
    up_to_end = is_terminator.flip(-1).cumsum(-1).flip(-1) > 0
    well_formed = ends_once & ((names_NP != PAD) == up_to_end).all(-1)
    if not bool(well_formed.all()):
        row = int((~well_formed).nonzero()[0, 0])
        raise UserError(
            f"series name {row} has no single terminator {TERMINATOR} followed by zeros "
            f"(codes {names_NP[row].tolist()[:12]} …): {remedy}"
        )


def sinusoid_code(num_positions: int, width: int) -> Tensor:
    """Position code (num_positions, width): columns sin ω₀p, cos ω₀p, sin ω₁p, …, ωᵢ = 10000^(−2i/width)."""
    positions = torch.arange(num_positions, dtype=torch.float32)[:, None]
    frequencies = 10000 ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = positions * frequencies
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


class NameAttention(nn.Module):
    """Multi-head self-attention in which only real characters (terminator included) are attended to."""

    def __init__(self, width: int, num_heads: int, head_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner = num_heads * head_width
        self.to_qkv = nn.Linear(width, 3 * inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, width))

    def forward(self, x_NPE: Tensor, is_character_NP: Tensor) -> Tensor:
        N, P, _ = x_NPE.shape
        q, k, v = self.to_qkv(x_NPE).view(N, P, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        pooled = F.scaled_dot_product_attention(q, k, v, attn_mask=is_character_NP[:, None, None])
        return self.to_out(pooled.transpose(1, 2).reshape(N, P, -1))


class NameFeedForward(nn.Module):
    """Two-layer MLP; the released layout counts an (empty) dropout between them, hence `net.0` and `net.3`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, width))

    def forward(self, x_NPE: Tensor) -> Tensor:
        return self.net(x_NPE)


class PreNorm(nn.Module):
    """x + fn(LayerNorm(x), …)."""

    def __init__(self, width: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fn = fn

    def forward(self, x_NPE: Tensor, *args: Tensor) -> Tensor:
        return x_NPE + self.fn(self.norm(x_NPE), *args)


class NameTransformer(nn.Module):
    """Pre-norm transformer without a final norm."""

    def __init__(self, width: int, num_layers: int, num_heads: int, head_width: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PreNorm(width, NameAttention(width, num_heads, head_width)),
                    PreNorm(width, NameFeedForward(width, hidden)),
                ]
            )
            for _ in range(num_layers)
        )

    def forward(self, x_NPE: Tensor, is_character_NP: Tensor) -> Tensor:
        for layer in self.layers:
            attention, feed_forward = cast(nn.ModuleList, layer)
            x_NPE = feed_forward(attention(x_NPE, is_character_NP))
        return x_NPE


class SeriesNameEncoder(nn.Module):
    """Character codes → one 256-wide vector per name: the transformer's output at the terminator.

    Embedding 47 × 246 beside a fixed 10-wide sine/cosine position code, 3 layers, 4 heads of 64, MLP 300.

    Cost per name of p characters: 1.2 M · p multiply-adds (0.03 GFLOP for 12 characters). Equal names of a batch are
    encoded once and padding beyond the longest name, which is never attended to, is cut: both exact.
    """

    width = 256

    def __init__(self, *, position_width: int = 10, num_layers: int = 3, num_heads: int = 4, hidden: int = 300) -> None:
        super().__init__()
        self.embed = nn.Embedding(NUM_CODES, self.width - position_width)
        self.transformer = NameTransformer(self.width, num_layers, num_heads, self.width // num_heads, hidden)
        self.register_buffer("position_code", sinusoid_code(200, position_width), persistent=False)
        self.position_code: Tensor

    def forward(self, names: Tensor) -> Tensor:
        """Name vectors (…, 256) of int64 codes (…, P) made by `encode_series_name`, P ≤ 200.

        Raises:
            ValueError: codes that no name encodes to (see `check_name_codes`) or P > 200.
        """
        P = names.shape[-1]
        if len(self.position_code) < P:
            raise UserError(f"series names have {P} positions, the encoder knows {len(self.position_code)}")
        if is_exporting():
            # Graphs know no checks of values, and no shapes that depend on them: every name, its padding masked.
            return self._encode(names.reshape(-1, P)).view(*names.shape[:-1], self.width)
        distinct_NP, row_of_name = torch.unique(names.reshape(-1, P), dim=0, return_inverse=True)
        check_name_codes(distinct_NP)
        lengths = (distinct_NP != PAD).sum(-1)
        at_terminator = self._encode(distinct_NP[:, : int(lengths.max())])
        return at_terminator[row_of_name].view(*names.shape[:-1], self.width)

    def _encode(self, names_NP: Tensor) -> Tensor:
        """Name vectors (N, 256)."""
        position_code = self.position_code[: names_NP.shape[1]].expand(names_NP.shape[0], -1, -1)
        x_NPE = torch.cat((self.embed(names_NP), position_code), dim=-1)
        x_NPE = self.transformer(x_NPE, names_NP != PAD)
        lengths = (names_NP != PAD).sum(-1)
        return x_NPE[torch.arange(x_NPE.shape[0], device=x_NPE.device), lengths - 1]


def is_exporting() -> bool:
    """Whether `torch.export` is looking at the model."""
    # PyTorch 2.6 has the wider question alone.
    return bool(getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)())


def load_series_name_weights(encoder: SeriesNameEncoder, path: str | Path) -> LoadReport:
    """Load trained weights from a safetensors or state-dict file, a whole released checkpoint, or a pickled module.

    The published file (`15t.pt`) is a pickled module; its tensors are taken without running anything of it.

    Args:
        encoder: gets the weights.
        path: file whose keys end in the encoder's parameter names under any one prefix
            (`embed.weight`, `serienameencoder.embed.weight`, `module.visual.trunk.serienameencoder.embed.weight`, …).

    Returns:
        what happened to every key under that prefix (the original module's output layer `linear.*` is skipped).

    Raises:
        ValueError: no such file, no file of tensors or of a module, no series-name encoder in it, or one of another
            size.
    """
    try:
        state = read_state_dict(path)
    except CheckpointError as error:
        if "Python objects" not in str(error):
            raise
        state = read_pickled_module(path)
    prefix = find_prefix(state, "embed.weight", beside="transformer.layers.0.0.fn.to_qkv.weight")
    if prefix is None:
        raise UserError(
            f"{path}: holds no series-name encoder (no key ending in embed.weight beside one ending in "
            "transformer.layers.0.0.fn.to_qkv.weight): give a file with its weights, or a released checkpoint for MRI "
            "or head CT"
        )
    own = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    leftover = assign_parameters(encoder, own, source=str(path))
    return LoadReport(
        source=str(path),
        used=[prefix + name for name in own if name not in leftover],
        skipped={prefix + name: "not part of the encoder" for name in leftover},
    )
