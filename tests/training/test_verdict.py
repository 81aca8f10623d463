"""Skipping an update without asking the device, and what a step asks it."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from itemizedclip.training import engine
from itemizedclip.training.verdict import Findings, update_unless
from tests.helpers.toy import toy_options, toy_train


@pytest.mark.parametrize("fused", [True, False])
def test_a_bad_step_leaves_weights_and_moments_and_a_good_one_is_a_plain_step(fused):
    torch.manual_seed(0)
    ours, plain = (torch.nn.Parameter(torch.arange(6.0).view(2, 3)) for _ in range(2))
    skipping = torch.optim.AdamW([ours], lr=0.1, fused=fused)
    reference = torch.optim.AdamW([plain], lr=0.1, fused=fused)
    for is_bad in (0, 1, 0, 1):
        gradient = torch.randn(2, 3)
        ours.grad = torch.full_like(gradient, float("nan")) if is_bad else gradient.clone()
        update_unless(skipping, torch.tensor(is_bad))
        if not is_bad:
            plain.grad = gradient
            reference.step()
        assert ours.equal(plain)
    for name, value in reference.state[plain].items():
        assert skipping.state[ours][name].equal(value), name


def test_a_finding_comes_with_the_next_step():
    findings = Findings()
    assert findings.take() is None
    assert findings.swap(1, torch.tensor([1, 0, 0]), torch.tensor(float("nan")), ["a"]) is None
    first = findings.swap(2, torch.tensor([0, 1, 1]), torch.tensor(0.5), ["b"])
    assert (first.step, first.is_bad, first.wants_stop, first.sample_ids) == (1, True, False, ["a"])
    second = findings.take()
    assert (second.step, second.is_bad, second.wants_stop, second.loss) == (2, False, True, 0.5)
    assert (first.wants_save, second.wants_save) == (False, True)
    assert findings.take() is None


class Asked(TorchDispatchMode):
    """Names the functions of the package in which the host asks for numbers of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal):
            frame = sys._getframe()
            while "itemizedclip" not in frame.f_code.co_filename:
                frame = frame.f_back
            self.names.add(frame.f_code.co_name)
        return func(*args, **(kwargs or {}))


def test_a_step_asks_the_device_for_nothing(tmp_path, monkeypatch):
    asked = Asked()
    plain = engine.train_step

    def watched(run, batch):
        with asked:
            return plain(run, batch)

    monkeypatch.setattr(engine, "train_step", watched)
    toy_train(toy_options(tmp_path))
    # A draw of the processor's own generator, and a look at logits that only a processor takes.
    assert asked.names == {"draw_keep", "_attention"}
