"""CLIP, SigLIP and FLAIR: against loops, on several ranks, and through the trainer."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from plain_loss import plain_losses
from test_objectives import heads, ours, rank_inputs
from toy import ToyModel, toy_options, toy_train

from itemizedclip.data.batch import ItemCollator, ItemSample
from itemizedclip.objectives.baselines import baseline_losses, flair_options, flair_own_options
from itemizedclip.objectives.loss import LossInputs, ObjectiveOptions
from itemizedclip.runtime.processes import leave_process_group
from itemizedclip.training.options import ObjectiveSettings

SCALE, BIAS = 14.0, -10.0


def pairs(images, texts) -> list[list[torch.Tensor]]:
    return [[SCALE * torch.dot(F.normalize(v, dim=0), F.normalize(t, dim=0)) for t in texts] for v in images]


def plain_clip(images, texts) -> torch.Tensor:
    """Mean over pairs and directions of −log softmax of the true pair, pair by pair."""
    logits, n = pairs(images, texts), len(images)
    total = torch.zeros(())
    for i in range(n):
        row, column = torch.stack(logits[i]), torch.stack([logits[j][i] for j in range(n)])
        total = total + row.exp().sum().log() - row[i] + column.exp().sum().log() - column[i]
    return total / (2 * n)


def plain_siglip(images, texts) -> torch.Tensor:
    """−Σ log σ(±(τ cos + β)) over all pairs, divided by the number of images."""
    logits, n = pairs(images, texts), len(images)
    total = torch.zeros(())
    for i in range(n):
        for j in range(n):
            total = total - F.logsigmoid((1 if i == j else -1) * (logits[i][j] + BIAS))
    return total / n


PLAIN = {"clip": plain_clip, "siglip": plain_siglip, "concat": plain_clip}


def loss_of(data: dict, baseline: str) -> dict[str, torch.Tensor]:
    inputs = LossInputs(
        data["image_global"], data["image_tokens"], data["items"].flatten(0, 1), data["mask"], data["normal"]
    )
    return baseline_losses(inputs, torch.tensor(SCALE), torch.tensor(BIAS), ObjectiveOptions(baseline=baseline))


@pytest.mark.parametrize("baseline", ["clip", "siglip", "concat"])
def test_equals_a_loop_over_pairs(baseline):
    data = rank_inputs(3, 5, 3, 4)
    losses = loss_of(data, baseline)
    assert set(losses) == {"loss", baseline}
    expected = PLAIN[baseline](data["image_global"], data["items"][:, 0])
    torch.testing.assert_close(losses["loss"], expected, rtol=1e-5, atol=1e-5)


def test_flair_is_attention_over_all_tokens_and_the_global_term():
    given = ObjectiveSettings(
        baseline="flair", ila_weight=3, ila_keep_rate=0.5, kta_weight=2, iis_weight=4, worst_positive_factor=1.5,
        normal_check=True, mask_duplicates=True,
    )  # fmt: skip
    head, plain = heads()
    data = rank_inputs(5, 4, 3, 6)
    losses = ours(head, data, flair_options(given))
    assert set(losses) == {"loss", "ila", "mps"}
    plain_options = dataclasses.replace(ObjectiveOptions(), worst_positive_factor=1.0, ila_keep_rate=1.0)
    expected = plain_losses(plain, [data], 0, torch.tensor(SCALE), torch.tensor(BIAS), plain_options)
    torch.testing.assert_close(losses["loss"], expected["ila"] + expected["mps"], rtol=1e-4, atol=1e-4)


def _world(rank: int, world: int, rendezvous: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    found = {}
    for baseline in PLAIN:
        data = rank_inputs(100 + rank, 3, 2, 4)
        leaves = {name: data[name].clone().requires_grad_() for name in ("image_global", "items")}
        loss = loss_of(data | leaves, baseline)["loss"]
        loss.backward()
        found[baseline] = {"loss": loss.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}
    torch.save(found, f"{results}/{rank}.pt")
    leave_process_group()


def test_ranks_together_are_the_joined_batch(tmp_path):
    """The mean over three ranks is the loss of nine pairs; gradients, which DDP averages, are three times its own."""
    world = 3
    mp.spawn(_world, (world, str(tmp_path / "meet"), str(tmp_path)), nprocs=world)
    ranks = [rank_inputs(100 + rank, 3, 2, 4) for rank in range(world)]
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    for baseline, plain in PLAIN.items():
        images = torch.cat([data["image_global"] for data in ranks]).requires_grad_()
        items = torch.cat([data["items"] for data in ranks]).requires_grad_()
        joined = plain(images, items[:, 0])
        joined.backward()
        mean = torch.stack([result[baseline]["loss"] for result in found]).mean()
        torch.testing.assert_close(mean, joined.detach(), rtol=1e-5, atol=1e-5)
        for name, leaf in (("image_global", images), ("items", items)):
            grads = torch.cat([result[baseline][name] for result in found])
            torch.testing.assert_close(grads, world * leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("baseline", ["clip", "siglip", "concat", "flair", "flair_own"])
def test_training_leaves_what_takes_no_part_as_it_is(tmp_path, baseline):
    result = toy_train(toy_options(tmp_path, objective=ObjectiveSettings(baseline=baseline, normal_check=True)))
    assert math.isfinite(result.losses["loss"])
    weights = torch.load(result.checkpoint, weights_only=True)["state_dict"]
    torch.manual_seed(0)
    fresh = ToyModel().state_dict()
    same = {name for name in fresh if torch.equal(weights[name], fresh[name])}
    assert ("visual_proj.attn.in_proj_weight" in same) is ("flair" not in baseline)
    assert ("logit_bias" in same) is (baseline in ("clip", "concat"))
    assert "image.patches.weight" not in same


def test_flairs_own_denominators():
    """½ (TCS / (K + B − 1) + MPS / (B·K)), with the sums taken by the loop, which divides by B and by B·K."""
    B, K = 4, 3
    head, plain = heads()
    data = rank_inputs(5, B, K, 6)
    losses = ours(head, data, flair_own_options(ObjectiveSettings(kta_weight=2, mask_duplicates=True), B, K))
    plain_options = dataclasses.replace(ObjectiveOptions(), worst_positive_factor=1.0, ila_keep_rate=1.0)
    expected = plain_losses(plain, [data], 0, torch.tensor(SCALE), torch.tensor(BIAS), plain_options)
    torch.testing.assert_close(
        losses["loss"], (expected["ila"] * B / (K + B - 1) + expected["mps"]) / 2, rtol=1e-4, atol=1e-4
    )


def test_concat_joins_the_items_of_an_image_to_one_text():
    seen: list[str] = []

    def tokenizer(texts):
        seen.extend(texts)
        return torch.tensor([[len(text)] for text in texts])

    samples = [
        ItemSample("a", torch.zeros(3, 2, 2), ["red", "blue", "green"]),
        ItemSample("b", torch.zeros(3, 2, 2), ["one"]),
    ]
    batch = ItemCollator(tokenizer, 2, join_items=True)(samples)
    assert seen == ["red. blue", "one"]
    assert batch.item_mask.tolist() == [[True], [True]]
    assert samples[0].items == ["red", "blue", "green"]
