"""Runs on studies: brain MRI, head CT and chest CT; one named recipe per published run, each with a debug size.

    bash train_mri.sh        8 GPUs in the paper, 859 steps of 256 studies per epoch on 220,001 studies
    bash train_ct.sh         the same on head CT
    bash train_ctrate.sh     8 GPUs in the paper, 47 steps of 512 scans per epoch on 24,128 scans
    itemizedclip train mri_debug --data-root DIR --json-root DIR
    itemizedclip train mr-rate --data-root DIR      the public MR-RATE, after `prepare studies --from mr-rate`

`data/brain.py` and `data/chest.py` have the layout of the files.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from itemizedclip.data.batch import BadSampleError
from itemizedclip.data.preflight import PreflightError
from itemizedclip.evaluation.classification import MultiLabelEvaluator
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.flags import at_least
from itemizedclip.runtime.logs import only_errors_of
from itemizedclip.runtime.processes import on_main
from itemizedclip.runtime.remote import Address, Place
from itemizedclip.training.engine import TrainResult
from itemizedclip.training.options import LoadingSettings, ModelSettings, ObjectiveSettings, OptimizerSettings
from itemizedclip.training.recipes import Opening, TrainingData, train_door
from itemizedclip.training.run import Evaluator
from itemizedclip_radiology.benchmarks.chest_ct import CT_RATE_VALID_LABELS
from itemizedclip_radiology.benchmarks.labelled_studies import BrainReader, LabelledStudies
from itemizedclip_radiology.benchmarks.labelled_volumes import find_validation_labels, open_labelled
from itemizedclip_radiology.benchmarks.mr_rate import open_mr_rate
from itemizedclip_radiology.data.brain import NUM_SERIES, BrainStudies, find_study_files
from itemizedclip_radiology.data.chest import (
    PUBLISHED_INPUT_INFO,
    ChestReader,
    ChestScans,
    ChestSettings,
    find_ct_rate_root,
    find_items_json,
)
from itemizedclip_radiology.data.reports import read_report_table
from itemizedclip_radiology.data.studies import Preparation
from itemizedclip_radiology.data.study_dataset import UsableStudies
from itemizedclip_radiology.data.volumes import Size
from itemizedclip_radiology.models.initial import InitialWeights, RadiologyRun, trunk_config, volume_transform

logger = logging.getLogger(__name__)

MAE_HUB_NAME = "timm/vit_base_patch16_224.mae"
"""MAE ViT-B/16 pretrained on ImageNet, the published starting point."""

BIOMEDBERT_HUB_NAME = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext"
"""The text tower's published starting point."""


CXR_BERT_HUB_NAME = "microsoft/BiomedVLP-CXR-BERT-specialized"
"""The text tower's published weights; loaded into a plain BERT, no remote code."""


# --- brain MRI and head CT -------------------------------------------------------------------------------------------


def _on_this_machine(folder: Place) -> Path:
    """The folder of studies to validate on.

    Raises:
        UserError: an address.
    """
    if isinstance(folder, Address):
        raise UserError(f"--labels: {folder} is elsewhere; studies to validate on are read from a local folder")
    return folder


