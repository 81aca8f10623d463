"""The objectives against the plain implementation, and the properties the method promises."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from plain_loss import PlainHead, plain_losses

from itemizedclip.models.item_attention import ItemAttention
from itemizedclip.objectives.loss import LossInputs, ObjectiveOptions, itemized_losses
from itemizedclip.objectives.pairing import build_pairing, sample_pairing
from itemizedclip.objectives.terms import text_ids
from itemizedclip.runtime.processes import leave_process_group

D, H = 32, 4
OPTIONS = ObjectiveOptions(ila_weight=1.2, kta_weight=0.9, key_token_fraction=0.2, mps_weight=0.3, iis_weight=0.7,
                           worst_positive_factor=1.5)  # fmt: skip


def rank_inputs(seed: int, B: int, K: int, L: int, *, keep_rate: float = 1.0) -> dict:
    """One rank's random features with ragged masks (at least one item per image) and some normal studies."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, K + 1, (B,), generator=g)
    mask = torch.arange(K) < counts[:, None]
    T = K + B - 1
    keep = torch.rand(B, H, T, L, generator=g) < keep_rate if keep_rate < 1 else None
    return {
        "image_global": torch.randn(B, D, generator=g),
        "image_tokens": torch.randn(B, L, D, generator=g),
        "items": torch.randn(B, K, D, generator=g),
        "mask": mask,
        "normal": torch.rand(B, generator=g) < 0.5,
        "ids": torch.randint(0, 4, (B, K), generator=g),
        "index": sample_pairing(mask, generator=g).index_BT,
        "keep": keep,
    }


def ours(head, data: dict, options: ObjectiveOptions, scale=14.0, bias=-10.0, **overrides):
    data = data | overrides
    inputs = LossInputs(
        data["image_global"],
        data["image_tokens"],
        data["items"].flatten(0, 1),
        data["mask"],
        data["normal"],
        data["ids"].flatten(),
    )
    return itemized_losses(
        head, inputs, torch.as_tensor(scale), torch.as_tensor(bias), options,
        index_BT=data["index"], keep_mask_BHTL=data["keep"],
    )  # fmt: skip


def heads(seed: int = 0) -> tuple[ItemAttention, PlainHead]:
    torch.manual_seed(seed)
    head = ItemAttention(D, H)
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.3)
    plain = PlainHead(D, H)
    plain.load_state_dict(head.state_dict())
    return head, plain


