"""A plan against what steps with data take: FLOP by PyTorch's counter, memory by its profiler."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from itemizedclip.commands.train import main
from itemizedclip.data.batch import ItemBatch
from itemizedclip.models.factory import create_model, load_model_config
from itemizedclip.objectives.block_size import GPU_SHARE, work_bytes
from itemizedclip.training.counting import loss_flop
from itemizedclip.training.options import LoadingSettings, ModelSettings, RunOptions
from itemizedclip.training.plan import FREE_SHARE, plan_run
from itemizedclip.training.run import set_recomputation
from itemizedclip.training.task import ItemizedTask

B, K = 6, 4
CONFIGS = ("ViT-scenes-ItemizedCLIP", "CTRATE_HLIP_debug")


def planned(name: str, *, checkpointing: bool) -> RunOptions:
    return RunOptions(
        model=ModelSettings(model=name, precision="fp32", grad_checkpointing=checkpointing),
        loading=LoadingSettings(batch_size=B, num_sampled_captions=K, workers=0),
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_plan_is_what_a_step_takes(name, checkpointing):
    options = planned(name, checkpointing=checkpointing)
    plan = plan_run(options)
    model = create_model(load_model_config(name))
    model.set_grad_checkpointing(checkpointing)
    task = ItemizedTask(model, options.objective).train()
    batch = ItemBatch(
        torch.zeros(B, *model.input_shape()),
        torch.ones(B, K, min(32, model.config["text_cfg"]["context_length"]), dtype=torch.int64),
        torch.ones(B, K, dtype=torch.bool), torch.zeros(B, dtype=torch.bool), [""] * B,
    )  # fmt: skip
    assert plan.parameters == sum(p.numel() for p in model.parameters())

    def towers():
        inputs = task.encode(batch)
        features = (inputs.image_global_BD, inputs.image_tokens_BLD, inputs.item_features_ND)
        torch.autograd.backward(features, [torch.ones_like(feature) for feature in features])

    with FlopCounterMode(display=False) as counter:
        towers()
    assert plan.towers_flop(B) == counter.get_total_flops()
    kept = sum((3 * p.requires_grad + 1) * p.nbytes for p in model.parameters())
    assert plan.kept_bytes == kept


@pytest.mark.parametrize(
    ("name", "checkpointing", "keeps", "precision"),
    [
        (CONFIGS[0], False, "nothing", "fp32"),
        (CONFIGS[0], True, "nothing", "amp_bf16"),
        (CONFIGS[1], False, "nothing", "amp_bf16"),
        (CONFIGS[1], True, "nothing", "fp32"),
        (CONFIGS[1], True, "attention", "fp32"),
    ],
)
def test_a_plan_tells_the_peak_of_memory(name, checkpointing, keeps, precision):
    images = 24
    options = planned(name, checkpointing=checkpointing)
    settings = replace(options.model, precision=precision, grad_checkpointing_keeps=keeps)
    options = replace(options, model=settings)
    plan = plan_run(options)
    model = create_model(load_model_config(name))
    set_recomputation(model, settings)
    task = ItemizedTask(model, options.objective).train()
    optimizer = torch.optim.AdamW(task.parameters(), fused=True)

    def step():
        batch = ItemBatch(
            torch.zeros(images, *model.input_shape()),
            torch.ones(images, K, min(32, model.config["text_cfg"]["context_length"]), dtype=torch.int64),
            torch.ones(images, K, dtype=torch.bool), torch.zeros(images, dtype=torch.bool), [""] * images,
        )  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "amp_bf16"):
            loss = task(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    held = list(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    standing = plan.parameter_bytes + plan.optimizer_bytes
    measured = standing + max(held)
    assert plan.step_bytes(images, 1, work_bytes(torch.device("cpu"))) == pytest.approx(measured, rel=0.1)
    assert max(held) > 0.5 * standing  # else this would say nothing of activations


def test_what_fits():
    plan = plan_run(planned(CONFIGS[1], checkpointing=True))
    memory = 2e9
    largest = plan.largest_batch(memory, 8)
    room = FREE_SHARE * memory
    assert plan.step_bytes(largest, 8, int(memory) // GPU_SHARE) <= room
    assert plan.step_bytes(largest + 1, 8, int(memory) // GPU_SHARE) > room
    assert plan.largest_batch(memory, 8, multiple=7) == largest // 7 * 7
    assert plan.largest_batch(1e6, 8) == 0


def test_flop_of_the_loss():
    options = planned(CONFIGS[0], checkpointing=False)
    model = create_model(CONFIGS[0])
    task = ItemizedTask(model, options.objective).train()
    images, tokens = torch.randn(B, 3, 64, 64), torch.ones(B, K, 16, dtype=torch.int64)
    mask = torch.ones(B, K, dtype=torch.bool)
    inputs = task.encode(ItemBatch(images, tokens, mask, ~mask[:, 0], [""] * B))
    inputs = replace(inputs, **{name: getattr(inputs, name).detach().requires_grad_() for name in (
        "image_global_BD", "image_tokens_BLD", "item_features_ND")})  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        task.losses(inputs)["loss"].backward()
    expected = loss_flop(B, K, 64, 128, passes=2, ranks=1)
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.3)


def test_the_command_tells_and_does_not_train(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["rsicd_debug", "--plan", "--batch-size", "16"]) is None
    told = " ".join(capsys.readouterr().out.split())
    for expected in (
        "16 images a process",
        "seconds a step",
        "141",
        "MB sent by each",
        "largest batch",
        "peak of a step",
    ):
        assert expected in told
    assert list(tmp_path.iterdir()) == []


def test_one_process_sends_nothing_and_more_send_more():
    plan = plan_run(planned(CONFIGS[1], checkpointing=False))
    assert plan.sent_bytes(8, 1) == 0
    assert plan.sent_bytes(8, 2) == plan.trained_bytes + 2 * 4 * 8 * K * plan.width
