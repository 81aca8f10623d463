"""Chest CT from training to zero-shot results: the scripts on a tiny synthetic cohort in the real formats."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import sys
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import ROOT, fails, run
from itemizedclip_radiology.benchmarks.chest_ct import (
    CHEST_CLASSES,
    RAD_CHESTCT_CLASSES,
    CtRateOptions,
    RadChestCtOptions,
)
from itemizedclip_radiology.benchmarks.operating_points import (
    corner_threshold,
    decide,
    decide_across_folds,
    measure_decisions,
    operating_points,
    published_grid,
)
from itemizedclip_radiology.data.ct_rate_tree import parse_volume_name
from itemizedclip_radiology.models.radiology_model import RadiologyItemizedCLIP
from itemizedclip_radiology.recipes import ctrate, ctrate_debug, main_chest
from itemizedclip_radiology.synthetic.cohort import write_ct_rate, write_rad_chestct
from PIL import Image
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold

from itemizedclip.evaluation.benchmark import evaluate_from_flags
from itemizedclip.models.factory import create_model, load_model_config, load_pretrained

SCRIPTS = ROOT / "Radiology_Tasks" / "src" / "open_ct_rate"
VOCABULARY = ROOT / "Radiology_Tasks" / "src" / "itemizedclip_radiology" / "models" / "configs" / "builtin_vocab.txt"
SIZE = (16, 48, 48)
SMALL = ("--volume-size", "16", "48", "48")


@dataclass
class Cohort:
    """Folders of a tiny cohort, and a BERT as CXR-BERT is published: prefix, heads, position ids, own code."""

    root: Path

    @property
    def ct_rate(self) -> Path:
        return self.root / "ct_rate"

    @property
    def items(self) -> Path:
        return self.ct_rate / "itemized.json"

    @property
    def rad_chestct(self) -> Path:
        return self.root / "rad_chestct"

    @property
    def bert(self) -> Path:
        return self.root / "bert"


def write_bert(folder: Path) -> None:
    folder.mkdir()
    text_cfg = load_model_config("CTRATE_HLIP_debug")["text_cfg"]
    torch.manual_seed(7)
    donor = RadiologyItemizedCLIP(load_model_config("CTRATE_HLIP_debug")).text.transformer
    weights = {f"bert.{name}": tensor for name, tensor in donor.state_dict().items()}
    weights |= {
        "bert.embeddings.position_ids": torch.arange(64)[None],
        "cls.predictions.bias": torch.zeros(672),
        "cls_projection_head.dense_to_hidden.weight": torch.zeros(8, 96),
    }
    torch.save(weights, folder / "pytorch_model.bin")
    foreign = {"architectures": ["CXRBertModel"], "auto_map": {"AutoModel": "modeling_cxrbert.CXRBertModel"}}
    (folder / "config.json").write_text(json.dumps(text_cfg["hf_config"] | foreign))
    shutil.copy(VOCABULARY, folder / "vocab.txt")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Cohort:
    cohort = Cohort(tmp_path_factory.mktemp("cohort"))
    write_ct_rate(cohort.ct_rate, num_train=17, num_valid=9, seed=5, size=SIZE)
    write_rad_chestct(cohort.rad_chestct, num_studies=12, seed=5, size=SIZE)
    write_bert(cohort.bert)
    # One reconstruction of two that cannot be read.
    path = cohort.ct_rate / parse_volume_name("train_2_a_1").path
    path.write_bytes(path.read_bytes()[:200])
    return cohort


@pytest.fixture(scope="module")
def trained(cohort, tmp_path_factory) -> Path:
    """The checkpoint of train_ctrate.sh, one process, BERT frozen."""
    logs = tmp_path_factory.mktemp("logs")
    result = run(
        "bash", str(ROOT / "train_ctrate.sh"), "--recipe", "ctrate_debug", "--name", "one", "--lock-text",
        "--log-every-n-steps", "1", *SMALL,
        DATA_ROOT=str(cohort.ct_rate), ITEMS_JSON=str(cohort.items), TEXT_MODEL=str(cohort.bert), LOGS=str(logs),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (logs / "one" / "stderr.txt").write_text(result.stderr)
    return logs / "one" / "checkpoints" / "epoch_2.pt"


def train(cohort: Cohort, logs: Path, *flags: str) -> dict[str, float]:
    """Training in this process; the last evaluation."""
    here = ("--data-root", str(cohort.ct_rate), "--items-json", str(cohort.items), "--logs", str(logs))
    return main_chest(["--recipe", "ctrate_debug", *SMALL, *here, *flags]).metrics


def metrics_of(folder: Path, kind: str) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


# --- training --------------------------------------------------------------------------------------------------------


def test_recipe_holds_the_published_numbers():
    recipe = ctrate()
    model, optimizer, objective = recipe.model, recipe.optimizer, recipe.objective
    assert model.model == "CTRATE_HLIP_BiomedBERT_itemizedclip"
    assert (model.precision, model.grad_checkpointing, model.lock_text) == ("amp", True, True)
    assert (recipe.loading.batch_size, recipe.loading.accum_batch, recipe.loading.num_sampled_captions) == (16, 4, 10)
    assert (optimizer.lr, optimizer.weight_decay, optimizer.warmup, optimizer.epochs) == (1e-4, 0.5, 100, 80)
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == (0.9, 0.98, 1e-6)
    assert (objective.ila_weight, objective.ila_keep_rate) == (1, 0.95)
    assert (objective.kta_weight, objective.key_token_fraction) == (1, 0.05)
    assert (objective.mps_weight, objective.iis_weight, objective.worst_positive_factor) == (0.1, 1, 1)
    assert objective.normal_check
    assert recipe.data.input_info == ("-1150", "350", "crop")
    assert recipe.initial.text_model.endswith("CXR-BERT-specialized")
    assert ctrate_debug().objective == objective


def test_training_writes_a_run_folder_and_evaluates_every_epoch(cohort, trained):
    folder = trained.parents[1]
    losses = [line["loss"] for line in metrics_of(folder, "train")]
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))
    evaluations = metrics_of(folder, "eval")
    assert [line["epoch"] for line in evaluations] == [1, 2]
    assert "ct_rate/macro_auc" in evaluations[0]
    log = (folder / "stderr.txt").read_text()
    assert "train_2_a_1.pt: truncated" in log
    assert "1 reconstructions of the training scans were skipped" in log
    assert "13 labelled validation volumes" in log
    checkpoint = torch.load(trained, weights_only=True)
    assert checkpoint["transform"]["input_info"] == ["-1150", "350", "crop"]
    assert checkpoint["transform"]["volume_size"] == list(SIZE)


def test_cxr_bert_loads_into_a_plain_bert_and_stays_frozen_but_for_its_layer_norms(cohort, trained):
    log = (trained.parents[1] / "stderr.txt").read_text()
    assert all(name in log for name in ("cls.predictions.bias", "cls_projection_head", "position_ids"))
    donor = torch.load(cohort.bert / "pytorch_model.bin", weights_only=True)
    state = torch.load(trained, weights_only=True)["state_dict"]
    own = {key.split("text.transformer.")[1]: value for key, value in state.items() if "text.transformer." in key}
    assert own
    same = {key: torch.equal(value, donor[f"bert.{key}"]) for key, value in own.items()}
    assert all(equal for key, equal in same.items() if "LayerNorm" not in key)
    # The published --lock-text leaves them trainable.
    assert not all(equal for key, equal in same.items() if "LayerNorm" in key)
    first = torch.load(trained.with_name("epoch_1.pt"), weights_only=True)["state_dict"]
    assert not torch.equal(first["text.proj.weight"], state["text.proj.weight"])
    # The BERT and its tokenizer are in the checkpoint: the folder is not needed any more.
    assert "[CLS]" in load_pretrained(trained).config["text_cfg"]["tokenizer_json"]


def test_locked_text_as_published_trains_layer_norms_with_dropout(cohort, trained, tmp_path):
    """The published --lock-text leaves BERT's LayerNorms trainable and its dropout active; ours can freeze all."""
    model = load_pretrained(trained).model
    for freeze, trained_names in ((False, {"LayerNorm"}), (True, set())):
        model.train()
        model.requires_grad_(True)
        model.text.locked = False
        model.lock(text=True, freeze_layer_norm=freeze)
        model.train()
        found = {name.split(".")[-2] for name, p in model.text.transformer.named_parameters() if p.requires_grad}
        assert found == trained_names
        assert model.text.transformer.training is not freeze
        assert model.text.proj.weight.requires_grad
    assert not ctrate().model.lock_text_freeze_layer_norm
    assert ctrate().model.lock_text


