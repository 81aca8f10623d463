"""The scoring engine against the published double loop, and top-k streams against a full sort."""

import pytest
import torch
import torch.nn.functional as F

from itemizedclip.evaluation import tcsim
from itemizedclip.evaluation.tcsim import (
    GlobalScorer,
    TcsimScorer,
    TopK,
    create_scorer,
    score_images,
    score_images_plainly,
    top_images,
    top_texts,
)
from itemizedclip.evaluation.tcsim_folded import FoldedScorer, scorer_of_stored_tokens
from itemizedclip.models.dual_encoder import ImageFeatures
from itemizedclip.models.item_attention import ItemAttention

D, H, N, L, M = 32, 4, 5, 9, 37


def random_head(seed=0, width=D, heads=H):
    torch.manual_seed(seed)
    head = ItemAttention(width, heads)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for norm in (head.ln_q, head.ln_k, head.ln_v):
        torch.nn.init.normal_(norm.weight, mean=1.0, std=0.3)
    return head


def random_features(seed=1, images=N, width=D):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(images, L, width, generator=generator)
    return ImageFeatures(torch.randn(images, width, generator=generator), tokens, (3, 3))


def random_texts(seed=2, texts=M, width=D):
    return torch.randn(texts, width, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def one_pair_at_a_time(head, tokens_NLD, texts_MD):
    """TCSim from the formulas of the method: no fused kernel, no batching."""
    d = head.width // head.num_heads
    Wq, Wk, Wv = head.attn.in_proj_weight.double().chunk(3)
    bq, bk, bv = head.attn.in_proj_bias.double().chunk(3)

    def norm(layer, x):
        return F.layer_norm(x, (head.width,), layer.weight.double(), layer.bias.double(), layer.eps)

    scores = torch.empty(len(tokens_NLD), len(texts_MD), dtype=torch.float64)
    for n, tokens in enumerate(tokens_NLD.double()):
        keys = norm(head.ln_k, tokens) @ Wk.T + bk
        values = norm(head.ln_v, tokens) @ Wv.T + bv
        for m, text in enumerate(texts_MD.double()):
            query = norm(head.ln_q, text) @ Wq.T + bq
            pooled = []
            for h in range(head.num_heads):
                part = slice(h * d, (h + 1) * d)
                exponentials = torch.exp(keys[:, part] @ query[part] / d**0.5)
                pooled.append(exponentials @ values[:, part] / (1 + exponentials.sum()))  # 1: the zero token
            out = head.attn.out_proj.weight.double() @ torch.cat(pooled) + head.attn.out_proj.bias.double()
            scores[n, m] = out @ text / (out.norm() * text.norm())
    return scores.float()


@pytest.mark.parametrize("normalise_tokens", [False, True])
def test_equals_the_formulas_and_the_published_loop(normalise_tokens):
    head, features, texts = random_head(), random_features(), random_texts()
    tokens = F.normalize(features.tokens_BLD, dim=-1) if normalise_tokens else features.tokens_BLD
    expected = one_pair_at_a_time(head, tokens, texts)
    ours = score_images(head, features.tokens_BLD, texts, normalise_tokens=normalise_tokens)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    plain = score_images_plainly(head, features.tokens_BLD, texts, normalise_tokens=normalise_tokens)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)


def test_normalising_tokens_matters():
    head, features, texts = random_head(), random_features(), random_texts()
    raw, unit = (score_images(head, features.tokens_BLD, texts, normalise_tokens=flag) for flag in (False, True))
    assert 1e-5 < (raw - unit).abs().max() < 1e-2


@pytest.mark.parametrize(("width", "heads"), [(24, 3), (30, 5), (8, 1), (6, 2)])
def test_any_width_and_number_of_heads(width, heads):
    head = random_head(3, width, heads)
    tokens, texts = random_features(4, 2, width).tokens_BLD, random_texts(5, 3, width)
    ours = score_images(head, tokens, texts, normalise_tokens=False)
    torch.testing.assert_close(ours, one_pair_at_a_time(head, tokens, texts), rtol=0, atol=1e-5)


