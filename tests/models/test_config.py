"""Model configs of strangers: refused in one sentence that names the file, before anything is built or fetched."""

from __future__ import annotations

import copy
import json
import socket

import pytest
import torch

from itemizedclip.models import factory
from itemizedclip.models.archive import save_archive
from itemizedclip.models.factory import (
    check_config,
    create_model,
    create_tokenizer,
    is_shipped,
    load_model_config,
    load_pretrained,
)
from itemizedclip.runtime.errors import UserError

PHOTOGRAPHS = "ViT-scenes-ItemizedCLIP"
STUDIES = "HLIPSN_debug"

TINY = {
    "embed_dim": 16,
    "head_heads": 4,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}

ABSENT = object()

# Of one of the shipped configs: path of the field, what a stranger writes there, what the message says.
HOSTILE = [
    (PHOTOGRAPHS, "embed_dim", ABSENT, "lacks embed_dim"),
    (PHOTOGRAPHS, "embed_dim", "512", "embed_dim is '512'; expected a whole number"),
    (PHOTOGRAPHS, "embed_dim", True, "embed_dim is true"),
    (PHOTOGRAPHS, "embed_dim", 10**4000, "embed_dim is a number of 13,288 bits"),
    (PHOTOGRAPHS, "embed_dim", 100, "not divisible by head_heads 8"),
    (PHOTOGRAPHS, "head_heads", 0, "head_heads is 0"),
    (PHOTOGRAPHS, "init_logit_scale", float("nan"), "init_logit_scale is nan"),
    (PHOTOGRAPHS, "init_logit_bias", "x" * 10_000, "init_logit_bias is 'xxx"),
    (PHOTOGRAPHS, "vision_cfg", 3, "vision_cfg is 3; expected an object"),
    (PHOTOGRAPHS, "vision_cfg", [1], "vision_cfg is a list of 1"),
    (PHOTOGRAPHS, "vision_cfg.tower", "evil", "vision_cfg.tower is 'evil'; installed families"),
    (PHOTOGRAPHS, "vision_cfg.tower", {}, "vision_cfg.tower is an empty object"),
    (PHOTOGRAPHS, "vision_cfg.image_size", ABSENT, "lacks image_size"),
    (PHOTOGRAPHS, "vision_cfg.image_size", 10**9, "image_size is 1000000000"),
    (PHOTOGRAPHS, "vision_cfg.patch_size", 0, "vision_cfg.patch_size is 0"),
    (PHOTOGRAPHS, "vision_cfg.patch_size", 65, "larger than image_size 64"),
    (PHOTOGRAPHS, "vision_cfg.width", -1, "vision_cfg.width is -1"),
    (PHOTOGRAPHS, "vision_cfg.width", 10**7, "vision_cfg.width is 10000000"),
    (PHOTOGRAPHS, "vision_cfg.width", 127, "do not divide it"),
    (PHOTOGRAPHS, "vision_cfg.layers", [2, 2, 2, 2], "vision_cfg.layers is a list of 4"),
    (PHOTOGRAPHS, "vision_cfg.layers", 10**6, "vision_cfg.layers is 1000000"),
    (PHOTOGRAPHS, "vision_cfg.mlp_ratio", 1e300, "vision_cfg.mlp_ratio is 1e+300"),
    (PHOTOGRAPHS, "vision_cfg.timm_model_name", "hf-hub:evil/tower", "timm_model_name is 'hf-hub:evil/tower'"),
    (PHOTOGRAPHS, "vision_cfg.wdith", 128, "unknown key 'wdith'; known: act_kwargs"),
    (PHOTOGRAPHS, "text_cfg.hf_model_name", "evil/text", "text_cfg.hf_model_name is 'evil/text'"),
    (PHOTOGRAPHS, "text_cfg.hf_tokenizer_name", "https://evil.example/t", "text_cfg.hf_tokenizer_name is 'https"),
    (PHOTOGRAPHS, "text_cfg.heads", 3, "not divisible by text_cfg.heads 3"),
    (PHOTOGRAPHS, "text_cfg.vocab_size", 0, "vocab_size is 0; expected a whole number from 1"),
    (PHOTOGRAPHS, "text_cfg.context_length", 1e9, "context_length is 1000000000.0"),
    (PHOTOGRAPHS, "preprocess", {"mean": 0.5}, "preprocess.mean is 0.5; expected a list of 3"),
    (PHOTOGRAPHS, "preprocess", {"std": [0, 1, 1]}, "preprocess.std is a list of 3"),
    (PHOTOGRAPHS, "preprocess", {"train_scale": [1.0, 0.5]}, "expected the smaller share first"),
    (PHOTOGRAPHS, "preprocess", {"size": 224}, "preprocess has the unknown key 'size'"),
    (STUDIES, "vision_cfg.volume_size", 16, "vision_cfg.volume_size is 16; expected a list of 3"),
    (STUDIES, "vision_cfg.volume_size", [4096, 4096, 4096], "expected at most"),
    (STUDIES, "vision_cfg.patch_size", [0, 16, 16], "vision_cfg.patch_size is a list of 3"),
    (STUDIES, "vision_cfg.block_scopes", ["series"] * 5000, "vision_cfg.block_scopes is a list of 5000"),
    (STUDIES, "vision_cfg.block_scopes", "series", "vision_cfg.block_scopes is 'series'"),
    (STUDIES, "vision_cfg.num_heads", 0, "vision_cfg.num_heads is 0"),
    (STUDIES, "vision_cfg.num_heads", 5, "width 96 is not divisible by num_heads 5"),
    (STUDIES, "vision_cfg.series_names", "yes", "expected true or false"),
    (STUDIES, "text_cfg.tower", "clip", "text_cfg.tower is 'clip'"),
    (STUDIES, "text_cfg.hf_config", ABSENT, "text_cfg lacks hf_config"),
    (STUDIES, "text_cfg.hf_config", "evil/bert", "names evil/bert, a repository of the Hugging Face hub"),
    (STUDIES, "text_cfg.hf_config.vocab_size", ABSENT, "text_cfg.hf_config lacks vocab_size"),
    (STUDIES, "text_cfg.hf_config.hidden_size", 97, "not divisible by num_attention_heads"),
    (STUDIES, "text_cfg.hf_config.hidden_act", "quick", "hidden_act is 'quick'"),
    (STUDIES, "text_cfg.hf_config.num_hidden_layers", 10**6, "num_hidden_layers is 1000000"),
    (STUDIES, "text_cfg.hf_config.auto_map", {}, "unknown key 'auto_map'"),
    (STUDIES, "text_cfg.context_length", 65, "positions for 64 tokens"),
]