@pytest.mark.parametrize(
    ("B", "K", "L"), [(4, 3, 10), (1, 4, 7), (5, 1, 6), (1, 1, 3), (3, 2, 2)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("keep_rate", [1.0, 0.6])
@pytest.mark.parametrize("mask_duplicates", [False, True])
@pytest.mark.parametrize("normal_check", [False, True])
def test_equals_the_plain_loss_and_its_gradients(B, K, L, keep_rate, normal_check, mask_duplicates):
    """Also K = 1, B = 1, one item, and L < 1/fraction."""
    head, plain = heads()
    options = dataclasses.replace(OPTIONS, normal_check=normal_check, mask_duplicates=mask_duplicates)
    data = rank_inputs(B * 10 + K, B, K, L, keep_rate=keep_rate)
    leaves = ("image_global", "image_tokens", "items")
    mine = data | {name: data[name].clone().requires_grad_() for name in leaves}
    theirs = data | {name: data[name].clone().requires_grad_() for name in leaves}
    losses = ours(head, mine, options)
    expected = plain_losses(plain, [theirs], 0, torch.tensor(14.0), torch.tensor(-10.0), options)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-4)
    losses["loss"].backward()
    expected["loss"].backward()
    for name in leaves:
        torch.testing.assert_close(mine[name].grad, theirs[name].grad, rtol=2e-3, atol=2e-4)
    for (name, a), (_, b) in zip(head.named_parameters(), plain.named_parameters()):
        assert (a.grad - b.grad).norm() <= 1e-3 * b.grad.norm() + 1e-4, name


def test_padding_content_changes_no_loss_and_no_gradient():
    head, _ = heads()
    data = rank_inputs(3, 5, 4, 9)
    assert not data["mask"].all()
    results = []
    for fill in (0.0, 1e3):
        items = torch.where(data["mask"][..., None], data["items"], fill * torch.ones(D)).requires_grad_()
        tokens = data["image_tokens"].clone().requires_grad_()
        losses = ours(head, data, OPTIONS, items=items, image_tokens=tokens)
        head.zero_grad()
        losses["loss"].backward()
        assert (items.grad[~data["mask"]] == 0).all()
        grads = [p.grad.clone() for p in head.parameters()]
        results.append([*losses.values(), tokens.grad, items.grad[data["mask"]], *grads])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_permuting_the_batch_changes_nothing_but_order():
    head, _ = heads()
    data = rank_inputs(4, 6, 3, 8)
    B, K = data["mask"].shape
    order = torch.randperm(B, generator=torch.Generator().manual_seed(0))
    drawn = {(i, j // K): j for i in range(B) for j in data["index"][i].tolist() if j // K != i}
    index = torch.empty_like(data["index"])
    for new_i in range(B):
        old_i = int(order[new_i])
        for column in range(K + B - 1):
            new_j = column if column < new_i else new_i if column < new_i + K else column - K + 1
            slot = column - new_i if new_j == new_i else drawn[old_i, int(order[new_j])] % K
            index[new_i, column] = new_j * K + slot
    permuted = {name: value[order] if name != "index" and value is not None else value for name, value in data.items()}
    before, after = ours(head, data, OPTIONS), ours(head, permuted, OPTIONS, index=index)
    for name in before:
        torch.testing.assert_close(before[name], after[name], rtol=1e-5, atol=1e-5)


def test_all_tokens_masked_attends_nowhere_without_nan():
    head, _ = heads()
    tokens, items = torch.randn(2, 5, D, requires_grad=True), torch.randn(2, 3, D, requires_grad=True)
    nothing = torch.zeros(2, H, 3, 5, dtype=torch.bool)
    pooled = head(items, tokens, keep=nothing)
    torch.testing.assert_close(pooled, head.attn.out_proj.bias.expand(2, 3, D))
    maps = head.attention_weights(items, head.project(tokens), keep=nothing)
    assert (maps.tokens == 0).all()
    assert (maps.nowhere == 1).all()
    both = head.attend_with_key_tokens(items, head.project(tokens), keep=nothing, num_key_tokens=2)
    (pooled.sum() + both[0].sum() + both[1].sum()).backward()
    assert torch.isfinite(tokens.grad).all()
    assert torch.isfinite(items.grad).all()


@pytest.mark.parametrize("keep", ["none", "per_head", "shared"])
def test_weights_path_equals_fused_path(keep):
    head, plain = heads()
    tokens, items = torch.randn(3, 11, D), torch.randn(3, 4, D)
    mask = {"none": None, "per_head": torch.rand(3, H, 4, 11) < 0.5, "shared": torch.rand(3, 1, 4, 11) < 0.5}[keep]
    projected = head.project(tokens)
    pooled = head.attend(items, projected, keep=mask)
    maps = head.attention_weights(items, projected, keep=mask)
    torch.testing.assert_close(maps.tokens.sum(-1) + maps.nowhere, torch.ones(3, H, 4))
    weighted = (maps.tokens @ projected.values[:, :, :-1]).transpose(1, 2).reshape(3, 4, D)
    torch.testing.assert_close(head.attn.out_proj(weighted), pooled, rtol=1e-4, atol=1e-5)
    for i in range(3):
        for t in range(4):
            row = None if mask is None else mask.expand(3, H, 4, 11)[i, :, t]
            expected, weights = plain(items[i, t], tokens[i], row)
            torch.testing.assert_close(pooled[i, t], expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(maps.tokens[i, :, t], weights[:, :-1], rtol=1e-4, atol=1e-6)


def test_keep_rate_is_the_share_of_kept_entries():
    """Values all one: the pooled value is the share of weight on kept tokens, so its mean reveals the rate."""
    head = ItemAttention(D, H)
    with torch.no_grad():
        head.attn.in_proj_weight.zero_()
        head.attn.in_proj_bias.zero_()
        head.attn.in_proj_bias[2 * D :] = 1.0
        head.attn.out_proj.weight.copy_(torch.eye(D))
    L = 400
    tokens, items = torch.randn(4, L, D), torch.randn(4, 6, D)
    pooled, _ = head.attend_with_key_tokens(items, head.project(tokens), keep=0.6)
    kept = pooled / (1 - pooled)  # pooled = n / (n + 1) for n kept tokens, all of logit 0
    assert abs(kept.detach().mean().item() / L - 0.6) < 0.02
    assert kept.detach().std().item() > 0


def test_negatives_are_drawn_uniformly_from_real_items():
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    g = torch.Generator().manual_seed(0)
    counts = torch.zeros(12)
    for _ in range(3000):
        pairing = sample_pairing(mask, generator=g)
        counts += torch.bincount(pairing.index_BT[pairing.labels_BT < 0], minlength=12)
    assert (counts[~mask.flatten()] == 0).all()
    torch.testing.assert_close(counts[:3] / 6000, torch.full((3,), 1 / 3), atol=0.03, rtol=0)
    torch.testing.assert_close(counts[8:10] / 6000, torch.full((2,), 1 / 2), atol=0.03, rtol=0)


def test_text_ids_tell_texts_apart_and_ignore_padding():
    tokens = torch.randint(1, 49408, (2000, 12), generator=torch.Generator().manual_seed(0))
    tokens[:, 9:] = 0
    ids = text_ids(tokens)
    assert len(ids.unique()) == len(tokens.unique(dim=0))
    assert torch.equal(ids, text_ids(torch.nn.functional.pad(tokens, (0, 5))))
    assert torch.equal(ids[:5], text_ids(tokens[:5].clone()))


def test_image_without_items_contributes_nothing():
    head, _ = heads()
    data = rank_inputs(5, 3, 2, 4)
    data["mask"] = torch.tensor([[True, True], [False, False], [True, False]])
    data["index"] = sample_pairing(data["mask"]).index_BT
    pairing = build_pairing(data["index"], data["mask"])
    assert (pairing.weights_BT[pairing.owner_BT == 1] == 0).all()
    assert torch.isfinite(ours(head, data, OPTIONS)["loss"])


def test_weight_zero_removes_a_term_and_its_gradient():
    head, _ = heads()
    data = rank_inputs(6, 3, 2, 5)
    for name in ("ila", "kta", "mps", "iis"):
        losses = ours(head, data, dataclasses.replace(OPTIONS, **{f"{name}_weight": 0.0}))
        assert name not in losses
    tokens = data["image_tokens"].clone().requires_grad_()
    global_only = ObjectiveOptions(ila_weight=0, kta_weight=0, iis_weight=0, mps_weight=1)
    losses = ours(head, data, global_only, image_tokens=tokens)
    assert set(losses) == {"loss", "mps"}
    assert not losses["loss"].requires_grad


@pytest.mark.parametrize(
    "wrong", [{"ila_weight": -1}, {"ila_keep_rate": 0}, {"key_token_fraction": 1.5}, {"worst_positive_factor": 0}]
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dataclasses.replace(OPTIONS, **wrong)


def test_bfloat16_autocast_stays_finite_and_near_float32():
    head, _ = heads()
    data = rank_inputs(8, 4, 3, 30)
    exact = ours(head, data, OPTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        rough = ours(head, data, OPTIONS)
    for name in exact:
        assert rough[name].dtype == torch.float32
        assert abs(rough[name] - exact[name]) <= 0.03 * exact[name].abs(), name


def _world(rank: int, world: int, rendezvous: str, results: str, checks: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    head, _ = heads()
    data = rank_inputs(100 + rank, 3, 2, 6)
    leaves = {n: data[n].clone().requires_grad_() for n in ("image_global", "image_tokens", "items")}
    losses = ours(head, data | leaves, dataclasses.replace(OPTIONS, normal_check=checks, mask_duplicates=checks))
    losses["loss"].backward()
    torch.save({"losses": {k: v.detach() for k, v in losses.items()}, "grads": {k: v.grad for k, v in leaves.items()}},
               f"{results}/{rank}.pt")  # fmt: skip
    leave_process_group()


@pytest.mark.parametrize("checks", [False, True])
def test_ranks_equal_the_gathered_computation(tmp_path, checks):
    """Three processes of three images: each loss, and the gradients that came back from the others."""
    world = 3
    mp.spawn(_world, (world, str(tmp_path / "meet"), str(tmp_path), checks), nprocs=world)
    _, plain = heads()
    options = dataclasses.replace(OPTIONS, normal_check=checks, mask_duplicates=checks)
    ranks = [rank_inputs(100 + rank, 3, 2, 6) for rank in range(world)]
    for data in ranks:
        for name in ("image_global", "image_tokens", "items"):
            data[name].requires_grad_()
    every = [plain_losses(plain, ranks, r, torch.tensor(14.0), torch.tensor(-10.0), options) for r in range(world)]
    sum(losses["loss"] for losses in every).backward()
    for rank in range(world):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in found["losses"].items():
            torch.testing.assert_close(value, every[rank][name].detach(), rtol=1e-4, atol=1e-4)
        for name, grad in found["grads"].items():
            torch.testing.assert_close(grad, ranks[rank][name].grad, rtol=2e-3, atol=2e-4)