def test_locked_text_on_two_processes_evaluates_as_one(cohort, trained, tmp_path):
    """Steps of learning rate 0, so that both evaluate the same weights; the second run also recomputes activations."""
    still = ("--lock-text", "--pretrained", str(trained), "--text-model", str(cohort.bert), "--epochs", "1",
             "--warmup", "0", "--lr", "0", "--valid-items", str(cohort.items))  # fmt: skip
    one = train(cohort, tmp_path, "--name", "one", *still)
    result = run(
        "bash", str(ROOT / "train_ctrate.sh"), "--recipe", "ctrate_debug", "--name", "two", *SMALL, *still,
        "--grad-checkpointing",
        DATA_ROOT=str(cohort.ct_rate), ITEMS_JSON=str(cohort.items), LOGS=str(tmp_path), GPUS="2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    # Every line is the run's own log: no complaint of DDP about parameters without gradient.
    assert "unused" not in result.stderr
    assert "UserWarning" not in result.stderr
    (two,) = metrics_of(tmp_path / "two", "eval")
    assert {"ct_rate/macro_auc", "itemized/mean_item_rank"} <= one.keys()
    assert {key: two[key] for key in one} == one
    assert one["ct_rate/macro_auc"] == metrics_of(trained.parents[1], "eval")[-1]["ct_rate/macro_auc"]


def test_a_killed_run_goes_on_to_the_same_numbers(cohort, trained, tmp_path):
    folder = tmp_path / "one"
    shutil.copytree(trained.parents[1], folder)
    for name in ("epoch_2.pt", "latest.pt"):
        (folder / "checkpoints" / name).unlink(missing_ok=True)
    before = metrics_of(folder, "train")
    train(cohort, tmp_path, "--name", "one", "--resume", "latest", "--lock-text", "--text-model", str(cohort.bert),
          "--log-every-n-steps", "1")  # fmt: skip
    again = metrics_of(folder, "train")[-2:]
    assert [line["step"] for line in again] == [3, 4]
    for old, new in zip(before[2:], again):
        assert (new["loss"], new["grad_norm"]) == (old["loss"], old["grad_norm"])
    assert metrics_of(folder, "eval")[-1]["ct_rate/macro_auc"] == metrics_of(folder, "eval")[1]["ct_rate/macro_auc"]


def test_what_is_evaluated_is_said(cohort, tmp_path, capsys):
    root = tmp_path / "data"
    root.mkdir()
    (root / "train").symlink_to(cohort.ct_rate / "train")
    once = ("--epochs", "1", "--warmup", "0", "--data-root", str(root))
    assert train(cohort, tmp_path, *once, "--name", "none") == {}
    message = capsys.readouterr().err
    assert message.count("nothing is evaluated during training") == 1
    assert "--labels" in message
    # Labels of another place, and half of the volumes missing.
    (root / "valid").mkdir()
    for number in range(1, 6):
        (root / "valid" / f"valid_{number}").symlink_to(cohort.ct_rate / "valid" / f"valid_{number}")
    labels = ("--zeroshot-ct-rate", str(cohort.ct_rate / "valid_labels.csv"))
    found = train(cohort, tmp_path, *once, *labels, "--name", "half", "--cache-dir", str(tmp_path / "cache"))
    assert set(found) > {"ct_rate/macro_auc"}
    assert "6 of 13 studies" in capsys.readouterr().err
    assert list((tmp_path / "cache").rglob("valid_1_a_1.safetensors"))


def test_unset_variables_are_all_named():
    result = run("bash", str(ROOT / "train_ctrate.sh"))
    assert result.returncode == 2
    assert all(f"  {name}  " in result.stderr for name in ("DATA_ROOT", "ITEMS_JSON"))


def test_wrong_training_flags_give_one_message(cohort, tmp_path, capsys):
    shifted = tmp_path / "shifted"
    write_ct_rate(shifted, num_train=9, num_valid=1, seed=5, size=SIZE)
    (shifted / "valid_labels.csv").unlink()
    for path in shifted.glob("train/*/*/*.pt"):
        torch.save(torch.load(path, weights_only=True).float() - 1024, path)
    alike = tmp_path / "alike.csv"
    with (cohort.ct_rate / "valid_labels.csv").open() as file:
        header, *rows = csv.reader(file)
    alike.write_text("\n".join([",".join(header), *(",".join([row[0], *"0" * (len(row) - 1)]) for row in rows)]))
    half = tmp_path / "half"
    shutil.copytree(cohort.ct_rate / "train" / "train_1", half / "train" / "train_1")
    cases = [
        (("--data-root", "/nowhere"), "/nowhere"),
        (("--data-root", str(cohort.bert)), "neither train/ nor valid/"),
        (("--data-root", str(half)), "have no folder"),
        (("--data-root", str(shifted), "--items-json", str(shifted / "itemized.json")), "--double-rescale undo"),
        (("--items-json", "/nowhere.json"), "/nowhere.json"),
        (("--items-json", str(cohort.bert / "config.json")), "config.json"),
        (("--valid-items", "/nowhere.json"), "/nowhere.json"),
        (("--labels", "/nowhere.csv"), "/nowhere.csv"),
        (("--labels", str(cohort.rad_chestct / "rad_chestct_labels.csv")), "VolumeName"),
        (("--labels", str(alike)), "no AUC exists"),
        (("--input-info", "-1150", "350", "zoom"), "zoom"),
        (("--input-info", "350", "-1150", "crop"), "--input-info 350 -1150 crop"),
        (("--cache-type", "int4"), "int4"),
        (("--lock-text",), "--text-model"),
        (("--text-model", "/nowhere/bert"), "/nowhere/bert"),
        (("--model", "HLIPSN_debug", "--volume-size", "16", "64", "64"), "series names"),
        (("--volume-size", "17", "48", "48"), "multiple of patch_size"),
        (("--batch-size", "100"), "--batch-size"),
        (("--zeroshot-template", "x"), "--zeroshot-template"),
    ]
    for flags, expected in cases:
        assert expected in fails(capsys, train, cohort, tmp_path / "logs", *flags), flags
    assert not list(tmp_path.glob("logs/*/checkpoints/*"))


# --- operating points ------------------------------------------------------------------------------------------------


def test_exact_ties_between_corners_go_to_the_largest_threshold():
    """Two operating points as far from the corner as each other: (4/7, 2/7) and (2/7, 4/7), told apart by rounding."""
    scores = np.arange(14) / 14
    for seed in range(200):
        labels = np.random.default_rng(seed).permutation(np.repeat([0, 1], 7))
        cuts = operating_points(scores)
        positive, negative = scores[labels == 1], scores[labels == 0]
        exact = [
            Fraction(int((negative > c).sum()), 7) ** 2 + Fraction(int((positive <= c).sum()), 7) ** 2 for c in cuts
        ]
        nearest = max(t for t, distance in enumerate(exact) if distance == min(exact))
        assert corner_threshold(scores, labels) == cuts[nearest]


def nearest_by_loop(scores: np.ndarray, labels: np.ndarray, thresholds) -> float:
    """The plain loop over thresholds: of equal distances the last."""
    best, chosen = math.inf, math.nan
    for threshold in thresholds:
        called = scores > threshold
        missed, false_alarm = (~called[labels == 1]).mean(), called[labels == 0].mean()
        distance = math.hypot(false_alarm, missed)
        if distance <= best:
            best, chosen = distance, float(threshold)
    return chosen


@pytest.mark.parametrize("seed", range(6))
def test_thresholds_equal_a_plain_loop(seed):
    generator = np.random.default_rng(seed)
    labels = generator.integers(2, size=60)
    scores = 0.2 + 0.05 * generator.normal(size=60) + 0.03 * labels
    if seed % 2:
        scores = scores.round(2)  # many equal scores
    for size in (1000, 4000):
        grid = published_grid(size)
        assert (grid[0], grid[-1], len(grid)) == (-1, 1, size)
        assert corner_threshold(scores, labels, grid) == nearest_by_loop(scores, labels, grid)
    # Among all operating points: every cut between two scores, and calling all or none.
    cuts = [-9.0, *np.sort(scores)]
    found, plain = corner_threshold(scores, labels), nearest_by_loop(scores, labels, cuts)
    assert ((scores > found) == (scores > plain)).all()
    assert len(operating_points(scores)) == len(np.unique(scores)) + 1


def test_ties_take_the_largest_threshold_and_equality_is_no_positive():
    scores, labels = np.array([0.0, 0.5]), np.array([0, 1])
    grid = np.array([-0.1, 0.0, 0.25, 0.49, 0.5])
    # 0, 0.25 and 0.49 all separate; at 0.5 the positive is not larger than the threshold.
    assert corner_threshold(scores, labels, grid) == 0.49
    # Scores the wrong way round: nothing is nearer than calling none.
    worst = decide(np.array([0.0, 1.0]), np.array([1, 0]))
    assert not worst.positive_N.any()


def test_cross_validation_keeps_patients_together_and_uses_other_folds_only():
    generator = np.random.default_rng(3)
    patients = np.repeat(np.arange(40), generator.integers(1, 4, size=40))
    labels = generator.integers(2, size=40)[patients]
    scores = generator.normal(size=len(patients))
    found = decide_across_folds(scores, labels, [f"valid_{p}" for p in patients])
    names = sorted({f"valid_{p}" for p in patients})
    of_row = np.array([names.index(f"valid_{p}") for p in patients])
    patient_labels = np.array([labels[of_row == number].max() for number in range(40)])
    expected = np.zeros(len(patients), dtype=bool)
    splits = StratifiedKFold(5, shuffle=True, random_state=0).split(patient_labels[:, None], patient_labels)
    for _, held_out in splits:
        inside = np.isin(of_row, held_out)
        cut = nearest_by_loop(scores[~inside], labels[~inside], operating_points(scores[~inside]))
        expected[inside] = scores[inside] > cut
    assert (found.positive_N == expected).all()
    assert len(found.thresholds) == 5
    # Two patients with the finding make two folds; one makes none.
    few = (patients < 2).astype(int)
    assert len(decide_across_folds(scores, few, patients).thresholds) == 2
    assert decide_across_folds(scores, (patients < 1).astype(int), patients) is None


def test_random_scores_look_better_at_thresholds_chosen_on_their_own_labels():
    optimistic, honest = [], []
    for seed in range(40):
        generator = np.random.default_rng(seed)
        labels, scores = np.arange(40) % 2, generator.normal(size=40)
        optimistic.append(measure_decisions(labels, decide(scores, labels).positive_N)["balanced_accuracy"])
        across = decide_across_folds(scores, labels, np.arange(40))
        honest.append(measure_decisions(labels, across.positive_N)["balanced_accuracy"])
    assert np.mean(optimistic) > 0.55
    assert abs(np.mean(honest) - 0.5) < 0.03


def test_measures_counted_by_hand():
    labels, called = np.array([1, 1, 1, 0, 0, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0, 0, 0], dtype=bool)
    found = measure_decisions(labels, called)
    assert found["accuracy"] == pytest.approx(6 / 8)
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert found["recall"] == found["precision"] == pytest.approx(2 / 3)
    assert found["f1"] == pytest.approx((3 * (2 / 3) + 5 * (4 / 5)) / 8)
    assert measure_decisions(labels, np.zeros(8, dtype=bool))["precision"] == 0


# --- zero-shot -------------------------------------------------------------------------------------------------------

EVALUATIONS = {
    "ct_rate": partial(evaluate_from_flags, CtRateOptions, prog="zeroshot_ct_rate.py"),
    "rad_chestct": partial(evaluate_from_flags, RadChestCtOptions, prog="zeroshot_rad_chestct.py"),
}


def score(name: str, root: Path, checkpoint: Path, output: Path, *flags: str) -> dict:
    """Run an evaluation in this process; its newest results.json."""
    EVALUATIONS[name](["--resume", str(checkpoint), "--data-root", str(root), "--workers", "0", "--output", str(output),
                       *flags])  # fmt: skip
    return json.loads(max(output.glob("*.results.json"), key=lambda path: path.stat().st_mtime_ns).read_text())


def read_scores(output: Path) -> dict[str, dict[str, float]]:
    lines = [line for path in output.glob("scores.*.jsonl") for line in path.read_text().splitlines()]
    return {entry["study"]: entry["scores"] for entry in map(json.loads, lines)}


def read_labels(path: Path) -> dict[str, dict[str, int]]:
    with path.open() as file:
        return {
            row[0].removesuffix(".nii.gz"): {k: int(float(v)) for k, v in zip(header[1:], row[1:])}
            for header, *rows in [list(csv.reader(file))]
            for row in rows
        }


def auc_by_pairs(labels: np.ndarray, scores: np.ndarray) -> float:
    """Share of (positive, negative) pairs in the right order, ties half."""
    difference = scores[labels == 1][:, None] - scores[labels == 0][None]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def plain_input(path: Path) -> torch.Tensor:
    """Window, centred pad and crop, normalisation, voxel by voxel as the formats are written down."""
    windowed = (torch.load(path, weights_only=True).float() + 1150).div(1500).clamp(0, 1).numpy()
    for axis, size in enumerate(SIZE):
        lack = max(0, size - windowed.shape[axis])
        widths = [(0, 0)] * 3
        widths[axis] = (lack // 2, lack - lack // 2)
        windowed = np.pad(windowed, widths)
        start = (windowed.shape[axis] - size) // 2
        windowed = np.take(windowed, range(start, start + size), axis)
    return torch.from_numpy((windowed - 0.449) / 0.226)[None, None, None].float()


@pytest.fixture(scope="module")
def ct_rate_scored(cohort, trained, tmp_path_factory) -> tuple[dict, Path]:
    """Results of CT-RATE in the published protocol, and their folder, which the script chose itself."""
    checkpoint = tmp_path_factory.mktemp("checkpoint") / "epoch_2.pt"
    shutil.copy(trained, checkpoint)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = run(
        "./zeroshot_ct_rate.py", "--resume", str(checkpoint), "--data-root", str(cohort.ct_rate), "--protocol",
        "published", cwd=SCRIPTS, PATH=path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "mean of 16, by scan" in result.stdout
    output = checkpoint.with_suffix(".zero_shot_ct_rate")
    return json.loads((output / "ct_rate.published.results.json").read_text()), output


def test_ct_rate_scores_against_a_plain_implementation(cohort, trained, ct_rate_scored):
    report, output = ct_rate_scored
    stored, loaded = read_scores(output), load_pretrained(trained)
    assert len(stored) == report["facts"]["num_studies"] == 13
    prompts = report["facts"]["prompts"]
    assert list(prompts) == list(CHEST_CLASSES)
    assert prompts["Lung nodule"] == "findings consistent with nodules or nodular density"
    tokens_NC = loaded.tokenizer(list(prompts.values()))
    with torch.no_grad():
        texts = F.normalize(loaded.model.encode_text(tokens_NC), dim=-1)
        for volume, scores in stored.items():
            image = plain_input(cohort.ct_rate / parse_volume_name(volume).path)
            tokens = F.normalize(loaded.model.encode_image(image).tokens_BLD, dim=-1)
            plain = F.cosine_similarity(loaded.model.head(texts[None], tokens)[0], texts)
            assert list(scores.values()) == pytest.approx(plain.tolist(), abs=2e-5)


def test_ct_rate_measures_against_a_plain_implementation(cohort, ct_rate_scored):
    report, output = ct_rate_scored
    metrics, stored = report["metrics"], read_scores(output)
    labels = read_labels(cohort.ct_rate / "valid_labels.csv")
    volumes = list(labels)
    scans = sorted({parse_volume_name(volume).scan for volume in volumes})
    aucs, scan_aucs, accuracies = [], [], []
    for name in CHEST_CLASSES:
        y, s = (np.array([table[volume][name] for volume in volumes]) for table in (labels, stored))
        if len(set(y)) < 2:
            assert name in report["facts"]["undefined_classes"]
            continue
        aucs.append(auc_by_pairs(y, s))
        assert metrics[f"auc/{name}"] == pytest.approx(aucs[-1])
        of_scan = [[v for v in volumes if parse_volume_name(v).scan == scan] for scan in scans]
        means = np.array([np.mean([stored[v][name] for v in members]) for members in of_scan])
        scan_aucs.append(auc_by_pairs(np.array([labels[members[0]][name] for members in of_scan]), means))
        assert metrics[f"scan/auc/{name}"] == pytest.approx(scan_aucs[-1])
        cut = nearest_by_loop(s, y, np.linspace(-1, 1, 1000))
        assert report["facts"]["thresholds"]["published"][name] == [pytest.approx(cut)]
        accuracies.append((y == (s > cut)).mean())
        assert metrics[f"published/accuracy/{name}"] == pytest.approx(accuracies[-1])
        assert metrics[f"published/f1/{name}"] == pytest.approx(f1_score(y, s > cut, average="weighted"))
    assert metrics["mean_auc"] == pytest.approx(np.mean(aucs))
    assert metrics["scan/mean_auc"] == pytest.approx(np.mean(scan_aucs))
    assert metrics["published/accuracy"] == pytest.approx(np.mean(accuracies))
    assert report["facts"]["num_scans"] == len(scans) == 9
    assert len(report["facts"]["threshold_choices"]) == 3
    with Image.open(output / "ct_rate.published.roc.png") as picture:
        assert min(picture.size) > 800


def test_ct_rate_is_the_same_on_two_processes_and_in_training(cohort, trained, ct_rate_scored, tmp_path):
    result = run(
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--",
        "zeroshot_ct_rate.py", "--resume", str(trained), "--data-root", str(cohort.ct_rate), "--batch-size", "3",
        "--workers", "1", "--output", str(tmp_path), cwd=SCRIPTS,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("scores.*.jsonl"))) == 2
    two = json.loads((tmp_path / "ct_rate.results.json").read_text())["metrics"]
    one = ct_rate_scored[0]["metrics"]
    assert two == {key: value for key, value in one.items() if not key.startswith("published/")}
    assert two["mean_auc"] == pytest.approx(metrics_of(trained.parents[1], "eval")[-1]["ct_rate/macro_auc"])


def test_rad_chestct_counts_calcification_once_or_twice(cohort, trained, tmp_path):
    corrected = score("rad_chestct", cohort.rad_chestct, trained, tmp_path)
    kept = {path: path.read_text() for path in tmp_path.glob("scores.*.jsonl")}
    published = score("rad_chestct", cohort.rad_chestct, trained, tmp_path, "--protocol", "published")
    assert {path: path.read_text() for path in tmp_path.glob("scores.*.jsonl")} == kept
    assert corrected["facts"]["num_studies"] == 12
    labels, stored = read_labels(cohort.rad_chestct / "rad_chestct_labels.csv"), read_scores(tmp_path)
    coronary, arterial = "Coronary artery wall calcification", "Arterial wall calcification"
    columns: dict[str, float] = {}
    for name in (*RAD_CHESTCT_CLASSES, "Calcification"):
        sources = [coronary, arterial] if name == "Calcification" else [name]
        y = np.array([max(row[source] for source in sources) for row in labels.values()])
        s = np.array([max(stored[scan][source] for source in sources) for scan in labels])
        if 0 < y.sum() < len(y):
            columns[name] = auc_by_pairs(y, s)
            assert corrected["metrics"][f"auc/{name}"] == pytest.approx(columns[name])
    assert {coronary, arterial, "Calcification"} <= columns.keys()
    of_14 = np.mean([auc for name, auc in columns.items() if name not in (coronary, arterial)])
    of_15 = np.mean([auc for name, auc in columns.items() if name != "Calcification"])
    assert corrected["metrics"]["mean_auc"] == published["metrics"]["classes_14/mean_auc"] == pytest.approx(of_14)
    assert published["metrics"]["mean_auc"] == corrected["metrics"]["columns_15/mean_auc"] == pytest.approx(of_15)
    assert "14 findings" in corrected["facts"]["headline"]
    assert "15 label columns" in published["facts"]["headline"]


def test_volumes_rescaled_twice_are_refused_or_mended_and_cached(cohort, trained, ct_rate_scored, tmp_path, capsys):
    root = tmp_path / "ct_rate"
    shutil.copytree(cohort.ct_rate / "valid", root / "valid")
    shutil.copy(cohort.ct_rate / "valid_labels.csv", root / "valid_predicted_labels.csv")
    for number, shift in ((1, 1024), (2, 8192)):
        path = root / parse_volume_name(f"valid_{number}_a_1").path
        torch.save(torch.load(path, weights_only=True).float() - shift, path)
    message = fails(capsys, score, "ct_rate", root, trained, tmp_path / "out")
    assert "2 of 13 studies cannot be read" in message
    assert "--double-rescale undo" in message
    assert len(read_scores(tmp_path / "out")) == 11
    cache = ("--double-rescale", "undo", "--cache-dir", str(tmp_path / "cache"), "--cache-type", "float16")
    report = score("ct_rate", root, trained, tmp_path / "mended", *cache)
    expected, found = read_scores(ct_rate_scored[1]), read_scores(tmp_path / "mended")
    assert found.keys() == expected.keys()
    for volume in expected:
        assert list(found[volume].values()) == pytest.approx(list(expected[volume].values()), abs=2e-3)
    reader = {"hu_window": [-1150, 350], "fit": "crop", "double_rescale": "undo", "cache": "float16"}
    assert report["facts"]["reader"] == reader
    assert report["facts"]["volume_size"] == list(SIZE)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 13


def test_volumes_that_are_no_chest_ct_are_scored_as_they_are_when_asked(cohort, trained, tmp_path, capsys):
    root = tmp_path / "ct_rate"
    shutil.copytree(cohort.ct_rate / "valid", root / "valid")
    shutil.copy(cohort.ct_rate / "valid_labels.csv", root / "valid_predicted_labels.csv")
    path = root / parse_volume_name("valid_1_a_1").path
    torch.save(torch.rand(torch.load(path, weights_only=True).shape), path)  # air and tissue are nowhere
    flags = ("--protocol", "published")
    message = fails(capsys, score, "ct_rate", root, trained, tmp_path / "out", *flags)
    assert "do not look like a chest CT in HU" in message
    assert "--read-as-is" in message
    report = score("ct_rate", root, trained, tmp_path / "out", *flags, "--read-as-is")
    assert "--read-as-is" in report["facts"]["reader"]["read_as_is"]
    scores = read_scores(tmp_path / "out")
    assert len(scores) == 13
    assert "valid_1_a_1" in scores
    message = fails(capsys, score, "ct_rate", root, trained, tmp_path / "out", "--read-as-is", "--cache-dir", "x")
    assert "--read-as-is leaves values as they are" in message


def test_a_checkpoint_brings_its_window_and_fit(cohort, trained, tmp_path):
    checkpoint = torch.load(trained, weights_only=True)
    checkpoint["transform"]["input_info"] = ["-1000", "400", "resize"]
    other = tmp_path / "other.pt"
    torch.save(checkpoint, other)
    own = score("rad_chestct", cohort.rad_chestct, other, tmp_path / "out")
    assert own["facts"]["reader"]["hu_window"] == [-1000, 400]
    assert own["facts"]["reader"]["fit"] == "resize"
    asked = score("rad_chestct", cohort.rad_chestct, other, tmp_path / "out", "--input-info", "-1150", "350", "crop")
    assert asked["facts"]["reader"]["fit"] == "crop"
    assert len(list((tmp_path / "out").glob("scores.*.jsonl"))) == 2


def test_wrong_evaluation_flags_give_one_message(cohort, trained, tmp_path, capsys):
    brain = create_model("HLIPSN_debug")
    torch.save({"state_dict": brain.state_dict(), "model_config": brain.config}, tmp_path / "brain.pt")
    here = ["--resume", str(trained), "--output", str(tmp_path / "out"), "--workers", "0"]
    data = ["--data-root", str(cohort.ct_rate)]
    ct_rate, rad_chestct = EVALUATIONS["ct_rate"], EVALUATIONS["rad_chestct"]
    cases = [
        (ct_rate, [*here, "--data-root", "/nowhere"], "/nowhere"),
        (ct_rate, [*here, "--data-root", str(cohort.rad_chestct)], "valid_predicted_labels.csv"),
        (ct_rate, [*here, *data, "--labels", "/nowhere.csv"], "/nowhere.csv"),
        (ct_rate, [*here, *data, "--labels", str(cohort.rad_chestct / "rad_chestct_labels.csv")], "VolumeName"),
        (ct_rate, [*here, *data, "--protocol", "paper"], "protocol"),
        (ct_rate, [*here, *data, "--input-info", "-1150", "crop"], "--input-info"),
        (ct_rate, [*here, *data, "--input-info", "-1150", "350", "zoom"], "zoom"),
        (ct_rate, ["--resume", "/nowhere.pt", *data], "/nowhere.pt"),
        (ct_rate, ["--resume", str(tmp_path / "brain.pt"), *data, "--output", str(tmp_path / "o")], "series names"),
        (ct_rate, data, "--resume"),
        (rad_chestct, [*here, *data], "rad_chestct_labels.csv"),
        (rad_chestct, [*here, "--data-root", str(cohort.rad_chestct), "--labels",
                       str(cohort.ct_rate / "valid_labels.csv")], "NoteAcc_DEID"),
    ]  # fmt: skip
    for main, arguments, expected in cases:
        assert expected in fails(capsys, main, arguments), arguments