def changed(name: str, field: str, value: object) -> dict:
    config = load_model_config(name)
    *above, last = field.split(".")
    place = config
    for key in above:
        place = place[key]
    if value is ABSENT:
        del place[last]
    else:
        place[last] = value
    return config


@pytest.fixture
def offline(monkeypatch):
    """Any attempt to connect fails the test, wherever the error ends."""
    tried = []

    def connect(self, address):
        tried.append(address)
        raise OSError("connected")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: connect(None, args))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield tried
    assert not tried


@pytest.fixture
def unbuilt(monkeypatch):
    """Building a model fails the test."""

    def build(self, config):
        raise AssertionError("built")

    for name in ("vit", "hlip"):
        monkeypatch.setattr(factory.FAMILIES.load(name), "__init__", build)


@pytest.mark.parametrize(
    ("name", "field", "value", "says"), HOSTILE, ids=[f"{field}-{str(value)[:12]}" for _, field, value, _ in HOSTILE]
)
def test_a_config_that_cannot_be_built_is_refused_before_it_is(name, field, value, says, unbuilt, offline, tmp_path):
    config = changed(name, field, value)
    with pytest.raises(UserError) as refused:
        create_model(config, source="their.pt")
    assert str(refused.value).startswith("their.pt: model config")
    assert says in str(refused.value)
    assert len(str(refused.value)) < 1500
    path = tmp_path / "their.json"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError) as refused:
        create_model(str(path))
    assert str(refused.value).startswith(f"{path}: ")


