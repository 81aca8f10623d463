"""What cannot be read is left out or ends an evaluation; what was scored is not scored again. On one and two ranks."""

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_model import BrokenTinyDataset, MaskedTinyDataset, TinyDatasetOfParts, TinyModel, tokenize

from itemizedclip.data.batch import BadSampleError
from itemizedclip.evaluation import encoding, retrieval
from itemizedclip.evaluation.classification import ClassPrompts, MultiLabelEvaluator, SingleLabelEvaluator
from itemizedclip.evaluation.encoding import EncodingOptions
from itemizedclip.evaluation.explanation import ExplainEvaluator
from itemizedclip.evaluation.ranks import retrieval_table
from itemizedclip.evaluation.retrieval import RetrievalEvaluator
from itemizedclip.evaluation.scores import ScoreStore
from itemizedclip.runtime.processes import leave_process_group

CLASSES = ClassPrompts.from_templates(["red one", "green two", "blue three"], ["a {class}"])
LABELS = [0, 1, 2, 0, 1, 2, 0]
TABLE = np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 0, 1], [1, 0, 1]])
BAD = (2, 5)
KINDS = ("retrieval", "strict retrieval", "single", "multi", "explain")


def evaluator_of(kind, data, encoding_options, labels=LABELS, table=TABLE):
    if "retrieval" in kind:
        strict = kind == "strict retrieval"
        return RetrievalEvaluator(
            data, tokenize, table=retrieval_table, equal_texts_are_rivals=strict, encoding=encoding_options
        )
    if kind == "single":
        return SingleLabelEvaluator(
            data, tokenize, CLASSES, labels, scorings=("tcsim", "global"), encoding=encoding_options
        )
    if kind == "multi":
        return MultiLabelEvaluator(data, tokenize, CLASSES, table, encoding=encoding_options)
    return ExplainEvaluator(data, tokenize, encoding=encoding_options)


def without_bad():
    """The data set as if the bad images had never been in it, and the numbers of the others."""
    data = MaskedTinyDataset()
    kept = [row for row in range(len(data)) if row not in BAD]
    data.images = data.images[kept]
    data.texts = [data.texts[row] for row in kept]
    data.item_masks = [data.item_masks[row] for row in kept]
    return data, kept


# --- bad samples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_bad_images_are_left_out_or_end_the_evaluation(kind, workers, caplog):
    skip = EncodingOptions(batch_size=1, num_workers=workers, on_bad_sample="skip")
    evaluator = evaluator_of(kind, BrokenTinyDataset(BAD), skip)
    found = evaluator.run(TinyModel())
    assert [record.message for record in caplog.records].count("image2.png: truncated; copy it again") == 1
    assert list(evaluator.unusable) == list(BAD)
    assert evaluator.facts["unusable"] == {f"image {row}": f"image{row}.png: truncated; copy it again" for row in BAD}
    others, kept = without_bad()
    expected = evaluator_of(kind, others, EncodingOptions(batch_size=1), [LABELS[row] for row in kept], TABLE[kept])
    assert found == expected.run(TinyModel())
    assert evaluator.facts["num_images"] == expected.facts["num_images"] == 5
    assert evaluator.facts.get("num_texts") == expected.facts.get("num_texts")
    assert evaluator.facts.get("texts_sha256") == expected.facts.get("texts_sha256")
    stop = EncodingOptions(batch_size=1, num_workers=workers)
    with pytest.raises(BadSampleError) as stopped:
        evaluator_of(kind, BrokenTinyDataset(BAD), stop).run(TinyModel())
    assert str(stopped.value) == "image2.png: truncated; copy it again"


@pytest.mark.parametrize("kind", ["retrieval", "explain"])
def test_images_whose_items_are_only_known_with_them(kind):
    """Without `items` a bad image is met before its texts are known; one without any text is as bad."""
    skip = EncodingOptions(batch_size=1, on_bad_sample="skip")
    data = BrokenTinyDataset(BAD[:1], lists_items=False)
    data.texts[BAD[1]] = []
    evaluator = evaluator_of(kind, data, skip)
    others, _ = without_bad()
    assert evaluator.run(TinyModel()) == evaluator_of(kind, others, EncodingOptions(batch_size=1)).run(TinyModel())
    assert evaluator.unusable[5] == "image 5 of BrokenTinyDataset has no text item; expected at least one"


def test_retrieval_without_its_scores_kept_leaves_the_same_out(monkeypatch):
    options = EncodingOptions(batch_size=2, on_bad_sample="skip")
    kept = evaluator_of("retrieval", BrokenTinyDataset(BAD), options).run(TinyModel())
    monkeypatch.setattr(retrieval, "KEPT_SCORE_BYTES", 100)
    assert evaluator_of("retrieval", BrokenTinyDataset(BAD), options).run(TinyModel()) == kept


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_readable_is_an_error(kind):
    skip = EncodingOptions(on_bad_sample="skip")
    with pytest.raises(BadSampleError, match=r"none of the 7 images can be used; the first: image0\.png"):
        evaluator_of(kind, BrokenTinyDataset(range(7)), skip).run(TinyModel())


# --- scores that are kept --------------------------------------------------------------------------------------------


def stored(folder, data, *, batch_size=2, policy="stop", **changes):
    """An evaluator that keeps its scores in a folder."""
    store = ScoreStore(folder, {"weights": 1}, CLASSES.names, **changes)
    options = EncodingOptions(batch_size=batch_size, on_bad_sample=policy)
    return MultiLabelEvaluator(data, tokenize, CLASSES, TABLE, encoding=options, store=store)


def lines_of(folder):
    lines = [line for path in sorted(folder.glob("scores.*.jsonl")) for line in path.read_text().splitlines()]
    return {entry["study"]: entry for entry in (json.loads(line) for line in lines if line.endswith("}"))}


