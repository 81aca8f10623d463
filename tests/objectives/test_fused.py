"""The loss that differentiates itself, against the plain way by autograd, and what it promises besides the numbers."""

from __future__ import annotations

import dataclasses
import itertools
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_objectives import OPTIONS, D, H, heads, rank_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from itemizedclip.objectives import exchange, fused
from itemizedclip.objectives.exchange import Exchange, RemoteItems
from itemizedclip.objectives.loss import LossInputs, itemized_losses
from itemizedclip.objectives.pairing import ItemRows
from itemizedclip.runtime.processes import leave_process_group

LEAVES = ("image_global", "image_tokens", "items")
COMBINATIONS = {
    "all": {},
    "checks": {"normal_check": True, "mask_duplicates": True},
    "no_kta": {"kta_weight": 0.0},
    "no_ila": {"ila_weight": 0.0},
    "no_iis_mps": {"iis_weight": 0.0, "mps_weight": 0.0},
    "no_uwp": {"worst_positive_factor": 1.0},
    "mps_alone": {"ila_weight": 0.0, "kta_weight": 0.0, "iis_weight": 0.0},
}


def given(ranks: list[dict], features_WND: Tensor) -> Exchange | None:
    """The items of all ranks but the first, without a process group."""
    remotes = [
        RemoteItems(features_WND[r].detach(), ItemRows(d["mask"], d["normal"], d["ids"].flatten()), d["index"], r)
        for r, d in enumerate(ranks)
        if r
    ]
    return Exchange(features_WND, lambda: remotes) if remotes else None


def step(
    ranks: list[dict], *, is_fused: bool, dtype=torch.float64, spread: float = 1.0, factor: float = 1.0, **options
) -> dict[str, Tensor]:
    """Losses of the first rank and the gradients of everything, after one backward pass of `factor` times the total."""
    head, _ = heads()
    head = head.to(dtype)
    with torch.no_grad():
        head.attn.in_proj_weight[: 2 * D] *= spread
    mine = ranks[0]
    leaves = {name: mine[name].to(dtype, copy=True).requires_grad_() for name in LEAVES}
    leaves["scale"] = torch.tensor(14.0, dtype=dtype, requires_grad=True)
    leaves["bias"] = torch.tensor(-10.0, dtype=dtype, requires_grad=True)
    leaves["others"] = torch.stack([data["items"].flatten(0, 1) for data in ranks]).to(dtype).requires_grad_()
    inputs = LossInputs(
        leaves["image_global"], leaves["image_tokens"], leaves["items"].flatten(0, 1), mine["mask"], mine["normal"],
        mine["ids"].flatten(),
    )  # fmt: skip
    losses = itemized_losses(
        head, inputs, leaves["scale"], leaves["bias"], dataclasses.replace(OPTIONS, **options),
        index_BT=mine["index"], keep_mask_BHTL=mine["keep"], exchange=given(ranks, leaves["others"]), fused=is_fused,
    )  # fmt: skip
    (factor * losses["loss"]).backward()
    grads = {name: leaf.grad for name, leaf in leaves.items()} | {n: p.grad for n, p in head.named_parameters()}
    return {name: value.detach() for name, value in (losses | grads).items() if value is not None}


def assert_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = (ours[name] - expected).norm() / (expected.norm() + 1e-6)
        assert error <= tolerance, (name, float(error))


@pytest.fixture(params=["folded", "projected"])
def way(request, monkeypatch) -> str:
    monkeypatch.setattr(fused, "folding_is_cheaper", lambda *sizes: request.param == "folded")
    return request.param


@pytest.fixture(params=["whole", "blocks"])
def blocks(request, monkeypatch) -> str:
    if request.param == "blocks":
        monkeypatch.setattr(fused, "work_bytes", lambda device: 1)
        monkeypatch.setattr(fused, "ranks_at_once", lambda *sizes: 2)
    return request.param


@pytest.mark.parametrize("name", COMBINATIONS)
@pytest.mark.parametrize("keep_rate", [1.0, 0.6])
@pytest.mark.parametrize("world", [1, 4])
def test_equals_autograd(way, blocks, world, keep_rate, name):
    for seed, (B, K, L) in enumerate([(4, 3, 10), (1, 4, 7), (5, 1, 6), (1, 1, 3), (3, 2, 40)]):
        ranks = [rank_inputs(10 * seed + rank, B, K, L, keep_rate=keep_rate) for rank in range(world)]
        theirs = step(ranks, is_fused=False, **COMBINATIONS[name])
        assert_alike(step(ranks, is_fused=True, **COMBINATIONS[name]), theirs, 1e-9)


