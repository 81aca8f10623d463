"""The radiology encoders: HLIP trunk, series names, BERT tower, released layout, initial weights.

Axes: B studies, S series, L patch tokens, C trunk width, N names or texts, P character positions.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import torch.nn.functional as F
from itemizedclip_radiology.models.hlip import HLIP, HLIPConfig, regroup, resample_position_table, sincos_table_3d
from itemizedclip_radiology.models.mae_init import inflate_patch_kernel, load_mae_weights
from itemizedclip_radiology.models.radiology_model import RadiologyItemizedCLIP, load_initial_weights
from itemizedclip_radiology.models.series_names import (
    NAME_LENGTH,
    SeriesNameEncoder,
    encode_series_name,
    encode_series_names,
    load_series_name_weights,
)
from itemizedclip_radiology.models.text_tower import (
    BertTextTower,
    bert_config_of,
    create_bert_tokenizer,
    load_bert_tokenizer,
    load_bert_weights,
    with_text_model,
)
from itemizedclip_radiology.recipes import MAE_HUB_NAME
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from itemizedclip.data.batch import ItemBatch
from itemizedclip.models.weights import load_weights
from itemizedclip.objectives.loss import ObjectiveOptions
from itemizedclip.training.task import ItemizedTask

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIGS = RadiologyItemizedCLIP.config_folder
PUBLISHED = ("HLIPSN_BiomedBERT_81616_itemizedclip", "CTRATE_HLIP_BiomedBERT_itemizedclip")
DEBUG = ("HLIPSN_debug", "CTRATE_HLIP_debug")


def config_of(name: str) -> dict:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def read_golden(name: str) -> tuple[dict[str, Tensor], dict]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}, config


def golden_trunk(name: str, scopes: tuple[str, ...]) -> tuple[HLIP, dict[str, Tensor], dict]:
    tensors, config = read_golden(name)
    trunk = HLIP(
        HLIPConfig(
            volume_size=config["img_size"],
            patch_size=config["patch_size"],
            block_scopes=scopes,
            width=config["embed_dim"],
            num_heads=config["num_heads"],
            series_names="in.series_names" in tensors,
        )
    )
    trunk.load_state_dict({k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")})
    return trunk.eval(), tensors, config


def small_trunk(
    *, series_names: bool = True, scopes=("slice", "series", "study", "slice", "study"), drop_path_rate: float = 0.0
) -> HLIP:
    torch.manual_seed(0)
    config = HLIPConfig(
        volume_size=(16, 32, 32),
        patch_size=(8, 16, 16),
        block_scopes=scopes,
        width=24,
        num_heads=4,
        drop_path_rate=drop_path_rate,
        series_names=series_names,
    )
    trunk = HLIP(config)
    # Larger weights than at the start of training, so that mistakes show.
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return trunk.eval()


def kept_for_backward(forward: Callable[[], Any], known: set[int]) -> int:
    """Elements kept for the backward pass outside checkpointed regions, tensors at `known` addresses not counted."""
    elements = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal elements
        elements += tensor.numel() * (tensor.data_ptr() not in known)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return elements


def study(num_series: int, *, batch: int = 2, size=(16, 32, 32)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_series)
    volumes = torch.randn(batch, num_series, 1, *size, generator=generator)
    names = torch.stack([encode_series_names([f"AX_T{s}_study{b}" for s in range(num_series)]) for b in range(batch)])
    return volumes, names


# --- golden vectors and layout ---------------------------------------------------------------------------------------


def test_trunk_with_series_names_reproduces_the_published_outputs():
    trunk, tensors, config = golden_trunk("model_hlip_series_names", ("series", "study", "series", "study"))
    names = torch.stack([encode_series_names(study_names) for study_names in config["series_names"]])
    assert torch.equal(names, tensors["in.series_names"])
    with torch.no_grad():
        vectors = trunk.serienameencoder(names)
        tokens, grid = trunk(tensors["in.image"], names)
    assert grid == (3, 2, 2, 2)
    assert relative_error(vectors.flatten(0, 1), tensors["out.series_name_embedding"]) < 5e-6
    assert relative_error(tokens, tensors["out.tokens"]) < 5e-6
    assert relative_error(tokens[:, 0], tensors["out.tokens"][:, 0]) < 5e-6


def test_chest_ct_trunk_reproduces_the_published_outputs():
    trunk, tensors, _ = golden_trunk("model_hlip_chest_ct", ("slice", "slice", "series", "series"))
    with torch.no_grad():
        tokens, grid = trunk(tensors["in.image"])
    assert grid == (1, 2, 2, 2)
    assert relative_error(tokens, tensors["out.tokens"]) < 5e-6
    assert relative_error(tokens[:, 0], tensors["out.tokens"][:, 0]) < 5e-6


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_names_and_shapes_are_those_of_the_released_checkpoint(name):
    with torch.device("meta"):
        model = RadiologyItemizedCLIP(config_of(name))
    layout = json.loads((GOLDEN / "checkpoint_layouts.json").read_text())[name]
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == layout


def test_published_block_scopes_and_starting_values():
    mri, chest = (config_of(name) for name in PUBLISHED)
    assert [i for i, s in enumerate(mri["vision_cfg"]["block_scopes"]) if s == "study"] == [2, 5, 8, 11]
    assert set(mri["vision_cfg"]["block_scopes"]) == {"series", "study"}
    assert [i for i, s in enumerate(chest["vision_cfg"]["block_scopes"]) if s == "series"] == [2, 5, 8, 11]
    assert set(chest["vision_cfg"]["block_scopes"]) == {"slice", "series"}
    for name in PUBLISHED:
        with torch.device("meta"):
            trunk = RadiologyItemizedCLIP(config_of(name)).visual.trunk
        rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in trunk.blocks]
        assert rates == pytest.approx([0.2 * i / 11 for i in range(12)])
    model = RadiologyItemizedCLIP(config_of("HLIPSN_debug"))
    assert float(model.logit_scale.detach().exp()) == pytest.approx(1 / 0.07, rel=1e-4)
    assert float(model.logit_bias.detach()) == -10


# --- trunk -----------------------------------------------------------------------------------------------------------


def plain_trunk(trunk: HLIP, volumes: Tensor, name_vectors: Tensor | None) -> Tensor:
    """Every group attended to in a Python loop, patches cut by indexing: an independent reading of the method."""
    outputs = []
    p, q, r = trunk.config.patch_size
    kernel = trunk.patch_embed.proj.weight.flatten(1)
    table = trunk.spatial_posemb[0]
    for study_index, study_volumes in enumerate(volumes):
        patches = {}
        for s, volume in enumerate(study_volumes[:, 0]):
            d, h, w = (n // size for n, size in zip(volume.shape, (p, q, r)))
            for i in range(d):
                for j in range(h):
                    for k in range(w):
                        voxels = volume[i * p : (i + 1) * p, j * q : (j + 1) * q, k * r : (k + 1) * r]
                        token = kernel @ voxels.flatten() + trunk.patch_embed.proj.bias + table[i, j, k]
                        patches[s, i, j, k] = token + (0 if name_vectors is None else name_vectors[study_index, s])
        order = list(patches)
        class_of = dict.fromkeys(order, trunk.cls_token[0, 0])
        for block, scope in zip(trunk.blocks, trunk.config.block_scopes):
            width = {"study": 0, "series": 1, "slice": 2}[scope]
            class_after: dict[tuple, Tensor] = {}
            patches_after: dict[tuple, Tensor] = {}
            for group in sorted({key[:width] for key in order}):
                members = [key for key in order if key[:width] == group]
                # All members were given a class token by their former group; each former group counts equally.
                class_token = torch.stack([class_of[key] for key in members]).mean(0)
                out = block(torch.stack([class_token, *(patches[key] for key in members)])[None])[0]
                class_after |= dict.fromkeys(members, out[0])
                patches_after |= dict(zip(members, out[1:]))
            class_of, patches = class_after, patches_after
        class_token = torch.stack([class_of[key] for key in order]).mean(0)
        outputs.append(trunk.norm(torch.stack([class_token, *(patches[key] for key in order)])))
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "scopes",
    [
        ("slice", "series", "study", "slice", "study"),
        ("study", "slice", "series"),
        ("series", "study"),
        ("slice",),
    ],
)
@torch.no_grad()
def test_scopes_equal_a_loop_over_groups(scopes):
    trunk = small_trunk(scopes=scopes)
    volumes, names = study(3)
    vectors = trunk.sne_proj(trunk.serienameencoder(names))
    tokens, grid = trunk(volumes, names)
    assert grid == (3, 2, 2, 2)
    assert relative_error(tokens, plain_trunk(trunk, volumes, vectors)) < 1e-5


def test_regroup_averages_class_tokens_when_joining_and_copies_them_when_splitting():
    tokens = torch.arange(4 * 3 * 2, dtype=torch.float32).view(4, 3, 2)  # one study, four groups, two patches each
    joined = regroup(tokens, num_studies=1, num_groups=2)
    assert torch.equal(joined[0], torch.stack([tokens[:2, 0].mean(0), *tokens[0, 1:], *tokens[1, 1:]]))
    split = regroup(joined, num_studies=1, num_groups=4)
    assert torch.equal(split[:, 1:], tokens[:, 1:])
    assert torch.equal(split[:, 0], joined[[0, 0, 1, 1], 0])


@pytest.mark.parametrize("num_series", [1, 2, 5, 12])
@torch.no_grad()
def test_any_number_of_series(num_series):
    volumes, names = study(num_series)
    tokens, grid = small_trunk()(volumes, names)
    assert tokens.shape == (2, 1 + num_series * 8, 24)
    assert grid == (num_series, 2, 2, 2)
    assert torch.isfinite(tokens).all()


@torch.no_grad()
def test_series_order_moves_patch_tokens_and_leaves_the_class_token():
    trunk = small_trunk()
    volumes, names = study(4)
    order = torch.tensor([2, 0, 3, 1])
    tokens, _ = trunk(volumes, names)
    moved, _ = trunk(volumes[:, order], names[:, order])
    assert relative_error(moved[:, 0], tokens[:, 0]) < 1e-5
    patches = tokens[:, 1:].unflatten(1, (4, 8))
    assert relative_error(moved[:, 1:].unflatten(1, (4, 8)), patches[:, order]) < 1e-5
    assert relative_error(moved[:, 1:], tokens[:, 1:]) > 0.1


@torch.no_grad()
def test_studies_of_a_batch_do_not_meet():
    trunk = small_trunk()
    volumes, names = study(3)
    together, _ = trunk(volumes, names)
    alone, _ = trunk(volumes[1:], names[1:])
    assert relative_error(together[1:], alone) < 1e-5


def test_gradient_reaches_every_trainable_parameter_and_checkpointing_changes_nothing():
    volumes, names = study(2)
    gradients = []
    for enable in (False, True):
        trunk = small_trunk().train()
        trunk.set_grad_checkpointing(enable)
        tokens, _ = trunk(volumes, names)
        tokens.square().mean().backward()
        gradients.append({name: p.grad for name, p in trunk.named_parameters() if p.requires_grad})
    fixed = [name for name, p in trunk.named_parameters() if not p.requires_grad]
    assert fixed == ["spatial_posemb"]
    for name, plain in gradients[0].items():
        assert plain is not None, name
        assert plain.abs().sum() > 0, name
        assert torch.allclose(plain, gradients[1][name], rtol=1e-5, atol=1e-8), name


def test_checkpointing_keeps_fewer_activations():
    model, config = debug_model("CTRATE_HLIP_debug")
    model.train()
    volumes, _ = study(1, size=config["vision_cfg"]["volume_size"])
    tokens = RadiologyItemizedCLIP.create_tokenizer(config)(["acute stroke"] * 8)
    known = {tensor.data_ptr() for tensor in (volumes, *model.parameters())}
    for forward in (lambda: model.visual.trunk(volumes), lambda: model.encode_text(tokens)):
        kept = []
        for enable in (False, True):
            model.set_grad_checkpointing(enable)
            kept.append(kept_for_backward(forward, known))
        assert kept[1] < kept[0] / 4


def test_checkpointing_with_drop_path_repeats_the_same_draw():
    volumes, names = study(2)
    gradients = []
    for enable, seed in ((False, 3), (True, 3), (False, 4)):
        trunk = small_trunk(drop_path_rate=0.5).train()
        trunk.set_grad_checkpointing(enable)
        torch.manual_seed(seed)
        tokens, _ = trunk(volumes, names)
        tokens.square().mean().backward()
        gradients.append(trunk.blocks[1].mlp.fc1.weight.grad)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-5, atol=1e-8)
    assert not torch.allclose(gradients[0], gradients[2], rtol=1e-5, atol=1e-8)


@torch.no_grad()
def test_bfloat16_autocast_stays_close():
    trunk, tensors, _ = golden_trunk("model_hlip_series_names", ("series", "study", "series", "study"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens, _ = trunk(tensors["in.image"], tensors["in.series_names"])
    assert tokens.dtype == torch.float32
    assert relative_error(tokens, tensors["out.tokens"]) < 0.02


@torch.no_grad()
def test_other_volume_sizes_resample_the_position_table():
    trunk = small_trunk()
    volumes, names = study(2, size=(24, 48, 16))
    tokens, grid = trunk(volumes, names)
    assert grid == (2, 3, 3, 1)
    assert tokens.shape == (2, 1 + 2 * 9, 24)
    expected = small_trunk()
    expected.spatial_posemb = nn.Parameter(resample_position_table(trunk.spatial_posemb, (3, 3, 1)))
    vectors = trunk.sne_proj(trunk.serienameencoder(names))
    assert relative_error(tokens, plain_trunk(expected, volumes, vectors)) < 1e-5


def test_resampled_table_is_exact_for_a_linear_ramp():
    # Cell centres of 4 cells and of 8 cells over the same interval; linear inside, held at the border.
    ramp = torch.arange(4.0).view(1, 4, 1, 1, 1).expand(1, 4, 2, 3, 1)
    resampled = resample_position_table(ramp, (8, 2, 3))
    centres = ((torch.arange(8) + 0.5) / 2 - 0.5).clamp(0, 3)
    assert torch.allclose(resampled[0, :, 1, 2, 0], centres)
    assert resample_position_table(ramp, (4, 2, 3)) is ramp


def test_position_table_at_the_start_tells_all_patches_apart():
    table = sincos_table_3d((6, 14, 14), 768).flatten(1, 3)[0]
    assert table.shape == (1176, 768)
    assert torch.allclose(table.square().sum(-1), torch.full((1176,), 384.0))
    distances = torch.cdist(table[None], table[None])[0] + 1e9 * torch.eye(1176)
    assert distances.min() > 1


@pytest.mark.parametrize(
    ("shape", "names_shape", "message"),
    [
        ((1, 2, 16, 32, 32), (1, 2, NAME_LENGTH), r"\(B, S, 1, D, H, W\)"),
        ((2, 16, 32, 32), (1, 2, NAME_LENGTH), r"\(B, S, 1, D, H, W\)"),
        ((1, 2, 3, 16, 32, 32), (1, 2, NAME_LENGTH), "one channel"),
        ((1, 0, 1, 16, 32, 32), (1, 0, NAME_LENGTH), "at least one series"),
        ((1, 2, 1, 16, 40, 32), (1, 2, NAME_LENGTH), "16×40×32 voxels do not divide into patches of 8×16×16"),
        ((1, 2, 1, 16, 32, 32), None, "pass series_names"),
        ((1, 2, 1, 16, 32, 32), (1, 3, NAME_LENGTH), r"\(1, 2, 110\), got \(1, 3, 110\)"),
        ((1, 2, 1, 16, 32, 32), (1, 1), r"\(1, 2, 110\), got \(1, 1\)"),
    ],
)
def test_wrong_inputs_say_what_was_expected(shape, names_shape, message):
    names = None if names_shape is None else torch.zeros(names_shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        small_trunk()(torch.zeros(shape), names)


def test_series_names_for_a_trunk_without_them_are_refused():
    volumes, names = study(1)
    with pytest.raises(ValueError, match="takes no series names"):
        small_trunk(series_names=False)(volumes, names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_scopes": ["series", "scan"]}, "slice, series, study per block.*scan"),
        ({"block_scopes": []}, "per block"),
        ({"volume_size": [48, 224]}, "three positive voxel counts"),
        ({"volume_size": [48, 220, 224]}, "not a multiple"),
        ({"width": 100}, "divisible"),
        ({"drop_path_rate": 1.5}, "drop_path_rate"),
        ({"drop_path": 0.1}, r"unknown keys \['drop_path'\]"),
    ],
)
def test_wrong_trunk_configurations_are_refused(change, message):
    options = {k: v for k, v in config_of(PUBLISHED[0])["vision_cfg"].items() if k != "tower"}
    with pytest.raises(ValueError, match=message):
        HLIPConfig.from_dict(options | change)


# --- series names ----------------------------------------------------------------------------------------------------


def test_series_name_code():
    assert encode_series_name("AX_t1c")[:8].tolist() == [1, 24, 27, 20, 31, 3, 46, 0]
    assert encode_series_name("z+-09.*(),")[:11].tolist() == [26, 28, 29, 30, 39, 40, 41, 42, 43, 44, 46]
    assert encode_series_name("a b/é=")[:7].tolist() == [1, 45, 2, 45, 45, 45, 46]
    assert encode_series_name("").tolist() == [46] + [0] * 109
    for name in ("x" * 300, "İ" * 300):
        codes = encode_series_name(name)
        assert codes.shape == (110,)
        assert codes.dtype == torch.int64
        assert (codes == 46).nonzero().flatten().tolist() == [109]
    assert encode_series_names(["a", "b"]).shape == (2, 110)


def test_series_names_of_the_wrong_type_are_refused():
    with pytest.raises(TypeError, match="single string 'AX_T1'"):
        encode_series_names("AX_T1")
    with pytest.raises(TypeError, match="must be a string, got int"):
        encode_series_names([3])
    with pytest.raises(ValueError, match="at least one"):
        encode_series_names([])


@torch.no_grad()
def test_padding_never_matters_to_a_name():
    torch.manual_seed(0)
    encoder = SeriesNameEncoder()
    names = encode_series_names(["AX_T1", "SAG_FLAIR_very_long_name_(contrast)", "AX_T1"])
    expected = encoder(names)
    assert relative_error(encoder(names[:1])[0], expected[0]) < 1e-6  # beside no longer name
    assert torch.equal(expected[0], expected[2])
    assert relative_error(encoder(names[:, :60]), expected) < 1e-6
    assert relative_error(encoder(F.pad(names, (0, 50))), expected) < 1e-6
    encoder.embed.weight[0] = 1e4  # the padding row
    assert relative_error(encoder(names), expected) < 1e-6
    assert relative_error(expected[1], expected[0]) > 0.1
    with pytest.raises(ValueError, match="210 positions"):
        encoder(F.pad(names, (0, 100)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1, 2, 3] + [0] * 107, "name 0 has no single terminator"),
        ([1, 46, 46] + [0] * 107, "no single terminator"),
        ([1, 46, 5] + [0] * 107, "no single terminator"),
        ([1, 0, 46] + [0] * 107, "no single terminator"),
        ([1, 47, 46] + [0] * 107, "0 … 46"),
        ([-1, 5, 46] + [0] * 107, "0 … 46"),
    ],
)
def test_codes_that_no_name_gives_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        SeriesNameEncoder()(torch.tensor([row]))
    with pytest.raises(ValueError, match="int64"):
        SeriesNameEncoder()(torch.tensor([row], dtype=torch.float32))


@pytest.mark.parametrize("prefix", ["", "serienameencoder.", "module.visual.trunk.serienameencoder."])
def test_series_name_weights_load_from_any_prefix(tmp_path, prefix):
    trained = SeriesNameEncoder()
    tensors = {prefix + k: v.clone() for k, v in trained.state_dict().items()}
    tensors[prefix + "linear.weight"] = torch.zeros(3, 256)
    tensors["text.transformer.embed.weight"] = torch.zeros(5, 5)
    save_file(tensors, tmp_path / "names.safetensors")
    torch.save({"epoch": 3, "state_dict": tensors}, tmp_path / "checkpoint.pt")
    for file in ("names.safetensors", "checkpoint.pt"):
        encoder = SeriesNameEncoder()
        report = load_series_name_weights(encoder, tmp_path / file)
        assert all(torch.equal(value, trained.state_dict()[key]) for key, value in encoder.state_dict().items())
        assert prefix + "linear.weight" in report.skipped


def test_bad_series_name_files_are_refused(tmp_path):
    encoder = SeriesNameEncoder()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    tensors = encoder.state_dict()
    torch.save({k: v for k, v in tensors.items() if "layers.2.1" not in k}, tmp_path / "short.pt")
    torch.save(tensors | {"embed.weight": torch.zeros(47, 128)}, tmp_path / "narrow.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "short.pt").read_bytes()[:2000])
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    for file, message in (
        ("absent.pt", "does not exist"),
        ("other.pt", "no series-name encoder"),
        ("empty.pt", "no"),
        ("short.pt", "lacks 6 of 34 weights"),
        ("narrow.pt", r"embed.weight has shape \(47, 128\), the model expects \(47, 246\)"),
        ("torn.pt", "torn.pt"),
        ("torn.safetensors", "torn.safetensors"),
    ):
        with pytest.raises(ValueError, match=message):
            load_series_name_weights(encoder, tmp_path / file)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


# --- text tower ------------------------------------------------------------------------------------------------------


@pytest.fixture
def bert_folder(tmp_path) -> Path:
    """A small BERT as the hub would give it: config, vocabulary, encoder weights under `bert.`, heads."""
    folder = tmp_path / "small-bert"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "acute", "stroke", "no", "lesion", "##s", "left", "."]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    shape: dict[str, Any] = {
        "vocab_size": len(words),
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 48,
        "max_position_embeddings": 32,
    }
    extra = {"model_type": "cxr-bert", "projection_size": 8, "architectures": ["X"], "auto_map": {"AutoModel": "x.X"}}
    (folder / "config.json").write_text(json.dumps(shape | extra))
    torch.manual_seed(1)
    tensors = {k: v.clone() for k, v in BertForMaskedLM(BertConfig(**shape)).state_dict().items()}
    tensors["bert.embeddings.position_ids"] = torch.arange(32)[None]
    tensors["cls_projection_head.dense_to_hidden.weight"] = torch.zeros(8, 24)
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def test_tokenizer_is_wordpiece_with_padding_and_truncation(bert_folder):
    tokenizer = load_bert_tokenizer(bert_folder, 6)
    tokens = tokenizer(["Acute STROKE.", "lesions", "left " * 9, ""])
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [
        [2, 5, 6, 11, 3, 0],
        [2, 8, 9, 3, 0, 0],
        [2, 10, 10, 10, 10, 3],
        [2, 3, 0, 0, 0, 0],
    ]
    assert tokenizer.is_truncated(tokens).tolist() == [False, False, True, False]
    assert tokenizer([]).shape == (0, 6)
    # The JSON that a checkpoint keeps is the whole tokenizer.
    text_cfg = {"context_length": 6, "tokenizer_json": tokenizer.to_json(), "hf_config": {"vocab_size": 12}}
    assert torch.equal(create_bert_tokenizer(text_cfg)(["acute xyz"]), torch.tensor([[2, 5, 1, 3, 0, 0]]))
    (bert_folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert load_bert_tokenizer(bert_folder, 6)(["Acute acute"]).tolist() == [[2, 1, 5, 3, 0, 0]]
    (bert_folder / "tokenizer.json").write_text(tokenizer.to_json())
    (bert_folder / "vocab.txt").unlink()
    assert torch.equal(load_bert_tokenizer(bert_folder, 6)(["Acute STROKE."]), tokens[:1])


def test_builtin_tokenizer_spells_any_word():
    for name in DEBUG:
        config = config_of(name)
        tokenizer = create_bert_tokenizer(config["text_cfg"] | {"context_length": 128})
        every = "abcdefghijklmnopqrstuvwxyz0123456789"
        assert tokenizer.vocab_size == config["text_cfg"]["hf_config"]["vocab_size"]
        texts = ["Left frontal cavernoma 1.5 x 2 cm (T2*).", f"{every}{every}-77 % of <the> area?", "Placeholder"]
        tokens = tokenizer(texts)
        assert not (tokens == 1).any()  # [UNK]
        assert len({tuple(row) for row in tokens.tolist()}) == 3


def test_wrong_tokenizers_are_refused(tmp_path, bert_folder):
    (tmp_path / "words.txt").write_text("[CLS]\n[SEP]\nword\n")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"words.txt: not a BERT tokenizer"):
        load_bert_tokenizer(tmp_path / "words.txt", 8)
    with pytest.raises(ValueError, match=r"broken.json: not a BERT tokenizer"):
        load_bert_tokenizer(tmp_path / "broken.json", 8)
    with pytest.raises(FileNotFoundError, match=r"neither vocab.txt nor tokenizer.json"):
        load_bert_tokenizer(tmp_path, 8)
    with pytest.raises(ValueError, match="12 tokens, the text tower embeds 11"):
        create_bert_tokenizer(
            {"tokenizer": str(bert_folder), "context_length": 8, "hf_config": {"vocab_size": 11, "hidden_size": 24}}
        )


def text_tower(folder: Path, **changes) -> BertTextTower:
    return BertTextTower({"hf_config": bert_config_of(folder), "context_length": 8} | changes, 16)


def test_bert_weights_load_into_a_plain_bert_and_what_is_left_is_listed(bert_folder):
    tower = text_tower(bert_folder).eval()
    report = load_bert_weights(tower, bert_folder)
    tensors = torch.load(bert_folder / "pytorch_model.bin", weights_only=True)
    for name, value in tower.transformer.state_dict().items():
        assert torch.equal(value, tensors["bert." + name]), name
    assert "position_ids" in next(key for key, why in report.skipped.items() if "buffer" in why)
    assert "cls_projection_head.dense_to_hidden.weight" in report.skipped
    assert set(report.used) | set(report.skipped) == set(tensors)
    assert not set(report.used) & set(report.skipped)

    # The feature is the last layer's class-token vector through the projection; the reference runs unpadded.
    reference = BertForMaskedLM(BertConfig(**bert_config_of(bert_folder))).eval()
    reference.load_state_dict({k: v for k, v in tensors.items() if k in reference.state_dict()})
    tokens = load_bert_tokenizer(bert_folder, 8)(["acute stroke", "no lesions left."])
    with torch.no_grad():
        features = tower(tokens)
        for row, length in enumerate((4, 7)):
            hidden = reference.bert(input_ids=tokens[row : row + 1, :length]).last_hidden_state[:, 0]
            assert relative_error(features[row : row + 1], hidden @ tower.proj.weight.T) < 1e-5
        assert relative_error(tower(tokens[:, :7]), features) < 1e-5


def test_older_names_and_safetensors_load_too(bert_folder):
    tensors = torch.load(bert_folder / "pytorch_model.bin", weights_only=True)
    old = {}
    for key, value in tensors.items():
        if key.startswith("bert."):
            name = key.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma")
            old[name.replace("LayerNorm.bias", "LayerNorm.beta")] = value.clone()
    save_file(old, bert_folder / "model.safetensors")
    tower = text_tower(bert_folder)
    report = load_bert_weights(tower, bert_folder)
    assert report.source.endswith("model.safetensors")
    assert torch.equal(tower.transformer.embeddings.LayerNorm.weight, old["embeddings.LayerNorm.gamma"])
    assert list(report.skipped) == ["embeddings.position_ids"]


def test_locked_bert_has_no_gradient_and_no_dropout_but_its_projection_trains(bert_folder):
    tower = text_tower(bert_folder)
    tokens = load_bert_tokenizer(bert_folder, 8)(["acute stroke"])
    tower.train()
    assert not torch.equal(tower(tokens), tower(tokens))  # dropout
    tower.lock()
    tower.train()
    features = tower(tokens)
    assert torch.equal(features, tower(tokens))
    assert not tower.transformer.training
    features.sum().backward()
    assert {name for name, p in tower.named_parameters() if p.grad is not None} == {"proj.weight"}
    assert {name for name, p in tower.named_parameters() if p.requires_grad} == {"proj.weight"}


def test_wrong_text_models_are_refused(tmp_path, bert_folder):
    larger = text_tower(bert_folder, hf_config=bert_config_of(bert_folder) | {"vocab_size": 40})
    with pytest.raises(ValueError, match=r"word_embeddings.weight has shape"):
        load_bert_weights(larger, bert_folder)
    torch.save({"w": torch.zeros(1)}, tmp_path / "w.bin")
    with pytest.raises(ValueError, match="holds no BERT"):
        load_bert_weights(text_tower(bert_folder), tmp_path / "w.bin")
    with pytest.raises(FileNotFoundError, match=r"model.safetensors nor pytorch_model.bin"):
        load_bert_weights(text_tower(bert_folder), tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"not the config.json of a BERT"):
        bert_config_of(tmp_path)
    with pytest.raises(ValueError, match=r"context_length is 64.*32 tokens"):
        text_tower(bert_folder, context_length=64)
    with pytest.raises(ValueError, match="unknown key 'hf_name'"):
        text_tower(bert_folder, hf_name="x")
    with pytest.raises(ValueError, match=r"int64 \(N, C\) with C ≤ 8"):
        text_tower(bert_folder)(torch.zeros(2, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"int64 \(N, C\)"):
        text_tower(bert_folder)(torch.zeros(9, dtype=torch.int64))


def test_without_network_the_message_names_the_files_to_bring(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    name = config_of(PUBLISHED[0])["text_cfg"]["text_model"]
    for load in (bert_config_of, lambda source: load_bert_tokenizer(source, 8)):
        with pytest.raises(FileNotFoundError, match=f"{name}.*HF_HUB_OFFLINE.*vocab.txt.*--text-model FOLDER"):
            load(name)
    with pytest.raises(FileNotFoundError, match=r"no such folder; --text-model takes a folder with config.json"):
        bert_config_of(tmp_path / "nowhere" / "at all")


# --- initial image weights -------------------------------------------------------------------------------------------


def mae_tensors(trunk: HLIP, *, in_plane: int = 16, cells: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    C = trunk.config.width
    shared = {k: v for k, v in trunk.state_dict().items() if k.startswith(("blocks.", "norm."))}
    shapes = {k: v.shape for k, v in shared.items()} | {
        "cls_token": (1, 1, C),
        "pos_embed": (1, 1 + cells**2, C),
        "patch_embed.proj.weight": (C, 3, in_plane, in_plane),
        "patch_embed.proj.bias": (C,),
        "mask_token": (1, 1, 8),
        "decoder_embed.weight": (8, C),
    }
    return {k: torch.randn(shape, generator=generator) for k, shape in shapes.items()}


def test_inflated_kernel_gives_a_stack_of_one_photograph_the_photographs_embedding():
    kernel = torch.randn(24, 3, 16, 16)
    photograph = torch.randn(1, 1, 32, 32)
    flat = F.conv2d(photograph.expand(-1, 3, -1, -1), kernel, stride=16)
    inflated = inflate_patch_kernel(kernel, (8, 16, 16))
    assert inflated.shape == (24, 1, 8, 16, 16)
    stack = photograph[:, :, None].expand(-1, -1, 8, -1, -1)
    assert relative_error(F.conv3d(stack, inflated, stride=(8, 16, 16))[:, :, 0], flat) < 1e-5
    assert inflate_patch_kernel(kernel, (8, 24, 24)).shape == (24, 1, 8, 24, 24)


def test_mae_weights_start_the_trunk_and_every_key_is_accounted_for(tmp_path):
    trunk = small_trunk()
    names_before = {k: v.clone() for k, v in trunk.serienameencoder.state_dict().items()}
    tensors = mae_tensors(trunk, cells=2)
    torch.save({"model": tensors}, tmp_path / "mae.pth")
    report = load_mae_weights(trunk, tmp_path / "mae.pth")
    assert set(report.used) | set(report.skipped) == set(tensors)
    assert sorted(report.skipped) == ["decoder_embed.weight", "mask_token"]
    assert all(k.startswith(("serienameencoder.", "sne_proj.")) for k in report.untouched)
    assert report.untouched
    assert "decoder_embed.weight" in str(report)
    assert torch.equal(trunk.blocks[1].mlp.fc1.weight, tensors["blocks.1.mlp.fc1.weight"])
    assert torch.equal(trunk.norm.bias, tensors["norm.bias"])
    assert torch.allclose(trunk.cls_token, tensors["cls_token"] + tensors["pos_embed"][:, :1])
    # Same grid in-plane: the 2-D table stays, and what is added depends on the depth index alone.
    added = trunk.spatial_posemb - tensors["pos_embed"][:, 1:].view(1, 1, 2, 2, 24)
    assert torch.allclose(added, added[:, :, :1, :1].expand_as(added), atol=1e-6)
    assert torch.allclose(added[0, 0, 0, 0], torch.tensor([0.0] * 12 + [1.0] * 12), atol=1e-6)
    assert not trunk.spatial_posemb.requires_grad
    assert all(torch.equal(v, names_before[k]) for k, v in trunk.serienameencoder.state_dict().items())
    save_file(mae_tensors(trunk, cells=3), tmp_path / "model.safetensors")
    assert load_mae_weights(trunk, tmp_path).source.endswith("model.safetensors")  # a folder; grid 3×3 resampled to 2×2


def test_wrong_mae_weights_change_nothing(tmp_path, monkeypatch):
    trunk = small_trunk()
    before = {k: v.clone() for k, v in trunk.state_dict().items()}
    tensors = mae_tensors(trunk)
    wrong = {
        "no ViT": ({"w": torch.zeros(2)}, "not a ViT"),
        "fewer blocks": ({k: v for k, v in tensors.items() if not k.startswith("blocks.4")}, "lacks .*blocks.4"),
        "other width": (tensors | {"pos_embed": torch.zeros(1, 10, 48)}, "width 48, the trunk has width 24"),
        "other MLP": (tensors | {"blocks.0.mlp.fc1.bias": torch.zeros(5)}, "blocks.0.mlp.fc1.bias"),
    }
    for state, message in wrong.values():
        torch.save(state, tmp_path / "wrong.pth")
        with pytest.raises(ValueError, match=message):
            load_mae_weights(trunk, tmp_path / "wrong.pth")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"model.safetensors.*--image-weights FOLDER"):
        load_mae_weights(trunk, MAE_HUB_NAME)
    assert all(torch.equal(v, before[k]) for k, v in trunk.state_dict().items())


# --- the whole model -------------------------------------------------------------------------------------------------


def debug_model(name: str) -> tuple[RadiologyItemizedCLIP, dict]:
    torch.manual_seed(0)
    config = config_of(name)
    return RadiologyItemizedCLIP(config), config


@pytest.mark.parametrize("name", DEBUG)
def test_debug_model_trains_end_to_end(name):
    model, config = debug_model(name)
    model.train()
    num_series = 3 if config["vision_cfg"]["series_names"] else 1
    volumes, names = study(num_series, size=config["vision_cfg"]["volume_size"])
    series_names = names if config["vision_cfg"]["series_names"] else None
    tokenizer = RadiologyItemizedCLIP.create_tokenizer(config)
    losses = []
    for enable in (False, True):
        model.zero_grad(set_to_none=True)
        model.set_grad_checkpointing(enable)
        image = model.encode_image(volumes, series_names=series_names)
        text = model.encode_text(tokenizer(["acute stroke", "no pleural effusion"]))
        pooled = model.head(text[:, None], image.tokens_BLD)[:, 0]
        logits = model.logit_scale.exp() * F.cosine_similarity(pooled, text) + model.logit_bias
        loss = F.softplus(-logits).sum() + F.cosine_similarity(image.global_BD, text).sum()
        loss.backward()
        losses.append(float(loss.detach()))
        missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert image.global_BD.shape == (2, 64)
    assert image.tokens_BLD.shape == (2, torch.tensor(image.grid).prod(), 64)
    assert text.shape == (2, 64)


def test_image_features_share_one_projection():
    model, config = debug_model("CTRATE_HLIP_debug")
    volumes, _ = study(1, size=config["vision_cfg"]["volume_size"])
    with torch.no_grad():
        image = model.eval().encode_image(volumes)
        tokens, grid = model.visual.trunk(volumes)
    matrix = model.visual.head.proj.weight.T
    assert torch.allclose(image.global_BD, tokens[:, 0] @ matrix, atol=1e-5)
    assert torch.allclose(image.tokens_BLD, tokens[:, 1:] @ matrix, atol=1e-5)
    assert image.grid == grid == (1, 4, 4, 4)


def test_lock_text_freezes_bert_only():
    model, config = debug_model("CTRATE_HLIP_debug")
    model.lock(text=True)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {n for n in frozen if not n.startswith("text.transformer.")} == {"visual.trunk.spatial_posemb"}
    # In the training step the projection still gets its gradient, and every parameter left to train gets one.
    tokens = RadiologyItemizedCLIP.create_tokenizer(config)(["acute stroke", "no effusion", "emphysema", "no nodule"])
    volumes, _ = study(1, size=config["vision_cfg"]["volume_size"])
    batch = ItemBatch(
        images=volumes,
        item_tokens=tokens.view(2, 2, -1),
        item_mask=torch.ones(2, 2, dtype=torch.bool),
        is_normal=torch.zeros(2, dtype=torch.bool),
        sample_ids=["a", "b"],
    )
    task = ItemizedTask(model, ObjectiveOptions()).train()
    assert not model.text.transformer.training
    assert model.visual.training
    task(batch)["loss"].backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} == frozen


def test_position_table_of_another_size_is_resampled_on_loading():
    model, _ = debug_model("HLIPSN_debug")
    tensors = {"visual.trunk.spatial_posemb": sincos_table_3d((3, 5, 5), 96)}
    notes = model.resize_position_tables(tensors)
    assert tensors["visual.trunk.spatial_posemb"].shape == (1, 2, 4, 4, 96)
    assert "(3, 5, 5) to (2, 4, 4)" in notes[0]
    assert model.resize_position_tables(dict(model.state_dict())) == []


def test_released_checkpoint_names_load_strictly_and_changes_are_listed():
    trained, config = debug_model("HLIPSN_debug")
    released = {"module." + key: value.clone() for key, value in trained.state_dict().items()}
    released["module.visual.trunk.spatial_posemb"] = sincos_table_3d((2, 8, 8), 96)
    released["module.text.transformer.embeddings.position_ids"] = torch.arange(64)[None]
    model = RadiologyItemizedCLIP(config)
    notes = load_weights(model, released, source="epoch_1.pt")
    assert len(notes) == 2
    assert any("position_ids" in note for note in notes)
    assert any("resampled from grid (2, 8, 8) to (2, 4, 4)" in note for note in notes)
    for name, value in model.state_dict().items():
        assert name == "visual.trunk.spatial_posemb" or torch.equal(value, trained.state_dict()[name]), name
    del released["module.visual.trunk.sne_proj.bias"]
    with pytest.raises(ValueError, match=r"epoch_1.pt: .*1 missing: visual.trunk.sne_proj.bias"):
        load_weights(model, released, source="epoch_1.pt")


def test_initial_weights_report_what_was_given_and_warn_of_the_rest(tmp_path, bert_folder, caplog):
    config = with_text_model(config_of("HLIPSN_debug") | {"embed_dim": 16}, bert_folder) | {"head_heads": 4}
    config["text_cfg"]["context_length"] = 8
    model = RadiologyItemizedCLIP(config)
    torch.save(mae_tensors(model.visual.trunk), tmp_path / "mae.pth")
    with caplog.at_level(logging.INFO):
        reports = load_initial_weights(model, image_weights=tmp_path / "mae.pth", text_model=bert_folder)
    assert len(reports) == 2
    assert "series-name encoder starts from random weights" in caplog.text
    assert "trunk starts from random" not in caplog.text
    assert "position_ids: a buffer" in caplog.text
    # The config now carries shape and vocabulary: no other file is needed for the tokenizer or the model.
    carried = json.loads(json.dumps(model.config))
    for file in bert_folder.iterdir():
        file.unlink()
    assert RadiologyItemizedCLIP.create_tokenizer(carried)(["acute"]).tolist() == [[2, 5, 3, 0, 0, 0, 0, 0]]
    RadiologyItemizedCLIP(carried).load_state_dict(model.state_dict())
    chest, _ = debug_model("CTRATE_HLIP_debug")
    with pytest.raises(ValueError, match="takes no series names"):
        load_initial_weights(chest, series_name_weights=tmp_path / "mae.pth")


def test_wrong_text_tower_kind_is_refused():
    config = config_of("HLIPSN_debug")
    config["text_cfg"]["tower"] = "clip"
    with pytest.raises(ValueError, match="'clip'"):
        RadiologyItemizedCLIP(config)
