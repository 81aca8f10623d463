"""MRI and head CT from training to zero-shot results: the scripts on a tiny synthetic cohort in the real formats."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import ROOT, fails, run
from itemizedclip_radiology.benchmarks.head_ct import Cq500Options, RsnaOptions
from itemizedclip_radiology.benchmarks.pub_brain_5 import PubBrain5Options, open_pub_brain_5, task_measures
from itemizedclip_radiology.data.brain import find_study_files
from itemizedclip_radiology.models.initial import build_model
from itemizedclip_radiology.models.series_names import encode_series_names
from itemizedclip_radiology.models.text_tower import bert_config_of, load_bert_tokenizer
from itemizedclip_radiology.recipes import StudyRun, ct, main_studies, mri
from itemizedclip_radiology.synthetic.cohort import write_head_ct_benchmarks, write_pub_brain_5, write_studies
from sklearn.metrics import f1_score, roc_auc_score

from itemizedclip.commands import explain
from itemizedclip.evaluation import encoding
from itemizedclip.evaluation.benchmark import evaluate_from_flags
from itemizedclip.evaluation.encoding import plan_batches
from itemizedclip.models.factory import load_model_config, load_pretrained
from itemizedclip.training.recipes import RECIPES, parse_recipe

SCRIPTS = ROOT / "Radiology_Tasks" / "src" / "open_mri_test"
SIZE = (8, 32, 32)
SMALL = ("--volume-size", "8", "32", "32")


@dataclass
class Cohort:
    """Folders of a tiny cohort."""

    root: Path

    @property
    def mri(self) -> Path:
        return self.root / "mri"

    @property
    def ct(self) -> Path:
        return self.root / "ct"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Cohort:
    root = tmp_path_factory.mktemp("cohort")
    write_studies(root / "mri", kind="mri", num_train=17, num_valid=5, seed=5, size=SIZE, with_margin=True)
    write_studies(root / "ct", kind="head_ct", num_train=8, num_valid=3, seed=5, size=SIZE)
    write_pub_brain_5(root / "pub_brain_5", num_studies=20, seed=5, size=SIZE)
    write_head_ct_benchmarks(root, num_studies=12, seed=5, size=SIZE)
    # One training series that cannot be read, and one validation study without a usable series.
    series = sorted((root / "mri" / "train" / "MRI5TRAIN00003").iterdir())[0] / "img.pt"
    series.write_bytes(series.read_bytes()[:200])
    for path in (root / "mri" / "valid" / "MRI5VALID00002").glob("*/img.pt"):
        torch.save(torch.zeros(*SIZE, 2), path)
    return Cohort(root)


@pytest.fixture(scope="module")
def trained(cohort, tmp_path_factory) -> Path:
    """The checkpoint of train_mri.sh, one process."""
    logs = tmp_path_factory.mktemp("logs")
    result = run(
        "bash", str(ROOT / "train_mri.sh"), "--recipe", "mri_debug", "--name", "one", "--log-every-n-steps", "1",
        *SMALL, "--use-serienames", DATA_ROOT=str(cohort.mri), JSON_ROOT=str(cohort.mri), LOGS=str(logs),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (logs / "one" / "stderr.txt").write_text(result.stderr)
    return logs / "one" / "checkpoints" / "epoch_2.pt"


def train(*flags: str) -> None:
    """Training in this process."""
    main_studies(["--recipe", "mri_debug", *SMALL, *flags])


def parse(*flags: str) -> StudyRun:
    """The options of these flags."""
    return parse_recipe("mri_debug", [*SMALL, *flags])


# --- training --------------------------------------------------------------------------------------------------------


def test_recipes_hold_the_published_numbers():
    for name in ("mri", "ct"):
        recipe = RECIPES.load(name)()
        assert recipe.model.model == "HLIPSN_BiomedBERT_81616_itemizedclip"
        assert (recipe.model.precision, recipe.model.grad_checkpointing) == ("amp", True)
        assert (recipe.loading.batch_size, recipe.loading.accum_batch, recipe.loading.step_batch) == (8, 4, 32)
        assert (recipe.loading.num_sampled_captions, recipe.data.num_series) == (7, 10)
        optimizer = recipe.optimizer
        assert (optimizer.lr, optimizer.weight_decay, optimizer.warmup, optimizer.epochs) == (1.75e-4, 0.2, 2000, 24)
        assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == (0.9, 0.98, 1e-6)
        objective = recipe.objective
        assert (objective.ila_weight, objective.ila_keep_rate) == (1, 0.9)
        assert (objective.kta_weight, objective.key_token_fraction) == (1, 0.05)
        assert (objective.mps_weight, objective.iis_weight, objective.worst_positive_factor) == (0.01, 1, 1.5)
        assert objective.normal_check
        assert RECIPES.load(f"{name}_debug")().objective == objective
    assert mri().initial.text_model.endswith("BiomedBERT-base-uncased-abstract-fulltext")


def test_training_writes_a_run_folder_and_validates_every_epoch(trained):
    folder = trained.parents[1]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))
    evaluations = [line for line in lines if line["kind"] == "eval"]
    assert [line["epoch"] for line in evaluations] == [1, 2]
    assert {"valid/text_to_image_R@1", "valid/mean_item_rank", "valid/complete@10"} <= set(evaluations[0])
    params = json.loads((folder / "params.json").read_text())
    assert params["model_config"]["vision_cfg"]["volume_size"] == list(SIZE)
    log = (folder / "stderr.txt").read_text()
    assert log.count("series skipped: study MRI5TRAIN00003") == 1
    assert "1 series of the training studies were skipped" in log
    assert "validation study left out: study MRI5VALID00002" in log
    assert "taken as 0-255" in log
    assert "the series-name encoder starts from random weights" in log
    checkpoint = torch.load(trained, weights_only=True)
    assert checkpoint["transform"] == {"volume_size": list(SIZE), "num_series": 6, "mean": 0.449, "std": 0.226}


def test_training_on_two_processes(cohort, tmp_path):
    result = run(
        "bash", str(ROOT / "train_ct.sh"), "--recipe", "ct_debug", "--name", "two", "--epochs", "1", "--warmup", "0",
        "--batch-size", "4", *SMALL,
        DATA_ROOT=str(cohort.ct), JSON_ROOT=str(cohort.ct), LOGS=str(tmp_path), GPUS="2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "val/mean_item_rank" in (tmp_path / "two" / "metrics.jsonl").read_text()
    assert (tmp_path / "two" / "checkpoints" / "epoch_1.pt").is_file()


def test_initial_weights_of_every_part(cohort, trained, tmp_path):
    from itemizedclip_radiology.models.radiology_model import RadiologyItemizedCLIP
    from timm.models.vision_transformer import VisionTransformer

    config = load_pretrained(trained).config
    bert = write_bert(tmp_path / "bert", config["text_cfg"]["hf_config"])
    torch.manual_seed(7)
    donor = RadiologyItemizedCLIP(config).text.transformer
    torch.save({f"bert.{k}": v for k, v in donor.state_dict().items()}, bert / "pytorch_model.bin")
    mae = VisionTransformer(img_size=224, patch_size=16, embed_dim=96, depth=4, num_heads=4, num_classes=0)
    torch.save({"model": mae.state_dict()}, tmp_path / "mae.pth")
    options = parse(
        "--text-model", str(bert), "--image-weights", str(tmp_path / "mae.pth"), "--series-name-weights", str(trained)
    )
    model = build_model(options, options.data.volume_size)
    own, saved = model.state_dict(), torch.load(trained, weights_only=True)["state_dict"]
    assert torch.equal(own["visual.trunk.blocks.2.attn.qkv.weight"], mae.state_dict()["blocks.2.attn.qkv.weight"])
    name = "visual.trunk.serienameencoder.embed.weight"
    assert torch.equal(own[name], saved[name])
    key = "encoder.layer.1.output.dense.weight"
    assert torch.equal(own[f"text.transformer.{key}"], donor.state_dict()[key])
    assert "[CLS]" in model.config["text_cfg"]["tokenizer_json"]


@pytest.mark.parametrize("program", [str(SCRIPTS / "zero_shot_rsna.py"), "-m", "/usr/bin/other"])
def test_an_environment_without_the_wings_packages_is_one_line(program):
    """Programs of the wing say it and end; others, such as a list of all models, get an error to catch."""
    lines = [
        "import importlib.util, sys",
        "find = importlib.util.find_spec",
        "importlib.util.find_spec = lambda name: None if name == 'nibabel' else find(name)",
        f"sys.argv = [{program!r}]",
        "import itemizedclip_radiology",
    ]
    result = run(sys.executable, "-c", "\n".join(lines))
    assert result.returncode == 1
    assert "packages that are not installed (nibabel): run " in result.stderr
    assert "pip install -e '.[radiology]'" in result.stderr
    assert ("ModuleNotFoundError" in result.stderr) is (program == "/usr/bin/other")
    assert ("Traceback" in result.stderr) is (program == "/usr/bin/other")


@pytest.mark.parametrize("script", ["train_mri.sh", "train_ct.sh"])
def test_unset_variables_are_all_named(script):
    result = run("bash", str(ROOT / script))
    assert result.returncode == 2
    assert all(f"  {name}  " in result.stderr for name in ("DATA_ROOT", "JSON_ROOT"))


def test_wrong_training_flags_give_one_message(cohort, tmp_path, capsys):
    here = ("--data-root", str(cohort.mri), "--json-root", str(cohort.mri), "--logs", str(tmp_path))
    empty = tmp_path / "empty"
    empty.mkdir()
    nameless = tmp_path / "nameless.json"
    config = load_model_config(parse().model.model)
    nameless.write_text(json.dumps(config | {"vision_cfg": config["vision_cfg"] | {"series_names": False}}))
    cases = [
        (("--data-root", "/nowhere"), "/nowhere"),
        (("--data-root", str(empty)), "is a folder in"),
        (("--json-root", str(empty)), "train.json"),
        (("--series", "3"), "--series"),
        (("--num-series", "0"), "--num-series"),
        (("--volume-size", "9", "32", "32"), "multiple of patch_size"),
        (("--volume-size", "16", "64", "64"), "expected 16×64×64"),
        (("--text-model", "/nowhere/bert"), "/nowhere/bert"),
        (("--reports", "/nowhere.csv"), "/nowhere.csv"),
        (("--image-weights", str(cohort.mri / "train.json")), "train.json"),
        (("--model", "ViT-scenes-ItemizedCLIP"), "ViT-scenes-ItemizedCLIP"),
        (("--no-use-serienames",), "series names"),
        (("--model", str(nameless)), "reads no series names"),
        (("--batch-size", "100"), "--batch-size"),
        (("--on-bad-sample", "stop"), "MRI5VALID00002"),
    ]
    for flags, expected in cases:
        assert expected in fails(capsys, train, *here, *flags), flags
    assert not list(tmp_path.glob("*/checkpoints/*"))


def test_training_studies_without_a_folder_are_counted_before_the_first_step(cohort, tmp_path, capsys):
    """Half a copy of the data, found by one listing instead of hours later."""
    root = tmp_path / "mri"
    shutil.copytree(cohort.mri, root)
    here = ("--data-root", str(root), "--json-root", str(root), "--logs", str(tmp_path / "logs"), "--batch-size", "4")
    here += ("--epochs", "1", "--val-frequency", "0")
    studies = sorted((root / "train").iterdir())
    for study in studies[:9]:
        shutil.rmtree(study)
    message = fails(capsys, train, *here)
    assert f"9 of 17 studies of {root / 'train.json'} have no folder in {root / 'train'}: {studies[0].name}" in message
    assert "more than --max-bad-fraction 0.01 allows" in message
    message = fails(capsys, train, *here, "--on-bad-sample", "stop")
    assert "(--on-bad-sample skip goes on without them)" in message
    train(*here, "--max-bad-fraction", "1", "--name", "half")
    assert "9 of 17 studies" in capsys.readouterr().err
    assert (tmp_path / "logs" / "half" / "checkpoints" / "epoch_1.pt").is_file()


def test_validation_index_of_both_names(cohort, tmp_path, capsys):
    shutil.copy(cohort.ct / "train.json", tmp_path / "train.json")
    for name in ("valid.json", "val.json"):
        shutil.copy(cohort.ct / "val.json", tmp_path / name)
    here = ("--data-root", str(cohort.ct), "--json-root", str(tmp_path), "--logs", str(tmp_path / "logs"))
    assert "take val.json with --is-ct" in fails(capsys, train, *here)
    for flag in ("--is-ct", "--ct"):
        assert find_study_files(cohort.ct, tmp_path, is_ct=parse(*here, flag).data.is_ct).valid_json.name == "val.json"
    assert ct().data.is_ct
    assert not mri().data.is_ct
    (tmp_path / "val.json").unlink()
    assert find_study_files(cohort.ct, tmp_path, is_ct=True).valid_json.name == "valid.json"


def test_report_table_replaces_reports(cohort, tmp_path, capsys):
    table = tmp_path / "reports.csv"
    here = ("--data-root", str(cohort.mri), "--json-root", str(cohort.mri), "--logs", str(tmp_path / "logs"))
    here += ("--report-replacer", str(table), "--epochs", "1", "--val-frequency", "0", "--name", "replaced")
    for content, expected in (
        (b"NOBODY,1. Acute stroke.\n", "none of its 1 studies (NOBODY, \u2026) is in"),
        (b"MRI5TRAIN00000,no number\n", "line 1: study 'MRI5TRAIN00000'"),
        (b"MRI5TRAIN00000,1. a,1. b\n", "line 1: 3 columns"),
        (b"\xff\xfe\x00,1. a\n", "is no UTF-8 text"),
    ):
        table.write_bytes(content)
        assert expected in fails(capsys, train, *here), content
    table.write_text('MRI5TRAIN00000,"1. Acute stroke.\n2. Old infarct."\nNOBODY,1. x\n')
    train(*here)
    log = capsys.readouterr().err
    assert "replaces the reports of 1 of 22 studies" in log
    assert "1 studies in no JSON file are not used, such as NOBODY" in log


# --- zero-shot -------------------------------------------------------------------------------------------------------

pub_brain_5 = partial(evaluate_from_flags, PubBrain5Options, prog="zero_shot_pub_brain_5.py")
rsna = partial(evaluate_from_flags, RsnaOptions, prog="zero_shot_rsna.py")
cq500 = partial(evaluate_from_flags, Cq500Options, prog="zero_shot_cq500.py")
EVALUATIONS = {"pub_brain_5": (pub_brain_5, "pub_brain_5"), "rsna": (rsna, "rsna"), "cq500": (cq500, "cq500")}


def score(name: str, cohort: Cohort, checkpoint: Path, output: Path, *flags: str) -> dict:
    """Run an evaluation in this process; its results.json."""
    main, folder = EVALUATIONS[name]
    main(["--resume", str(checkpoint), "--data-dir", str(cohort.root / folder), "--workers", "0",
          "--output", str(output), *flags])  # fmt: skip
    (results,) = sorted(output.glob("*.results.json"), key=lambda p: p.stat().st_mtime)[-1:]
    return json.loads(results.read_text())


def read_scores(output: Path) -> dict[str, dict[str, float]]:
    lines = [line for path in output.glob("scores.*.jsonl") for line in path.read_text().splitlines()]
    return {entry["study"]: entry["scores"] for entry in map(json.loads, lines)}


def auc_by_pairs(labels: np.ndarray, scores: np.ndarray) -> float:
    """Share of (positive, negative) pairs in the right order, ties half."""
    difference = scores[labels == 1][:, None] - scores[labels == 0][None]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


@pytest.mark.parametrize("name", ["rsna", "cq500"])
def test_head_ct_scores_and_aucs_against_a_plain_implementation(name, cohort, trained, tmp_path):
    report = score(name, cohort, trained, tmp_path)
    loaded = load_pretrained(trained)
    model = loaded.model
    prompts = report["facts"]["prompts"]
    stored = read_scores(tmp_path)
    assert len(stored) == report["facts"]["num_studies"] == 12
    windows = {"img_blood.pt": "BloodWindow", "img_bone.pt": "BoneWindow", "img_brain.pt": "BrainWindow"}
    prefix = "RSNA_" if name == "rsna" else ""
    with torch.no_grad():
        texts = F.normalize(model.encode_text(loaded.tokenizer(list(prompts.values()))), dim=-1)
        for study, scores in stored.items():
            volumes, names = [], []
            for series in sorted((cohort.root / name / f"{prefix}{study}").iterdir()):
                for file, window in windows.items():
                    volumes.append((torch.load(series / file, weights_only=True) / 255 - 0.449) / 0.226)
                    stem = "MPR-AX_HEAD-protocol" if name == "rsna" else f"{series.name}_AX"
                    names.append(f"{stem}_{window}")
            image = torch.stack(volumes)[None, :, None]
            features = model.encode_image(image, series_names=encode_series_names(names)[None])
            tokens = F.normalize(features.tokens_BLD, dim=-1)
            plain = F.cosine_similarity(model.head(texts[None], tokens)[0], texts)
            assert list(scores.values()) == pytest.approx(plain.tolist(), abs=2e-5)
    header, *rows = (line.split(",") for line in next((cohort.root / name).glob("*.csv")).read_text().splitlines())
    for finding in prompts:
        labels = np.array([int(row[header.index(finding)]) for row in rows])
        values = np.array([stored[row[0]][finding] for row in rows])
        if 0 < labels.sum() < len(labels):
            assert report["metrics"][f"auc/{finding}"] == pytest.approx(auc_by_pairs(labels, values))
        else:
            assert finding in report["facts"]["undefined_classes"]
    aucs = [value for key, value in report["metrics"].items() if key.startswith("auc/")]
    assert report["metrics"]["mean_auc"] == pytest.approx(np.mean(aucs))


def test_cq500_is_the_same_on_two_processes_from_its_own_folder(cohort, trained, tmp_path):
    one = score("cq500", cohort, trained, tmp_path / "one", "--batch-size", "4")
    result = run(
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--",
        "zero_shot_cq500.py", "--resume", str(trained), "--data-dir", str(cohort.root / "cq500"), "--use-serienames",
        "--workers", "1", "--output", str(tmp_path / "two"), cwd=SCRIPTS,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "MidlineShift" in result.stdout
    assert len(list((tmp_path / "two").glob("scores.*.jsonl"))) == 2
    two = json.loads((tmp_path / "two" / "cq500.results.json").read_text())
    assert two["metrics"] == one["metrics"]
    first, second = read_scores(tmp_path / "one"), read_scores(tmp_path / "two")
    assert first.keys() == second.keys()
    for study in first:
        assert list(first[study].values()) == pytest.approx(list(second[study].values()), abs=1e-5)


def test_pub_brain_5_as_published_commands_call_it(cohort, trained, tmp_path):
    """Both sets, from the script's folder; the second takes over the scores of the first."""
    checkpoint = tmp_path / "epoch_2.pt"
    shutil.copy(trained, checkpoint)
    data = cohort.root / "pub_brain_5"
    result = run(
        sys.executable, "zero_shot_pub_brain_5.py", "--resume", str(checkpoint),
        "--input-filename", "pub_brain_5.csv", "--data-dir", str(data), cwd=SCRIPTS,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "meningioma" in result.stdout
    output = tmp_path / "epoch_2.zero_shot_pub_brain_5"
    before = {path: path.read_text() for path in output.glob("scores.*.jsonl")}
    assert len(read_scores(output)) == 20
    pub_brain_5(["--resume", str(checkpoint), "--input-filename", "pub_brain_5_gt.csv", "--data-dir", str(data)])
    assert {path: path.read_text() for path in output.glob("scores.*.jsonl")} == before
    report = json.loads((output / "pub_brain_5_gt.results.json").read_text())
    assert report["facts"]["studies_per_task"]["disease"] == 10
    full = json.loads((output / "pub_brain_5.results.json").read_text())
    assert set(full["metrics"]) == {
        f"{task}/{measure}"
        for task in ("stroke", "glioma", "meningioma", "metastasis", "tumour", "disease")
        for measure in ("balanced_accuracy", "f1", "recall", "precision", "auc")
    }
    scores = read_scores(output)
    normal = [study for study in scores if study.startswith("open_bhb")]
    stroke = [study for study in scores if study.startswith("stroke")]
    margin = np.array([scores[study]["Stroke"] - scores[study]["Normal"] for study in stroke + normal])
    labels = np.array([1] * len(stroke) + [0] * len(normal))
    assert full["metrics"]["stroke/auc"] == pytest.approx(auc_by_pairs(labels, margin))
    accuracy = ((margin > 0)[labels == 1].mean() + (margin <= 0)[labels == 0].mean()) / 2
    assert full["metrics"]["stroke/balanced_accuracy"] == pytest.approx(accuracy)


def test_task_measures_of_numbers_counted_by_hand():
    #                  normal disease          rows 0…2 are normal, 3…5 the disease
    scores = np.array([[0.9, 0.1], [0.6, 0.5], [0.2, 0.3], [0.1, 0.8], [0.5, 0.7], [0.7, 0.3]])
    measured = task_measures(scores, np.array([0, 0, 0, 1, 1, 1]))
    assert measured["balanced_accuracy"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert measured["recall"] == pytest.approx(2 / 3)
    assert measured["precision"] == pytest.approx(2 / 3)
    assert measured["f1"] == pytest.approx(2 / 3)
    # Disease margins 0.7, 0.2, −0.4 against −0.8, −0.1, 0.1: 7 of 9 pairs in order.
    assert measured["auc"] == pytest.approx(7 / 9)
    assert task_measures(scores, np.zeros(6, dtype=int)) == {}


def test_task_measures_of_three_classes():
    generator = np.random.default_rng(0)
    scores, truth = generator.normal(size=(30, 3)), generator.integers(3, size=30)
    measured = task_measures(scores, truth)
    predicted = scores.argmax(1)
    recalls = [(predicted[truth == c] == c).mean() for c in range(3)]
    precisions = [(truth[predicted == c] == c).mean() for c in range(3)]
    assert measured["balanced_accuracy"] == measured["recall"] == pytest.approx(np.mean(recalls))
    assert measured["precision"] == pytest.approx(np.mean(precisions))
    assert measured["f1"] == pytest.approx(f1_score(truth, predicted, average="weighted"))
    shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    assert measured["auc"] == pytest.approx(np.mean([roc_auc_score(truth == c, shares[:, c]) for c in range(3)]))


def test_published_protocol_swaps_the_labels_of_midline_shift_and_mass_effect(cohort, trained, tmp_path):
    corrected = score("cq500", cohort, trained, tmp_path)
    before = {path: path.read_text() for path in tmp_path.glob("scores.*.jsonl")}
    published = score("cq500", cohort, trained, tmp_path, "--protocol", "published")
    assert published["protocol"] == "published"
    # The swap is one of labels: no study is scored again.
    assert {path: path.read_text() for path in tmp_path.glob("scores.*.jsonl")} == before
    assert (tmp_path / "cq500.results.json").is_file()
    header, *rows = (line.split(",") for line in (cohort.root / "cq500" / "CQ500.csv").read_text().splitlines())
    stored = read_scores(tmp_path)
    shift = np.array([int(row[header.index("MidlineShift")]) for row in rows])
    if shift.sum() > 0:
        values = np.array([stored[row[0]]["MassEffect"] for row in rows])
        assert published["metrics"]["auc/MassEffect"] == pytest.approx(auc_by_pairs(shift, values))
    mass = np.array([int(row[header.index("MassEffect")]) for row in rows])
    values = np.array([stored[row[0]]["MidlineShift"] for row in rows])
    assert published["metrics"]["auc/MidlineShift"] == pytest.approx(auc_by_pairs(mass, values))
    assert corrected["metrics"]["auc/ICH"] == published["metrics"]["auc/ICH"]


# --- scores that survive ---------------------------------------------------------------------------------------------


def count_scored(monkeypatch, *, fail_after: int | None = None) -> list[int]:
    """Rows that are read from now on; with `fail_after` the process "is killed" before the next one."""
    scored: list[int] = []
    plain = encoding._Images.__getitem__

    def counted(images, row):
        if fail_after is not None and len(scored) >= fail_after:
            raise KeyboardInterrupt
        scored.append(row)
        return plain(images, row)

    monkeypatch.setattr(encoding._Images, "__getitem__", counted)
    return scored


def test_a_killed_evaluation_goes_on(cohort, trained, tmp_path, monkeypatch, capsys):
    whole = score("rsna", cohort, trained, tmp_path / "whole")
    with monkeypatch.context() as patch:
        count_scored(patch, fail_after=5)
        with pytest.raises(KeyboardInterrupt):
            score("rsna", cohort, trained, tmp_path / "part")
    (path,) = (tmp_path / "part").glob("scores.*.jsonl")
    assert len(path.read_text().splitlines()) == 5
    with path.open("a") as file:
        file.write('{"study": "ID_00')  # killed while writing
    scored = count_scored(monkeypatch)
    again = score("rsna", cohort, trained, tmp_path / "part")
    assert len(scored) == 7
    assert again["metrics"] == whole["metrics"]
    assert "unfinished" in capsys.readouterr().err
    scored.clear()
    assert score("rsna", cohort, trained, tmp_path / "part")["metrics"] == whole["metrics"]
    assert scored == []
    score("rsna", cohort, trained, tmp_path / "part", "--no-resume-scores")
    assert len(scored) == 12


def test_scores_of_other_weights_or_settings_never_mix(cohort, trained, tmp_path, monkeypatch):
    score("rsna", cohort, trained, tmp_path)
    checkpoint = torch.load(trained, weights_only=True)
    checkpoint["state_dict"]["visual.trunk.cls_token"] += 0.1
    other = tmp_path / "other.pt"
    torch.save(checkpoint, other)
    scored = count_scored(monkeypatch)
    score("rsna", cohort, other, tmp_path)
    assert len(scored) == 12
    scored.clear()
    score("rsna", cohort, trained, tmp_path, "--precision", "fp32")
    assert scored == []  # auto was float32 here
    score("rsna", cohort, trained, tmp_path, "--precision", "amp_bf16")
    assert len(scored) == 12
    assert len(list(tmp_path.glob("scores.*.jsonl"))) == 3
    scored.clear()
    score("rsna", cohort, other, tmp_path)
    assert scored == []


def test_missing_and_broken_studies(cohort, trained, tmp_path, capsys, monkeypatch):
    root = tmp_path / "rsna"
    shutil.copytree(cohort.root / "rsna", root)
    folders = sorted(root.glob("RSNA_*"))
    shutil.rmtree(folders[0])
    arguments = ["--resume", str(trained), "--data-dir", str(root), "--workers", "0", "--output", str(tmp_path / "out")]
    message = fails(capsys, rsna, arguments)
    assert folders[0].name.removeprefix("RSNA_") in message
    assert "--allow-missing" in message
    # A study without a readable window; another that lacks one.
    shutil.copytree(cohort.root / "rsna" / folders[0].name, folders[0])
    for path in folders[1].glob("*/img_*.pt"):
        path.write_bytes(b"no tensor")
    next(folders[2].glob("*/img_bone.pt")).unlink()
    message = fails(capsys, rsna, arguments)
    assert "1 of 12 studies" in message
    assert "kept" in message
    assert len(read_scores(tmp_path / "out")) == 11
    scored = count_scored(monkeypatch)
    rsna([*arguments, "--allow-missing"])
    assert len(scored) == 1  # only the broken study is tried again
    report = json.loads((tmp_path / "out" / "rsna.results.json").read_text())
    assert report["facts"]["num_studies"] == 11
    assert list(report["facts"]["unusable"]) == [folders[1].name.removeprefix("RSNA_")]
    # The published evaluation counts absent studies with score 0.
    rsna([*arguments, "--allow-missing", "--protocol", "published"])
    published = json.loads((tmp_path / "out" / "rsna.published.results.json").read_text())
    assert published["facts"]["missing_scored_zero"]
    stored = read_scores(tmp_path / "out")
    header, *rows = (line.split(",") for line in (root / "RSNA.csv").read_text().splitlines())
    labels = np.array([int(row[header.index("Any")]) for row in rows])
    values = np.array([stored.get(row[0], {"Any": 0.0})["Any"] for row in rows])
    assert published["metrics"]["auc/Any"] == pytest.approx(auc_by_pairs(labels, values))
    # A study that has been mended is scored, one whose series have come back is scored anew.
    shutil.rmtree(root)
    shutil.copytree(cohort.root / "rsna", root)
    scored.clear()
    rsna(arguments)
    assert len(scored) == 2


def test_released_checkpoint_with_a_tokenizer_from_a_folder(cohort, trained, tmp_path, capsys, monkeypatch):
    """A released file carries weights under module. names and nothing else; its hub cannot be reached here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loaded = torch.load(trained, weights_only=True)
    released = tmp_path / "released.pt"
    torch.save({"state_dict": {f"module.{key}": value for key, value in loaded["state_dict"].items()}}, released)
    config = load_pretrained(trained).config
    text_cfg = {key: value for key, value in config["text_cfg"].items() if key != "tokenizer_json"}
    config = config | {"text_cfg": text_cfg | {"text_model": "nobody/no-such-bert"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    bert = write_bert(tmp_path / "bert", text_cfg["hf_config"])
    flags = ["--data-dir", str(cohort.root / "rsna"), "--workers", "0", "--resume"]
    model = ["--model", str(tmp_path / "config.json")]
    assert "--text-model FOLDER" in fails(capsys, rsna, [*flags, str(released), *model])
    found = rsna([*flags, str(released), *model, "--text-model", str(bert)])
    assert found == score("rsna", cohort, trained, tmp_path / "own")["metrics"]
    message = fails(capsys, rsna, [*flags, str(trained), "--text-model", str(bert),
                                                  "--output", str(tmp_path / "out")])  # fmt: skip
    assert "drop --text-model" in message
    # The commands that ask about one study take the same flag.
    study = next((cohort.root / "rsna").glob("RSNA_*"))
    question = [str(study), "--items", "a bleed", "--output", str(tmp_path / "explained"), "--checkpoint"]
    assert "--text-model FOLDER" in fails(capsys, explain.main, [*question, str(released), *model])
    explain.main([*question, str(released), *model, "--text-model", str(bert), "--no-nifti"])
    explained = json.loads((tmp_path / "explained" / "explanation.json").read_text())
    assert [entry["item"] for entry in explained["items"]] == ["a bleed"]


def write_bert(folder: Path, shape: dict) -> Path:
    """A BERT folder without weights: shape and vocabulary."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape))
    shutil.copy(
        ROOT / "Radiology_Tasks" / "src" / "itemizedclip_radiology" / "models" / "configs" / "builtin_vocab.txt",
        folder / "vocab.txt",
    )
    return folder


def test_wrong_evaluation_flags_give_one_message(cohort, trained, tmp_path, capsys):
    here = ["--resume", str(trained), "--output", str(tmp_path / "out"), "--workers", "0"]
    data = ["--data-dir", str(cohort.root / "rsna")]
    wrong = tmp_path / "wrong.csv"
    wrong.write_text((cohort.root / "rsna" / "RSNA.csv").read_text().replace("Subdural", "SDH"))
    unknown = tmp_path / "list.txt"
    unknown.write_text("ID_0000000000\n")
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00study")
    cases = [
        (rsna, [*here, *data, "--labels", str(wrong)], "no column 'Subdural'"),
        (rsna, [*here, *data, "--labels", "/nowhere.csv"], "/nowhere.csv"),
        (rsna, [*here, *data, "--study-lists", str(unknown)], "ID_0000000000"),
        (rsna, [*here, "--data-dir", "/nowhere"], "/nowhere"),
        (rsna, [*here, *data, "--labels", str(binary)], "no UTF-8 text"),
        (rsna, [*here, *data, "--study-lists", str(binary)], "no UTF-8 text"),
        (rsna, [*here, *data, "--output", str(wrong / "out")], "another folder with --output"),
        (rsna, [*here, *data, "--output", str(wrong)], "another folder with --output"),
        (rsna, [*here, *data, "--batch-size", "0"], "--batch-size"),
        (rsna, [*here, *data, "--protocol", "paper"], "protocol"),
        (rsna, [*here, *data, "--bloodonly"], "bloodonly"),
        (rsna, [*here, *data, "--no-use-serienames"], "series names"),
        (rsna, ["--resume", "/nowhere.pt", *data], "/nowhere.pt"),
        (rsna, ["--resume", str(wrong), *data], str(wrong)),
        (pub_brain_5, [*here, "--data-dir", str(cohort.root / "cq500"), "--use-serienames"], "zero_shot_cq500.py"),
        (pub_brain_5, [*here, "--data-dir", str(cohort.mri)], "pub_brain_5.csv"),
    ]
    for main, arguments, expected in cases:
        assert expected in fails(capsys, main, arguments), arguments


# --- the proof on the cohort -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def proof() -> ModuleType:
    return benchmark_program("mri_cohort")


def benchmark_program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("domain", ["mri", "head_ct"])
def test_proof_runs_at_its_quick_size(proof, domain, tmp_path, capsys):
    assert proof.main(["--output", str(tmp_path / "proof"), "--domain", domain, "--quick"]) == 0
    report = json.loads((tmp_path / "proof" / "results.json").read_text())
    metrics, facts = report["metrics"], report["facts"]
    findings = sum(len(read_findings(tmp_path / "proof" / "cohort" / name)) for name in PROOF_SETS[domain])
    assert facts["num_findings"] == findings > 0
    assert sum(one["num"] for one in facts["by_finding"].values()) == findings
    assert 0 <= metrics["attention/mask"] <= metrics["attention/within_one_patch"] <= metrics["attention/series"] <= 1
    for name in ("series", "mask", "within_one_patch"):
        assert 0 < metrics[f"attention/{name}/chance"] < 1
    assert 0 <= metrics["mean_auc"] <= 1
    assert "zero-shot mean AUC" in capsys.readouterr().out
    assert "is not empty" in fails(capsys, proof.main, ["--output", str(tmp_path / "proof"), "--quick"])


PROOF_SETS = {"mri": ["pub_brain_5"], "head_ct": ["rsna", "cq500"]}


def read_findings(folder: Path) -> list[dict]:
    return [finding for study in json.loads((folder / "findings.json").read_text()).values() for finding in study]


def test_landed_attention_counted_by_hand(proof):
    """Two series of 2×2×2 patches of 2×2×2 voxels; the finding is one voxel of the first series."""
    mask = torch.zeros(2, 4, 4, 8, dtype=torch.bool)
    mask[0, 1, 3, 0] = True
    landed = proof.Landed()
    # Patches are numbered by series, depth, row, column; of 2×2×2×4 = 32 the mask lies in (0, 0, 1, 0), number 4.
    for peak, expected in ((4, (True, True, True)), (9, (True, False, True)), (6, (True, False, False)),
                           (20, (False, False, False))):  # fmt: skip
        landed.add(peak, mask, (2, 2, 2))
        assert landed.hits[-1] == expected
        # A whole series; one patch; its 2 × 2 × 2 neighbourhood at the edge of the volume.
        assert landed.chances[-1] == (16 / 32, 1 / 32, 8 / 32)
    assert landed.metrics()["attention/within_one_patch"] == 0.5
    assert len((landed + landed).hits) == 8


def test_full_size_benchmark_prepares_whole_studies_and_the_published_text_tower(tmp_path, monkeypatch):
    full_size = benchmark_program("full_size_step")
    monkeypatch.setattr(full_size, "BRAIN_SIZE", SIZE)
    flags = full_size.write_brain(tmp_path, 1)
    assert find_study_files(flags[1], flags[3]).train_json.is_file()
    benchmark = open_pub_brain_5(tmp_path / "zero_shot" / "pub_brain_5.csv", tmp_path / "zero_shot")
    assert [len(study.series) for study in benchmark.studies] == [10, 10]
    assert benchmark.load(0, size=SIZE).image.shape == (10, 1, *SIZE)
    domain = full_size.DOMAINS["mri"]
    assert domain.model == RECIPES.load(domain.recipe)().model.model
    bert = full_size.write_bert(tmp_path / "bert", domain.model)
    assert bert_config_of(bert) == load_model_config(domain.model)["text_cfg"]["hf_config"]
    assert load_bert_tokenizer(bert, 256)(["Acute stroke."]).shape == (1, 256)


def test_batches_hold_studies_of_one_number_of_series():
    batches = plan_batches({0: 3, 1: 6, 2: 3, 3: 3, 4: 6, 5: 9}, batch_size=2)
    assert batches == [[5], [1, 4], [0, 2], [3]]