@pytest.mark.parametrize("most", [1, 2])
def test_drawn_ranks_give_the_loss_and_gradients_of_all_on_average(way, blocks, monkeypatch, most):
    """Over every possible draw, not over many random ones: equal to the last digits."""
    ranks = [rank_inputs(70 + rank, 4, 3, 10) for rank in range(4)]
    draws = list(itertools.permutations(range(3)))
    found: dict[bool, list[dict[str, Tensor]]] = {True: [], False: []}
    for draw in draws:
        monkeypatch.setattr(torch, "randperm", lambda count, draw=draw: torch.tensor(draw))
        for is_fused in (True, False):
            found[is_fused].append(step(ranks, is_fused=is_fused, remote_ranks=most))
        assert_alike(found[True][-1], found[False][-1], 1e-9)
    monkeypatch.undo()
    everyone = step(ranks, is_fused=True)
    mean = {name: torch.stack([one[name] for one in found[True]]).mean(0) for name in everyone}
    assert_alike(mean, everyone, 1e-9)
    assert not torch.allclose(found[True][0]["loss"], everyone["loss"])
    assert torch.equal(found[True][0]["mps"], everyone["mps"]), "MPS meets all"
    assert_alike(step(ranks, is_fused=True, remote_ranks=3), everyone, 0.0)


@pytest.mark.parametrize("keep_rate", [1.0, 0.5])
def test_logits_too_far_apart_for_one_exponential(way, keep_rate):
    ranks = [rank_inputs(rank, 3, 2, 9, keep_rate=keep_rate) for rank in range(2)]
    # Heads that are sure of different tokens tie for the key token: here every token is one.
    theirs = step(ranks, is_fused=False, spread=30.0, key_token_fraction=1.0)
    assert_alike(step(ranks, is_fused=True, spread=30.0, key_token_fraction=1.0), theirs, 1e-8)


def test_gradients_are_those_of_finite_differences(way):
    """torch.autograd.gradcheck goes back several times, which this loss refuses."""
    head, _ = heads()
    head = head.double()
    data, other = rank_inputs(3, 2, 2, 4), rank_inputs(4, 2, 2, 4)
    arguments = [data["image_global"], data["image_tokens"], data["items"].flatten(0, 1)]
    arguments += [torch.stack([data["items"], other["items"]]).flatten(1, 2)]
    arguments = [a.double().requires_grad_() for a in arguments]
    arguments += [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (4.0, -3.0)]
    arguments += list(head.parameters())

    def total() -> Tensor:
        image_global, tokens, items, others, scale, bias = arguments[:6]
        inputs = LossInputs(image_global, tokens, items, data["mask"], data["normal"])
        sent = given([data, other], others)
        return itemized_losses(head, inputs, scale, bias, OPTIONS, index_BT=data["index"], exchange=sent)["loss"]

    total().backward()
    step_size, generator = 1e-6, torch.Generator().manual_seed(0)
    for argument in arguments:
        direction = torch.randn(argument.shape, generator=generator, dtype=torch.float64)
        values = []
        with torch.no_grad():
            for shift in (step_size, -2 * step_size, step_size):
                argument += shift * direction
                values.append(total())
        slope = (values[0] - values[1]) / (2 * step_size)
        torch.testing.assert_close((argument.grad * direction).sum(), slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.08), (torch.float16, 0.01)])
def test_half_precision(way, dtype, tolerance):
    """Near float32, and no gradient lost to float16's range: the loss scale arrives only after they are computed."""
    ranks = [rank_inputs(20 + rank, 4, 3, 30) for rank in range(2)]
    options = {"iis_weight": 0.7, "key_token_fraction": 1.0}  # every token a key token: no choice to differ in
    exact = step(ranks, is_fused=True, dtype=torch.float32, **options)
    with torch.autocast("cpu", dtype):
        rough = step(ranks, is_fused=True, dtype=torch.float32, factor=1e-3, **options)
    for name in exact:
        assert rough[name].dtype == torch.float32
        factor = 1e-3 if name not in ("loss", "ila", "kta", "mps", "iis") else 1.0
        error = (rough[name] - factor * exact[name]).norm() / (factor * exact[name].norm() + 1e-6)
        assert error <= tolerance, (name, float(error))


