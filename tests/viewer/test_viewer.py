"""Attention maps, the way back to the input's pixels, and the figures made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from open_clip.transform import image_transform
from PIL import Image
from torch import nn
from torchvision.transforms import CenterCrop, Compose, RandomResizedCrop

from itemizedclip.data.batch import ItemCollator, ItemSample
from itemizedclip.evaluation.attention import ItemMaps, item_maps, maps_of_features
from itemizedclip.models.dual_encoder import ImageFeatures
from itemizedclip.models.factory import create_model, create_tokenizer, create_transform
from itemizedclip.models.item_attention import ItemAttention
from itemizedclip.viewer.figures import (
    COLOUR_MAP,
    MIN_SCALE_TOP,
    OVERLAY_OPACITY,
    attention_figure,
    head_figure,
    save_figure,
    wrap_text,
)
from itemizedclip.viewer.geometry import Geometry, geometry_of_transform, map_to_input

TINY = {
    "name": "tiny",
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    "head_heads": 4,
}
LONG_ITEM = (
    "a pagoda with several curved roofs stands at the left of the picture, in front of a wide lake whose far shore is "
    "hidden by haze, and beside it a row of trees whose leaves are turning yellow"
)


# --- maps ------------------------------------------------------------------------------------------------------------


def plain_attention(head: ItemAttention, items_TD, tokens_LD):
    """Weights (H, T, L + 1) and embeddings (T, D) by PyTorch's own attention with a zero token."""
    attention = nn.MultiheadAttention(head.width, head.num_heads, batch_first=True, add_zero_attn=True)
    attention.in_proj_weight, attention.in_proj_bias = head.attn.in_proj_weight, head.attn.in_proj_bias
    attention.out_proj.weight, attention.out_proj.bias = head.attn.out_proj.weight, head.attn.out_proj.bias
    with torch.no_grad():
        pooled, weights = attention(
            head.ln_q(items_TD), head.ln_k(tokens_LD), head.ln_v(tokens_LD), average_attn_weights=False
        )
    return weights, pooled


def random_head(width=16, num_heads=4) -> ItemAttention:
    torch.manual_seed(1)
    head = ItemAttention(width, num_heads).eval()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.7)
    return head


@pytest.mark.parametrize("grid", [(3, 4), (2, 3, 2, 1)], ids=["photograph", "study of two series"])
@pytest.mark.parametrize("normalise", [False, True])
def test_maps_and_scores_equal_pytorchs_attention(grid, normalise):
    head, T, L = random_head(), 5, 12
    tokens_BLD, items_BTD = torch.randn(2, L, 16), torch.randn(2, T, 16)
    maps = maps_of_features(
        head, ImageFeatures(tokens_BLD[:, 0], tokens_BLD, grid), items_BTD, normalise_tokens=normalise
    )
    for b, one in enumerate(maps):
        tokens_LD = F.normalize(tokens_BLD[b], dim=-1) if normalise else tokens_BLD[b]
        weights, pooled = plain_attention(head, items_BTD[b], tokens_LD)
        assert one.head_weights.shape == (T, 4, *grid)
        torch.testing.assert_close(one.head_weights.flatten(2), weights[..., :-1].transpose(0, 1))
        torch.testing.assert_close(one.head_nowhere, weights[..., -1].T)
        torch.testing.assert_close(one.weights.flatten(1), weights[..., :-1].mean(0))
        torch.testing.assert_close(one.scores, F.cosine_similarity(items_BTD[b], pooled, dim=-1))


def test_each_item_is_scored_against_its_own_embedding():
    head = random_head()
    tokens_1LD, items_TD = torch.randn(1, 6, 16), torch.randn(4, 16)
    features = ImageFeatures(tokens_1LD[:, 0], tokens_1LD, (2, 3))
    together = maps_of_features(head, features, items_TD[None])[0]
    alone = torch.cat([maps_of_features(head, features, item[None, None])[0].scores for item in items_TD])
    torch.testing.assert_close(together.scores, alone)
    with torch.no_grad():
        against_first = F.cosine_similarity(items_TD, head(items_TD[None], tokens_1LD)[0, :1], dim=-1)
    assert (together.scores - against_first).abs()[1:].min() > 1e-3


