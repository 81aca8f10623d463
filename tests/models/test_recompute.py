"""Recomputation, compilation and patch dropout of both families of towers, against the plain towers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from itemizedclip.models.dual_encoder import DualEncoder
from itemizedclip.models.factory import create_model, load_model_config
from itemizedclip.models.patch_dropout import PatchDropout
from itemizedclip.runtime.errors import UserError
from itemizedclip.training.run import compile_towers
from tests.helpers.toy import ToyModel

NAMES = ("ViT-scenes-ItemizedCLIP", "CTRATE_HLIP_debug")


@pytest.fixture(scope="module", params=NAMES)
def plain(request) -> DualEncoder:
    """A small model in training mode; its text tower has no dropout, which fused attention of a CPU cannot have."""
    torch.manual_seed(0)
    return without_dropout(create_model(load_model_config(request.param)).train())


def without_dropout(model: DualEncoder) -> DualEncoder:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return model


def gradients(model: DualEncoder) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    images = torch.randn(2, *model.input_shape())
    texts = torch.randint(1, 90, (3, 12))
    model.zero_grad(set_to_none=True)
    features, items = model.encode_image(images), model.encode_text(texts)
    (features.tokens_BLD.square().mean() + features.global_BD.square().mean() + items.square().mean()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Attentions(TorchDispatchMode):
    """Counts fused attention, forward."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func).startswith("aten._scaled_dot_product") and "backward" not in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keep_attention", [False, True])
def test_recomputing_changes_no_gradient_and_keeps_attention_where_asked(plain, keep_attention):
    expected = gradients(plain)
    model = copy.deepcopy(plain)
    model.set_grad_checkpointing(True, keep_attention=keep_attention)
    assert model.state_dict().keys() == plain.state_dict().keys()
    with Attentions() as attentions:
        found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    assert attentions.count == len(model.blocks()) * (1 if keep_attention else 2)
    model.set_grad_checkpointing(False)
    with Attentions() as attentions:
        gradients(model)
    assert attentions.count == len(model.blocks())


def test_compiled_blocks_recompute_and_give_the_same_gradients():
    torch.manual_seed(0)
    plain = without_dropout(create_model(load_model_config(NAMES[1])).train())
    expected = gradients(plain)
    model = copy.deepcopy(plain)
    model.set_grad_checkpointing(True, keep_attention=True)
    compile_towers(model, backend="aot_eager_decomp_partition")  # as the default one, without its C++ compiler
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp_min(1e-6)
        assert error < 1e-3, name


def test_patch_dropout_keeps_a_random_part_in_order():
    x = torch.arange(24.0).view(2, 12, 1).expand(-1, -1, 3)
    dropout = PatchDropout(0.5, has_class_token=True)
    kept = dropout(x)
    assert kept.shape == (2, 6, 3)  # the class token and int(11 / 2) of the others
    assert kept[:, 0].equal(x[:, 0])
    assert (kept.diff(dim=1) > 0).all()
    assert not dropout(x).equal(kept)
    assert dropout.eval()(x) is x
    assert PatchDropout(0.99)(x).shape == (2, 1, 3)


def test_towers_train_on_a_part_and_evaluate_on_the_whole(plain):
    model = copy.deepcopy(plain)
    images = torch.randn(2, *model.input_shape())
    whole = model.eval().encode_image(images).tokens_BLD
    model.train().set_patch_dropout(0.5)
    part = model.encode_image(images)
    assert part.tokens_BLD.shape[1] == whole.shape[1] // 2
    assert part.global_BD.isfinite().all()
    assert model.eval().encode_image(images).tokens_BLD.equal(whole)
    model.train().set_patch_dropout(0.0)
    assert model.encode_image(images).tokens_BLD.shape == whole.shape
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_every_attention_group_of_a_study_loses_equally_many_patches():
    config = load_model_config("HLIPSN_debug")
    config["vision_cfg"]["series_names"] = False
    model = create_model(config).train()
    model.set_patch_dropout(0.25)
    seen: list[torch.Size] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
        for block in model.visual.trunk.blocks
    ]
    model.encode_image(torch.randn(2, *model.input_shape(3)))
    for hook in hooks:
        hook.remove()
    d, h, w = model.visual.trunk.config.grid_size
    kept = int(d * h * w * 0.75)
    sizes = {"series": (6, 1 + kept), "study": (2, 1 + 3 * kept)}
    assert [shape[:2] for shape in seen] == [sizes[scope] for scope in model.visual.trunk.config.block_scopes]


def test_a_model_without_patch_dropout_says_so():
    with pytest.raises(UserError, match="drop --patch-dropout"):
        ToyModel().set_patch_dropout(0.5)
