"""The 2D model, its factory, and loading of released and own checkpoints."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from itemizedclip.models.factory import (
    create_model,
    create_tokenizer,
    create_transform,
    list_models,
    load_model_config,
    load_pretrained,
)
from itemizedclip.models.weights import CheckpointError, load_weights
from itemizedclip.runtime import registry

LAYOUTS = json.loads((Path(__file__).parents[1] / "golden" / "checkpoint_layouts.json").read_text())
TINY = {
    "name": "tiny",
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    "head_heads": 4,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model(TINY)


def test_the_published_layout_is_exact():
    with torch.device("meta"):
        model = create_model("ViT-B-16-ItemizedCLIP")
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == LAYOUTS["ViT-B-16-ItemizedCLIP"]


@pytest.mark.parametrize("style", ["plain", "module", "old projection", "module, old projection", "compiled"])
def test_published_names_load_strictly(model, style, tmp_path):
    state = dict(model.state_dict())
    if "old projection" in style:
        state["image_post2.proj"] = state.pop("image_post.proj")
    prefix = "module." if "module" in style else "module._orig_mod." if style == "compiled" else ""
    torch.save({"epoch": 3, "name": "x", "state_dict": {prefix + k: v for k, v in state.items()}}, tmp_path / "a.pt")
    loaded = load_pretrained(tmp_path / "a.pt", config=TINY)
    assert loaded.notes == []
    assert loaded.meta["epoch"] == 3
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.model.state_dict()[name], value)


def test_a_built_in_tokenizer_cannot_be_replaced(tmp_path):
    torch.save(create_model(TINY).state_dict(), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="built in; drop --text-model"):
        load_pretrained(tmp_path / "a.pt", config=TINY, text_model="some/bert")


def test_known_buffers_are_skipped_and_listed(model):
    state = dict(model.state_dict()) | {"module.attn_mask": torch.zeros(20, 20)}
    notes = load_weights(model, state, source="file.pt")
    assert len(notes) == 1
    assert "module.attn_mask" in notes[0]


def test_of_two_published_projections_the_one_in_use_is_taken(model, tmp_path):
    """Files of an intermediate version hold both; the second is the one their code calls."""
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    in_use = torch.randn_like(model.state_dict()["image_post.proj"])
    torch.save({**state, "module.image_post2.proj": in_use}, tmp_path / "both.pt")
    loaded = load_pretrained(tmp_path / "both.pt", config=model.config)
    assert torch.equal(loaded.model.state_dict()["image_post.proj"], in_use)
    assert loaded.notes == ["module.image_post.proj (not in use: image_post2.proj is)"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("text_post.proj"), r"1 missing: text_post.proj"),
        (lambda s: s.update(extra=torch.zeros(1)), r"1 unknown: extra"),
        (lambda s: s.update({"logit_scale": torch.zeros(2)}), r"1 of another shape: logit_scale \(2,\) for \(\)"),
    ],
)
def test_weights_that_do_not_fit_are_named(model, change, message):
    state = dict(model.state_dict())
    change(state)
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, state, source="file.pt")


def test_position_tables_of_another_size_are_resampled_and_listed(model):
    bigger = create_model(TINY | {"vision_cfg": TINY["vision_cfg"] | {"image_size": 48},
                                  "text_cfg": TINY["text_cfg"] | {"context_length": 24}})  # fmt: skip
    notes = load_weights(bigger, model.state_dict(), source="file.pt")
    assert len(notes) == 2
    assert bigger.encode_image(torch.randn(1, 3, 48, 48)).grid == (6, 6)


class Hostile:
    def __reduce__(self):
        return (print, ("executed",))


def test_files_that_are_no_checkpoints_are_refused(tmp_path, capsys):
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "code.pt").write_bytes(pickle.dumps({"state_dict": Hostile()}))
    torch.save({"state_dict": Hostile()}, tmp_path / "code_zip.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"state_dict": {}}, tmp_path / "no_config.pt")
    for name, message in {
        "absent.pt": "does not exist",
        "": "is a folder",
        "text.pt": "is no checkpoint, or damaged|not a readable checkpoint",
        "code.pt": "holds Python objects|is no checkpoint|not a readable checkpoint",
        "code_zip.pt": r"holds Python objects .*print",
        "list.pt": "expected a dict",
        "no_config.pt": "--model",
    }.items():
        with pytest.raises(CheckpointError, match=message) as raised:
            load_pretrained(tmp_path / name)
        assert "weights_only" not in str(raised.value)  # no advice to load it all the same
    assert "executed" not in capsys.readouterr().out


def test_unknown_names_suggest_the_near_one(tmp_path):
    with pytest.raises(ValueError, match="did you mean ViT-B-16-ItemizedCLIP"):
        load_model_config("ViT-B-16-ItemisedCLIP")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"not valid JSON .* expected a model config"):
        load_model_config(tmp_path / "bad.json")
    (tmp_path / "half.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks embed_dim, vision_cfg, text_cfg"):
        load_model_config(tmp_path / "half.json")
    with pytest.raises(ValueError, match=r"vision_cfg.tower is 'none'"):
        create_model(TINY | {"vision_cfg": {"tower": "none"}})


def test_every_listed_model_has_a_config():
    assert "ViT-B-16-ItemizedCLIP" in list_models()
    for name in list_models():
        assert load_model_config(name)["name"] == name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_a_gradient(model, checkpointing):
    model.set_grad_checkpointing(checkpointing)
    features = model.encode_image(torch.randn(2, 3, 32, 32))
    items = model.encode_text(create_tokenizer(TINY)(["a red roof", "two planes"]))
    pooled = model.head(items[None].expand(2, -1, -1), features.tokens_BLD)
    loss = (pooled.sum() + features.global_BD.sum()) * model.logit_scale + model.logit_bias
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_cutting_padding_changes_no_text_feature(model):
    model.eval()
    tokens = create_tokenizer(TINY)(["a red roof", "two planes near a hangar"])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(tokens), model.encode_text(tokens[:, :8]), rtol=1e-5, atol=1e-6)


def test_locking_freezes_whole_towers(model):
    model.lock(text=True)
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"transformer", "token_embedding", "positional_embedding", "ln_final", "text_post"}
    model.lock(image=True)
    trainable = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"visual_proj", "logit_scale", "logit_bias"}


def test_logit_scale_is_clamped(model):
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    model.clamp_logit_scale()
    assert float(model.logit_scale.detach().exp()) == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode_image(torch.zeros(1, 3, 16, 16)), r"images must be \(B, 3, 32, 32\), got \(1, 3, 16, 16\)"),
        (lambda m: m.encode_image(torch.zeros(1, 3, 32, 32), series_names=torch.zeros(1, 1, 110)), "series names"),
        (lambda m: m.encode_text(torch.zeros(1, 21, dtype=torch.long)), "21 tokens, the text tower takes 20"),
        (lambda m: m.head.project(torch.zeros(2, 5, 7)), r"image tokens must be \(B, L, 32\)"),
        (lambda m: m.head.project_queries(torch.zeros(2, 5, 7)), r"items must be \(..., 32\)"),
    ],
)
def test_tensors_of_the_wrong_shape_are_named(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_transforms_crop_and_normalise():
    image = Image.new("RGB", (400, 300), (255, 255, 255))
    for is_train in (True, False):
        out = create_transform(load_model_config("ViT-B-16-ItemizedCLIP"), is_train=is_train)(image)
        assert out.shape == (3, 224, 224)
        expected = (1 - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
            [0.26862954, 0.26130258, 0.27577711]
        )
        torch.testing.assert_close(out.mean((1, 2)), expected, rtol=1e-4, atol=1e-4)


def test_tokens_are_clip_bpe_and_long_texts_keep_their_end():
    tokenizer = create_tokenizer(TINY)
    tokens = tokenizer(["a cat", "word " * 50])
    assert tokens.shape == (2, 20)
    assert tokens[0].tolist()[:5] == [49406, 320, 2368, 49407, 0]
    assert tokens[1, -1] == 49407
    assert tokenizer.is_truncated(tokens).tolist() == [False, True]


def test_a_wing_without_its_packages_stands_in_nobodys_way(monkeypatch):
    """The base install has no transformers: 2D models work, and asking for a study model names the extra."""

    class Broken:
        name, module = "hlip", "wing.models"
        dist = SimpleNamespace(name="itemizedclip", requires=["tokenizers>=0.2; extra == 'radiology'"])

        def load(self) -> type:
            raise ModuleNotFoundError("No module named 'tokenizers'", name="tokenizers")

    monkeypatch.setattr(registry, "entry_points", lambda group: [Broken()])
    assert create_model("ViT-scenes-ItemizedCLIP").config["name"] == "ViT-scenes-ItemizedCLIP"
    assert list_models() == ["ViT-B-16-ItemizedCLIP", "ViT-scenes-ItemizedCLIP", "ViT-scenes-long-text-ItemizedCLIP"]
    with pytest.raises(ValueError, match=r"tokenizers: pip install -e '.\[radiology\]'"):
        create_model(TINY | {"vision_cfg": {"tower": "hlip"}})
