"""Train ItemizedCLIP on chest CT: CT-RATE.

    python Radiology_Tasks/src/open_ct_rate/main.py --recipe ctrate --data-root DIR --items-json FILE
    torchrun --nproc_per_node 8 -- Radiology_Tasks/src/open_ct_rate/main.py --recipe ctrate …

`train_ctrate.sh` is the same with its paths in environment variables. `data/chest.py` has the layout of the files.
 Each epoch ends with the zero-shot evaluation of the labelled validation volumes, with retrieval among the
scans of --valid-items, with both, or, where there is neither, with a line that says so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from itemizedclip.data.batch import BadSampleError, ItemCollator, ItemSample, Tokenizer
from itemizedclip.data.preflight import PreflightError
from itemizedclip.evaluation.classification import ClassPrompts, MultiLabelEvaluator
from itemizedclip.evaluation.encoding import EncodingOptions
from itemizedclip.evaluation.retrieval import RetrievalEvaluator
from itemizedclip.models.factory import create_tokenizer
from itemizedclip.runtime.errors import UserError, reported_errors
from itemizedclip.runtime.processes import on_main
from itemizedclip.training.engine import TrainResult, train
from itemizedclip.training.options import parse_run
from itemizedclip.training.run import Evaluator, launch_run
from itemizedclip_radiology.benchmarks.chest_ct import CT_RATE_VALID_LABELS, open_ct_rate
from itemizedclip_radiology.benchmarks.labelled_studies import LabelledStudies, find_labels
from itemizedclip_radiology.data.chest import (
    PUBLISHED_INPUT_INFO,
    ChestCTDataset,
    ChestInput,
    ChestReader,
    find_ct_rate_root,
    find_items_json,
)
from itemizedclip_radiology.data.ct_rate_tree import parse_volume_name
from itemizedclip_radiology.data.volumes import Size, read_volume
from itemizedclip_radiology.recipes_chest import RECIPES, ChestRun
from itemizedclip_radiology.training import (
    UsableStudies,
    build_model,
    check_folders,
    report_skipped,
    usable_rows,
    volume_transform,
)

logger = logging.getLogger(__name__)

DESCRIPTION = "Train ItemizedCLIP on chest CT (CT-RATE)."

_VOLUMES_READ_WHOLE = 8


# --- training scans --------------------------------------------------------------------------------------------------


def open_scans(options: ChestRun, root: Path, items_json: Path, chest: ChestInput, *, is_train: bool) -> ChestCTDataset:
    """The scans of an item file.

    Raises:
        BadSampleError: entries that cannot be used; see --on-bad-sample.
    """
    return ChestCTDataset(
        data_root=root,
        items_json=items_json,
        is_train=is_train,
        num_items=options.loading.num_sampled_captions,
        seed=options.run.seed,
        options=chest,
        cache=options.data.cache(chest.window),
        on_bad_sample=options.loading.on_bad_sample,
    )


def check_scans(options: ChestRun, dataset: ChestCTDataset) -> None:
    """Say what was found, and stop when too many scans are not on disk.

    Raises:
        PreflightError: see `check_folders`.
    """
    window = dataset.options.window
    logger.info(
        "%d scans of %s; window %g…%g HU, %s to %s voxels",
        len(dataset), dataset.index.path, window.hu_min, window.hu_max, dataset.options.fit,
        "×".join(map(str, dataset.options.size)),
    )  # fmt: skip
    check_folders(
        dataset.without_folder(), len(dataset), index=dataset.index.path, folder=dataset.data_root,
        loading=options.loading,
    )  # fmt: skip


# --- validation ------------------------------------------------------------------------------------------------------


@dataclass
class LabelledVolumes:
    """The volumes of a benchmark that can be opened, as evaluators read them.

    Attributes:
        benchmark: volumes and labels.
        rows: which of them.
        size: voxels of the model's input.
    """

    benchmark: LabelledStudies
    rows: list[int]
    size: Size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> ItemSample:
        study = self.benchmark.load(self.rows[index], size=self.size)
        return ItemSample(self.benchmark.studies[self.rows[index]].study_id, study.image, [])

    @property
    def labels_NC(self) -> np.ndarray:
        """float64 (N, C): 1, 0, or NaN where not rated."""
        labels_NC = self.benchmark.labels_NC[self.rows].astype(np.float64)
        return np.where(labels_NC < 0, np.nan, labels_NC)


def unusable_volumes(benchmark: LabelledStudies, size: Size) -> dict[int, str]:
    """Row → why a volume cannot be used.

    Of each file only the beginning is read, of a few all values; when one of those is wrong, all values of all.
    """

    def message(row: int, *, whole: bool) -> str | None:
        try:
            if whole:
                benchmark.load(row, size=size)
            else:
                read_volume(benchmark.studies[row].series[0].path, memory_map=True)
        except BadSampleError as error:
            return str(error)
        return None

    few = range(0, len(benchmark), -(-len(benchmark) // _VOLUMES_READ_WHOLE))
    whole = any(message(row, whole=True) for row in few)
    if whole:
        logger.info("a validation volume cannot be used; reading all %d", len(benchmark))
    messages = {row: message(row, whole=whole) for row in range(len(benchmark))}
    return {row: found for row, found in messages.items() if found is not None}


def find_validation_labels(options: ChestRun, root: Path) -> Path | None:
    """--labels, or labels of validation volumes that are there too.

    Raises:
        FileNotFoundError: --labels is not there.
    """
    if options.data.labels is not None:
        return find_labels(options.data.labels, CT_RATE_VALID_LABELS, root)
    if not (root / "valid").is_dir():
        return None
    try:
        return find_labels(None, CT_RATE_VALID_LABELS, root)
    except FileNotFoundError:
        return None


def open_labelled(options: ChestRun, root: Path, labels: Path, chest: ChestInput) -> LabelledVolumes:
    """The labelled validation volumes.

    Raises:
        FileNotFoundError: missing volumes, with --on-bad-sample stop, or all of them.
        ValueError, BadSampleError, PreflightError: labels or volumes that cannot be used.
    """
    skip = options.loading.on_bad_sample == "skip"
    benchmark = open_ct_rate(labels, root, allow_missing=skip)
    benchmark.reader = ChestReader(root, chest, options.data.cache(chest.window))
    unusable = unusable_volumes(benchmark, chest.size)
    rows = usable_rows(
        len(benchmark), unusable.get, source=labels, on_bad_sample=options.loading.on_bad_sample, what="volume"
    )
    labelled = LabelledVolumes(benchmark, rows, chest.size)
    if not any(len(np.unique(column[~np.isnan(column)])) == 2 for column in labelled.labels_NC.T):
        raise PreflightError(f"{labels}: no finding has both volumes with and without it, so no AUC exists")
    logger.info("%s: %d labelled validation volumes", labels, len(labelled))
    return labelled


def unusable_scan(dataset: ChestCTDataset, row: int) -> str | None:
    """Why no reconstruction of a scan can be used, None when one can; of each file only the beginning is read."""
    entry = dataset.index[row]
    messages = []
    for recon in entry["recons"]:
        try:
            read_volume(dataset.data_root / parse_volume_name(recon).path, memory_map=True)
        except BadSampleError as error:
            messages.append(f"scan {entry['study']}: {error}")
            continue
        return None
    return messages[0]


def open_evaluators(options: ChestRun, root: Path, chest: ChestInput, tokenizer: Tokenizer) -> list[Evaluator]:
    """What runs after each epoch, on all ranks; every rank must call it."""
    encoding = EncodingOptions(batch_size=options.loading.batch_size, num_workers=options.loading.workers)
    evaluators: list[Evaluator] = []
    labels = on_main(lambda: find_validation_labels(options, root))
    if labels is not None:
        labelled = on_main(lambda: open_labelled(options, root, labels, chest))
        classes = ClassPrompts(labelled.benchmark.classes, [[prompt] for prompt in labelled.benchmark.prompts])
        evaluators.append(
            MultiLabelEvaluator(
                labelled,
                tokenizer,
                classes,
                labelled.labels_NC,
                name="ct_rate",
                scorings=(options.objective.scoring,),
                encoding=encoding,
            )
        )
    items_json = options.data.valid_items
    if items_json is not None:

        def check() -> list[int]:
            dataset = open_scans(options, root, items_json, chest, is_train=False)
            why = partial(unusable_scan, dataset)
            where, policy = dataset.index.path, options.loading.on_bad_sample
            return usable_rows(len(dataset), why, source=where, on_bad_sample=policy)

        rows = on_main(check)
        scans = UsableStudies(open_scans(options, root, items_json, chest, is_train=False), rows)
        evaluators.append(
            RetrievalEvaluator(
                scans, tokenizer, name=items_json.stem, scoring=options.objective.scoring, encoding=encoding
            )
        )
    if not evaluators:
        logger.warning(
            "nothing is evaluated during training: no labels of validation volumes (%s in %s, with %s beside them; "
            "--labels), and no --valid-items", " or ".join(CT_RATE_VALID_LABELS[:2]), root, root / "valid",
        )  # fmt: skip
    return evaluators


# --- run -------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> TrainResult:
    """Parse flags, build model and data, train."""
    options = parse_run(RECIPES, "ctrate", argv, prog="main.py", description=DESCRIPTION)
    data = options.data
    with reported_errors(), launch_run(options) as ranks:
        root, items_json = on_main(lambda: (find_ct_rate_root(data.data_root), find_items_json(data.items_json)))
        model = build_model(options, data.volume_size)
        config = model.visual.trunk.config
        if config.series_names:
            raise UserError(f"--model {options.model.model} reads series names of brain studies; give a chest CT model")
        chest = data.chest_input(config.volume_size)
        on_main(lambda: check_scans(options, open_scans(options, root, items_json, chest, is_train=True)))
        if not ranks.is_main:
            # What the main rank has said of the item file need not be said again.
            logging.getLogger("itemizedclip_radiology.data.reports").setLevel(logging.ERROR)
        scans = open_scans(options, root, items_json, chest, is_train=True)
        tokenizer = create_tokenizer(model.config)
        result = train(
            options,
            model=model,
            dataset=scans,
            collator=ItemCollator(tokenizer, options.loading.num_sampled_captions),
            evaluators=open_evaluators(options, root, chest, tokenizer),
            transform=volume_transform(config.volume_size, input_info=list(data.input_info or PUBLISHED_INPUT_INFO)),
            data_fingerprint=json.dumps(scans.fingerprint),
            ranks=ranks,
        )
        report_skipped(scans.skipped_recons, "reconstructions of the training scans")
        return result