def test_multiples_of_an_even_spread():
    maps = ItemMaps(torch.full((2, 3, 4, 5), 0.03), torch.full((2, 3), 0.4), torch.zeros(2))
    torch.testing.assert_close(maps.times_uniform(), torch.full((2, 4, 5), 0.6))
    torch.testing.assert_close(maps.times_uniform(per_head=True), torch.full((2, 3, 4, 5), 0.6))
    torch.testing.assert_close(maps.times_uniform().flatten(1).mean(1), 1 - maps.nowhere)
    peaked = torch.zeros(1, 2, 3, 4)
    peaked[0, :, 1, 2] = torch.tensor([0.5, 0.25])
    torch.testing.assert_close(ItemMaps(peaked, torch.zeros(1, 2), torch.zeros(1)).peaks, torch.tensor([0.375 * 12]))


def test_maps_of_a_batch_leave_padding_out():
    torch.manual_seed(0)
    model = create_model(TINY).eval()
    collate = ItemCollator(create_tokenizer(TINY))
    samples = [
        ItemSample("a", torch.randn(3, 32, 32), ["a red circle", "two trees", "grass"]),
        ItemSample("b", torch.randn(3, 32, 32), ["a lake"]),
    ]
    together = item_maps(model, collate(samples))
    assert [len(maps) for maps in together] == [3, 1]
    assert together[0].grid == (4, 4)
    for sample, maps in zip(samples, together):
        alone = item_maps(model, collate([sample]))[0]
        torch.testing.assert_close(maps.head_weights, alone.head_weights)
        torch.testing.assert_close(maps.scores, alone.scores)


def test_maps_refuse_a_training_model_and_a_wrong_grid():
    model = create_model(TINY)
    batch = ItemCollator(create_tokenizer(TINY))([ItemSample("a", torch.zeros(3, 32, 32), ["x"])])
    with pytest.raises(ValueError, match=r"model\.eval"):
        item_maps(model, batch)
    with pytest.raises(ValueError, match="6 image tokens"):
        maps_of_features(random_head(), ImageFeatures(torch.zeros(1, 16), torch.zeros(1, 6, 16), (2, 2)),
                         torch.zeros(1, 1, 16))  # fmt: skip


# --- geometry --------------------------------------------------------------------------------------------------------

TRANSFORMS = {
    "shortest": image_transform(32, False, resize_mode="shortest"),
    "shortest, not square": image_transform((32, 48), False, resize_mode="shortest"),
    "longest": image_transform(32, False, resize_mode="longest"),
    "longest, grey padding": image_transform((32, 48), False, resize_mode="longest", fill_color=99),
    "squash": image_transform(32, False, resize_mode="squash"),
    "squash, not square": image_transform((48, 32), False, resize_mode="squash"),
    "model's own": create_transform(TINY, is_train=False),
    "crop with padding": Compose([CenterCrop((64, 48)), *image_transform(32, False).transforms]),
}
INPUT_SIZES = [(64, 64), (120, 50), (37, 91), (20, 20), (32, 32)]