@dataclass(frozen=True)
class StudyData:
    """Where the studies are, and what is taken of them."""

    data_root: Path | None = None
    """Folder of STUDY/SERIES/img.pt, or of train/ and valid/ (or val/) with these; default: DATA_ROOT."""

    json_root: Path | None = None
    """Folder of train.json and valid.json (or val.json); default: JSON_ROOT, then the study folder."""

    reports: Annotated[Path | None, tyro.conf.arg(aliases=("--report-replacer",))] = None
    """CSV of study and numbered report text, no header line, whose items replace those of the JSON files."""

    is_ct: Annotated[bool, tyro.conf.arg(aliases=("--ct",))] = False
    """Validation studies are those of val.json, also where valid.json lies beside it (as in published head CT runs)."""

    num_series: int = NUM_SERIES
    """Series slots of a training study, filled at random, with repeats when it has fewer; validation takes all."""

    volume_size: Size | None = None
    """Voxels (slices rows columns) of a series, multiples of the model's patch; None: the model's own."""

    prepare: Preparation = "crop"
    """resample: files of any size become the model's, such as those of `prepare studies` for the debug sizes."""

    use_serienames: bool = True
    """Accepted for published commands; whether the model reads series names is part of its config."""

    def __post_init__(self) -> None:
        at_least(self, num_series=1)

    def open(self, opening: Opening) -> TrainingData:
        """Training and validation split; validation retrieves among the studies that can be opened.

        Raises:
            MissingFileError: a file or folder is missing.
            UserError: a JSON or report file that is none, or a model that reads other names.
            BadSampleError, PreflightError: entries or studies that cannot be used; see --on-bad-sample.
        """
        options, loading = opening.options, opening.options.loading
        files = on_main(lambda: find_study_files(self.data_root, self.json_root, is_ct=self.is_ct))
        vision = trunk_config(opening.model)
        if vision.series_names and not self.use_serienames:
            raise UserError(f"--model {options.model.model} reads series names; drop --no-use-serienames")
        if not vision.series_names:
            raise UserError(
                f"--model {options.model.model} reads no series names, by which the series of a study are told apart; "
                "give a model whose config says series_names"
            )
        reports = None if self.reports is None else read_report_table(self.reports)

        def split(json_path: Path, *, is_train: bool) -> BrainStudies:
            return BrainStudies(
                data_root=files.data_root,
                json_path=json_path,
                is_train=is_train,
                num_items=loading.num_sampled_captions,
                seed=options.run.seed,
                num_series=self.num_series,
                volume_size=vision.volume_size,
                prepare=self.prepare,
                reports=reports,
                on_bad_sample=loading.on_bad_sample,
            )

        def opened() -> tuple[BrainStudies, BrainStudies]:
            return split(files.train_json, is_train=True), split(files.valid_json, is_train=False)

        def check() -> list[int]:
            on_main_rank.extend(opened())
            on_main_rank[0].check_on_disk(loading)
            if reports is not None:
                check_reports(reports, on_main_rank, source=self.reports)
            for dataset in on_main_rank:
                try:
                    logger.info(dataset.describe_first_study())
                except BadSampleError as error:
                    if loading.on_bad_sample == "stop":
                        raise
                    where = dataset.index.path
                    logger.warning("%d studies of %s; the first cannot be used: %s", len(dataset), where, error)
            return on_main_rank[1].usable_rows(loading.on_bad_sample)

        # The main rank first, which reports what is wrong; an index of 220,000 studies is read only once.
        on_main_rank: list[BrainStudies] = []
        rows = on_main(check)
        with only_errors_of("itemizedclip_radiology.data.reports", enabled=not opening.ranks.is_main):
            train_split, valid_split = on_main_rank or opened()

        def report_skipped() -> None:
            train_split.report_skipped("series of the training studies")
            valid_split.report_skipped("series of the validation studies")

        how = {} if self.prepare == "crop" else {"prepare": self.prepare}
        return TrainingData(
            train_split,
            # Studies differ in their number of series.
            [opening.retrieval(UsableStudies(valid_split, rows), files.valid_json.stem, batch_size=1)],
            train_split.fingerprint,
            transform=volume_transform(vision.volume_size, num_series=self.num_series, **how),
            at_end=report_skipped,
        )


