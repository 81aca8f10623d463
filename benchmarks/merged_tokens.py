"""What merged, 8-bit tokens lose: TCSim, the exact best ten, and the images that truly show what a text says.

    python benchmarks/merged_tokens.py CHECKPOINT --level standard --images 1000

CHECKPOINT is a model trained on embedded scenes (`itemizedclip demo` makes one).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from itemizedclip.data.scenes import ScenesDataset, class_labels, class_prompts
from itemizedclip.evaluation.encoding import EncodingOptions, encode_image_batch, encode_texts
from itemizedclip.evaluation.tcsim_folded import scorer_of_stored_tokens
from itemizedclip.models.dual_encoder import ImageFeatures
from itemizedclip.models.factory import create_transform, load_pretrained
from itemizedclip.search.compressed import bytes_per_image, merge_tokens

TOP = 10


def average_precision(scores_NM: Tensor, labels_NM: Tensor) -> float:
    """Mean over texts of the average precision of the images that show them."""
    values = []
    for scores, labels in zip(scores_NM.T, labels_NM.T):
        if labels.any():
            hits = labels[scores.argsort(descending=True)].double()
            precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
            values.append(float((precision * hits).sum() / hits.sum()))
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--level", default="standard")
    parser.add_argument("--images", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_pretrained(options.checkpoint)
    model = loaded.model.eval()
    transform = create_transform(loaded.config, is_train=False)
    data = ScenesDataset(split="test", num_scenes=options.images, level=options.level, transform=transform)
    encoding = EncodingOptions()
    features = []
    with torch.no_grad():
        for start in range(0, options.images, 50):
            batch = torch.stack([data[n].image for n in range(start, min(start + 50, options.images))])
            features.append(encode_image_batch(model, batch, encoding))
    global_ND = torch.cat([one.global_BD for one in features]).float()
    tokens_NLD = torch.cat([one.tokens_BLD for one in features]).float()
    _, L, D = tokens_NLD.shape
    texts = [text for text, _ in class_prompts(options.level)]
    texts_MD = encode_texts(model, loaded.tokenizer, texts, encoding)
    labels = torch.from_numpy(class_labels(data)).bool()
    scorer = scorer_of_stored_tokens(model.head, texts_MD, normalise_tokens=False)

    def scores(tokens: Tensor) -> Tensor:
        return scorer.score(ImageFeatures(global_ND, tokens, features[0].grid))

    exact = scores(tokens_NLD)
    best = exact.topk(TOP, dim=0).indices
    print(f"{options.images} images, {len(texts)} texts, L {L}, D {D}; TCSim spreads {float(exact.std()):.3f}")
    print(f"all tokens, float16: {2 * (L + 1) * D:,} bytes, average precision {average_precision(exact, labels):.4f}")
    half = scores(tokens_NLD.half().float())
    print(f"float16 loses {float((half - exact).abs().mean()):.6f} of TCSim")
    for m in (1, 8, 27, 64):
        merged = scores(merge_tokens(tokens_NLD, m).unpacked())

        def kept(among: int, merged: Tensor = merged) -> float:
            found = [(merged[:, t].topk(among).indices[:, None] == best[:, t]).any(0) for t in range(len(texts))]
            return float(torch.stack(found).double().mean())

        print(
            f"{m:3} tokens, 8 bits: {bytes_per_image(L, D, m):,} bytes, |difference of TCSim| "
            f"{float((merged - exact).abs().mean()):.4f} (95 %: {float((merged - exact).abs().quantile(0.95)):.4f}), "
            f"recall@10 {kept(TOP):.3f} (among 50: {kept(5 * TOP):.3f}), "
            f"average precision {average_precision(merged, labels):.4f}"
        )


if __name__ == "__main__":
    main()