@pytest.mark.parametrize("mode", ["nearest", "smooth"])
@pytest.mark.parametrize("size", INPUT_SIZES, ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_planted_spot_comes_back_where_it_was(name, size, mode):
    transform = TRANSFORMS[name]
    geometry = geometry_of_transform(transform, size)
    patch = 8
    patch_in_input = [patch / scale for scale in geometry.scale]
    centres = [(0.5, 0.5), (0.4, 0.65), (0.62, 0.35)]
    for centre in centres:
        row, column = (round(part * n) for part, n in zip(centre, size))
        picture = np.zeros((*size, 3), dtype=np.uint8)
        spot = [slice(max(0, round(at - side / 2)), round(at + side / 2) + 1)
                for at, side in zip((row, column), patch_in_input)]  # fmt: skip
        picture[spot[0], spot[1]] = 255
        view = transform(Image.fromarray(picture))
        assert tuple(view.shape[1:]) == geometry.view_size
        brightness = F.avg_pool2d(view.mean(0, keepdim=True), patch)[0]
        back = map_to_input(brightness - brightness.min(), geometry, mode)
        assert back.shape == size
        brightest = np.argwhere(back == np.nanmax(back)).mean(0)
        for found, planted, reach in zip(brightest, (row, column), patch_in_input):
            assert abs(found - planted) <= reach, (name, size, centre)


@pytest.mark.parametrize("size", INPUT_SIZES, ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_geometry_follows_the_transform_to_the_pixel(name, size):
    """A picture of its own row and column numbers, sent through the transform, tells where each view pixel is from."""
    geometry = geometry_of_transform(TRANSFORMS[name], size)
    for axis in (0, 1):
        numbers = np.indices(size)[axis].astype(np.uint8) + 100  # above every padding value
        steps = [step for step in TRANSFORMS[name].transforms if type(step).__name__ != "Normalize"]
        view = Compose(steps)(Image.fromarray(numbers).convert("RGB"))[0].numpy() * 255 - 100
        at = (np.indices(geometry.view_size)[axis] + 0.5 + geometry.offset[axis]) / geometry.scale[axis] - 0.5
        other = 1 - axis
        across = (np.indices(geometry.view_size)[other] + 0.5 + geometry.offset[other]) / geometry.scale[other]
        # Away from the borders, where resampling mixes with nothing.
        inner = (at > 3) & (at < size[axis] - 4) & (across > 3) & (across < size[other] - 4)
        assert inner.any()
        np.testing.assert_allclose(view[inner], at[inner], atol=1.01)


def test_pixels_outside_the_crop_are_nan():
    geometry = geometry_of_transform(image_transform(224, False), (480, 640))
    back = map_to_input(torch.ones(14, 14), geometry)
    # 640 columns become 298, of which the library keeps 37 … 260: centres from 79.5 · 298/640 to 560.5 · 298/640.
    seen = np.zeros((480, 640), dtype=bool)
    seen[:, 79:561] = True
    np.testing.assert_array_equal(np.isfinite(back), seen)


def test_padding_is_not_part_of_the_input():
    geometry = geometry_of_transform(image_transform(32, False, resize_mode="longest"), (16, 32))
    assert geometry.offset == (-8, 0)
    rows = torch.arange(4.0)[:, None].expand(4, 4)
    back = map_to_input(rows, geometry)
    np.testing.assert_array_equal(back[:, 0], [1.0] * 8 + [2.0] * 8)


def test_nearest_shows_patches_and_smooth_is_linear():
    values = torch.rand(2, 3, 4, 4)
    geometry = Geometry.of_input((32, 32))
    np.testing.assert_array_equal(map_to_input(values, geometry), np.kron(values.numpy(), np.ones((1, 1, 8, 8))))
    expected = F.interpolate(values, size=(32, 32), mode="bilinear", align_corners=False).numpy()
    np.testing.assert_allclose(map_to_input(values, geometry, "smooth"), expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["nearest", "smooth"])
def test_volumes_go_the_same_way(mode):
    # 40 × 90 × 70 voxels, resampled to twice the depth, then padded in depth and cropped in the plane.
    geometry = Geometry.of_input((40, 90, 70)).resize((80, 90, 70)).crop((-8, 13, 3), (96, 64, 64))
    view = torch.zeros(96, 64, 64)
    planted = (11, 30, 40)
    depth, row, column = planted[0] * 2 + 1 + 8, planted[1] - 13, planted[2] - 3
    view[depth - 4 : depth + 4, row - 4 : row + 4, column - 4 : column + 4] = 1
    grid = F.avg_pool3d(view[None], 8)[0]
    back = map_to_input(grid, geometry, mode)
    assert back.shape == (40, 90, 70)
    found = np.argwhere(back == np.nanmax(back)).mean(0)
    assert np.all(np.abs(found - planted) <= (4, 8, 8))
    seen = np.zeros(back.shape, dtype=bool)
    seen[:, 13:77, 3:67] = True
    np.testing.assert_array_equal(np.isfinite(back), seen)
    plain = F.interpolate(grid[None, None], size=(96, 64, 64), mode={"nearest": "nearest", "smooth": "trilinear"}[mode])
    np.testing.assert_allclose(back[20, 13:77, 3:67], plain[0, 0, 48:50].mean(0), atol=0.05)


def test_a_large_input_can_be_drawn_small():
    geometry = geometry_of_transform(image_transform(32, False), (400, 800))
    values = torch.rand(4, 4)
    small = map_to_input(values, geometry.of_resized_input((40, 80)))
    np.testing.assert_array_equal(small, map_to_input(values, geometry)[5::10, 5::10])


def test_geometry_refuses_what_has_no_way_back():
    with pytest.raises(ValueError, match="RandomResizedCrop"):
        geometry_of_transform(Compose([RandomResizedCrop(32)]), (64, 64))
    with pytest.raises(ValueError, match="RandomResizedCrop"):
        geometry_of_transform(create_transform(TINY, is_train=True), (64, 64))
    with pytest.raises(ValueError, match="2 or 3 axes"):
        Geometry.of_input((5,))
    with pytest.raises(ValueError, match="expected 2 numbers"):
        Geometry.of_input((5, 5)).crop((0, 0, 0), (1, 1, 1))
    with pytest.raises(ValueError, match="cubic"):
        map_to_input(torch.ones(2, 2), Geometry.of_input((4, 4)), "cubic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fewer axes"):
        map_to_input(torch.ones(2), Geometry.of_input((4, 4)))


# --- figures ---------------------------------------------------------------------------------------------------------


def picture(height=60, width=80) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def flat_maps(count, size, value=1.0) -> np.ndarray:
    return np.full((count, *size), value, dtype=np.float32)


def boxes(figure):
    """Boxes on paper, in pixels: of every text, and of every image."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [text.get_window_extent(canvas.get_renderer()) for text in figure.texts]
    return texts, [axes.get_window_extent() for axes in figure.axes]


@pytest.mark.parametrize("size", [(60, 80), (40, 400), (400, 40), (64, 64)], ids=str)
@pytest.mark.parametrize("count", [1, 3, 7, 15])
def test_every_item_is_readable(count, size):
    items = [LONG_ITEM, "WIDE CAPITALS " + "W" * 40, "between $5 and $6", *(f"item number {k}" for k in range(12))]
    items = items[:count]
    figure = attention_figure(
        picture(*size),
        items,
        flat_maps(count, size),
        [0.1] * count,
        nowhere=[0.5] * count,
        peaks=[99.9] * count,
        title="rsicd_images/a_rather_long_file_name_of_an_image_0001.jpg",
    )
    assert len(figure.axes) == 1 + count + 1  # the image, the overlays, the colour bar
    # White space aside, because a word too long for a line is broken.
    written = "".join("".join(text.get_text() for text in figure.texts).split())
    assert all("".join(f"{k + 1}. {item}".split()) in written for k, item in enumerate(items))
    texts, images = boxes(figure)
    page = figure.bbox
    for box in texts:
        assert page.x0 <= box.x0 <= box.x1 <= page.x1 + 1
        assert page.y0 <= box.y0 <= box.y1 <= page.y1
        assert not any(box.overlaps(image) for image in images)
    assert not any(a.overlaps(b) for k, a in enumerate(images) for b in images[:k])
    for k, a in enumerate(texts):
        for b in texts[:k]:  # lines of type may touch, columns may not
            assert min(a.x1, b.x1) - max(a.x0, b.x0) <= 0 or min(a.y1, b.y1) - max(a.y0, b.y0) < 0.3 * a.height


def test_titles_carry_score_and_nowhere():
    maps = flat_maps(2, (60, 80))
    maps[1, 0, 0] = 7.25
    figure = attention_figure(picture(), ["a", "b"], maps, [0.1234, -0.05], nowhere=[0.336, 0], peaks=[1, 7.25])
    written = [text.get_text() for text in figure.texts]
    assert "TCSim 0.123 · nowhere 34 % · peak 1.0×, no localisation" in written
    assert "TCSim −0.050 · nowhere 0 % · peak 7.2×" in written
    assert "80 × 60 px" in written
    bare = attention_figure(picture(), ["a", "b"], maps, [0.1234, -0.05])
    assert "TCSim 0.123" in [text.get_text() for text in bare.texts]


def test_overlays_share_one_scale():
    grey = np.full((10, 10, 3), 100, dtype=np.uint8)
    maps = flat_maps(2, (10, 10))
    maps[0, 0, 0], maps[1, 5, 5] = 8.0, 4.0
    figure = attention_figure(grey, ["a", "b"], maps, [0, 0])
    first, second = (axes.images[0].get_array() for axes in figure.axes[1:3])
    np.testing.assert_array_equal(first[1:, :5], second[1:, :5])

    def colour(share):
        low, high = OVERLAY_OPACITY
        opacity = low + (high - low) * share
        below = 0.15 * 255 + 0.85 * 100
        return (1 - opacity) * below + opacity * 255 * np.array(colormaps[COLOUR_MAP](share)[:3])

    np.testing.assert_allclose(first[0, 0], colour(1.0), atol=2)
    np.testing.assert_allclose(second[5, 5], colour(0.5), atol=2)
    np.testing.assert_allclose(second[0, 0], colour(1 / 8), atol=2)
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), grey)
    assert figure.axes[-1].get_xlim() == (0, 8)


def test_a_flat_map_does_not_look_like_a_finding():
    figure = attention_figure(picture(), ["a"], flat_maps(1, (60, 80), 1.2), [0])
    assert figure.axes[-1].get_xlim() == (0, MIN_SCALE_TOP)
    chosen = attention_figure(picture(), ["a"], flat_maps(1, (60, 80), 1.2), [0], scale_top=20)
    assert chosen.axes[-1].get_xlim() == (0, 20)


def test_what_the_model_did_not_see_is_pale_and_said_to_be():
    maps = flat_maps(1, (60, 80))
    maps[0, :, :20] = np.nan
    figure = attention_figure(picture(), ["a"], maps, [0])
    overlay = figure.axes[1].images[0].get_array().astype(float)
    assert overlay[:, :20].mean() > overlay[:, 20:].mean() + 60
    assert "outside the crop" in " ".join(text.get_text() for text in figure.texts)
    whole = attention_figure(picture(), ["a"], flat_maps(1, (60, 80)), [0])
    assert "outside the crop" not in " ".join(text.get_text() for text in whole.texts)
    nothing = attention_figure(picture(), ["a"], flat_maps(1, (60, 80), np.nan), [0])
    assert nothing.axes[-1].get_xlim() == (0, MIN_SCALE_TOP)


def test_masks_are_outlined_where_they_are():
    masks = np.zeros((2, 60, 80), dtype=bool)
    masks[0, 10:20, 30:50] = True
    masks[1, 50:60, 0:10] = True  # touches the border
    figure = attention_figure(picture(), ["a", "b"], flat_maps(2, (60, 80)), [0, 0], masks=masks)
    for axes, (top, bottom, left, right) in zip(figure.axes[1:3], ((9.5, 19.5, 29.5, 49.5), (49.5, 59.5, -0.5, 9.5))):
        outlines = [path.vertices for line in axes.collections for path in line.get_paths()]
        assert len(outlines) == 2  # dark below light
        for outline in outlines:
            np.testing.assert_allclose(outline.min(0), (left, top))
            np.testing.assert_allclose(outline.max(0), (right, bottom))
            np.testing.assert_array_equal(outline[0], outline[-1])


def test_figures_are_as_fine_as_the_image():
    figure = attention_figure(picture(900, 1200), ["a"], flat_maps(1, (900, 1200)), [0])
    _, images = boxes(figure)
    assert images[0].width >= 1199
    assert images[0].width / images[0].height == pytest.approx(1200 / 900, rel=1e-3)


@pytest.mark.parametrize("size", [(60, 80), (300, 30), (30, 300)], ids=str)
def test_one_row_per_item_and_a_picture_per_head(size):
    maps = np.random.default_rng(0).random((2, 4, *size)).astype(np.float32)
    nowhere = np.array([[0.1, 0.2, 0.3, 0.4], [0, 0, 0, 1]])
    figure = head_figure(Image.fromarray(picture(*size)), ["a", LONG_ITEM], maps, [0.5, 0.25], nowhere=nowhere)
    assert len(figure.axes) == 1 + 2 * (1 + 4) + 1
    written = [text.get_text() for text in figure.texts]
    assert written.count("head 4") == 2
    assert {"nowhere 25 %", "nowhere 40 %", "nowhere 100 %"} <= set(written)
    texts, images = boxes(figure)
    assert not any(text.overlaps(image) for text in texts for image in images)
    rows = [text for text in texts if text.width > 0]
    assert not any(a.overlaps(b) and abs(a.y0 - b.y0) < 1 for k, a in enumerate(rows) for b in rows[:k])


@pytest.mark.parametrize("suffix", [".png", ".pdf"])
def test_files_are_deterministic_and_say_nothing_of_their_making(tmp_path, suffix):
    for name in ("a", "b"):
        figure = attention_figure(picture(), ["an item"], flat_maps(1, (60, 80)), [0.5])
        save_figure(figure, tmp_path / "new folder" / f"{name}{suffix}")
    first, second = ((tmp_path / "new folder" / f"{name}{suffix}").read_bytes() for name in ("a", "b"))
    assert first == second
    assert b"atplotlib" not in first
    assert b"CreationDate" not in first


def test_figures_refuse_what_does_not_fit(tmp_path):
    figure = attention_figure(picture(), ["a"], flat_maps(1, (60, 80)), [0])
    with pytest.raises(ValueError, match=r"x\.jpg: expected .* \.png or \.pdf"):
        save_figure(figure, tmp_path / "x.jpg")
    with pytest.raises(ValueError, match=r"maps: expected the shape \(2, 60, 80\)"):
        attention_figure(picture(), ["a", "b"], flat_maps(1, (60, 80)), [0, 0])
    with pytest.raises(ValueError, match="scores"):
        attention_figure(picture(), ["a"], flat_maps(1, (60, 80)), [0, 0])
    with pytest.raises(ValueError, match="masks"):
        attention_figure(picture(), ["a"], flat_maps(1, (60, 80)), [0], masks=np.zeros((1, 5, 5), dtype=bool))
    with pytest.raises(ValueError, match="at least one item"):
        attention_figure(picture(), [], flat_maps(0, (60, 80)), [])
    with pytest.raises(ValueError, match="uint8"):
        attention_figure(picture() / 255.0, ["a"], flat_maps(1, (60, 80)), [0])


def test_wrapping():
    assert wrap_text("two words", 4.0, 9) == ["two words"]
    assert wrap_text("", 4.0, 9) == [""]
    lines = wrap_text("so many words " * 400, 2.5, 9)
    assert lines[-1].endswith("…")
    assert 10 <= len(lines) <= 20
    assert "".join(wrap_text("x" * 90, 1.0, 9)) == "x" * 90
