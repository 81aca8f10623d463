"""What --precision means on the device at hand."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from itemizedclip.runtime.processes import SetupError


@dataclass(frozen=True)
class Precision:
    """How a run computes.

    Attributes:
        name: amp, amp_bf16, bf16 or fp32.
        device_type: cpu or cuda.
        autocast_dtype: of matrix products under autocast, None without autocast.
        notice: a sentence when it is not what was asked for.
    """

    name: str
    device_type: str
    autocast_dtype: torch.dtype | None
    notice: str | None = None

    def autocast(self) -> contextlib.AbstractContextManager:
        """Context of every forward pass."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=self.autocast_dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling for float16; does nothing otherwise."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "amp")


def resolve_precision(name: str, device: torch.device) -> Precision:
    """The precision a run can have on a device.

    auto becomes amp_bf16 on GPUs that compute bfloat16, amp on older GPUs, fp32 on CPUs. amp on a CPU becomes fp32,
    with a notice.

    Raises:
        SetupError: bfloat16 is asked for on a GPU without it.
    """
    if device.type == "cpu":
        if name == "amp":
            notice = "--precision amp is float16 with loss scaling and needs a GPU; this CPU run computes in fp32"
            return Precision("fp32", "cpu", None, notice)
        return Precision(name, "cpu", torch.bfloat16) if "bf16" in name else Precision("fp32", "cpu", None)
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        name = "amp_bf16" if has_bf16 else "amp"
    if "bf16" in name and not has_bf16:
        raise SetupError(f"--precision {name}: this GPU does not compute bfloat16; use --precision amp")
    dtype = {"amp": torch.float16, "amp_bf16": torch.bfloat16, "bf16": torch.bfloat16}.get(name)
    return Precision(name, device.type, dtype)