@pytest.mark.parametrize(("name", "field", "value", "says"), HOSTILE[8:30:3], ids=lambda value: str(value)[:20])
def test_checkpoints_carry_no_such_config_either(name, field, value, says, unbuilt, offline, tmp_path):
    path = tmp_path / "their.pt"
    torch.save({"state_dict": {"w": torch.zeros(2)}, "model_config": changed(name, field, value)}, path)
    with pytest.raises(UserError, match="model config") as refused:
        load_pretrained(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert says in str(refused.value)


@pytest.mark.parametrize("config", ["ViT-B-16-ItemizedCLIP", "/etc/hostname", 5, [], {"embed_dim": 8}])
def test_what_is_no_config_at_all_in_a_checkpoint(config, unbuilt, offline, tmp_path):
    path = tmp_path / "their.pt"
    torch.save({"state_dict": {"w": torch.zeros(2)}, "model_config": config}, path)
    with pytest.raises(UserError, match=r"their.pt: model config: (expected a model config|lacks)"):
        load_pretrained(path)


def test_nesting_without_end_is_refused(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text("[" * 10**6)
    with pytest.raises(UserError, match=r"deep.json: nested too deeply"):
        load_model_config(path)
    deep: dict = {}
    for _ in range(500):
        deep = {"a": deep}
    with pytest.raises(UserError, match="nested too deeply"):
        create_model(TINY | {"more": deep})


def test_a_checkpoint_whose_config_says_much_more_than_its_weights_is_not_built(tmp_path, unbuilt):
    path = tmp_path / "small.pt"
    save_archive(
        {"state_dict": {"w": torch.zeros(2)}, "model_config": load_model_config("ViT-B-16-ItemizedCLIP")}, path
    )
    with pytest.raises(UserError, match=r"small.pt: the model config describes a model of 1\d\d,\d\d\d,\d\d\d numbers"):
        load_pretrained(path)


def test_a_model_larger_than_the_machine_is_refused(monkeypatch):
    config = copy.deepcopy(TINY)
    config["vision_cfg"] |= {"width": 65536, "head_width": 64, "layers": 1000}
    with pytest.raises(UserError, match=r"describes a model of 51,\d{3},\d{3},\d{3},\d{3} numbers"):
        create_model(config)
    monkeypatch.setattr("itemizedclip.models.config._memory_bytes", lambda: 10**6)
    with pytest.raises(UserError, match=r"this machine has 0.0 GB of memory"):
        create_model(TINY)


VARIANTS = [
    TINY,
    TINY | {"vision_cfg": TINY["vision_cfg"] | {"image_size": [30, 50], "patch_size": [8, 10], "mlp_ratio": 2.3}},
    TINY | {"vision_cfg": TINY["vision_cfg"] | {"no_ln_pre": True, "ls_init_value": 0.1, "layers": 3}},
    TINY | {"text_cfg": TINY["text_cfg"] | {"width": 24, "heads": 3, "ls_init_value": 1, "layers": 2}},
    TINY | {"vision_cfg": TINY["vision_cfg"] | {"pos_embed_type": "sin_cos_2d", "pool_type": "avg"}},
    PHOTOGRAPHS,
    "CTRATE_HLIP_debug",
]


@pytest.mark.parametrize("config", VARIANTS, ids=range(len(VARIANTS)))
def test_numbers_counted_from_a_config_are_those_of_the_model(config):
    model = create_model(config)
    held = sum(p.numel() for p in model.parameters()) + sum(
        b.numel() for name, b in model.named_buffers() if name == "attn_mask"
    )
    assert check_config(model.config, source="") == held


def test_numbers_of_a_model_with_series_names_are_counted_to_within_its_encoder():
    model = create_model(STUDIES)
    held = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.visual.trunk.buffers())
    assert held <= check_config(model.config, source="") < held + 600_000


def test_shipped_configs_are_good_and_of_published_size():
    sizes = {name: check_config(load_model_config(name), source=name) for name in factory.list_models()}
    assert 140e6 < sizes["ViT-B-16-ItemizedCLIP"] < 160e6
    assert 190e6 < sizes["CTRATE_HLIP_BiomedBERT_itemizedclip"] < 205e6


def test_only_shipped_names_and_flags_fetch_a_tokenizer(offline, tmp_path, monkeypatch):
    asked = []

    def snapshot(name, *, local_files_only, **more):
        asked.append((name, local_files_only))
        raise FileNotFoundError(name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    config = load_model_config(STUDIES)
    config["text_cfg"] |= {"text_model": "evil/bert"}
    path = tmp_path / "their.json"
    path.write_text(json.dumps(config))
    assert is_shipped(STUDIES)
    assert not is_shipped(str(path))
    with pytest.raises(UserError, match=r"their.pt: a model config names evil/bert.*--text-model evil/bert"):
        create_tokenizer(config, source="their.pt")
    assert asked == [("evil/bert", True)]
    with pytest.raises(UserError, match="not downloadable"):
        create_tokenizer(config, fetch=True)
    assert asked[1:] == [("evil/bert", False)]


def test_a_checkpoint_fetches_nothing(offline, tmp_path):
    model = create_model(STUDIES)
    config = copy.deepcopy(model.config)
    config["text_cfg"]["text_model"] = "evil/bert"
    path = tmp_path / "their.pt"
    save_archive({"state_dict": model.state_dict(), "model_config": config}, path)
    with pytest.raises(UserError, match=r"their.pt: a model config names evil/bert"):
        load_pretrained(path)
