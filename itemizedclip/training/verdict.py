"""What all ranks find of a step, read by the host when the next one is under way.

The device skips an update by itself (AdamW's `found_inf`), so nobody waits for it: the finding of a step is copied to
the host beside the next step, and what is said and counted about it comes that much later.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Finding:
    """One step's, agreed by all ranks.

    Attributes:
        step: its number, from 1.
        is_bad: loss or gradient was not finite on some rank; nothing was updated.
        wants_stop: a signal asks some rank to stop.
        wants_save: some rank wants a checkpoint.
        loss: this rank's.
        sample_ids: of this rank's batch.
    """

    step: int
    is_bad: bool
    wants_stop: bool
    wants_save: bool
    loss: float
    sample_ids: list[str]


class Findings:
    """The one finding that is on its way to the host."""

    def __init__(self) -> None:
        self._waiting: tuple[int, Tensor, list[str]] | None = None
        self._arrived: torch.Event | None = None

    def swap(self, step: int, flags: Tensor, loss: Tensor, sample_ids: list[str]) -> Finding | None:
        """Send a step's finding to the host; returns the one before, if there is one.

        Args:
            step: from 1.
            flags: three numbers on the run's device, not 0 where any rank says: bad, stop, save.
            loss: scalar on the device.
            sample_ids: of the batch.
        """
        before = self.take()
        numbers = torch.cat([flags.to(torch.float32), loss.detach().to(torch.float32)[None]])
        self._waiting = (step, self._to_host(numbers), sample_ids)
        return before

    def _to_host(self, numbers: Tensor) -> Tensor:
        if not numbers.is_cuda:
            return numbers
        host = torch.empty_like(numbers, device="cpu", pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        self._arrived = torch.cuda.current_stream().record_event()
        return host

    def take(self) -> Finding | None:
        """The finding on its way, once it is here."""
        if self._waiting is None:
            return None
        if self._arrived is not None:
            self._arrived.synchronize()
        step, numbers, sample_ids = self._waiting
        self._waiting = self._arrived = None
        is_bad, wants_stop, wants_save, loss = numbers.tolist()
        return Finding(step, bool(is_bad), bool(wants_stop), bool(wants_save), loss, sample_ids)


def update_unless(optimizer: torch.optim.Optimizer, is_bad: Tensor) -> None:
    """A step of an optimizer that its device leaves out where `is_bad` is not 0; the host is not asked.

    Optimizers that cannot (those of sharded parameters, and all that are not fused) are asked here and now.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    plain = all(type(p) in (nn.Parameter, Tensor) and not hasattr(p, "device_mesh") for p in parameters)
    if not (plain and optimizer.defaults.get("fused")):
        if not bool(is_bad):
            optimizer.step()
        return
    optimizer.found_inf = is_bad.to(torch.float32)  # type: ignore[attr-defined]
    optimizer.step()
