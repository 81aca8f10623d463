"""Retrieval and zero-shot evaluators: against plain loops, and the same on one and on two processes."""

import json
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from rich.console import Console
from tiny_model import MaskedTinyDataset, TinyDataset, TinyModel, tokenize

from itemizedclip.data.batch import BadSampleError, ItemSample
from itemizedclip.evaluation import encoding, retrieval
from itemizedclip.evaluation.classification import (
    ClassPrompts,
    MultiLabelEvaluator,
    SingleLabelEvaluator,
    ZeroShotClassifier,
    class_aucs,
    class_ranks,
)
from itemizedclip.evaluation.encoding import EncodingOptions
from itemizedclip.evaluation.explanation import ExplainEvaluator
from itemizedclip.evaluation.ranks import retrieval_metrics, retrieval_table, validation_metrics
from itemizedclip.evaluation.results import EvaluationReport, metrics_table, write_results
from itemizedclip.evaluation.retrieval import RetrievalEvaluator
from itemizedclip.evaluation.tcsim import score_images_plainly
from itemizedclip.runtime.processes import leave_process_group

SMALL = EncodingOptions(batch_size=2, text_batch_size=3)
CLASSES = ClassPrompts.from_templates(["red one", "green two", "blue three"], ["a {class}", "the {class}"])
LABELS = [0, 1, 2, 0, 1, 2, 0]
TABLE = np.array([[1, 0, 1], [0, 1, 1], [1, math.nan, 1], [0, 0, 1], [1, 1, 1], [0, 0, 1], [1, 0, 1]])


def all_evaluators():
    data = TinyDataset()
    return {
        "validation": RetrievalEvaluator(data, tokenize, encoding=SMALL),
        "table": RetrievalEvaluator(data, tokenize, table=retrieval_table, scoring="global", encoding=SMALL),
        "lenient": RetrievalEvaluator(data, tokenize, equal_texts_are_rivals=False, encoding=SMALL),
        "single": SingleLabelEvaluator(data, tokenize, CLASSES, LABELS, scorings=("tcsim", "global"), encoding=SMALL),
        "multi": MultiLabelEvaluator(data, tokenize, CLASSES, TABLE, encoding=SMALL),
        "explain": ExplainEvaluator(MaskedTinyDataset(), tokenize, encoding=SMALL),
        "one batch": RetrievalEvaluator(data, tokenize),  # the second rank has nothing to do
        "one batch of classes": SingleLabelEvaluator(data, tokenize, CLASSES, LABELS),
        "one batch explained": ExplainEvaluator(MaskedTinyDataset(), tokenize),
    }


@torch.no_grad()
def plain_scores(model, data, texts, *, normalise_tokens=False, scoring="tcsim"):
    features = model.encode_image(data.images)
    if scoring == "global":
        return F.cosine_similarity(features.global_BD[:, None], texts[None], dim=-1)
    return score_images_plainly(model.head, features.tokens_BLD, texts, normalise_tokens=normalise_tokens)


@torch.no_grad()
def plain_class_features(model):
    features = []
    for name in CLASSES.names:
        prompts = F.normalize(model.encode_text(tokenize([f"a {name}", f"the {name}"])), dim=-1)
        features.append(F.normalize(prompts.mean(0), dim=-1))
    return torch.stack(features)


# --- retrieval ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scoring", ["tcsim", "global"])
@pytest.mark.parametrize("normalise_tokens", [False, True])
def test_retrieval_equals_the_whole_matrix(scoring, normalise_tokens):
    model, data = TinyModel().eval(), TinyDataset(11)
    owner = torch.tensor([row for row, own in enumerate(data.texts) for _ in own])
    # One score per different text, so that equal texts tie to the last digit as the evaluator promises.
    texts = sorted({text for own in data.texts for text in own})
    column = torch.tensor([texts.index(text) for own in data.texts for text in own])
    features = model.encode_text(tokenize(texts)).detach()
    scores = plain_scores(model, data, features, normalise_tokens=normalise_tokens, scoring=scoring)[:, column]
    evaluator = RetrievalEvaluator(data, tokenize, scoring=scoring, normalise_tokens=normalise_tokens, encoding=SMALL)
    assert evaluator.run(model) == pytest.approx(validation_metrics(scores, owner))
    evaluator.table = retrieval_table
    assert evaluator.run(model) == pytest.approx(retrieval_metrics(scores, owner))
    assert evaluator.facts["num_texts"] == len(owner)
    assert evaluator.facts["num_different_texts"] == len(texts) < len(owner)