def test_images_of_as_many_parts_share_a_forward_pass(tmp_path, monkeypatch):
    shapes = []
    plain = encoding.encode_image_batch

    def noted(model, images, options, **more):
        shapes.append(tuple(images.shape))
        return plain(model, images, options, **more)

    monkeypatch.setattr(encoding, "encode_image_batch", noted)
    evaluator = stored(tmp_path, TinyDatasetOfParts(skipping=[4]))
    scores = evaluator.scores(TinyModel())["tcsim"]
    assert shapes == [(2, 3, 8, 24), (2, 3, 8, 16), (2, 3, 8, 8), (1, 3, 8, 8)]
    alone = stored(tmp_path / "alone", TinyDatasetOfParts(), batch_size=1).scores(TinyModel())["tcsim"]
    torch.testing.assert_close(scores, alone, rtol=0, atol=1e-6)
    assert evaluator.skipped == ["image4, part9: no tensor"]
    assert lines_of(tmp_path)["image1"] == {
        "study": "image1",
        "scores": dict(zip(CLASSES.names, scores[1].tolist())),
        "series": ["part0", "part1", "part2"],
        "skipped": [],
    }


@pytest.mark.parametrize("killed_after", [1, 3, 4])
def test_a_killed_evaluation_goes_on_to_the_same_numbers(tmp_path, monkeypatch, killed_after, caplog):
    whole = stored(tmp_path / "whole", TinyDatasetOfParts()).run(TinyModel())
    done = []
    plain = encoding.encode_image_batch

    def killed(model, images, options, **more):
        if len(done) == killed_after:
            raise KeyboardInterrupt
        done.append(len(images))
        return plain(model, images, options, **more)

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "encode_image_batch", killed)
        try:
            stored(tmp_path / "part", TinyDatasetOfParts()).run(TinyModel())
        except KeyboardInterrupt:
            assert killed_after < 4
    (path,) = (tmp_path / "part").glob("scores.*.jsonl")
    with path.open("a") as file:
        file.write('{"study": "image')
    data = TinyDatasetOfParts()
    again = stored(tmp_path / "part", data)
    assert again.run(TinyModel()) == whole
    assert len(data.read) == 7 - sum(done)
    assert "1 unfinished lines passed over" in caplog.text
    scores = {name: line["scores"] for name, line in lines_of(tmp_path / "part").items()}
    assert scores == {name: line["scores"] for name, line in lines_of(tmp_path / "whole").items()}


def test_scores_are_taken_over_while_nothing_changed(tmp_path):
    first = stored(tmp_path, TinyDatasetOfParts(skipping=[4]))
    metrics = first.run(TinyModel())
    data = TinyDatasetOfParts()
    data.counts[1] = 1  # parts are gone; that of image 4 may have been mended
    assert stored(tmp_path, data).run(TinyModel()) != metrics
    assert sorted(data.read) == [1, 4]
    data = TinyDatasetOfParts()
    assert stored(tmp_path, data, anew=True).run(TinyModel()) == metrics
    assert len(data.read) == 7
    other = ScoreStore(tmp_path, {"weights": 2}, CLASSES.names)
    assert other.path(0) != first.store.path(0)
    assert other.take_over() == {}


def test_bad_images_end_a_kept_evaluation_after_the_others(tmp_path):
    with pytest.raises(BadSampleError) as stopped:
        stored(tmp_path, TinyDatasetOfParts(BAD)).run(TinyModel())
    message = str(stopped.value)
    assert message.startswith("2 of 7 images cannot be read, the first: image2.png: truncated; copy it again. ")
    assert f"are kept in {tmp_path}: mend these images, or leave them out with --on-bad-sample skip" in message
    assert len(lines_of(tmp_path)) == 5
    data = TinyDatasetOfParts(BAD)
    evaluator = stored(tmp_path, data, policy="skip")
    evaluator.run(TinyModel())
    assert evaluator.rows == [0, 1, 3, 4, 6]
    assert sorted(data.read) == [2, 5]


def test_scores_that_are_not_finite_are_never_kept(tmp_path):
    model = TinyModel()
    with torch.no_grad():
        model.patches.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        stored(tmp_path, TinyDatasetOfParts()).run(model)
    assert lines_of(tmp_path) == {}


# --- ranks of processes ----------------------------------------------------------------------------------------------


def run_all(folder):
    options = EncodingOptions(batch_size=2, text_batch_size=3, on_bad_sample="skip")
    evaluators = {kind: evaluator_of(kind, BrokenTinyDataset(BAD), options) for kind in KINDS}
    evaluators["one batch"] = evaluator_of("retrieval", BrokenTinyDataset(BAD), EncodingOptions(on_bad_sample="skip"))
    evaluators["stored"] = stored(folder / "all", TinyDatasetOfParts())
    evaluators["stored again"] = stored(folder / "all", TinyDatasetOfParts())
    evaluators["stored, some bad"] = stored(folder / "some", TinyDatasetOfParts(BAD), policy="skip")
    model = TinyModel()
    return {name: [one.run(model), sorted(one.unusable)] for name, one in evaluators.items()}


def _run_as_rank(rank, world_size, rendezvous, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    (folder / f"{rank}.json").write_text(json.dumps(run_all(folder)))
    leave_process_group()


def test_two_ranks_leave_out_and_keep_the_same(tmp_path):
    alone = run_all(tmp_path / "alone")
    mp.spawn(_run_as_rank, (2, str(tmp_path / "meet"), tmp_path), nprocs=2)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == alone
    for name in ("all", "some"):
        assert len(list((tmp_path / name).glob("scores.*.jsonl"))) == 2
        assert lines_of(tmp_path / name) == lines_of(tmp_path / "alone" / name)
