"""How long a scene takes to draw, level by level, beside a training step that needs a batch of them.

    python benchmarks/scenes.py [--scenes 300]

Processor seconds of this thread: waiting for other jobs does not count, the caches they empty do. The step is forward,
loss, backward and AdamW of the scenes' recipe, on scenes drawn before.
"""

from __future__ import annotations

import argparse
import time

import torch

from itemizedclip.commands.demo import scenes as recipe
from itemizedclip.data.batch import ItemCollator
from itemizedclip.data.scenes import LEVELS, ScenesDataset
from itemizedclip.models.factory import create_model, create_tokenizer, create_transform
from itemizedclip.training.task import ItemizedTask

BATCH = 32
STEPS = 12


def drawing_ms(level: str, count: int) -> float:
    """Processor milliseconds of one training sample, drawn and transformed."""
    dataset = ScenesDataset(split="train", num_scenes=count + 1, level=level, seed=0, shuffle_items=True)
    dataset[(0, count)]  # handwriting is read once
    started = time.process_time()
    for index in range(count):
        dataset[(0, index)]
    return 1000 * (time.process_time() - started) / count


def step_ms() -> float:
    """Processor milliseconds of a training step of the recipe."""
    options = recipe()
    torch.manual_seed(0)
    model = create_model(options.model.model)
    transform = create_transform(model.config, is_train=False)
    dataset = ScenesDataset(
        split="train", num_scenes=BATCH, level=options.data.level, seed=0, transform=transform, shuffle_items=True
    )
    collate = ItemCollator(create_tokenizer(model.config), options.loading.num_sampled_captions)
    batch = collate([dataset[(0, index)] for index in range(BATCH)])
    task = ItemizedTask(model, options.objective).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    started = time.process_time()
    for step in range(STEPS + 2):
        if step == 2:
            started = time.process_time()
        optimizer.zero_grad()
        task(batch)["loss"].backward()
        optimizer.step()
    return 1000 * (time.process_time() - started) / STEPS


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=300)
    count = parser.parse_args().scenes
    torch.set_num_threads(1)
    step = step_ms()
    print(f"| level | ms a scene | ms a batch of {BATCH} | of a step of {step:.0f} ms, drawn anew each time |")
    print("|---|---|---|---|")
    for level in LEVELS:
        own = drawing_ms(level, count)
        print(f"| `{level}` | {own:.2f} | {own * BATCH:.0f} | {own * BATCH / step:.0%} |")
