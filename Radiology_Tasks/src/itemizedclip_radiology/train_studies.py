"""Train ItemizedCLIP on whole studies: brain MRI and head CT.

    python Radiology_Tasks/src/open_mri_train/main.py --recipe mri --data-root DIR --json-root DIR
    torchrun --nproc_per_node 8 -- Radiology_Tasks/src/open_mri_train/main.py --recipe ct …

`train_mri.sh` and `train_ct.sh` are the same with their paths in environment variables. `data/study_dataset.py` has the
layout of the files.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from itemizedclip.data.batch import BadSampleError, ItemCollator
from itemizedclip.data.preflight import PreflightError
from itemizedclip.evaluation.encoding import EncodingOptions
from itemizedclip.evaluation.retrieval import RetrievalEvaluator
from itemizedclip.models.factory import create_tokenizer
from itemizedclip.runtime.errors import UserError, reported_errors
from itemizedclip.runtime.processes import Ranks, on_main
from itemizedclip.training.engine import TrainResult, train
from itemizedclip.training.options import parse_run
from itemizedclip.training.run import launch_run
from itemizedclip_radiology.data.reports import read_report_table
from itemizedclip_radiology.data.study_dataset import VOLUME_FILE, StudyDataset, StudyFiles, find_study_files
from itemizedclip_radiology.data.volumes import Size, crop_series, read_volume
from itemizedclip_radiology.recipes_studies import RECIPES, StudyRun
from itemizedclip_radiology.training import (
    UsableStudies,
    build_model,
    check_folders,
    report_skipped,
    usable_rows,
    volume_transform,
)

logger = logging.getLogger(__name__)

DESCRIPTION = "Train ItemizedCLIP on whole studies of brain MRI or head CT."


# --- data ------------------------------------------------------------------------------------------------------------


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


def check_reports(
    reports: Mapping[str, Sequence[str]], datasets: Sequence[StudyDataset], *, source: Path | None
) -> None:
    """Say how many studies a report table serves, and refuse one that serves none.

    Raises:
        PreflightError: a table without any study of the JSON files.
    """
    known = {study for dataset in datasets for study in dataset.studies}
    unknown = [study for study in reports if study not in known]
    if len(unknown) == len(reports):
        example = f" ({unknown[0]}, …)" if unknown else ""
        files = " or ".join(str(dataset.index.path) for dataset in datasets)
        raise PreflightError(f"{source}: none of its {len(reports):,} studies{example} is in {files}")
    logger.info("%s replaces the reports of %d of %d studies", source, len(reports) - len(unknown), len(known))
    if unknown:
        logger.warning("%s: %d studies in no JSON file are not used, such as %s", source, len(unknown), unknown[0])


def open_studies(
    options: StudyRun, files: StudyFiles, volume_size: Size, ranks: Ranks
) -> tuple[StudyDataset, StudyDataset, list[int]]:
    """Training and validation split, and which studies of the latter can be used.

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

    def opened() -> tuple[StudyDataset, StudyDataset]:
        return split(files.train_json, is_train=True), split(files.valid_json, is_train=False)

    def check() -> list[int]:
        train_split, valid_split = opened()
        on_main_rank.extend((train_split, valid_split))
        check_folders(
            train_split.without_folder(), len(train_split), index=train_split.index.path,
            folder=train_split.study_folder, loading=loading,
        )  # fmt: skip
        if reports is not None:
            check_reports(reports, on_main_rank, source=options.data.reports)
        for dataset in on_main_rank:
            try:
                logger.info(dataset.describe_first_study())
            except BadSampleError as error:
                if loading.on_bad_sample == "stop":
                    raise
                where = dataset.index.path
                logger.warning("%d studies of %s; the first cannot be used: %s", len(dataset), where, error)
        why, where = partial(unusable_study, valid_split), valid_split.index.path
        return usable_rows(len(valid_split), why, source=where, on_bad_sample=loading.on_bad_sample)

    # The main rank first, which reports what is wrong with the files; an index of 220,000 studies is read only once.
    on_main_rank: list[StudyDataset] = []
    rows = on_main(check)
    if on_main_rank:
        train_split, valid_split = on_main_rank
    else:
        # What the main rank has said of the index files need not be said again.
        logging.getLogger("itemizedclip_radiology.data.reports").setLevel(logging.ERROR)
        train_split, valid_split = opened()
    return train_split, valid_split, rows


# --- run -------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> TrainResult:
    """Parse flags, build model and data, train."""
    options = parse_run(RECIPES, "mri", argv, prog="main.py", description=DESCRIPTION)
    data = options.data
    with reported_errors(), launch_run(options) as ranks:
        files = on_main(lambda: find_study_files(data.data_root, data.json_root, is_ct=data.is_ct))
        model = build_model(options, data.volume_size)
        config = model.visual.trunk.config
        if config.series_names and not data.use_serienames:
            raise UserError(f"--model {options.model.model} reads series names; drop --no-use-serienames")
        volume_size = config.volume_size
        train_split, valid_split, rows = open_studies(options, files, volume_size, ranks)
        evaluator = RetrievalEvaluator(
            UsableStudies(valid_split, rows),
            create_tokenizer(model.config),
            name=files.valid_json.stem,
            scoring=options.objective.scoring,
            # Studies differ in their number of series.
            encoding=EncodingOptions(batch_size=1, num_workers=options.loading.workers),
        )
        result = train(
            options,
            model=model,
            dataset=train_split,
            collator=ItemCollator(evaluator.tokenizer, options.loading.num_sampled_captions),
            evaluators=[evaluator],
            transform=volume_transform(volume_size, num_series=data.num_series),
            data_fingerprint=json.dumps(train_split.fingerprint),
            ranks=ranks,
        )
        report_skipped(train_split.skipped_series, "series of the training studies")
        report_skipped(valid_split.skipped_series, "series of the validation studies")
        return result
