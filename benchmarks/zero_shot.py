"""Zero-shot of one study on a CPU: processor seconds by part, in float32 and in bfloat16.

    python benchmarks/zero_shot.py --output DIR [--domains chest mri] [--threads 1] [--studies 1]

The published models at their real size with random weights, and studies written for the purpose: an MRI study of
Pub-Brain-5 of ten scans of 48×224×224 (11,760 tokens, 5 classes), a chest CT of Rad-ChestCT's format of 112×336×336
(2,744 tokens, 15 findings). Reading is from the page cache and makes the model's input; the texts of the classes are
encoded once per evaluation; the rest is once per study. Figures: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from full_size_step import write_brain, write_chest
from itemizedclip_radiology.benchmarks.chest_ct import RadChestCtOptions
from itemizedclip_radiology.benchmarks.pub_brain_5 import PubBrain5Options

from itemizedclip.evaluation.benchmark import BenchmarkOptions, Subject
from itemizedclip.evaluation.classification import ClassEvaluator, ZeroShotClassifier
from itemizedclip.evaluation.encoding import EncodingOptions
from itemizedclip.models.factory import LoadedModel, create_model, create_tokenizer, load_model_config

T = TypeVar("T")

DOMAINS: dict[str, tuple[str, str, type[BenchmarkOptions], Callable[[Path, int], list[str]]]] = {
    "mri": ("HLIPSN_BiomedBERT_81616_itemizedclip", "HLIPSN_debug", PubBrain5Options, write_brain),
    "chest": ("CTRATE_HLIP_BiomedBERT_itemizedclip", "CTRATE_HLIP_debug", RadChestCtOptions, write_chest),
}
"""Name → model, the model whose embedded vocabulary stands for its own, benchmark, and what writes the studies."""


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Processor seconds, and what was worked out."""
    begin = time.process_time()
    result = work()
    return time.process_time() - begin, result


@torch.no_grad()
def measure(domain: str, folder: Path, studies: int) -> None:
    name, vocabulary, kind, write = DOMAINS[domain]
    write(folder / domain, 1)
    config = load_model_config(name)
    torch.manual_seed(0)
    model = create_model(config).eval()
    tokenizer = create_tokenizer(load_model_config(vocabulary))
    for precision, dtype in (("float32", None), ("bfloat16", torch.bfloat16)):
        encoding = EncodingOptions(batch_size=1, autocast_dtype=dtype)
        options = kind(checkpoint=Path("none"), data_dir=folder / domain / "zero_shot", output=folder / "none.json")  # type: ignore[call-arg]
        subject = Subject(LoadedModel(model, config, tokenizer), encoding, {"checkpoint_sha256": "", "precision": ""})
        evaluator = options.open(subject).evaluator
        assert isinstance(evaluator, ClassEvaluator)
        texts_s, classifier = timed(
            lambda evaluator=evaluator, encoding=encoding: ZeroShotClassifier(  # type: ignore[misc]
                model, tokenizer, evaluator.classes, normalise_tokens=evaluator.normalise_tokens, options=encoding
            )
        )
        for row in range(studies):
            evaluator.dataset[row]  # into the page cache
            read_s, sample = timed(lambda row=row, evaluator=evaluator: evaluator.dataset[row])  # type: ignore[misc]
            names = None if sample.series_names is None else sample.series_names[None]

            def encode(sample=sample, names=names, dtype=dtype):
                with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                    return model.encode_image(sample.image[None], series_names=names)

            towers_s, features = timed(encode)
            score_s, scores = timed(lambda classifier=classifier, features=features: classifier.score(features))  # type: ignore[misc]
            print(
                f"{domain:6} {precision:9} reading {read_s:6.2f}  towers {towers_s:7.2f}  scoring {score_s:6.3f}  "
                f"together {read_s + towers_s + score_s:7.2f}  (texts once {texts_s:5.2f}, {scores.shape[1]} classes, "
                f"{features.tokens_BLD.shape[1]} tokens)",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="new folder for the studies")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=["chest", "mri"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--studies", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for domain in args.domains:
        measure(domain, args.output, args.studies)


if __name__ == "__main__":
    main()