def test_equal_texts_of_other_images_may_be_no_rivals():
    """Image 1 shows what image 0 shows and more, in the same words."""
    data = TinyDataset(4)
    data.texts = [["red one"], ["red one", "blue two"], ["green three"], ["green three", "red two"]]
    model = TinyModel().eval()
    strict = RetrievalEvaluator(data, tokenize).ranks(model)
    lenient = RetrievalEvaluator(data, tokenize, equal_texts_are_rivals=False).ranks(model)
    features = {text: model.encode_text(tokenize([text])).detach() for own in data.texts for text in own}
    row = 0
    for image, own in enumerate(data.texts):
        beaten = []
        for text in own:
            column = plain_scores(model, data, features[text])[:, 0]
            rivals = [n for n in range(4) if text not in data.texts[n]]
            assert lenient.text_to_image_M[row] == 1 + sum(bool(column[n] > column[image]) for n in rivals)
            row += 1
            others = [t for n in range(4) if n != image for t in data.texts[n] if t not in own]
            scores = {t: plain_scores(model, data, features[t])[image, 0] for t in (*others, text)}
            beaten.append(sum(bool(scores[t] > scores[text]) for t in others))
        assert lenient.best_text_N[image] == 1 + min(beaten)
        assert lenient.worst_text_N[image] == len(own) + max(beaten)
    assert strict.best_text_N.sum() > lenient.best_text_N.sum()  # ties count half


def test_retrieval_computes_again_what_it_could_not_keep(monkeypatch):
    model = TinyModel()
    kept = RetrievalEvaluator(TinyDataset(), tokenize, encoding=SMALL).run(model)
    monkeypatch.setattr(retrieval, "KEPT_SCORE_BYTES", 100)
    passes = []
    evaluator = RetrievalEvaluator(TinyDataset(), tokenize, encoding=SMALL)
    scores = evaluator._scores
    monkeypatch.setattr(evaluator, "_scores", lambda *arguments: passes.append(1) or scores(*arguments))
    assert evaluator.run(model) == kept
    assert len(passes) == 2


def test_retrieval_reads_items_without_decoding_images():
    class Listed(TinyDataset):
        decoded = 0

        def items(self, index):
            return self.texts[index]

        def __getitem__(self, index):
            self.decoded += 1
            return super().__getitem__(index)

    data = Listed()
    assert RetrievalEvaluator(data, tokenize).run(TinyModel()) == RetrievalEvaluator(TinyDataset(), tokenize).run(
        TinyModel()
    )
    assert data.decoded == len(data)


def test_evaluators_leave_the_mode_and_report_progress():
    model, seen = TinyModel().train(), []
    evaluator = RetrievalEvaluator(
        TinyDataset(), tokenize, encoding=SMALL, on_progress=lambda done, total: seen.append((done, total))
    )
    assert evaluator.run(model) == evaluator.run(model)  # dropout was off
    assert model.training
    assert seen[:4] == [(2, 7), (4, 7), (6, 7), (7, 7)]


def test_workers_and_batch_size_change_nothing():
    data, model = TinyDataset(), TinyModel()
    reference = RetrievalEvaluator(data, tokenize, encoding=SMALL).run(model)
    for options in (EncodingOptions(batch_size=3, text_batch_size=100), EncodingOptions(batch_size=5, num_workers=1)):
        assert RetrievalEvaluator(data, tokenize, encoding=options).run(model) == reference


