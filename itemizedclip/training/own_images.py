"""The recipe `own`: train on your own images, described by a JSONL file (`itemizedclip.data.jsonl`).

itemizedclip train own --train-file train.jsonl --val-file valid.jsonl --name mine
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from itemizedclip.data.jsonl import ImageItems
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.processes import on_main
from itemizedclip.training.options import LoadingSettings, ObjectiveSettings, OptimizerSettings, RunOptions
from itemizedclip.training.recipes import Opening, TrainingData, run_on


@dataclass(frozen=True)
class OwnImages:
    """Your images and their items."""

    train_file: Path | None = None
    """JSONL of the training images: {"image": "PATH", "items": ["text", …]} on each line."""

    val_file: Path | None = None
    """JSONL of other images, retrieved among after each epoch; None: no validation."""

    image_root: Path | None = None
    """Folder that the paths are relative to; default: that of the JSONL file."""

    join_items: bool = False
    """Training texts are 1 … 3 items joined, as in the published recipes of photographs; otherwise single items."""

    def open(self, opening: Opening) -> TrainingData:
        """See `itemizedclip.training.recipes.DataGroup`.

        Raises:
            UserError: no --train-file, or files that cannot be used.
        """
        options = opening.options
        if self.train_file is None:
            raise UserError("--train-file is not set; give the JSONL of the training images (docs/own-data.md)")

        def images(path: Path, *, is_train: bool) -> ImageItems:
            return ImageItems(
                path,
                opening.transform(is_train=is_train),
                num_items=options.loading.num_sampled_captions,
                is_train=is_train,
                seed=options.run.seed,
                join_items=self.join_items,
                image_root=self.image_root,
                on_bad_sample=options.loading.on_bad_sample,
            )

        train_file, val_file = self.train_file, self.val_file
        # The main rank first, which reports what is wrong with the files.
        on_main(lambda: sum(len(images(path, is_train=False)) for path in (train_file, val_file) if path is not None))
        dataset = images(train_file, is_train=True)
        validation = [] if val_file is None else [opening.retrieval(images(val_file, is_train=False), "val")]
        return TrainingData(dataset, validation, dataset.fingerprint)


def own() -> RunOptions:
    """Your own images, from a JSONL file of paths and items; --pretrained starts from a trained model."""
    return run_on(
        OwnImages(),
        objective=ObjectiveSettings(ila_keep_rate=0.8, mask_duplicates=True),
        optimizer=OptimizerSettings(lr=3e-4, weight_decay=0.5, warmup=100, epochs=30),
        loading=LoadingSettings(batch_size=64),
    )