def test_float16_tokens_keep_small_gradients():
    head, _ = heads()
    data = rank_inputs(2, 4, 3, 12)
    grads = []
    for dtype in (torch.float32, torch.float16):
        tokens = data["image_tokens"].to(dtype, copy=True).requires_grad_()
        inputs = LossInputs(
            data["image_global"], tokens, data["items"].flatten(0, 1), data["mask"], data["normal"]
        )  # fmt: skip
        loss = itemized_losses(head, inputs, torch.tensor(1e-5), torch.tensor(-10.0), OPTIONS, index_BT=data["index"])
        (65536.0 * loss["loss"]).backward()
        grads.append(tokens.grad.float())
    assert (grads[0] - grads[1]).norm() <= 0.05 * grads[0].norm()


def test_terms_carry_no_gradient_and_there_is_one_way_back():
    head, _ = heads()
    data = rank_inputs(1, 3, 2, 5)
    items = data["items"].flatten(0, 1).requires_grad_()
    inputs = LossInputs(data["image_global"], data["image_tokens"], items, data["mask"], data["normal"])
    losses = itemized_losses(head, inputs, torch.tensor(14.0), torch.tensor(-10.0), OPTIONS)
    assert [name for name, value in losses.items() if value.requires_grad] == ["loss"]
    losses["loss"].backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="fused=False"):
        losses["loss"].backward()
    plain = itemized_losses(head, inputs, torch.tensor(14.0), torch.tensor(-10.0), OPTIONS, fused=False)
    assert all(value.requires_grad for value in plain.values())
    with torch.no_grad():
        values = itemized_losses(head, inputs, torch.tensor(14.0), torch.tensor(-10.0), OPTIONS)
    assert not values["loss"].requires_grad


def test_without_gradient_the_values_are_the_same(way):
    head, _ = heads()
    data = rank_inputs(1, 3, 2, 5)
    inputs = LossInputs(
        data["image_global"], data["image_tokens"], data["items"].flatten(0, 1), data["mask"], data["normal"]
    )

    def values() -> dict[str, Tensor]:
        scale, bias = torch.tensor(14.0), torch.tensor(-10.0)
        return itemized_losses(head, inputs, scale, bias, OPTIONS, index_BT=data["index"])

    with torch.no_grad():
        found = values()
    for name, value in values().items():
        torch.testing.assert_close(found[name], value)


def test_what_is_frozen_gets_no_gradient():
    head, _ = heads()
    for parameter in head.ln_k.parameters():
        parameter.requires_grad_(False)
    data = rank_inputs(1, 3, 2, 5)
    inputs = LossInputs(
        data["image_global"], data["image_tokens"], data["items"].flatten(0, 1), data["mask"], data["normal"]
    )
    itemized_losses(head, inputs, torch.tensor(14.0), torch.tensor(-10.0), OPTIONS)["loss"].backward()
    assert {name for name, p in head.named_parameters() if p.grad is None} == {"ln_k.weight", "ln_k.bias"}


def test_the_plain_way_serves_function_transforms():
    head, _ = heads()
    data = rank_inputs(1, 3, 2, 5)

    def total(tokens: Tensor) -> Tensor:
        inputs = LossInputs(
            data["image_global"], tokens, data["items"].flatten(0, 1), data["mask"], data["normal"]
        )  # fmt: skip
        scale, bias = torch.tensor(14.0), torch.tensor(-10.0)
        return itemized_losses(head, inputs, scale, bias, OPTIONS, index_BT=data["index"], fused=False)["loss"]

    by_function = torch.func.grad(total)(data["image_tokens"])
    tokens = data["image_tokens"].clone().requires_grad_()
    total(tokens).backward()
    torch.testing.assert_close(by_function, tokens.grad)


@pytest.mark.parametrize("rate", [0.05, 0.6, 0.8, 0.95])
def test_drawn_entries_are_kept_at_the_rate_and_independently(rate):
    torch.manual_seed(0)
    kept = torch.cat([fused.draw_keep((4, 8, 25, 96), rate, torch.device("cpu")) for _ in range(10)]).double()
    n = kept.numel()
    sigma = (rate * (1 - rate) / n) ** 0.5
    assert abs(kept.mean().item() - rate) < 5 * sigma
    centred = kept.flatten() - rate
    for lag in (1, 2, 3, 4, 96):  # neighbours share a draw of 64 bits
        assert abs((centred[lag:] * centred[:-lag]).mean().item()) < 5 * rate * (1 - rate) / n**0.5
    for place in range(4):
        assert abs(kept.flatten()[place::4].mean().item() - rate) < 10 * sigma