def test_half_precision_towers_run():
    options = EncodingOptions(batch_size=4, autocast_dtype=torch.bfloat16)
    near = RetrievalEvaluator(TinyDataset(), tokenize, encoding=options).run(TinyModel())
    assert all(math.isfinite(value) for value in near.values())
    halved = RetrievalEvaluator(TinyDataset(), tokenize).run(TinyModel().bfloat16())
    assert all(math.isfinite(value) for value in halved.values())


def test_broken_weights_and_data_are_refused():
    model = TinyModel()
    with torch.no_grad():
        model.patches.bias.fill_(math.nan)
    for evaluator in all_evaluators().values():
        with pytest.raises(ValueError, match=r"NaN|not finite"):
            evaluator.run(model)
    empty = TinyDataset()
    empty.texts[3] = []
    with pytest.raises(BadSampleError, match="image 3"):
        RetrievalEvaluator(empty, tokenize).run(TinyModel())
    with pytest.raises(ValueError, match="empty"):
        RetrievalEvaluator(TinyDataset(0), tokenize).run(TinyModel())
    with pytest.raises(ValueError, match="batch_size is 0"):
        EncodingOptions(batch_size=0)

    class Ragged(TinyDataset):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return ItemSample(sample.sample_id, sample.image[:, : 8 - 2 * (index % 2)], sample.items)

    with pytest.raises(BadSampleError, match=r"image1 is \(3, 6, 8\), image0 is \(3, 8, 8\)"):
        RetrievalEvaluator(Ragged(), tokenize).run(TinyModel())


# --- classification -------------------------------------------------------------------------------------------------


def test_ranks_of_classes_by_hand():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.3, 0.2], [0.0, 0.0, 0.0]])
    assert class_ranks(scores, torch.tensor([2, 0, 1])).tolist() == [2.0, 1.5, 2.0]


def test_classification_equals_the_plain_path():
    model, data = TinyModel().eval(), TinyDataset()
    evaluator = all_evaluators()["single"]
    table = evaluator.run(model)
    for scoring in ("tcsim", "global"):
        scores = plain_scores(model, data, plain_class_features(model), normalise_tokens=True, scoring=scoring)
        ranks = [1 + int((row > row[label]).sum()) for row, label in zip(scores, LABELS)]
        assert table[f"{scoring}/top1"] == pytest.approx(np.mean([rank <= 1 for rank in ranks]))
        assert table[f"{scoring}/top5"] == 1.0
        assert table[f"{scoring}/mean_rank"] == pytest.approx(np.mean(ranks))
        torch.testing.assert_close(evaluator.scores(model)[scoring], scores, rtol=0, atol=1e-5)
    features = model.encode_image(data.images)
    classifier = ZeroShotClassifier(model, tokenize, CLASSES, scoring="global")
    torch.testing.assert_close(classifier.score(features), scores, rtol=0, atol=1e-5)


def test_labels_may_be_fewer_than_images():
    evaluator = SingleLabelEvaluator(TinyDataset(), tokenize, CLASSES, LABELS[:3], encoding=SMALL)
    assert set(evaluator.run(TinyModel())) == {"top1", "top5", "mean_rank"}
    assert evaluator.facts["num_images"] == 3
    assert evaluator.scores(TinyModel())["tcsim"].shape == (3, 3)


def test_auc_by_hand_and_undefined_classes():
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.8, 0.5, 0.2], [0.7, 0.9, 0.3], [0.1, 0.1, 0.4]])
    labels = np.array([[1, 0, 1], [0, 1, 1], [1, 1, 1], [0, math.nan, 1]])
    # Class 0: of 4 pairs, 0.7 < 0.8 is wrong. Class 1: one tie of 2 pairs. Class 2: no negative image.
    assert class_aucs(scores, labels) == [0.75, 0.75, None]
    evaluator = MultiLabelEvaluator(TinyDataset(4), tokenize, CLASSES, labels)
    assert evaluator.measures(scores) == {"macro_auc": 0.75, "auc/red one": 0.75, "auc/green two": 0.75}
    assert evaluator.facts["undefined_classes"] == ["blue three"]
    with pytest.raises(ValueError, match="no AUC exists"):
        MultiLabelEvaluator(TinyDataset(4), tokenize, CLASSES, np.ones((4, 3))).measures(scores)


