"""MLL, mAMS, pointing game and mIoU: by hand, and against a loop over images; the command that measures and draws."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from itemizedclip_radiology.synthetic.cohort import write_studies
from PIL import Image
from tiny_model import SIDE, D, MaskedTinyDataset, TinyDataset, TinyModel, tokenize

from itemizedclip.commands import explain
from itemizedclip.data.batch import ItemSample
from itemizedclip.data.scenes import ScenesDataset
from itemizedclip.evaluation.encoding import EncodingOptions
from itemizedclip.evaluation.explanation import (
    ExplainEvaluator,
    mask_ious,
    mean_map_similarity,
    pointing_hits,
    upsample_maps,
)
from itemizedclip.models.dual_encoder import ImageFeatures
from itemizedclip.models.factory import create_model, load_pretrained
from itemizedclip.viewer.explanation import explain_input
from itemizedclip.viewer.inputs import open_input


def test_map_similarity_by_hand():
    maps = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    half = math.sqrt(0.5)
    assert mean_map_similarity(maps) == pytest.approx((0 + half + half) / 3)
    assert mean_map_similarity(torch.ones(2, 5)) == pytest.approx(1.0)
    assert math.isnan(mean_map_similarity(maps[:1]))
    assert mean_map_similarity(torch.zeros(2, 4)) == 0.0  # attention all on the zero token


def test_pointing_by_hand():
    maps = torch.zeros(1, 4, 6)
    maps[0, 1, 4] = 1
    for pixel, tolerance, hit in (((1, 4), 0, True), ((1, 5), 0, False), ((1, 5), 1, True), ((2, 5), 1, False)):
        mask = torch.zeros(1, 4, 6, dtype=torch.bool)
        mask[0, pixel[0], pixel[1]] = True
        assert pointing_hits(maps, mask, tolerance_px=tolerance).tolist() == [hit]
    assert pointing_hits(maps, torch.zeros(1, 4, 6, dtype=torch.bool), tolerance_px=99).tolist() == [False]


def test_iou_by_hand():
    maps = torch.tensor([[[0.4, 0.3], [0.1, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    masks = torch.tensor([[[True, False], [True, False]], [[True, True], [False, False]]])
    # Of the first map, 1 pixel lies above 0.8 of its maximum, 2 above 0.5, 3 above 0.2. The second finds nothing.
    expected = torch.tensor([[1 / 2, 1 / 3, 2 / 3], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(mask_ious(maps, masks, (0.8, 0.5, 0.2)), expected)


def test_upsampling_keeps_rows_and_columns_apart():
    maps = torch.zeros(1, 6)
    maps[0, 4] = 1  # row 1, column 1 of 2 × 3
    enlarged = upsample_maps(maps, (2, 3), (8, 12))
    assert enlarged.shape == (1, 8, 12)
    peak = int(enlarged.flatten().argmax())
    assert (peak // 12, peak % 12) in {(row, column) for row in range(4, 8) for column in range(4, 8)}


@pytest.mark.parametrize("normalise_tokens", [False, True])
def test_evaluator_equals_a_loop(normalise_tokens):
    model, data = TinyModel().eval(), MaskedTinyDataset()
    data.item_masks[0][0] = False  # an item that the crop has removed
    lowest, similarities, nowhere, hits = [], [], [], []
    nowhere_of: dict[bool, list[float]] = {False: [], True: []}  # by whether the item is to be seen
    ious: dict[float, list[float]] = {step / 20: [] for step in range(1, 20)}
    for row in range(len(data)):
        tokens = model.encode_image(data.images[row : row + 1]).tokens_BLD.detach()
        if normalise_tokens:
            tokens = F.normalize(tokens, dim=-1)
        items = model.encode_text(tokenize(data.texts[row]))[None].detach()
        projected = model.head.project(tokens)
        lowest.append(F.cosine_similarity(items, model.head.attend(items, projected), dim=-1).min().item())
        weights = model.head.attention_weights(items, projected)
        maps = weights.tokens[0].mean(0)
        nowhere += weights.nowhere[0].mean(0).tolist()
        pairs = [F.cosine_similarity(maps[i], maps[j], dim=0).item() for i in range(len(maps)) for j in range(i)]
        if pairs:
            similarities.append(sum(pairs) / len(pairs))
        for k, mask in enumerate(data.item_masks[row]):
            nowhere_of[bool(mask.any())].append(weights.nowhere[0].mean(0)[k].item())
            if not mask.any():
                continue
            enlarged = F.interpolate(maps[k].reshape(1, 1, 4, 4), size=(SIDE, SIDE), mode="bilinear")[0, 0]
            hits.append(bool(mask.flatten()[enlarged.flatten().argmax()]))
            for threshold in ious:
                found = enlarged > threshold * enlarged.max()
                ious[threshold].append(float((found & mask).sum() / (found | mask).sum()))
    miou = {threshold: sum(values) / len(values) for threshold, values in ious.items()}
    best = max(miou, key=miou.__getitem__)
    evaluator = ExplainEvaluator(
        data, tokenize, normalise_tokens=normalise_tokens, encoding=EncodingOptions(batch_size=3)
    )
    found = evaluator.run(model)
    assert found == pytest.approx(
        {
            "mll": sum(lowest) / len(lowest),
            "mams": sum(similarities) / len(similarities),
            "nowhere_share": sum(nowhere) / len(nowhere),
            "nowhere_share_absent": sum(nowhere_of[False]) / len(nowhere_of[False]),
            "nowhere_share_present": sum(nowhere_of[True]) / len(nowhere_of[True]),
            "pointing_game": sum(hits) / len(hits),
            "miou": miou[0.5],
            "miou_best": miou[best],
            "miou_best_threshold": best,
        },
        abs=1e-5,
    )
    assert evaluator.facts["num_masks"] == len(hits) == evaluator.facts["num_items"] - 1


def test_without_masks_and_with_one_item():
    data = TinyDataset()
    assert set(ExplainEvaluator(data, tokenize).run(TinyModel())) == {"mll", "mams", "nowhere_share"}
    data.texts = [own[:1] for own in data.texts]
    assert set(ExplainEvaluator(data, tokenize).run(TinyModel())) == {"mll", "nowhere_share"}


def test_perfect_attention_points_and_covers():
    """Attention planted on one patch, its mask the same patch."""
    maps = torch.zeros(1, 16)
    maps[0, 6] = 1
    mask = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    mask[0, 2:4, 4:6] = True
    enlarged = upsample_maps(maps, (4, 4), (SIDE, SIDE))
    assert pointing_hits(enlarged, mask).all()
    assert mask_ious(enlarged, mask, (0.5,)).item() == 1.0


@pytest.mark.parametrize("masks", [torch.ones(9, 8, 8, dtype=torch.bool), torch.ones(8, 8), torch.ones(1, 8, 8)])
def test_masks_that_do_not_fit(masks):
    class Wrong(TinyDataset):
        def masks(self, index):
            return masks

    with pytest.raises(ValueError, match="masks of image 0 are"):
        ExplainEvaluator(Wrong(), tokenize).run(TinyModel())


# --- studies ---------------------------------------------------------------------------------------------------------


class StudyModel(TinyModel):
    """Volumes (B, S, 1, 4, 8, 8) in patches of 2 × 4 × 4."""

    def __init__(self):
        super().__init__()
        self.patches = torch.nn.Linear(32, D)

    def encode_image(self, images, *, series_names=None):
        B, S = images.shape[:2]
        cells = images.view(B, S, 2, 2, 2, 4, 2, 4).permute(0, 1, 2, 4, 6, 3, 5, 7)
        tokens = self.patches(cells.reshape(B, S * 8, 32))
        return ImageFeatures(tokens.mean(1), tokens, (S, 2, 2, 2))


class Studies(TinyDataset):
    """Studies of 1 … 3 series; every item has a mask in some of them."""

    def __init__(self):
        super().__init__(count=5)
        generator = torch.Generator().manual_seed(1)
        series = [1, 3, 2, 2, 3]
        self.images = [torch.randn(s, 1, 4, 8, 8, generator=generator) for s in series]
        self.item_masks = [
            torch.rand(len(own), s, 4, 8, 8, generator=generator) < 0.1 for own, s in zip(self.texts, series)
        ]
        self.item_masks[1][0] = False

    def masks(self, index):
        return self.item_masks[index]


def test_studies_equal_a_loop():
    """Trilinear within a series, peaks over all series, tolerance within a series."""
    model, data = StudyModel().eval(), Studies()
    tolerance = (1.0, 2.0, 2.0)
    hits, near, ious = [], [], []
    for row in range(len(data)):
        features = model.encode_image(data.images[row][None])
        items = model.encode_text(tokenize(data.texts[row]))[None].detach()
        weights = model.head.attention_weights(items, model.head.project(features.tokens_BLD.detach()))
        for k, mask in enumerate(data.item_masks[row]):
            if not mask.any():
                continue
            maps = weights.tokens[0, :, k].mean(0).reshape(-1, 1, 2, 2, 2)
            enlarged = torch.cat([F.interpolate(one[None], size=(4, 8, 8), mode="trilinear")[0] for one in maps])
            peak = (enlarged == enlarged.max()).nonzero()[0].tolist()
            hits.append(bool(mask[tuple(peak)]))
            steps = [
                sum(((a - b) / t) ** 2 for a, b, t in zip(voxel[1:], peak[1:], tolerance))
                for voxel in mask.nonzero().tolist()
                if voxel[0] == peak[0]
            ]
            near.append(min(steps, default=9) <= 1)
            found = enlarged > 0.5 * enlarged.max()
            ious.append(float((found & mask).sum() / (found | mask).sum()))
    encoding = EncodingOptions(batch_size=1)
    exact = ExplainEvaluator(data, tokenize, encoding=encoding).run(model)
    assert exact["pointing_game"] == pytest.approx(sum(hits) / len(hits))
    assert exact["miou"] == pytest.approx(sum(ious) / len(ious), abs=1e-6)
    tolerant = ExplainEvaluator(data, tokenize, encoding=encoding, tolerance_px=tolerance)
    assert tolerant.run(model)["pointing_game"] == pytest.approx(sum(near) / len(near))
    assert sum(near) > sum(hits)
    assert tolerant.facts["num_masks"] == len(hits)
    with pytest.raises(ValueError, match="expected one number or 3, one per axis"):
        ExplainEvaluator(data, tokenize, encoding=encoding, tolerance_px=(1.0, 1.0)).run(model)


def test_another_series_is_never_near():
    maps = torch.zeros(1, 2, 3, 4, 4)
    maps[0, 1, 1, 2, 2] = 1
    masks = torch.zeros(1, 2, 3, 4, 4, dtype=torch.bool)
    masks[0, 0, 1, 2, 2] = True
    assert pointing_hits(maps, masks, tolerance_px=(0, 9, 9, 9)).tolist() == [False]
    masks[0, 1, 0, 2, 3] = True
    assert pointing_hits(maps, masks, tolerance_px=(0, 9, 9, 9)).tolist() == [True]
    assert pointing_hits(maps, masks, tolerance_px=(0, 0, 9, 9)).tolist() == [False]


def test_upsampling_keeps_series_apart():
    maps = torch.zeros(1, 2 * 8)
    maps[0, 8] = 1  # the first token of the second series
    enlarged = upsample_maps(maps, (2, 2, 2, 2), (2, 4, 6, 8))
    assert enlarged.shape == (1, 2, 4, 6, 8)
    assert not enlarged[0, 0].any()
    assert enlarged[0, 1, 0, 0, 0] == 1


def test_thresholds_in_any_order_equal_a_plain_comparison():
    generator = torch.Generator().manual_seed(0)
    maps, masks = torch.rand(3, 5, 6, 7, generator=generator), torch.rand(3, 5, 6, 7, generator=generator) < 0.3
    thresholds = (0.5, 0.05, 0.95, 0.4)
    found = mask_ious(maps, masks, thresholds)
    for k in range(3):
        for column, threshold in enumerate(thresholds):
            above = maps[k] / maps[k].max() > threshold
            expected = float((above & masks[k]).sum()) / float((above | masks[k]).sum())
            assert found[k, column].item() == pytest.approx(expected, abs=1e-12)


# --- the command -----------------------------------------------------------------------------------------------------


def save_model(name: str, path: Path) -> Path:
    torch.manual_seed(0)
    model = create_model(name)
    torch.save({"state_dict": model.state_dict(), "model_config": model.config, "epoch": 1}, path)
    return path


@pytest.fixture(scope="module")
def scenes_checkpoint(tmp_path_factory) -> Path:
    return save_model("ViT-scenes-ItemizedCLIP", tmp_path_factory.mktemp("scenes") / "epoch_1.pt")


@pytest.fixture(scope="module")
def study_checkpoint(tmp_path_factory) -> Path:
    return save_model("HLIPSN_debug", tmp_path_factory.mktemp("studies") / "epoch_1.pt")


def fails(capsys, *flags) -> str:
    with pytest.raises(SystemExit) as stop:
        explain.main([str(flag) for flag in flags])
    assert stop.value.code not in (0, None)
    return capsys.readouterr().err


def write_scenes(folder: Path, count: int) -> ScenesDataset:
    """Scenes as PNG files with items.json, and masks of both kinds for photographs."""
    scenes = ScenesDataset(split="test", num_scenes=count, level="lattice", seed=0)
    (folder / "masks").mkdir(parents=True)
    items = {}
    for n in range(count):
        scene = scenes.scene(n)
        Image.fromarray(scene.image).save(folder / f"s{n}.png")
        items[f"s{n}.png"] = scene.items
        if n % 2:
            np.savez(folder / "masks" / f"s{n}.npz", masks=scene.masks)
        else:
            (folder / "masks" / f"s{n}").mkdir()
            for k, mask in enumerate(scene.masks, start=1):
                Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"s{n}" / f"{k}.png")
    (folder / "items.json").write_text(json.dumps(items))
    return scenes


def test_a_folder_measures_as_the_scenes_it_holds(scenes_checkpoint, tmp_path, capsys):
    write_scenes(tmp_path / "set", 5)
    base = ["--checkpoint", str(scenes_checkpoint)]
    made = explain.main([*base, "--scenes", "lattice", "--num-scenes", "5", "--output", str(tmp_path / "a")])
    read = explain.main(
        [*base, "--folder", str(tmp_path / "set"), "--items-json", str(tmp_path / "set" / "items.json"),
         "--masks", str(tmp_path / "set" / "masks"), "--output", str(tmp_path / "b")]
    )  # fmt: skip
    assert read == pytest.approx(made, abs=1e-5)
    assert set(read) >= {"mll", "mams", "pointing_game", "miou"}
    results = json.loads((tmp_path / "b" / "results.json").read_text())
    assert results["metrics"] == pytest.approx(read)
    assert results["facts"]["pointing_tolerance_px"] == [4.0, 4.0]
    assert "pointing_game" in capsys.readouterr().out
    without = explain.main(
        [*base, "--folder", str(tmp_path / "set"), "--items-json", str(tmp_path / "set" / "items.json"),
         "--output", str(tmp_path / "c")]
    )  # fmt: skip
    assert without == pytest.approx({name: made[name] for name in ("mll", "mams", "nowhere_share")}, abs=1e-5)


def test_what_cannot_be_read_ends_the_measures_or_is_left_out_and_named(scenes_checkpoint, tmp_path, capsys):
    write_scenes(tmp_path / "set", 3)
    arguments = ["--checkpoint", str(scenes_checkpoint), "--folder", str(tmp_path / "set"),
                 "--items-json", str(tmp_path / "set" / "items.json"), "--output", str(tmp_path / "out")]  # fmt: skip
    broken = next(path for path in sorted((tmp_path / "set").iterdir()) if path.name == "s1.png")
    broken.write_bytes(b"no picture")
    assert broken.name in fails(capsys, *arguments)
    found = explain.main([*arguments, "--on-bad-sample", "skip"])
    assert "1 names that cannot be read are left out, such as s1.png" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "out" / "results.json").read_text())["facts"]["unusable"]) == ["s1.png"]
    items = json.loads((tmp_path / "set" / "items.json").read_text())
    del items["s1.png"]
    (tmp_path / "set" / "items.json").write_text(json.dumps(items))
    assert explain.main(arguments) == pytest.approx(found, abs=1e-6)


def test_a_cohort_of_studies(study_checkpoint, tmp_path):
    """Masks of findings.json against the evaluator on the same studies, stacked by hand."""
    cohort = write_studies(tmp_path, kind="mri", num_train=1, num_valid=4, seed=5, with_margin=True)
    shown = {name: entries for name, entries in cohort.studies.items() if "VALID" in name and entries}
    found = explain.main(
        ["--folder", str(tmp_path / "valid"), "--items-json", str(tmp_path / "findings.json"), "--allow-missing",
         "--masks", str(tmp_path / "masks"), "--checkpoint", str(study_checkpoint), "--output", str(tmp_path / "out")]
    )  # fmt: skip
    loaded = load_pretrained(study_checkpoint)

    class ByHand:
        def __len__(self):
            return len(shown)

        def _study(self, index):
            return list(shown)[index], open_input(tmp_path / "valid" / list(shown)[index], loaded)

        def __getitem__(self, index):
            name, opened = self._study(index)
            texts = [entry["item"] for entry in shown[name]]
            return ItemSample(name, opened.image, texts, series_names=opened.series_names)

        def masks(self, index):
            name, opened = self._study(index)
            masks = cohort.masks(name)
            rows = []
            for entry in shown[name]:
                crop = masks[entry["finding"]][:, 4:68, 4:68]
                rows.append(torch.stack([crop & (view.name in entry["series"]) for view in opened.views]))
            return torch.stack(rows)

    evaluator = ExplainEvaluator(
        ByHand(), loaded.tokenizer, tolerance_px=(4.0, 8.0, 8.0), encoding=EncodingOptions(batch_size=1)
    )
    assert found == pytest.approx(evaluator.run(loaded.model))
    facts = json.loads((tmp_path / "out" / "results.json").read_text())["facts"]
    assert facts["num_masks"] == facts["num_items"] == sum(map(len, shown.values()))
    assert facts["pointing_tolerance_px"] == [4.0, 8.0, 8.0]


def test_a_picture(scenes_checkpoint, tmp_path, capsys):
    write_scenes(tmp_path / "set", 1)
    explain.main(
        [str(tmp_path / "set" / "s0.png"), "--checkpoint", str(scenes_checkpoint), "--items", "a red one; a blue two",
         "--heads", "--output", str(tmp_path / "out")]
    )  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "attention.png", "attention_heads.png", "explanation.json",
    ]  # fmt: skip
    content = json.loads((tmp_path / "out" / "explanation.json").read_text())
    loaded = load_pretrained(scenes_checkpoint)
    explanation = explain_input(loaded, open_input(tmp_path / "set" / "s0.png", loaded), ["a red one", "a blue two"])
    assert [item["score"] for item in content["items"]] == pytest.approx(explanation.maps.scores.tolist(), abs=1e-5)
    token = int(explanation.maps.weights[0].argmax())
    row, column = content["items"][0]["peak"]["row_column"]
    assert (row // 8, column // 8) == (token // 8, token % 8)
    assert "a blue two" in capsys.readouterr().out


def test_a_study_folder(study_checkpoint, tmp_path):
    write_studies(tmp_path, kind="mri", num_train=1, num_valid=1, seed=5)
    study = next((tmp_path / "train").iterdir())
    explain.main(
        [str(study), "--checkpoint", str(study_checkpoint), "--items", "Acute stroke.", "--output",
         str(tmp_path / "out")]
    )  # fmt: skip
    series = sorted(path.name for path in study.iterdir())
    names = {path.name for path in (tmp_path / "out" / "volumes").iterdir()}
    assert names == {f"{what}__{one}.nii.gz" for one in series for what in ("image", "item01_acute_stroke")}
    assert (tmp_path / "out" / "montage.png").is_file()


def test_one_message_for_what_is_wrong(scenes_checkpoint, study_checkpoint, tmp_path, capsys):
    write_scenes(tmp_path / "set", 2)
    base = ["--checkpoint", scenes_checkpoint]
    picture, items = tmp_path / "set" / "s0.png", tmp_path / "set" / "items.json"
    folder = ["--folder", tmp_path / "set", "--items-json", items]
    assert "one input" in fails(capsys, *base)
    assert "one input" in fails(capsys, picture, *base, "--scenes", "lattice")
    assert "has no items of its own" in fails(capsys, picture, *base)
    assert "expected one of easy, lattice" in fails(capsys, *base, "--scenes", "latice")
    assert "needs --items-json" in fails(capsys, *base, "--folder", tmp_path)
    assert "are photographs" in fails(capsys, "--checkpoint", study_checkpoint, "--scenes", "lattice")
    assert "no such file" in fails(capsys, tmp_path / "none.png", *base, "--items", "a")
    (tmp_path / "more.json").write_text(json.dumps({"s0.png": ["a"], "gone": ["b"]}))
    assert "1 of 2 names are not in" in fails(capsys, *base, *folder[:3], tmp_path / "more.json")
    (tmp_path / "bad.json").write_text(json.dumps({"s0.png": [3]}))
    assert "'s0.png', item 1: expected a text" in fails(capsys, *base, *folder[:3], tmp_path / "bad.json")
    assert "holds masks of none" in fails(capsys, *base, *folder, "--masks", tmp_path)
    np.savez(tmp_path / "set" / "masks" / "s0.npz", masks=np.ones((2, 9, 9), bool))
    assert "mask '1' is 9×9; expected 64×64" in fails(capsys, *base, *folder, "--masks", tmp_path / "set" / "masks")
    (tmp_path / "set" / "masks" / "s0.npz").write_bytes(b"PK\x03\x04 nothing")
    assert "masks cannot be read" in fails(capsys, *base, *folder, "--masks", tmp_path / "set" / "masks")
    np.savez(tmp_path / "set" / "masks" / "s0.npz", masks=np.full((2, 64, 64), 7))
    assert "expected bool masks" in fails(capsys, *base, *folder, "--masks", tmp_path / "set" / "masks")


def test_results_are_named_after_the_input(tmp_path):
    (tmp_path / "1.2.840.113").mkdir()
    named = {"1.2.840.113": "1.2.840.113", "a.b.nii.gz": "a.b", "scan.pt": "scan", "IM0001": "IM0001"}
    for source, name in named.items():
        assert explain.folder_named_after(tmp_path / source, "explain") == Path(f"{name}.explain")


def test_masks_of_a_series_that_is_not_there(study_checkpoint, tmp_path, capsys):
    write_studies(tmp_path, kind="mri", num_train=1, num_valid=1, seed=5)
    study = next((tmp_path / "train").iterdir()).name
    (tmp_path / "items.json").write_text(json.dumps({study: [{"item": "a", "series": ["AX_NONE"]}]}))
    torch.save({"1": torch.ones(16, 64, 64, dtype=torch.bool)}, tmp_path / "masks" / f"{study}.pt")
    message = fails(
        capsys, "--checkpoint", study_checkpoint, "--folder", tmp_path / "train", "--items-json",
        tmp_path / "items.json", "--masks", tmp_path / "masks",
    )  # fmt: skip
    assert "'a' is shown in AX_NONE; the study has" in message