def test_singular_output_projection():
    """A rotation needs no inverse: heads that the projection ignores or repeats do no harm."""
    head = random_head()
    with torch.no_grad():
        head.attn.out_proj.weight[:, :8] = 0
        head.attn.out_proj.weight[:, 8:16] = head.attn.out_proj.weight[:, 16:24]
        head.attn.out_proj.bias.zero_()
    tokens, texts = random_features().tokens_BLD, random_texts()
    ours = score_images(head, tokens, texts, normalise_tokens=False)
    torch.testing.assert_close(ours, one_pair_at_a_time(head, tokens, texts), rtol=0, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("block_bytes", [1, 3000, 20_000, 10**9])
def test_blocks_of_any_size_give_the_same(block_bytes, threads):
    head, features, texts = random_head(), random_features(), random_texts()
    expected = score_images_plainly(head, features.tokens_BLD, texts, normalise_tokens=False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        scorer = TcsimScorer(head, texts, normalise_tokens=False, block_bytes=block_bytes)
        seen = torch.zeros(N, M)
        for block in scorer.score_blocks(features):
            seen[block.images, block.texts] += 1
        assert (seen == 1).all()
        torch.testing.assert_close(scorer.score(features), expected, rtol=0, atol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_bounded_memory(monkeypatch):
    """No intermediate result of many texts exceeds the bound."""
    head, features, texts = random_head(), random_features(images=1), random_texts(texts=4096)
    largest = 0
    plain = tcsim._linear

    def watched(x, weight, bias):
        nonlocal largest
        result = plain(x, weight, bias)
        largest = max(largest, result.numel() * 4)
        return result

    monkeypatch.setattr(tcsim, "_linear", watched)
    TcsimScorer(head, texts, normalise_tokens=False, block_bytes=64 * 1024).score(features)
    assert 0 < largest <= 64 * 1024


def test_one_product_off_the_cpu_path():
    """What an accelerator runs, one unrotated product, on the CPU: the same scores."""
    head, features, texts = random_head(), random_features(), random_texts()
    scorer = TcsimScorer(head, texts, normalise_tokens=False)
    rows, projection = slice(0, D), head.attn.out_proj
    scorer._strips = [tcsim._Strip(rows, rows, projection.weight.detach(), projection.bias.detach())]
    scorer._targets_MD = F.pad(F.normalize(texts, dim=-1), (0, 0, 0, -M % tcsim.ROW_MULTIPLE))
    expected = score_images_plainly(head, features.tokens_BLD, texts, normalise_tokens=False)
    torch.testing.assert_close(scorer.score(features), expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_accelerator():
    head, features, texts = random_head(), random_features(), random_texts()
    expected = score_images_plainly(head, features.tokens_BLD, texts, normalise_tokens=False)
    ours = score_images(head.cuda(), features.tokens_BLD.cuda(), texts.cuda(), normalise_tokens=False)
    torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=1e-5)


def test_bfloat16_is_near_and_autocast_changes_nothing():
    head, features, texts = random_head(), random_features(), random_texts()
    exact = score_images(head, features.tokens_BLD, texts, normalise_tokens=False)
    near = score_images(head, features.tokens_BLD, texts, normalise_tokens=False, dtype=torch.bfloat16)
    assert near.dtype == torch.float32
    assert 0 < (near - exact).abs().max() < 2e-2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = score_images(head, features.tokens_BLD, texts, normalise_tokens=False)
    assert torch.equal(under_autocast, exact)


def test_bfloat16_weights():
    head, features, texts = random_head().bfloat16(), random_features(), random_texts()
    ours = score_images(head, features.tokens_BLD.bfloat16(), texts.bfloat16(), normalise_tokens=False)
    plain = score_images_plainly(
        head.float(), features.tokens_BLD.bfloat16().float(), texts.bfloat16().float(), normalise_tokens=False
    )
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)


def test_scorer_keeps_its_weights():
    head, features, texts = random_head(), random_features(), random_texts()
    scorer = TcsimScorer(head, texts, normalise_tokens=False)
    before = scorer.score(features)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(2).add_(0.1)
    assert torch.equal(scorer.score(features), before)


@pytest.mark.parametrize("block_bytes", [1, None])
def test_global_scores(block_bytes):
    features, texts = random_features(), random_texts()
    expected = torch.stack([F.cosine_similarity(image[None], texts, dim=-1) for image in features.global_BD])
    torch.testing.assert_close(GlobalScorer(texts, block_bytes=block_bytes).score(features), expected)


def test_wrong_arguments():
    head = random_head()
    with pytest.raises(ValueError, match=r"texts must be \(M, 32\) with M ≥ 1, got \(0, 32\)"):
        TcsimScorer(head, torch.zeros(0, D), normalise_tokens=False)
    with pytest.raises(ValueError, match="got \\(3, 16\\)"):
        TcsimScorer(head, torch.zeros(3, 16), normalise_tokens=False)
    with pytest.raises(ValueError, match="tcsim or global"):
        create_scorer(head, torch.zeros(3, D), "cosine", normalise_tokens=False)
    with pytest.raises(ValueError, match="k must be at least 1"):
        TopK(0, 3)
    with pytest.raises(ValueError, match="NaN"):
        TopK(1, 1).update(torch.tensor([[float("nan")]]), torch.tensor([0]))
    with pytest.raises(ValueError, match="column numbers"):
        TopK(1, 1).update(torch.tensor([[0.0]]), torch.tensor([-1]))


def test_top_k_stream_equals_full_sort_with_ties():
    generator = torch.Generator().manual_seed(7)
    scores = torch.randint(-4, 4, (6, 50), generator=generator).float() / 7
    scores[0, :5], scores[0, 5:9] = -0.0, 0.0  # equal, although their bits differ
    expected = scores.sort(dim=1, descending=True, stable=True)
    for size in (1, 7, 50):
        best = TopK(8, 6)
        blocks = list(torch.arange(50).split(size))
        for columns in reversed(blocks):
            best.update(scores[:4, columns], columns, rows=slice(0, 4))
            best.update(scores[4:, columns], columns, rows=slice(4, 6))
        values, columns = best.result()
        assert torch.equal(values, expected.values[:, :8])
        assert torch.equal(columns, expected.indices[:, :8])


def test_top_k_of_fewer_than_k():
    best = TopK(3, 1)
    best.update(torch.tensor([[float("-inf"), 2.5]]), torch.tensor([4, 2**32 - 1]))
    values, columns = best.result()
    assert values.tolist() == [[2.5, float("-inf"), float("-inf")]]
    assert columns.tolist() == [[2**32 - 1, 4, -1]]


def test_top_images_and_texts_of_a_stream():
    head, texts = random_head(), random_texts()
    batches = [(torch.arange(N) + N * b, random_features(seed=20 + b)) for b in range(3)]
    whole = torch.cat([score_images(head, f.tokens_BLD, texts, normalise_tokens=True) for _, f in batches])
    scorer = TcsimScorer(head, texts, normalise_tokens=True, block_bytes=4000)
    scores_Mk, images_Mk = top_images(scorer, batches, 4)
    expected = whole.T.sort(dim=1, descending=True)
    torch.testing.assert_close(scores_Mk, expected.values[:, :4], rtol=0, atol=1e-5)
    assert torch.equal(images_Mk, expected.indices[:, :4])
    expected = whole.sort(dim=1, descending=True)
    for numbers, scores_Bk, texts_Bk in top_texts(scorer, batches, 4):
        torch.testing.assert_close(scores_Bk, expected.values[numbers, :4], rtol=0, atol=1e-5)
        assert torch.equal(texts_Bk, expected.indices[numbers, :4])


# --- few texts with stored tokens ------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise_tokens", [False, True])
@pytest.mark.parametrize("block_bytes", [1, 20_000, None])
def test_folded_projections_equal_the_formulas(normalise_tokens, block_bytes, monkeypatch):
    monkeypatch.setattr("itemizedclip.evaluation.tcsim_folded.MAX_TEXTS_PER_BLOCK", 16)  # several blocks of texts
    head, features, texts = random_head(), random_features(), random_texts()
    tokens = F.normalize(features.tokens_BLD, dim=-1) if normalise_tokens else features.tokens_BLD
    scorer = FoldedScorer(head, texts, normalise_tokens=normalise_tokens, block_bytes=block_bytes)
    seen = torch.zeros(N, M)
    for block in scorer.score_blocks(features):
        seen[block.images, block.texts] += 1
    assert (seen == 1).all()
    expected = one_pair_at_a_time(head, tokens, texts)
    torch.testing.assert_close(scorer.score(features), expected, rtol=0, atol=1e-5)


def test_folded_scorer_reads_half_precision_and_keeps_its_weights():
    head, texts = random_head().bfloat16(), random_texts(texts=3)
    tokens = random_features().tokens_BLD.half()
    expected = score_images_plainly(random_head().bfloat16().float(), tokens.float(), texts, normalise_tokens=False)
    scorer = FoldedScorer(head, texts, normalise_tokens=False)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = scorer.score(ImageFeatures(tokens[:, 0], tokens, (3, 3)))
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"got \(0, 32\)"):
        FoldedScorer(head, texts[:0], normalise_tokens=False)


@pytest.mark.parametrize(("texts", "kind"), [(1, FoldedScorer), (10, FoldedScorer), (11, TcsimScorer)])
def test_the_cheaper_scorer_of_stored_tokens(texts, kind):
    """D / (H − 1) = 32 / 3 texts."""
    assert type(scorer_of_stored_tokens(random_head(), random_texts(texts=texts), normalise_tokens=False)) is kind
