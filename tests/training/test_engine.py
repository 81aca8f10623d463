"""The task (gradient caching, frozen towers), the optimizer, precision, and whole runs of the toy model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from toy import ToyDataset, ToyModel, ToyRun, toy_options, toy_tokenizer, toy_train

from itemizedclip.data.batch import BadSampleError, ItemBatch, ItemCollator
from itemizedclip.data.preflight import PreflightError
from itemizedclip.runtime.errors import reported_errors
from itemizedclip.runtime.precision import Precision, resolve_precision
from itemizedclip.runtime.processes import SetupError, StopRequest, choose_device
from itemizedclip.training import run as run_module
from itemizedclip.training import task as task_module
from itemizedclip.training.engine import NonFiniteError
from itemizedclip.training.folder import TrackingError, choose_run_folder
from itemizedclip.training.optimizer import create_optimizer, create_schedule, decaying_parameters, parameter_groups
from itemizedclip.training.options import LoadingSettings, ObjectiveSettings, OptimizerSettings
from itemizedclip.training.run import cast_towers
from itemizedclip.training.task import ItemizedTask
from itemizedclip.training.tracking import check_trackers, drop_lines_after

TOY = str(Path(__file__).parents[1] / "helpers" / "toy.py")
OBJECTIVE = ObjectiveSettings(ila_keep_rate=0.8)


def toy_batch(num_images: int = 8) -> ItemBatch:
    dataset = ToyDataset(num_images)
    return ItemCollator(toy_tokenizer, 4)([dataset[(0, i)] for i in range(num_images)])


def toy_task(num_chunks: int = 1, *, dropout: float = 0.0, objective: ObjectiveSettings = OBJECTIVE) -> ItemizedTask:
    torch.manual_seed(0)
    return ItemizedTask(ToyModel(dropout), objective, num_chunks=num_chunks)


LossAndGradients = tuple[float, dict[str, torch.Tensor]]


def loss_and_gradients(task: ItemizedTask, num_images: int = 8) -> LossAndGradients:
    torch.manual_seed(1)
    loss = task(toy_batch(num_images))["loss"]
    loss.backward()
    return loss.item(), {name: p.grad for name, p in task.model.named_parameters() if p.grad is not None}


def assert_same(a: LossAndGradients, b: LossAndGradients, rtol: float) -> None:
    assert a[0] == pytest.approx(b[0], rel=rtol)
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        worst = (a[1][name] - b[1][name]).abs().max() / b[1][name].abs().max().clamp(min=1e-12)
        assert worst < rtol, f"{name}: relative error {worst:.1e}"


def curve(folder: Path, kind: str = "train") -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in curve(folder)]


def run_toy(*flags: object, ranks: int = 1, check: bool = True) -> subprocess.CompletedProcess:
    """The toy run in processes of its own."""
    # "--" keeps torchrun from reading --logs as one of its own flags.
    launcher = ["-m", "itemizedclip.runtime.torchrun", "--standalone", "--nproc_per_node", str(ranks), "--"]
    command = [sys.executable, *(launcher if ranks > 1 else []), TOY, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


# --- gradient caching ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_chunks", [2, 3, 8, 20])
def test_chunks_give_the_gradients_of_the_whole_batch(num_chunks):
    whole = loss_and_gradients(toy_task())
    assert {"logit_scale", "logit_bias", "visual_proj.attn.in_proj_weight"} <= whole[1].keys()
    assert_same(loss_and_gradients(toy_task(num_chunks)), whole, 2e-6)


def test_recomputing_repeats_dropout(monkeypatch):
    recomputed = loss_and_gradients(toy_task(4, dropout=0.5))
    monkeypatch.setattr(task_module, "checkpoint", lambda encode, *arguments, use_reentrant: encode(*arguments))
    kept = loss_and_gradients(toy_task(4, dropout=0.5))
    assert_same(recomputed, kept, 1e-6)
    assert loss_and_gradients(toy_task(4))[0] != pytest.approx(kept[0], rel=1e-3)


def test_chunks_nest_with_activation_checkpointing():
    plain, nested = toy_task(4, dropout=0.5), toy_task(4, dropout=0.5)
    nested.model.set_grad_checkpointing(True)
    assert_same(loss_and_gradients(nested), loss_and_gradients(plain), 1e-6)


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors made and not yet freed, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function, kinds, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen.add(storage._cdata)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return out

    def _free(self, key: int, num_bytes: int) -> None:
        self.seen.discard(key)
        self.live -= num_bytes


class DeepTower(nn.Module):
    """A tower whose activations outweigh everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 2, stride=2)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 16)) for _ in range(8))

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return tokens


