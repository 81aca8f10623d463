"""The scripts of natural images from end to end, with a small model: training, retrieval, pictures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from itemizedclip_2d import visualize_shards
from itemizedclip_2d.benchmarks import retrieval_main
from itemizedclip_2d.recipes import itemized_cc03m, itemized_cc03m_debug
from itemizedclip_2d.recipes import main as train_2d
from itemizedclip_2d.retrieval_sets import coco_val2017
from itemizedclip_2d.shards import ShardDataset
from natural_files import CaptionedImages, ShardFolder, write_coco, write_flickr, write_karpathy, write_shards

from itemizedclip.evaluation.ranks import retrieval_metrics
from itemizedclip.evaluation.tcsim import score_images_plainly
from itemizedclip.models.factory import create_transform, load_pretrained
from itemizedclip.runtime.processes import Stopped

ROOT = Path(__file__).parents[2]
DEBUG = ["--recipe", "itemized_cc0.3M_debug", "--device", "cpu"]


@dataclass(frozen=True)
class World:
    """Data of all kinds, and a checkpoint trained on the shards by the script."""

    shards: ShardFolder
    coco: CaptionedImages
    flickr: CaptionedImages
    run: Path
    log: str

    @property
    def checkpoint(self) -> Path:
        return self.run / "checkpoints" / "epoch_2.pt"


def script(name: str, *flags: object, check: bool = True, **variables: object) -> subprocess.CompletedProcess:
    """A script of the project, with these variables alone."""
    known = ("PATH", "HOME", "TMPDIR", "LANG", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "WANDB_MODE", "LD_LIBRARY_PATH")
    environment = {key: value for key, value in os.environ.items() if key in known}
    environment |= {"PYTHON": sys.executable, "GPUS": "1"} | {key: str(value) for key, value in variables.items()}
    done = subprocess.run(
        ["bash", str(ROOT / name), *map(str, flags)], env=environment, capture_output=True, text=True, timeout=300,
        cwd=ROOT / "tests",
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    root = tmp_path_factory.mktemp("natural")
    shards = write_shards(root / "cc", num_shards=4, per_shard=6, gaps=["000010003"], without_items=["000020001"])
    done = script(
        "train_itemized_cc0.3M.sh", *DEBUG, "--name", "a",
        TRAIN_SHARDS=shards.pattern(0, 2), VAL_SHARDS=shards.shards[3], ITEMS_JSON=shards.items_path,
        LOGS=root / "logs",
    )  # fmt: skip
    return World(shards, write_coco(root / "coco"), write_flickr(root / "flickr"), root / "logs" / "a", done.stderr)


def train_flags(world: World, logs: Path, *more: object) -> list[str]:
    flags = [
        *DEBUG, "--logs", logs, "--train-data", world.shards.pattern(0, 2), "--val-data", world.shards.shards[3],
        "--external-captions", world.shards.items_path, *more,
    ]  # fmt: skip
    return [str(flag) for flag in flags]


def refused(capfd, argv: list[str], main=train_2d) -> str:
    """What a command says on standard error when it exits with an error."""
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code not in (0, None)
    return capfd.readouterr().err


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


# --- training --------------------------------------------------------------------------------------------------------


def test_the_script_trains_and_validates(world):
    assert "Training shards: 17 images (shards: 3); their own captions instead of items from" in world.log
    assert "Validation shards: 6 images (shards: 1)" in world.log
    assert "2 epochs of 4 steps of 4 images" in world.log
    saved = torch.load(world.checkpoint, weights_only=True)
    assert saved["step"] == 8
    assert saved["options"]["data"]["train_data"] == world.shards.pattern(0, 2)
    assert {"val/text_to_image_R@1", "val/worst_item_rank"} <= saved["metrics"].keys()
    params = json.loads((world.run / "params.json").read_text())
    assert params["loading"]["num_sampled_captions"] == 7


def test_two_processes_train_on_the_same_samples(world, tmp_path):
    done = script(
        "train_itemized_cc0.3M.sh", *DEBUG, "--name", "two", "--batch-size", 2, "--epochs", 1, "--workers", 1,
        TRAIN_SHARDS=world.shards.pattern(0, 2), VAL_SHARDS=world.shards.shards[3], ITEMS_JSON=world.shards.items_path,
        LOGS=tmp_path, GPUS=2,
    )  # fmt: skip
    assert "fp32 on 2 × cpu; 1 epochs of 4 steps of 4 images" in done.stderr
    saved = torch.load(tmp_path / "two/checkpoints/epoch_1.pt", weights_only=True)
    assert saved["data_fingerprint"] == torch.load(world.checkpoint, weights_only=True)["data_fingerprint"]
    # The evaluator of the same weights gives one process what it gave two.
    model = load_pretrained(tmp_path / "two/checkpoints/epoch_1.pt").model
    assert validation_of(world, model) == pytest.approx(saved["metrics"], rel=1e-6)


def validation_of(world: World, model) -> dict[str, float]:
    """What training would report for the weights of `model`, computed here in one process."""
    from itemizedclip.training.recipes import open_data, parse_run
    from itemizedclip.training.run import launch_run

    options = parse_run({"itemized_cc0.3M_debug": itemized_cc03m_debug}, "rsicd", train_flags(world, Path("unused")))
    with launch_run(options) as ranks:
        data, _ = open_data(options, model, ranks)
        (evaluator,) = data.evaluators
        return {f"val/{name}": value for name, value in evaluator.run(model).items()}


def test_a_run_that_is_stopped_and_resumed_equals_one_that_is_not(world, tmp_path, monkeypatch):
    flags = train_flags(world, tmp_path, "--val-frequency", 0, "--log-every-n-steps", 1)
    train_2d([*flags, "--name", "whole"])
    read: list[tuple[int, int]] = []
    true_getitem = ShardDataset.__getitem__

    def counted(self, key):
        read.append(key)
        if len(read) == 1 + 4 * 4 + 6:  # the start-up check, then the first epoch, then into the second step
            os.kill(os.getpid(), signal.SIGTERM)
        return true_getitem(self, key)

    monkeypatch.setattr(ShardDataset, "__getitem__", counted)
    with pytest.raises(Stopped) as stopped_by:
        train_2d([*flags, "--name", "cut"])
    assert (stopped_by.value.code, stopped_by.value.result.interrupted) == (75, True)
    stopped = torch.load(tmp_path / "cut/checkpoints/latest.pt", weights_only=True)
    assert (stopped["epoch"], stopped["step_in_epoch"]) == (1, 2)
    read.clear()
    assert not train_2d([*flags, "--name", "cut", "--resume", "latest"]).interrupted
    assert [epoch for epoch, _ in read] == [0] + 8 * [1]  # the check, and the two steps that were left
    whole, cut = (weights(tmp_path / name / "checkpoints/epoch_2.pt") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_bad_images_are_replaced_up_to_a_fraction(world, tmp_path, capfd):
    shards = write_shards(tmp_path / "cc", num_shards=2, per_shard=6)
    content = bytearray(shards.shards[0].read_bytes())
    start = content.find(b"\xff\xd8")
    content[start : start + 300] = bytes(300)
    shards.shards[0].write_bytes(content)
    flags = [
        *DEBUG, "--logs", str(tmp_path), "--train-data", shards.pattern(), "--external-captions",
        str(shards.items_path), "--epochs", "1",
    ]  # fmt: skip
    train_2d([*flags, "--max-bad-fraction", "0.1", "--name", "a"])
    assert "bad sample replaced" in (tmp_path / "a/log.txt").read_text()
    assert "00000.tar: 000000000.jpg: no readable image" in (tmp_path / "a/log.txt").read_text()
    capfd.readouterr()
    assert "more than --max-bad-fraction allows" in refused(capfd, [*flags, "--max-bad-fraction", "0.05"])
    assert "000000000.jpg: no readable image" in refused(capfd, [*flags, "--on-bad-sample", "stop"])


def test_other_ways_to_give_data(world, tmp_path):
    flags = [
        *DEBUG, "--logs", str(tmp_path), "--epochs", "1", "--name", "a", "--dataset-resampled", "--shard-window", "1",
        "--train-data", f"{world.shards.shards[0]}::{world.shards.pattern(1, 2)}", "--train-num-samples", "12",
    ]  # fmt: skip
    result = train_2d(flags)
    assert (result.step, result.metrics) == (3, {})
    options = json.loads((tmp_path / "a/params.json").read_text())["data"]
    assert options["external_captions"] == "captions"


def test_recipe_is_the_published_one():
    options = itemized_cc03m()
    o = options.objective
    assert (o.ila_weight, o.ila_keep_rate, o.kta_weight, o.key_token_fraction) == (1, 0.8, 1, 0.2)
    assert (o.mps_weight, o.iis_weight, o.worst_positive_factor, o.normal_check) == (0.1, 0.1, 1.5, False)
    p = options.optimizer
    assert (p.lr, p.weight_decay, p.beta1, p.beta2, p.eps) == (5e-4, 0.8, 0.9, 0.98, 1e-8)
    assert (p.warmup, p.epochs, p.lr_scheduler) == (2000, 100, "cosine")
    assert (options.loading.batch_size, options.loading.num_sampled_captions) == (128, 7)
    assert (options.model.model, options.model.precision) == ("ViT-B-16-ItemizedCLIP", "amp")
    assert options.data.train_num_samples == 300_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train-data", ""], "--train-data is not set; give the training shards"),
        (["--train-data", "/nowhere/{0..3}.tar"], "4 of 4 files do not exist"),
        (["--external-captions", "/nowhere.json"], "/nowhere.json: no such file"),
        (["--batch-size", "40"], "17 samples do not fill one step of 40"),
        (["--val-data", "/nowhere/{0..3}.tar"], "4 of 4 files do not exist"),
        (["--train-num-samples", "0"], "--train-num-samples is 0; expected at least 1"),
        (["--shard-window", "-1"], "--shard-window is -1; expected at least 0"),
        (["--recipe", "itemized_cc03M"], "no recipe named itemized_cc03M"),
        (["--rsicd-data-dir", "x"], "Unrecognized options: --rsicd-data-dir"),
    ],
)
def test_wrong_training_flags(world, tmp_path, capfd, flags, message):
    said = " ".join(refused(capfd, train_flags(world, tmp_path, *flags)).replace("│", " ").split())
    assert message in said
    assert "Traceback" not in said


def test_errors_of_several_processes_are_said_once(world, tmp_path):
    done = script(
        "train_itemized_cc0.3M.sh", *DEBUG, TRAIN_SHARDS="/nowhere.tar", VAL_SHARDS="none", ITEMS_JSON="captions",
        LOGS=tmp_path, GPUS=2, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("1 of 1 files do not exist") == 1


# --- retrieval -------------------------------------------------------------------------------------------------------


def results(path: Path) -> dict:
    return json.loads(path.read_text())


def plain_metrics(checkpoint: Path, coco: CaptionedImages, scoring: str) -> dict[str, float]:
    """The table from one matrix of scores, computed image by image with the published head."""
    loaded = load_pretrained(checkpoint)
    model = loaded.model
    dataset = coco_val2017(coco.root, create_transform(loaded.config, is_train=False))
    texts = [text for index in range(len(dataset)) for text in dataset.items(index)]
    owner = torch.tensor([index for index in range(len(dataset)) for _ in dataset.items(index)])
    with torch.no_grad():
        features = [model.encode_image(dataset[index].image[None]) for index in range(len(dataset))]
        text_MD = torch.cat([model.encode_text(loaded.tokenizer([text])) for text in texts])
        if scoring == "tcsim":
            tokens = torch.cat([f.tokens_BLD for f in features])
            scores = score_images_plainly(model.head, tokens, text_MD, normalise_tokens=False)
        else:
            images = torch.cat([f.global_BD for f in features])
            scores = torch.nn.functional.cosine_similarity(images[:, None], text_MD[None], dim=-1)
    # Texts that read the same tie exactly.
    same = {text: number for number, text in reversed(list(enumerate(texts)))}
    return retrieval_metrics(scores[:, [same[text] for text in texts]], owner)


@pytest.mark.parametrize("scoring", ["tcsim", "global"])
def test_coco_numbers_equal_the_plain_ones(world, tmp_path, scoring):
    flag = "--inference-with-flair" if scoring == "tcsim" else "--no-inference-with-flair"
    argv = ["coco", "--resume", world.checkpoint, "--coco-data-root-dir", world.coco.root, "--device", "cpu", flag]
    metrics = retrieval_main([str(a) for a in [*argv, "--workers", 0, "--output", tmp_path / "r.json"]])
    assert metrics == pytest.approx(plain_metrics(world.checkpoint, world.coco, scoring), abs=1e-9)
    assert len(metrics) == 21
    written = results(tmp_path / "r.json")
    assert written["metrics"] == metrics
    assert (written["facts"]["num_images"], written["facts"]["num_texts"]) == (9, 48)
    assert written["facts"]["scoring"] == scoring
    assert written["protocol"] == "corrected"
    assert {"annotations_sha256", "checkpoint_sha256", "texts_sha256"} <= written["facts"].keys()


def test_scripts_give_the_same_numbers_for_any_number_of_processes(world, tmp_path):
    coco = {"COCO_DIR": world.coco.root, "RESUME": world.checkpoint}
    one = script("inference_coco.sh", "--batch-size", 2, "--workers", 0, "--output", tmp_path / "1.json", **coco)
    script("inference_coco.sh", "--batch-size", 2, "--workers", 1, "--output", tmp_path / "2.json", GPUS=2, **coco)
    assert results(tmp_path / "1.json") == results(tmp_path / "2.json")
    assert "mean rank" in one.stdout
    assert "worst caption" in one.stdout
    assert "9 images, 48 captions, tcsim" in one.stdout
    assert "coco_val2017 has 5,000 images" in one.stderr


def test_flickr_script(world):
    done = script("inference_flickr.sh", FLICKR_DIR=f"{world.flickr.root}/", RESUME=world.checkpoint)
    assert "8 images, 40 captions, tcsim" in done.stdout
    written = results(world.checkpoint.with_suffix(".flickr30k_val.tcsim.json"))
    assert written["evaluation"] == "flickr30k_val"


def test_karpathy_split(world, tmp_path):
    written = write_karpathy(tmp_path / "coco")
    argv = ["coco", "--split", "karpathy", "--coco-data-root-dir", written.root, "--resume", world.checkpoint]
    retrieval_main([str(a) for a in [*argv, "--output", tmp_path / "r.json", "--workers", 0, "--device", "cpu"]])
    assert results(tmp_path / "r.json")["facts"]["num_texts"] == 15


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "0"], "--batch-size is 0; expected at least 1"),
        (["--splitt", "val2017"], "Unrecognized options: --splitt"),
        (["--resume", "/nowhere.pt"], "/nowhere.pt: checkpoint does not exist"),
        (["--coco-data-root-dir", "/nowhere"], "/nowhere: no such folder; expected COCO's folder"),
        (["--split", "karpathy"], "bring dataset_coco.json (caption_datasets.zip"),
        (["--output", "/"], "results cannot be written there"),
    ],
)
def test_wrong_retrieval_flags(world, capfd, flags, message):
    argv = ["coco", "--resume", world.checkpoint, "--coco-data-root-dir", world.coco.root, "--device", "cpu", *flags]
    said = " ".join(refused(capfd, [str(a) for a in argv], retrieval_main).replace("│", " ").split())
    assert message in said
    assert "inference_coco.sh" in said
    assert "Traceback" not in said


def test_a_command_must_be_named(capfd):
    assert "expected a command first: coco or flickr" in refused(capfd, ["cocoo"], retrieval_main)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_ends_the_evaluation_with_its_name_or_is_left_out(world, tmp_path, capfd, workers):
    written = write_coco(tmp_path / "coco")
    name = list(written.captions)[3]
    path = written.root / "images/val2017" / name
    path.write_bytes(path.read_bytes()[:600])
    output = tmp_path / "r.json"
    argv = ["coco", "--resume", world.checkpoint, "--coco-data-root-dir", written.root, "--workers", workers]
    argv = [str(a) for a in [*argv, "--device", "cpu", "--output", output]]
    said = refused(capfd, argv, retrieval_main)
    assert said.splitlines()[-1].startswith(f"inference_coco.sh: error: {path}: no readable image")
    assert "Traceback" not in said
    assert not output.exists()
    retrieval_main([*argv, "--on-bad-sample", "skip"])
    facts = results(output)["facts"]
    assert list(facts["unusable"]) == [name]
    assert (facts["num_images"], facts["num_texts"]) == (8, 48 - len(written.captions[name]))
    assert facts["is_whole_set"] is False
    printed = capfd.readouterr()
    assert "8 images, " in printed.out
    assert "1 listed images are missing or cannot be read; see r.json" in printed.out
    assert f"{path}: no readable image" in printed.err


# --- variables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "variables"),
    [
        ("train_itemized_cc0.3M.sh", ["TRAIN_SHARDS", "VAL_SHARDS", "ITEMS_JSON"]),
        ("inference_coco.sh", ["COCO_DIR", "RESUME"]),
        ("inference_flickr.sh", ["FLICKR_DIR", "RESUME"]),
        ("visualize_itemized_cc3m.sh", ["VAL_SHARDS", "ITEMS_JSON", "RESUME"]),
    ],
)
def test_unset_variables_are_named(name, variables):
    done = script(name, check=False)
    assert done.returncode == 2
    assert f"{name}: set these environment variables first" in done.stderr
    assert [line.split()[0] for line in done.stderr.splitlines()[1:-1]] == variables
    assert all(f"{variable}=" in done.stderr.splitlines()[-1] for variable in variables)
    one_given = script(name, check=False, **{variables[0]: "x"})
    assert variables[0] not in [line.split()[0] for line in one_given.stderr.splitlines()[1:-1]]


def test_help_needs_no_variable():
    shown = script("train_itemized_cc0.3M.sh", "--help").stdout
    assert "--train-num-samples" in shown


# --- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_of_shards(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")  # items stay on one line of the table
    argv = [
        "--resume", world.checkpoint, "--device", "cpu", "--val-data", world.shards.pattern(2, 3),
        "--external-captions", world.shards.items_path, "--output", tmp_path, "--viz-id", "1,7",
    ]  # fmt: skip
    visualize_shards.main([str(a) for a in argv])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1_000020001.png", "7_000030001.png"]
    printed = capsys.readouterr().out
    assert all(item in printed for item in world.shards.items[15_001])
    # The item file lacks the second sample of shard 2: its own captions are shown.
    assert "there is" in printed
    assert printed.count("│ 1 │") == 2