def test_draws_follow_the_seed():
    head, _ = heads()
    data = rank_inputs(1, 4, 3, 20)
    inputs = LossInputs(
        data["image_global"], data["image_tokens"], data["items"].flatten(0, 1), data["mask"], data["normal"]
    )
    options = dataclasses.replace(OPTIONS, ila_keep_rate=0.5)
    found = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        scale, bias = torch.tensor(14.0), torch.tensor(-10.0)
        found.append(itemized_losses(head, inputs, scale, bias, options, index_BT=data["index"])["ila"])
    assert found[0] == found[2] != found[1]
    assert fused.draw_keep((2, 3), 1.0, torch.device("cpu")) is None


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations made and nothing freed yet."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, key)
        return result

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def test_memory_does_not_grow_with_ranks(way, monkeypatch):
    """Beyond the gradient of their items, which is as large as the items themselves."""
    monkeypatch.setattr(fused, "work_bytes", lambda device: 1)
    monkeypatch.setattr(fused, "ranks_at_once", lambda *sizes: 1)
    B, K, L = 6, 2, 200

    def peak(world: int, is_fused: bool) -> int:
        ranks = [rank_inputs(rank, B, K, L) for rank in range(world)]
        with LiveBytes() as live:
            step(ranks, is_fused=is_fused, dtype=torch.float32)
        return live.peak

    few, many = peak(2, True), peak(10, True)
    items = 8 * B * K * D * 4
    assert many - few <= 3.5 * items  # the test's own copy, the gradient, its sum in the leaf; masks and indices
    assert peak(10, False) - peak(2, False) > 8 * H * B * (K + B - 1) * L * 4


def _world(rank: int, world: int, rendezvous: str, results: str, supported: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    if not supported:

        def missing(*args, **kwargs):
            raise RuntimeError("ProcessGroupGloo does not support reduce_scatter")

        exchange.dist.reduce_scatter_tensor = missing
    found = []
    for is_fused in (True, False):
        head, _ = heads()
        data = rank_inputs(100 + rank, 3, 2, 6)
        leaves = {name: data[name].clone().requires_grad_() for name in LEAVES}
        inputs = LossInputs(
            leaves["image_global"], leaves["image_tokens"], leaves["items"].flatten(0, 1), data["mask"],
            data["normal"], data["ids"].flatten(),
        )  # fmt: skip
        options = dataclasses.replace(OPTIONS, normal_check=True, mask_duplicates=True)
        losses = itemized_losses(
            head, inputs, torch.tensor(14.0), torch.tensor(-10.0), options, index_BT=data["index"], fused=is_fused
        )
        ((rank + 1) * losses["loss"]).backward()  # the owner's gradient knows each rank's own factor
        grads = {name: leaf.grad for name, leaf in leaves.items()} | {n: p.grad for n, p in head.named_parameters()}
        found.append({name: value.detach() for name, value in (losses | grads).items()})
    torch.save(found, f"{results}/{rank}.pt")
    leave_process_group()


@pytest.mark.parametrize(("world", "supported"), [(2, True), (4, True), (2, False)])
def test_ranks_equal_autograd_and_the_joined_computation(tmp_path, world, supported):
    """Real processes; with and without the backend's reduce-scatter."""
    mp.spawn(_world, (world, str(tmp_path / "meet"), str(tmp_path), supported), nprocs=world)
    ranks = [rank_inputs(100 + rank, 3, 2, 6) for rank in range(world)]
    items = torch.zeros(world, 6, D)
    own, expected = [], []
    for rank in range(world):
        order = [rank, *(r for r in range(world) if r != rank)]
        options = {"normal_check": True, "mask_duplicates": True}
        joined = step([ranks[r] for r in order], is_fused=False, factor=rank + 1.0, **options)
        if world > 1:
            for place, r in enumerate(order):
                items[r] += joined["others"][place].float()
        own.append(joined["items"].flatten(0, 1))
        expected.append(joined)
    for rank in range(world):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        theirs = expected[rank] | {"items": (items[rank] + own[rank]).view(3, 2, D)}
        for name in ("others", "scale", "bias"):
            theirs.pop(name)
        for ours in found:
            assert_alike(ours, {name: value.float() for name, value in theirs.items()}, 2e-5)
