#!/usr/bin/env python3
"""Train ItemizedCLIP on whole studies: brain MRI and head CT.

    python Radiology_Tasks/src/open_mri_train/main.py --recipe mri --data-root DIR --json-root DIR
    torchrun --nproc_per_node 8 -- Radiology_Tasks/src/open_mri_train/main.py --recipe ct …

`train_mri.sh` and `train_ct.sh` are the same with their paths in environment variables. `open_mri_train.data` has the
layout of the files.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_mri.mae_init import mae_weights_file
from open_mri.radiology_model import RadiologyItemizedCLIP, load_initial_weights
from open_mri.reports import read_report_table
from open_mri.text_tower import with_text_model
from open_mri.volumes import GREY_MEAN, GREY_STD, Size, crop_series, read_volume

from itemizedclip.collectives import gather_objects
from itemizedclip.data.batch import BadSampleError, ItemCollator, ItemSample
from itemizedclip.data.preflight import PreflightError
from itemizedclip.evaluation.encoding import EncodingOptions
from itemizedclip.evaluation.retrieval import RetrievalEvaluator
from itemizedclip.models.factory import create_model, create_tokenizer, load_model_config
from itemizedclip.training.distributed import Ranks, launch, on_main
from itemizedclip.training.engine import TrainResult, reported_errors, train
from itemizedclip.training.options import parse_run
from open_mri_train.data import VOLUME_FILE, StudyDataset, StudyFiles, find_study_files
from open_mri_train.recipes import RECIPES, StudyRun

logger = logging.getLogger(__name__)

DESCRIPTION = "Train ItemizedCLIP on whole studies of brain MRI or head CT."


# --- model -----------------------------------------------------------------------------------------------------------


def model_config(options: StudyRun) -> dict[str, Any]:
    """The config of --model with the text model and the volume size of the run.

    Raises:
        FileNotFoundError: a text model that is neither here nor to be had from the hub.
        ValueError: no such model, or one for other images.
    """
    config = load_model_config(options.model.model)
    if config["vision_cfg"].get("tower") != "hlip":
        raise ValueError(f"--model {options.model.model} is no model of 3-D studies; for example HLIPSN_debug is one")
    if options.data.volume_size is not None:
        config["vision_cfg"] = {**config["vision_cfg"], "volume_size": list(options.data.volume_size)}
    if options.initial.text_model is not None:
        config = with_text_model(config, options.initial.text_model)
    return config


def build_model(options: StudyRun) -> RadiologyItemizedCLIP:
    """The model with its initial weights; call it on every rank, under `launch`.

    Raises:
        FileNotFoundError, ValueError: weights that are not there or do not fit.
    """

    def fetch() -> None:
        model_config(options)
        if options.initial.image_weights is not None and options.model.pretrained is None:
            mae_weights_file(options.initial.image_weights)

    # The main rank first: one download, one message about what is missing.
    on_main(fetch)
    model = create_model(model_config(options))
    assert isinstance(model, RadiologyItemizedCLIP)
    reads_names = model.visual.trunk.config.series_names
    if reads_names and not options.data.use_serienames:
        raise ValueError(f"--model {options.model.model} reads series names; drop --no-use-serienames")
    if options.model.pretrained is None:
        load_initial_weights(
            model,
            image_weights=options.initial.image_weights,
            series_name_weights=options.initial.series_name_weights,
            text_model=options.initial.text_model,
        )
    return model


# --- data ------------------------------------------------------------------------------------------------------------


@dataclass
class ValidationStudies:
    """The studies of a split that can be opened, as the evaluators read them.

    Attributes:
        dataset: the split, in evaluation mode.
        rows: which of its studies.
    """

    dataset: StudyDataset
    rows: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> ItemSample:
        return self.dataset[self.rows[index]]

    def items(self, index: int) -> list[str]:
        """All items of a study; its volumes are not read."""
        return self.dataset.items_of(self.rows[index])


def unusable_study(dataset: StudyDataset, row: int) -> str | None:
    """Why no series of a study can be used, None when one can; of each file only the beginning is read."""
    entry = dataset.index[row]
    messages = []
    for name in entry["series"]:
        path = dataset.study_folder / entry["study"] / name / VOLUME_FILE
        try:
            crop_series(read_volume(path, memory_map=True), dataset.volume_size, source=path)
        except BadSampleError as error:
            messages.append(f"study {entry['study']}, series {name}: {error}")
            continue
        return None
    more = f" (and {len(messages) - 1} more series)" if len(messages) > 1 else ""
    return f"{messages[0]}{more}"


def usable_rows(dataset: StudyDataset, *, on_bad_sample: str) -> list[int]:
    """Studies of a validation split with at least one series that can be opened.

    An evaluation cannot replace a study as training does, and should not end after hours of training.

    Raises:
        BadSampleError: a study without any, unless `on_bad_sample` is "skip".
        PreflightError: no study is left.
    """
    rows, bad = [], []
    for row in range(len(dataset)):
        message = unusable_study(dataset, row)
        if message is None:
            rows.append(row)
        elif on_bad_sample == "stop":
            raise BadSampleError(f"{message}. Fix it (--on-bad-sample skip goes on without it)")
        else:
            bad.append(message)
    if not rows:
        raise PreflightError(f"{dataset.index.path}: no study can be used; the first: {bad[0]}")
    for message in bad[:5]:
        logger.warning("validation study left out: %s", message)
    if bad:
        logger.warning("%d of %d validation studies are left out", len(bad), len(dataset))
    return rows


def open_studies(
    options: StudyRun, files: StudyFiles, volume_size: Size, ranks: Ranks
) -> tuple[StudyDataset, ValidationStudies]:
    """Training and validation split.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: a JSON or report file that is none.
        BadSampleError, PreflightError: entries or studies that cannot be used; see --on-bad-sample.
    """
    loading = options.loading
    reports = None if options.data.reports is None else read_report_table(options.data.reports)

    def split(json_path: Path, *, is_train: bool) -> StudyDataset:
        return StudyDataset(
            data_root=files.data_root,
            json_path=json_path,
            is_train=is_train,
            num_items=loading.num_sampled_captions,
            seed=options.run.seed,
            num_series=options.data.num_series,
            volume_size=volume_size,
            reports=reports,
            on_bad_sample=loading.on_bad_sample,
        )

    def check() -> list[int]:
        for json_path in (files.train_json, files.valid_json):
            dataset = split(json_path, is_train=json_path == files.train_json)
            try:
                logger.info(dataset.describe_first_study())
            except BadSampleError as error:
                if loading.on_bad_sample == "stop":
                    raise
                logger.warning("%d studies of %s; the first cannot be used: %s", len(dataset), json_path, error)
        return usable_rows(dataset, on_bad_sample=loading.on_bad_sample)

    # The main rank first, which reports what is wrong with the files.
    rows = on_main(check)
    if not ranks.is_main:
        # What the main rank has said of the index files need not be said again.
        logging.getLogger("open_mri.reports").setLevel(logging.ERROR)
    train_split = split(files.train_json, is_train=True)
    return train_split, ValidationStudies(split(files.valid_json, is_train=False), rows)


def report_skipped_series(train_split: StudyDataset, valid_split: StudyDataset) -> None:
    """Log how many series could not be used, over all ranks."""
    for name, dataset in (("training", train_split), ("validation", valid_split)):
        skipped = {position for share in gather_objects(list(dataset.skipped_series)) for position in share}
        if skipped:
            logger.warning("%d series of the %s studies were skipped; log.txt names each", len(skipped), name)


# --- run -------------------------------------------------------------------------------------------------------------


def volume_transform(volume_size: Sequence[int], num_series: int) -> Mapping[str, Any]:
    """What is done to volumes, for checkpoints."""
    return {"volume_size": list(volume_size), "num_series": num_series, "mean": GREY_MEAN, "std": GREY_STD}


def main(argv: Sequence[str] | None = None) -> TrainResult:
    """Parse flags, build model and data, train."""
    options = parse_run(RECIPES, "mri", argv, prog="main.py", description=DESCRIPTION)
    with reported_errors(), launch(options) as ranks:
        files = on_main(lambda: find_study_files(options.data.data_root, options.data.json_root))
        model = build_model(options)
        volume_size = model.visual.trunk.config.volume_size
        train_split, valid_split = open_studies(options, files, volume_size, ranks)
        evaluator = RetrievalEvaluator(
            valid_split,
            create_tokenizer(model.config),
            name=files.valid_json.stem,
            # Studies differ in their number of series.
            encoding=EncodingOptions(batch_size=1, num_workers=options.loading.workers),
        )
        result = train(
            options,
            model=model,
            dataset=train_split,
            collator=ItemCollator(evaluator.tokenizer, options.loading.num_sampled_captions),
            evaluators=[evaluator],
            transform=volume_transform(volume_size, options.data.num_series),
            data_fingerprint=json.dumps(train_split.fingerprint),
            ranks=ranks,
        )
        report_skipped_series(train_split, valid_split.dataset)
        return result


if __name__ == "__main__":
    main()