def check_reports(
    reports: Mapping[str, Sequence[str]], datasets: Sequence[BrainStudies], *, source: Path | None
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


@dataclass(frozen=True)
class StudyRun(RadiologyRun):
    """A training run on whole studies."""

    data: StudyData = field(default_factory=StudyData)


def mri() -> StudyRun:
    """Published recipe: HLIP on brain MRI, 8 GPUs × 32 studies, 24 epochs; paper: Pub-Brain-5 stroke BAcc 97.3."""
    return StudyRun(
        model=ModelSettings(model="HLIPSN_BiomedBERT_81616_itemizedclip", precision="amp", grad_checkpointing=True),
        objective=ObjectiveSettings(
            ila_weight=1.0,
            ila_keep_rate=0.9,
            kta_weight=1.0,
            key_token_fraction=0.05,
            mps_weight=0.01,
            iis_weight=1.0,
            worst_positive_factor=1.5,
            normal_check=True,
        ),
        optimizer=OptimizerSettings(
            lr=1.75e-4, weight_decay=0.2, beta1=0.9, beta2=0.98, eps=1e-6, warmup=2000, epochs=24
        ),
        # Of hundreds of thousands of studies some cannot be read.
        loading=LoadingSettings(batch_size=8, accum_batch=4, num_sampled_captions=7, on_bad_sample="skip"),
        initial=InitialWeights(text_model=BIOMEDBERT_HUB_NAME, image_weights=MAE_HUB_NAME),
    )


def ct() -> StudyRun:
    """Published recipe: HLIP on head CT, 8 GPUs × 32 studies, 24 epochs; paper: RSNA mean AUC of five findings 91.5."""
    return replace(mri(), data=StudyData(is_ct=True))


def _debug_size(recipe: StudyRun) -> StudyRun:
    return replace(
        recipe,
        model=replace(recipe.model, model="HLIPSN_debug", precision="fp32"),
        optimizer=replace(recipe.optimizer, lr=1e-3, warmup=2, epochs=2),
        loading=replace(recipe.loading, batch_size=8, accum_batch=1, num_sampled_captions=3, workers=0),
        data=replace(recipe.data, num_series=6),
        initial=InitialWeights(),
    )


def mri_debug() -> StudyRun:
    """Debug size: the MRI run with the smallest model on 16×64×64 voxels and 2 epochs, seconds on a CPU."""
    return _debug_size(mri())


def ct_debug() -> StudyRun:
    """Debug size: the head CT run with the smallest model on 16×64×64 voxels and 2 epochs, seconds on a CPU."""
    recipe = _debug_size(ct())
    return replace(recipe, data=replace(recipe.data, num_series=3))


@dataclass(frozen=True)
class MrRateData(StudyData):
    """Where the studies of MR-RATE are, as `itemizedclip prepare studies --from mr-rate` writes them."""

    labels: Path | None = None
    """mrrate_labels.csv: after each epoch the findings of the validation studies are scored. None: retrieval alone."""

    prompts: Path | None = None
    """The data set's pathologies.json, whose texts are scored; default: texts of ours."""

    def open(self, opening: Opening) -> TrainingData:
        """As `StudyData`, with zero-shot evaluation of the validation studies where there are labels."""
        data = super().open(opening)
        if self.labels is None:
            return data
        labels, options = self.labels, opening.options
        skips = options.loading.on_bad_sample == "skip"

        def read() -> LabelledStudies:
            root = _on_this_machine(find_study_files(self.data_root, self.json_root).data_root)
            return open_mr_rate(labels, root, split="valid", prompts=self.prompts, allow_missing=skips)

        vision = trunk_config(opening.model)
        reader = BrainReader(self.prepare)
        names = bool(vision.series_names)
        studies = replace(on_main(read), reader=reader, size=vision.volume_size, series_names=names)
        evaluator = MultiLabelEvaluator(
            studies,
            opening.tokenizer,
            studies.class_prompts,
            studies.known_labels_NC,
            name=studies.name,
            scorings=(options.objective.scoring,),
            encoding=opening.encoding(1),
        )
        return replace(data, evaluators=[*data.evaluators, evaluator])


@dataclass(frozen=True)
class MrRateRun(StudyRun):
    """A training run on MR-RATE."""

    data: MrRateData = field(default_factory=MrRateData)


def mr_rate() -> MrRateRun:
    """Public brain and spine MRI: as the recipe mri, on MR-RATE's 88,985 training studies (347 steps of 256)."""
    recipe = mri()
    return MrRateRun(
        model=recipe.model,
        objective=recipe.objective,
        optimizer=recipe.optimizer,
        loading=recipe.loading,
        initial=recipe.initial,
    )


def mr_rate_debug() -> MrRateRun:
    """Debug size: the MR-RATE run with the smallest model and 2 epochs, seconds on a CPU."""
    recipe = _debug_size(mr_rate())
    assert isinstance(recipe, MrRateRun)
    # The files are of the published size, the model's is smaller.
    return replace(recipe, data=replace(recipe.data, prepare="resample"))


# --- chest CT ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChestData(ChestSettings):
    """Where the scans are, and how they are read."""

    data_root: Path | None = None
    """CT-RATE's folder of volumes, with train/ and valid/ in it; default: DATA_ROOT."""

    items_json: Path | None = None
    """Reconstructions and report items of each training scan (itemized.json); default: ITEMS_JSON."""

    labels: Annotated[Path | None, tyro.conf.arg(aliases=("--zeroshot-ct-rate",))] = None
    """Validation labels for the zero-shot evaluation; default: those of --data-root or the folder above, if any."""

    valid_items: Path | None = None
    """JSON file like --items-json, of other scans: retrieval among them after each epoch. None: no retrieval."""

    volume_size: Size | None = None
    """Voxels (slices rows columns) of the input, multiples of the model's patch; None: the model's own."""

    def open(self, opening: Opening) -> TrainingData:
        """Training scans; after each epoch zero-shot evaluation of the labelled validation volumes, retrieval among the
        scans of --valid-items, both, or, where there is neither, nothing, which the log says.

        Raises:
            MissingFileError: a file or folder is missing.
            UserError: an item or label file that is none, or a model of brain studies.
            BadSampleError, PreflightError: entries or volumes that cannot be used; see --on-bad-sample.
        """
        options, loading = opening.options, opening.options.loading
        root, items_json = on_main(lambda: (find_ct_rate_root(self.data_root), find_items_json(self.items_json)))
        vision = trunk_config(opening.model)
        if vision.series_names:
            raise UserError(f"--model {options.model.model} reads series names of brain studies; give a chest CT model")
        chest = self.chest_input(vision.volume_size)

        def scans_of(path: Path, *, is_train: bool) -> ChestScans:
            return ChestScans(
                data_root=root,
                items_json=path,
                is_train=is_train,
                num_items=loading.num_sampled_captions,
                seed=options.run.seed,
                options=chest,
                cache=self.cache(chest.window),
                on_bad_sample=loading.on_bad_sample,
            )

        def check() -> None:
            dataset = scans_of(items_json, is_train=True)
            logger.info(
                "%d scans of %s; window %g…%g HU, %s to %s voxels", len(dataset), items_json, chest.window.hu_min,
                chest.window.hu_max, chest.fit, "×".join(map(str, chest.size)),
            )  # fmt: skip
            dataset.check_on_disk(loading)

        on_main(check)
        with only_errors_of("itemizedclip_radiology.data.reports", enabled=not opening.ranks.is_main):
            scans = scans_of(items_json, is_train=True)
        evaluators: list[Evaluator] = []
        # Training volumes may lie at an address, those to validate on lie here.
        labels: Path | None = None
        if self.labels is not None or isinstance(root, Path):
            here = _on_this_machine(root)
            labels = on_main(lambda: find_validation_labels(self.labels, here))
        if labels is not None:
            reader = ChestReader(here, chest, self.cache(chest.window))
            labelled = on_main(lambda: open_labelled(labels, here, reader, loading.on_bad_sample))
            evaluators.append(
                MultiLabelEvaluator(
                    labelled,
                    opening.tokenizer,
                    labelled.class_prompts,
                    labelled.known_labels_NC,
                    name="ct_rate",
                    scorings=(options.objective.scoring,),
                    encoding=opening.encoding(),
                )
            )
        valid_items = self.valid_items
        if valid_items is not None:
            rows = on_main(lambda: scans_of(valid_items, is_train=False).usable_rows(loading.on_bad_sample))
            valid = UsableStudies(scans_of(valid_items, is_train=False), rows)
            evaluators.append(opening.retrieval(valid, valid_items.stem))
        if not evaluators:
            logger.warning(
                "nothing is evaluated during training: no labels of validation volumes (%s in %s, with %s beside them; "
                "--labels), and no --valid-items", " or ".join(CT_RATE_VALID_LABELS[:2]), root, root / "valid",
            )  # fmt: skip
        return TrainingData(
            scans,
            evaluators,
            scans.fingerprint,
            transform=volume_transform(vision.volume_size, input_info=list(self.input_info or PUBLISHED_INPUT_INFO)),
            at_end=lambda: scans.report_skipped("reconstructions of the training scans"),
        )


@dataclass(frozen=True)
class ChestRun(RadiologyRun):
    """A training run on chest CT."""

    data: ChestData = field(default_factory=ChestData)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.lock_text and self.initial.text_model is None and self.model.pretrained is None:
            raise UserError(
                "--lock-text would freeze a BERT of random weights: give its weights with --text-model, or drop "
                "--lock-text (--no-lock-text)"
            )


def ctrate() -> ChestRun:
    """Published recipe: HLIP on chest CT, 8 GPUs × 64 scans, 80 epochs; paper: CT-RATE mean AUC of 16 findings 83.2."""
    return ChestRun(
        model=ModelSettings(
            model="CTRATE_HLIP_BiomedBERT_itemizedclip",
            precision="amp",
            grad_checkpointing=True,
            lock_text=True,
            # As published: the library's default leaves BERT's LayerNorms trainable and its dropout active.
            lock_text_freeze_layer_norm=False,
        ),
        objective=ObjectiveSettings(
            ila_weight=1.0,
            ila_keep_rate=0.95,
            kta_weight=1.0,
            key_token_fraction=0.05,
            mps_weight=0.1,
            iis_weight=1.0,
            worst_positive_factor=1.0,
            normal_check=True,
        ),
        optimizer=OptimizerSettings(lr=1e-4, weight_decay=0.5, beta1=0.9, beta2=0.98, eps=1e-6, warmup=100, epochs=80),
        # Of 47,149 volumes some cannot be converted.
        loading=LoadingSettings(batch_size=16, accum_batch=4, num_sampled_captions=10, on_bad_sample="skip"),
        initial=InitialWeights(text_model=CXR_BERT_HUB_NAME, image_weights=MAE_HUB_NAME),
        data=ChestData(input_info=PUBLISHED_INPUT_INFO),
    )


def ctrate_debug() -> ChestRun:
    """Debug size: the chest CT run with the smallest model on 32×96×96 voxels and 2 epochs, seconds on a CPU."""
    recipe = ctrate()
    return replace(
        recipe,
        # Its BERT starts from random weights, which are not worth freezing.
        model=replace(recipe.model, model="CTRATE_HLIP_debug", precision="fp32", lock_text=False),
        optimizer=replace(recipe.optimizer, lr=1e-3, weight_decay=0.2, warmup=2, epochs=2),
        loading=replace(recipe.loading, batch_size=8, accum_batch=1, num_sampled_captions=3, workers=0),
        initial=InitialWeights(),
    )


# --- the published scripts -------------------------------------------------------------------------------------------


def main_studies(argv: Sequence[str] | None = None) -> TrainResult | None:
    """Entry point of open_mri_train/main.py."""
    names = ("mri", "ct", "mr-rate", "mri_debug", "ct_debug", "mr-rate_debug")
    return train_door(names, argv, description="Train ItemizedCLIP on whole studies of brain MRI or head CT.")


def main_chest(argv: Sequence[str] | None = None) -> TrainResult | None:
    """Entry point of open_ct_rate/main.py."""
    return train_door(("ctrate", "ctrate_debug"), argv, description="Train ItemizedCLIP on chest CT (CT-RATE).")
