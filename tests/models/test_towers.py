"""Towers of other libraries as initial weights: the features are the library's own, the head is new."""

from __future__ import annotations

import open_clip
import pytest
import torch
from itemizedclip_radiology.models.radiology_model import RadiologyItemizedCLIP
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from safetensors.torch import save_file

from itemizedclip.commands import convert
from itemizedclip.models.factory import load_model_config, load_pretrained
from itemizedclip.models.towers import load_towers
from itemizedclip.models.weights import CheckpointError

VISION = CLIPVisionCfg(layers=2, width=128, patch_size=8, image_size=32)
TEXT = CLIPTextCfg(context_length=12, vocab_size=49408, width=64, heads=1, layers=2)


@pytest.fixture(scope="module")
def texts() -> torch.Tensor:
    return open_clip.SimpleTokenizer(context_length=12)(["a red roof", "two parked cars and a tree"])


@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
def test_features_are_open_clips(kind, texts, tmp_path, capsys):
    torch.manual_seed(1)
    theirs = kind(48, VISION, TEXT, init_logit_bias=-10.0 if kind is CustomTextCLIP else None).eval()
    save_file({key: value.contiguous() for key, value in theirs.state_dict().items()}, tmp_path / "clip.safetensors")
    convert.main([str(tmp_path / "clip.safetensors"), "--towers", "--to", str(tmp_path / "start")])
    said = capsys.readouterr().out
    assert "start from random weights (seed 0)" in said
    assert "heads of 64 are taken" in said
    ours = load_pretrained(tmp_path / "start").model
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_image(images).global_BD, theirs.encode_image(images))
        torch.testing.assert_close(ours.encode_text(texts), theirs.encode_text(texts))
    assert torch.equal(ours.logit_scale, theirs.logit_scale)
    again = load_towers(tmp_path / "clip.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(ours.head.parameters(), again.model.head.parameters()))


def test_hlip_towers_without_its_table_of_series(tmp_path):
    config = load_model_config("HLIPSN_debug")
    torch.manual_seed(2)
    donor = RadiologyItemizedCLIP(config).state_dict()
    theirs = {
        f"module.{key}": value
        for key, value in donor.items()
        if not key.startswith(
            ("visual_attn.", "visual.trunk.serienameencoder.", "visual.trunk.sne_proj.", "logit_bias")
        )
    }
    theirs["module.visual.trunk.sequential_posemb"] = torch.zeros(1, 40, 96)
    torch.save({"epoch": 3, "state_dict": theirs}, tmp_path / "hlip.pt")
    loaded = load_towers(tmp_path / "hlip.pt", config="HLIPSN_debug")
    own = loaded.model.state_dict()
    assert all(torch.equal(own[key.removeprefix("module.")], value) for key, value in theirs.items() if key[7:] in own)
    assert not torch.equal(own["visual_attn.attn.in_proj_weight"], donor["visual_attn.attn.in_proj_weight"])
    assert any("sequential_posemb" in note for note in loaded.notes)
    # A tower that is not all there is none.
    del theirs["module.visual.trunk.norm.weight"]
    torch.save({"state_dict": theirs}, tmp_path / "half.pt")
    with pytest.raises(CheckpointError, match=r"1 missing: visual\.trunk\.norm\.weight"):
        load_towers(tmp_path / "half.pt", config="HLIPSN_debug")


def test_towers_that_do_not_fit(tmp_path):
    torch.save({"visual.trunk.attn_pool.latent": torch.zeros(1)}, tmp_path / "siglip.pt")
    with pytest.raises(CheckpointError, match=r"siglip\.pt: its image tower has attention pooling"):
        load_towers(tmp_path / "siglip.pt")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"no towers of open_clip's CLIP .* give --model"):
        load_towers(tmp_path / "other.pt")
    save_file(
        {key: value.contiguous() for key, value in CLIP(48, VISION, TEXT).state_dict().items()},
        tmp_path / "c.safetensors",
    )
    with pytest.raises(CheckpointError, match="ViT-none: neither a model of this project nor of open_clip"):
        load_towers(tmp_path / "c.safetensors", config="ViT-none")