def peak_bytes(num_images: int, num_chunks: int) -> int:
    torch.manual_seed(0)
    model = ToyModel(0.0)
    model.image = DeepTower()
    model.visual_proj.requires_grad_(False)
    objective = ObjectiveSettings(ila_weight=0, kta_weight=0, iis_weight=0, mps_weight=1)
    task = ItemizedTask(model, objective, num_chunks=num_chunks)
    batch = toy_batch(num_images)
    with LiveBytes() as counter:
        task(batch)["loss"].backward()
    return counter.peak


def test_activation_memory_is_that_of_one_chunk():
    whole, chunk = peak_bytes(64, 1), peak_bytes(8, 1)
    assert whole > 6 * chunk  # the towers dominate, so the comparison means something
    assert peak_bytes(64, 8) < 1.3 * chunk


# --- frozen towers, idle parameters --------------------------------------------------------------------------------


@pytest.mark.parametrize(("image", "text"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("num_chunks", [1, 2])
def test_locked_towers_run_in_evaluation_mode_without_gradients(image, text, num_chunks):
    model = ToyModel(0.5)
    model.lock(image=image, text=text)
    task = ItemizedTask(model, OBJECTIVE, num_chunks=num_chunks).train()
    assert (model.image.training, model.text.training) == (not image, not text)
    runs = []
    model.image.register_forward_pre_hook(lambda module, _: runs.append(torch.is_grad_enabled()))
    _, gradients = loss_and_gradients(task)
    assert runs == [not image] * len(runs)
    assert any(name.startswith("image.") for name in gradients) is not image
    assert any(name.startswith("text.") for name in gradients) is not text
    assert "visual_proj.attn.in_proj_weight" in gradients
    # A frozen tower is not run again in the backward pass.
    assert len(runs) == (num_chunks if image or num_chunks == 1 else 2 * num_chunks)


def test_global_terms_alone_leave_the_head_as_it_is(tmp_path):
    only_global = ObjectiveSettings(ila_weight=0, kta_weight=0, iis_weight=0, mps_weight=1)
    result = toy_train(toy_options(tmp_path, objective=only_global))
    weights = torch.load(result.checkpoint, weights_only=True)["state_dict"]
    torch.manual_seed(0)
    fresh = ToyModel().state_dict()
    assert torch.equal(weights["visual_proj.attn.in_proj_weight"], fresh["visual_proj.attn.in_proj_weight"])
    assert not torch.equal(weights["image.patches.weight"], fresh["image.patches.weight"])
    assert set(result.losses) == {"loss", "mps"}


@pytest.mark.parametrize("off", ["ila_weight", "kta_weight", "mps_weight", "iis_weight"])
def test_every_term_can_be_switched_off(tmp_path, off):
    result = toy_train(toy_options(tmp_path, objective=replace(OBJECTIVE, **{off: 0.0})))
    assert off.removesuffix("_weight") not in result.losses
    assert math.isfinite(result.losses["loss"])


def test_a_parameter_outside_the_loss_is_named(tmp_path):
    model = ToyModel()
    model.image.idle = nn.Linear(2, 2)
    with pytest.raises(SetupError, match=r"2 trainable parameters take no part in the loss \(image\.idle\.weight"):
        toy_train(toy_options(tmp_path), model=model)


# --- optimizer and schedule ----------------------------------------------------------------------------------------


def test_every_trainable_parameter_is_in_one_group_and_only_matrices_decay():
    model = ToyModel()
    model.image.norm.weight = nn.Parameter(torch.ones(1, 16))  # a norm of two dimensions
    model.text.embedding.requires_grad_(False)
    decaying = decaying_parameters(model)
    assert decaying == {
        "image.patches.weight", "image.mlp.0.weight", "image.mlp.3.weight", "text.embedding.weight", "text.out.weight",
        "visual_proj.attn.in_proj_weight", "visual_proj.attn.out_proj.weight",
    }  # fmt: skip
    groups = parameter_groups(model, 0.3)
    assert [group["weight_decay"] for group in groups] == [0.0, 0.3]
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert {names[id(p)] for p in groups[1]["params"]} == decaying - {"text.embedding.weight"}
    with pytest.raises(ValueError, match="no parameter is trainable"):
        parameter_groups(model.requires_grad_(False), 0.3)


def test_the_optimizer_takes_the_options():
    settings = OptimizerSettings(lr=1e-3, beta1=0.8, beta2=0.9, eps=1e-5, weight_decay=0.7)
    optimizer = create_optimizer(ToyModel(), settings, torch.device("cpu"))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    assert (optimizer.defaults["eps"], optimizer.param_groups[1]["weight_decay"]) == (1e-5, 0.7)


def test_schedules_are_warm_up_then_cosine_or_constant():
    cosine = create_schedule(OptimizerSettings(lr=2.0, warmup=4), 14)
    assert [cosine(step) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    for step in range(4, 14):
        assert cosine(step) == pytest.approx(1 + math.cos(math.pi * (step - 4) / 10))
    const = create_schedule(OptimizerSettings(lr=2.0, warmup=0, lr_scheduler="const"), 14)
    assert {const(step) for step in range(14)} == {2.0}
    with pytest.raises(ValueError, match="--warmup 4 is longer than the run of 3 steps"):
        create_schedule(OptimizerSettings(warmup=4), 3)


# --- precision and device ------------------------------------------------------------------------------------------


def test_precision_on_a_cpu():
    cpu = torch.device("cpu")
    amp = resolve_precision("amp", cpu)
    assert (amp.name, amp.autocast_dtype) == ("fp32", None)
    assert "needs a GPU" in str(amp.notice)
    assert resolve_precision("amp_bf16", cpu).autocast_dtype == torch.bfloat16
    assert not resolve_precision("amp_bf16", cpu).scaler().is_enabled()


@pytest.mark.parametrize("name", ["amp_bf16", "bf16"])
def test_bfloat16_is_near_float32_and_losses_are_float32(name):
    exact = loss_and_gradients(toy_task(2))
    task = toy_task(2)
    precision = resolve_precision(name, torch.device("cpu"))
    cast_towers(task.model, precision)
    assert task.model.image.patches.weight.dtype == (torch.bfloat16 if name == "bf16" else torch.float32)
    assert task.model.visual_proj.ln_q.weight.dtype == task.model.logit_scale.dtype == torch.float32
    torch.manual_seed(1)
    with precision.autocast():
        outputs = task(toy_batch())
    outputs["loss"].backward()
    assert {value.dtype for value in outputs.values()} == {torch.float32}
    assert outputs["loss"].item() == pytest.approx(exact[0], rel=0.02)
    assert all(torch.isfinite(p.grad).all() for p in task.parameters())


def test_logits_of_every_term_are_computed_in_float32_under_autocast():
    """Features given in float32: autocast may touch the head's projections, not τ·cos + β."""
    objective = ObjectiveSettings(ila_weight=0, kta_weight=0, iis_weight=0, mps_weight=1)
    exact = loss_and_gradients(toy_task(objective=objective))[0]

    class Float32Towers(ToyModel):
        def encode_image(self, images, *, series_names=None):
            with torch.autocast("cpu", enabled=False):
                return super().encode_image(images, series_names=series_names)

        def encode_text(self, tokens_NC):
            with torch.autocast("cpu", enabled=False):
                return super().encode_text(tokens_NC)

    torch.manual_seed(0)
    task = ItemizedTask(Float32Towers(0.0), objective)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task(toy_batch())["loss"]
    assert float(loss.detach()) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("precision", ["amp", "amp_bf16", "bf16", "fp32"])
def test_every_precision_trains_on_a_cpu(tmp_path, precision):
    options = toy_options(tmp_path)
    result = toy_train(replace(options, model=replace(options.model, precision=precision)))
    values = losses(result.folder)
    assert sum(values[-4:]) < 0.7 * sum(values[:4])


def float16_on_the_cpu(name: str, device: torch.device) -> Precision:
    """What amp is on a GPU."""
    return Precision("amp", "cpu", torch.float16)


def test_loss_scaling_skips_overflows_lowers_the_scale_and_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "resolve_precision", float16_on_the_cpu)
    options = toy_options(tmp_path)
    options = replace(options, run=replace(options.run, name="a"))
    first = toy_train(options)
    log = (first.folder / "log.txt").read_text()
    skipped = log.count("float16 gradients overflowed; the loss scale is lowered")
    assert skipped >= 1  # the scale starts at 65,536, too high for these losses
    scale = torch.load(first.checkpoint, weights_only=True)["scaler"]["scale"]
    assert scale == 65536 / 2**skipped
    assert sum(losses(first.folder)[-4:]) < 0.7 * sum(losses(first.folder)[:4])
    before = losses(first.folder)
    toy_train(replace(options, run=replace(options.run, resume=str(first.folder / "checkpoints/epoch_1.pt"))))
    assert losses(first.folder) == before


def test_devices_that_do_not_exist_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", 0, 1).type == "cpu"
    with pytest.raises(SetupError, match="--device cuda: PyTorch sees no GPU; use --device cpu"):
        choose_device("cuda", 0, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1, 2) == torch.device("cuda", 1)
    assert choose_device("cuda:1", 0, 1) == torch.device("cuda", 1)
    with pytest.raises(SetupError, match="wants GPU 2, there are 2: start at most 2 processes"):
        choose_device("auto", 2, 3)
    with pytest.raises(SetupError, match="use --device cuda, one GPU each"):
        choose_device("cuda:1", 0, 2)


# --- whole runs ----------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_folder_and_learns(tmp_path):
    options = toy_options(tmp_path)
    result = toy_train(replace(options, run=replace(options.run, name="a")))
    assert result.folder == tmp_path / "a"
    assert sorted(p.name for p in result.folder.iterdir()) == ["checkpoints", "log.txt", "metrics.jsonl", "params.json"]
    params = json.loads((result.folder / "params.json").read_text())
    assert (params["run"]["name"], params["optimizer"]["epochs"], params["model_config"]["name"]) == ("a", 2, "toy")
    lines = curve(result.folder)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert lines[-1].keys() >= {
        "epoch", "samples", "loss", "ila", "kta", "mps", "iis", "lr", "logit_scale", "logit_bias", "grad_norm",
        "images_per_s", "step_s", "data_wait_s", "peak_memory_mib", "skipped_samples",
        "towers_s", "loss_s", "exchange_s", "optimizer_s", "tflop_per_s", "mfu",
    }  # fmt: skip
    parts = sum(lines[-1][f"{part}_s"] for part in ("towers", "loss", "exchange", "optimizer"))
    assert 0 < parts + lines[-1]["data_wait_s"] <= lines[-1]["step_s"], "no second is counted twice"
    flop = [line["tflop_per_s"] * line["step_s"] for line in lines]
    assert flop == pytest.approx(flop[:1] * len(flop)), "counted once, at the first step"
    assert lines[-1]["samples"] == 80
    weights = options.objective
    total = sum(getattr(weights, f"{term}_weight") * lines[3][term] for term in ("ila", "kta", "mps", "iis"))
    assert lines[3]["loss"] == pytest.approx(total, rel=1e-5)
    assert sum(losses(result.folder)[-5:]) < 0.6 * sum(losses(result.folder)[:5])
    assert [line["epoch"] for line in curve(result.folder, "eval")] == [1, 2]
    assert result.metrics == {"toy/sum": curve(result.folder, "eval")[-1]["toy/sum"]}
    log = (result.folder / "log.txt").read_text()
    for expected in ("2 epochs of 10 steps of 4 images", "epoch 2 evaluation", "finished after 20 of 20 steps"):
        assert expected in log


def test_joined_and_cached_batches_take_the_same_steps(tmp_path):
    """batch 8 at once = 4 × 2 joined = 4 × 2 cached = 2 × 2 × 2; without dropout, which draws per chunk."""
    curves = []
    for name, sizes in {"once": (8, 1, 1), "joined": (4, 2, 1), "cached": (4, 1, 2), "both": (2, 2, 2)}.items():
        options = toy_options(tmp_path, loading=LoadingSettings(*sizes, num_sampled_captions=4, workers=0))
        options = replace(options, run=replace(options.run, name=name), data=replace(options.data, dropout=0.0))
        curves.append(losses(toy_train(options).folder))
    assert len(curves[0]) == 10
    for other in curves[1:]:
        assert other == pytest.approx(curves[0], rel=1e-3)
        assert other[0] == pytest.approx(curves[0][0], rel=1e-6)


def test_loader_processes_change_nothing(tmp_path):
    options = toy_options(tmp_path)
    alone = toy_train(replace(options, run=replace(options.run, name="alone")))
    loading = replace(options.loading, workers=2)
    helped = toy_train(replace(options, run=replace(options.run, name="helped"), loading=loading))
    assert losses(helped.folder) == losses(alone.folder)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> tuple[Path, str]:
    """Several runs on two ranks, in one start of the processes: their folder and what they printed."""
    logs = tmp_path_factory.mktemp("two_ranks")
    exact = ["--logs", logs, "--dropout", 0, "--samples", 43]
    runs = [
        [*exact, "--name", "plain", "--batch-size", 4],
        [*exact, "--name", "cached", "--batch-size", 2, "--accum-freq", 2, "--workers", 1],
        ["--logs", logs, "--name", "locked", "--lock-text", "--grad-checkpointing", "--accum-freq", 2, "--epochs", 1],
        ["--logs", logs, "--name", "nan", "--nan", 7, "--epochs", 1],
    ]
    done = run_toy(*(flag for run in runs for flag in (*run, "+")), "--logs", logs, "--name", "last", ranks=2)
    return logs, done.stderr


def test_two_ranks_take_equal_steps_cache_exactly_and_evaluate_like_one(two_ranks):
    logs, _ = two_ranks
    plain, cached = losses(logs / "plain"), losses(logs / "cached")
    assert len(plain) == 10  # 43 // (2 · 4) = 5 steps per epoch
    assert cached == pytest.approx(plain, rel=1e-3)
    assert cached[0] == pytest.approx(plain[0], rel=1e-6)
    assert curve(logs / "plain")[-1]["samples"] == 80
    weights = torch.load(logs / "plain/checkpoints/epoch_2.pt", weights_only=True)["state_dict"]
    assert all(not name.startswith(("module.", "model.")) for name in weights)
    model = ToyModel()
    model.load_state_dict(weights)
    with torch.no_grad():
        expected = sum(
            float(model.eval().encode_image(ToyDataset(10)[i].image[None]).global_BD.sum()) for i in range(10)
        )
    assert curve(logs / "plain", "eval")[-1]["toy/sum"] == pytest.approx(expected, rel=1e-4)


def test_two_ranks_lock_a_tower_checkpoint_activations_and_cache_gradients_together(two_ranks):
    logs, _ = two_ranks
    assert "finished after 2 of 2 steps" in (logs / "locked/log.txt").read_text()


@pytest.mark.slow
def test_compiled_and_recomputed_blocks_give_the_same_losses_on_one_and_two_ranks(tmp_path):
    for ranks in (1, 2):
        flags = ["--logs", tmp_path, "--dropout", 0, "--epochs", 1, "--samples", 16, "--warmup", 1, "--name"]
        compiled = ["--torchcompile", "--grad-checkpointing", "--grad-checkpointing-keeps", "attention"]
        run_toy(*flags, f"plain{ranks}", "+", *flags, f"compiled{ranks}", *compiled, ranks=ranks)
        plain, compiled = losses(tmp_path / f"plain{ranks}"), losses(tmp_path / f"compiled{ranks}")
        assert compiled == pytest.approx(plain, rel=1e-4)
        weights = torch.load(tmp_path / f"compiled{ranks}/checkpoints/epoch_1.pt", weights_only=True)["state_dict"]
        assert weights.keys() == ToyModel().state_dict().keys()


# --- what goes wrong -----------------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_is_skipped_and_names_its_images(tmp_path, monkeypatch):
    options = toy_options(tmp_path)
    # Preflight looks at sample 0 only.
    result = toy_train(replace(options, data=replace(options.data, nan=(7,))))
    log = (result.folder / "log.txt").read_text()
    assert log.count("the loss is not finite; images: toy-") == 2  # once per epoch
    assert "toy-7" in log
    weights = torch.load(result.checkpoint, weights_only=True)["state_dict"]
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert [line["loss"] for line in curve(result.folder) if line["loss"] == "nan"] == ["nan", "nan"]
    assert result.step == 20


def test_training_stops_after_too_many_such_steps(tmp_path):
    options = toy_options(tmp_path)
    options = replace(
        options,
        optimizer=replace(options.optimizer, max_nonfinite_steps=3),
        data=replace(options.data, nan=tuple(range(1, 40))),
    )
    options = replace(options, run=replace(options.run, name="a"))
    with pytest.raises(NonFiniteError, match=r"3 steps in a row, up to step 3, .* images: toy-.*lower --lr"):
        toy_train(options)
    assert "ERROR ended by NonFiniteError: 3 steps in a row" in (tmp_path / "a/log.txt").read_text()


def test_ranks_agree_to_skip_when_one_of_them_is_not_finite(two_ranks):
    logs, printed = two_ranks
    assert printed.count("the update is skipped") == 2  # a warning of each rank
    assert "finished after 5 of 5 steps" in (logs / "nan/log.txt").read_text()
    weights = torch.load(logs / "nan/checkpoints/epoch_1.pt", weights_only=True)["state_dict"]
    assert all(torch.isfinite(value).all() for value in weights.values())


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_stop_the_run_with_one_sentence(tmp_path, workers):
    options = toy_options(tmp_path)
    options = replace(options, loading=replace(options.loading, workers=workers), data=replace(options.data, bad=(7,)))
    with pytest.raises(BadSampleError) as failure:
        toy_train(options)
    assert str(failure.value) == (
        "toy/7.png: truncated image; copy it again (--on-bad-sample skip goes on without such samples)"
    )


def test_bad_samples_are_replaced_counted_and_logged(tmp_path):
    options = toy_options(tmp_path)
    loading = replace(options.loading, on_bad_sample="skip", max_bad_fraction=0.1, workers=1)
    result = toy_train(replace(options, loading=loading, data=replace(options.data, bad=(3, 7))))
    last = curve(result.folder)[-1]
    assert (result.step, last["samples"]) == (20, 80)
    assert last["skipped_samples"] >= 4  # each in both epochs; a replacement may itself be bad
    assert (result.folder / "log.txt").read_text().count("bad sample replaced: toy/7.png") >= 2
    options = replace(options, loading=replace(loading, max_bad_fraction=0.0), data=replace(options.data, bad=(3, 7)))
    with pytest.raises(BadSampleError, match="more than --max-bad-fraction allows"):
        toy_train(replace(options, run=replace(options.run, name="strict")))


def test_starting_conditions_are_checked(tmp_path):
    options = toy_options(tmp_path)
    with pytest.raises(PreflightError, match="holds 3 samples, one step needs 4"):
        toy_train(replace(options, data=replace(options.data, samples=3)))
    with pytest.raises(SetupError, match="--warmup 50 is longer than the run of 20 steps"):
        toy_train(replace(options, optimizer=replace(options.optimizer, warmup=50)))
    with pytest.raises(SetupError, match="--backend nccl needs GPUs"):
        raise_from_join(options)


def raise_from_join(options: ToyRun) -> None:
    from itemizedclip.runtime.processes import _join

    _join(replace(options.distributed, backend="nccl"), torch.device("cpu"))


def test_errors_of_a_script_are_one_line(tmp_path):
    done = run_toy("--logs", tmp_path, "--samples", 3, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("toy: error: the training data holds 3 samples, one step needs 4")
    assert list(tmp_path.iterdir()) == []  # no folder for a run that never began
    with pytest.raises(SystemExit) as stop, reported_errors():  # no message of ours: its trace goes to a file
        _, _ = [1]
    assert stop.value.code == 70


def test_files_that_cannot_be_written_are_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop, reported_errors("toy"):
        (tmp_path / "file" / "folder").mkdir()
    assert stop.value.code == 1
    assert capsys.readouterr().err == f"toy: error: {tmp_path / 'file' / 'folder'}: Not a directory\n"
    with pytest.raises(BrokenPipeError), reported_errors():  # names no file: the trace stays
        raise BrokenPipeError(32, "Broken pipe")


def test_torchrun_variables_that_do_not_fit_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SetupError, match="RANK and LOCAL_RANK is not: start the processes with torchrun"):
        toy_train(toy_options(tmp_path))


def test_stop_requests_are_heard_inside_the_block_only():
    import os
    import signal

    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest.listening() as request:
        assert request.signal is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert request.signal == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) is before


# --- tracking ------------------------------------------------------------------------------------------------------


def test_lines_beyond_the_resumed_point_and_broken_lines_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "samples": 4}\n{"step": 2, "samples": 8}\n{"step": 3, "samples": 12}\n{"st')
    assert drop_lines_after(path, 8) == 2
    assert path.read_text() == '{"step": 1, "samples": 4}\n{"step": 2, "samples": 8}\n'
    assert drop_lines_after(path, 8) == 0
    assert drop_lines_after(tmp_path / "none", 8) == 0


def test_a_name_in_use_is_refused(tmp_path):
    options = toy_options(tmp_path)
    options = replace(options, run=replace(options.run, name="a"), optimizer=replace(options.optimizer, epochs=1))
    toy_train(options)
    with pytest.raises(TrackingError, match=r"a run of this name exists; continue it with --resume latest"):
        toy_train(options)
    named = choose_run_folder(replace(options.run, name=""), None)
    assert named.name.startswith("toy-2")


def test_a_missing_tracker_names_the_extra(monkeypatch):
    options = toy_options()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TrackingError, match=r"--report-to wandb: .* pip install -e '\.\[tracking\]'"):
        check_trackers(replace(options.logging, report_to="wandb"))


def test_tensorboard_gets_the_curve_and_a_failing_tracker_stops_nothing(tmp_path, monkeypatch):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    options = toy_options(tmp_path)
    options = replace(
        options, run=replace(options.run, name="a"), logging=replace(options.logging, report_to="tensorboard")
    )
    toy_train(options)
    assert list((tmp_path / "a/tensorboard").glob("events*"))

    def fail(*arguments, **keywords):
        raise OSError("disk full")

    monkeypatch.setattr(tensorboard.SummaryWriter, "add_scalar", fail)
    result = toy_train(replace(options, run=replace(options.run, name="b")))
    assert result.step == 20
    assert (result.folder / "log.txt").read_text().count("disk full; going on without it") == 1
