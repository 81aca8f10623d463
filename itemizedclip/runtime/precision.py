"""What --precision means on the device at hand."""

from __future__ import annotations

import contextlib
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from itemizedclip.runtime.collectives import gather_objects, is_main
from itemizedclip.runtime.processes import SetupError

logger = logging.getLogger(__name__)

WORTHWHILE_RATIO = 0.8
"""auto takes bfloat16 on a CPU whose products in it take at most this share of float32's time: casts cost the rest."""

_PROBE_SIZE = 256
_PROBE_ROUNDS = 5


@dataclass(frozen=True)
class Precision:
    """How a run computes.

    Attributes:
        name: amp, amp_bf16, bf16 or fp32.
        device_type: cpu or cuda.
        autocast_dtype: of matrix products under autocast, None without autocast.
        reason: why auto became this, a sentence.
        notice: a sentence when it is not what was asked for, or slower than another.
    """

    name: str
    device_type: str
    autocast_dtype: torch.dtype | None
    reason: str | None = None
    notice: str | None = None

    @property
    def matmul_dtype(self) -> torch.dtype:
        """In which the towers multiply matrices."""
        return self.autocast_dtype or torch.float32

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Context of every forward pass."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=self.autocast_dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling for float16; does nothing otherwise."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "amp")


def resolve_precision(name: str, device: torch.device) -> Precision:
    """The precision a command can have on a device, the same on every rank; all ranks must call it. Logs its reason.

    auto becomes amp_bf16 where every rank's device computes bfloat16, else amp on GPUs and fp32 on CPUs. amp on a CPU
    becomes fp32, with a notice; with --deterministic auto does, too, for what decides there is a measured time.

    Raises:
        SetupError: bfloat16 is asked for on a GPU without it.
    """
    precision = _on_cpu(name) if device.type == "cpu" else _on_gpu(name, device)
    if is_main() and precision.reason:
        logger.info("precision %s: %s", precision.name, precision.reason)
    if is_main() and precision.notice:
        logger.warning(precision.notice)
    return precision


def _on_cpu(name: str) -> Precision:
    if name == "amp":
        notice = "--precision amp is float16 with loss scaling and needs a GPU; this CPU run computes in fp32"
        return Precision("fp32", "cpu", None, notice=notice)
    if name == "auto" and torch.are_deterministic_algorithms_enabled():
        return Precision("fp32", "cpu", None, reason="--deterministic, which measures nothing")
    if name == "auto":
        found = gather_objects(cpu_bfloat16())
        # The slowest rank would hold up the others.
        slowest = max(found, key=lambda one: (not one.is_worthwhile, one.ratio))
        if slowest.is_worthwhile:
            return Precision("amp_bf16", "cpu", torch.bfloat16, reason=slowest.sentence)
        return Precision("fp32", "cpu", None, reason=slowest.sentence)
    if "bf16" not in name:
        return Precision("fp32", "cpu", None)
    own = cpu_bfloat16()
    slow = None if own.is_worthwhile else f"--precision {name}: {own.sentence}; --precision fp32 is faster"
    return Precision(name, "cpu", torch.bfloat16, notice=slow)


def _on_gpu(name: str, device: torch.device) -> Precision:
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    reason = None
    if name == "auto":
        everywhere = all(gather_objects(has_bf16))
        name = "amp_bf16" if everywhere else "amp"
        reason = "the GPU computes bfloat16" if everywhere else "the GPU, or another rank's, has no bfloat16 units"
    if "bf16" in name and not has_bf16:
        raise SetupError(f"--precision {name}: this GPU does not compute bfloat16; use --precision amp")
    dtype = {"amp": torch.float16, "amp_bf16": torch.bfloat16, "bf16": torch.bfloat16}.get(name)
    return Precision(name, device.type, dtype, reason=reason)


# --- bfloat16 on CPUs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CpuBfloat16:
    """What this processor makes of bfloat16.

    Attributes:
        has_units: whether PyTorch and oneDNN report instructions for it; None where they cannot tell.
        ratio: measured time of a linear layer's three matrix products, in that of float32.
    """

    has_units: bool | None
    ratio: float

    @property
    def is_worthwhile(self) -> bool:
        """Whether bfloat16 pays: units that exist and are faster, or, where nobody can tell, are faster."""
        return self.has_units is not False and self.ratio <= WORTHWHILE_RATIO

    @property
    def sentence(self) -> str:
        """For the log."""
        units = {True: "has bfloat16 units", False: "has no bfloat16 units", None: "may have bfloat16 units"}
        measured = f"products in bfloat16 take {self.ratio:.2g} times as long as in float32 (measured)"
        return f"this CPU {units[self.has_units]}; {measured}"


@lru_cache(maxsize=1)
def cpu_bfloat16() -> CpuBfloat16:
    """Ask the libraries and measure, once per process; a tenth of a second."""
    return CpuBfloat16(_reported_units(), _measured_ratio())


def _reported_units() -> bool | None:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    # oneDNN obeys ONEDNN_MAX_CPU_ISA but also says yes to AVX-512 without the units; PyTorch knows those, yet not in
    # every version.
    asked: list[Callable[[], bool] | None] = [
        getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None),
        getattr(torch.cpu, "_is_avx512_bf16_supported", None),
    ]
    answers = [bool(ask()) for ask in asked if ask is not None]
    return all(answers) if answers else None


@torch.no_grad()
def _measured_ratio() -> float:
    """Best processor time of several rounds, on one thread: other jobs of the machine then hardly count."""
    n = _PROBE_SIZE
    # Not random: the generator that builds the model stays where it is.
    exact = [torch.linspace(-1, 1, n * n).view(n, n) for _ in range(3)]
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(_PROBE_ROUNDS):
            for dtype in best:
                tensors = [tensor.to(dtype) for tensor in exact]
                started = time.thread_time()
                _linear_layer(*tensors)
                best[dtype] = min(best[dtype], time.thread_time() - started)
    finally:
        torch.set_num_threads(threads)
    return best[torch.bfloat16] / max(best[torch.float32], 1e-9)


def _linear_layer(x: Tensor, weight: Tensor, gradient: Tensor) -> None:
    """The products of one layer forward and backward."""
    _ = x @ weight.T, gradient @ weight, gradient.T @ x