def test_wrong_classes_and_labels():
    data = TinyDataset()
    with pytest.raises(ValueError, match=r"lacks \{class\}"):
        ClassPrompts.from_templates(["red"], ["a photo"])
    with pytest.raises(ValueError, match="must differ"):
        ClassPrompts.from_templates(["red", "red"], ["{class}"])
    with pytest.raises(ValueError, match="expected a list of at least one prompt"):
        ClassPrompts(["red"], ["red"])
    with pytest.raises(ValueError, match="0 … 2 for 3 classes, got 3"):
        SingleLabelEvaluator(data, tokenize, CLASSES, [0, 3])
    with pytest.raises(ValueError, match="8 labels for 7 images"):
        SingleLabelEvaluator(data, tokenize, CLASSES, [0] * 8)
    with pytest.raises(ValueError, match=r"\(images, 3 classes\), got \(7, 2\)"):
        MultiLabelEvaluator(data, tokenize, CLASSES, TABLE[:, :2])
    with pytest.raises(ValueError, match="0, 1 or NaN"):
        MultiLabelEvaluator(data, tokenize, CLASSES, TABLE * 2)
    with pytest.raises(ValueError, match="tcsim, global or both"):
        SingleLabelEvaluator(data, tokenize, CLASSES, LABELS, scorings=())


# --- ranks of processes ---------------------------------------------------------------------------------------------


def _run_all(rank, world_size, rendezvous, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    model = TinyModel()
    results = {name: evaluator.run(model) for name, evaluator in all_evaluators().items()}
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(results, file)
    leave_process_group()


def test_ranks_agree_to_the_last_digit(tmp_path):
    model = TinyModel()
    alone = {name: evaluator.run(model) for name, evaluator in all_evaluators().items()}
    mp.spawn(_run_all, (2, str(tmp_path / "meet"), str(tmp_path)), nprocs=2)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == alone


def test_batches_of_ranks_cover_everything_once(monkeypatch):
    monkeypatch.setattr(encoding.collectives, "world_size", lambda: 3)
    seen = []
    for rank in range(3):
        monkeypatch.setattr(encoding.collectives, "rank", lambda rank=rank: rank)
        seen += encoding.own_batches(11, 2)
    assert sorted(row for batch in seen for row in batch) == list(range(11))


# --- reports --------------------------------------------------------------------------------------------------------


def test_results_file_and_table(tmp_path):
    evaluator = all_evaluators()["multi"]
    metrics = evaluator.run(TinyModel())
    report = EvaluationReport("toy classes", "corrected", "epoch_1.pt", metrics, evaluator.facts)
    path = tmp_path / "new" / "results.json"
    write_results(path, report)
    read = json.loads(path.read_text())
    assert read["metrics"] == metrics
    assert (read["protocol"], read["checkpoint"]) == ("corrected", "epoch_1.pt")
    assert read["facts"]["prompts_sha256"] == CLASSES.sha256
    assert read["facts"]["undefined_classes"] == ["blue three"]
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]
    with pytest.raises(ValueError, match="macro_auc are not finite"):
        write_results(path, EvaluationReport("toy", "corrected", "", {"macro_auc": math.nan}))
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        write_results(path, EvaluationReport("toy", "corrected", "", {}, {"tensor": torch.zeros(1)}))
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(metrics_table("toy", {"top1": 0.5, "mean_rank": 1.0, "auc/top": 0.25}, evaluator.facts))
    text = console.export_text()
    assert "50.0 %" in text
    assert "1.00" in text  # a perfect mean rank is no percentage
    assert "0.2500" in text
    assert "auc/blue three" in text
    assert "undefined" in text
