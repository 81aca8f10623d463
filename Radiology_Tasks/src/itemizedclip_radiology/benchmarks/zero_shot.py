"""Zero-shot evaluation of studies: what Pub-Brain-5, RSNA, CQ500, CT-RATE and Rad-ChestCT have in common.

A study's score for a class is TCSim of the class's text with the study's image tokens, which are L2-normalised before
the head. The scores of each study are appended to a JSONL file as soon as they are known, so that an evaluation that
was stopped goes on where it was; scores of other weights, texts or settings lie in files of other names.

Axes: N studies, C classes, M missing studies, B studies of one forward pass.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from itemizedclip.data.batch import BadSampleError
from itemizedclip.evaluation.classification import ClassPrompts, ZeroShotClassifier, class_aucs
from itemizedclip.evaluation.encoding import EncodingOptions
from itemizedclip.evaluation.results import EvaluationReport, format_measure, write_results
from itemizedclip.models.dual_encoder import DualEncoder
from itemizedclip.models.factory import LoadedModel, load_pretrained
from itemizedclip.runtime.collectives import gather_objects
from itemizedclip.runtime.errors import MissingFileError, UserError, reported_errors
from itemizedclip.runtime.files import file_sha256
from itemizedclip.runtime.flags import read_flags
from itemizedclip.runtime.logs import literal, progress_bar
from itemizedclip.runtime.precision import Precision, resolve_precision
from itemizedclip.runtime.processes import DistributedSettings, Ranks, launch, on_main
from itemizedclip_radiology.benchmarks.benchmark import Benchmark, Protocol
from itemizedclip_radiology.data.volumes import Size
from itemizedclip_radiology.models.text_tower import bert_config_of

logger = logging.getLogger(__name__)

_SCORES_VERSION = 1
"""Part of the key of every scores file; to be raised when scores change for a reason the key does not show."""


# --- options ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ZeroShotOptions(ABC):
    """What to evaluate, and how."""

    resume: Path
    """Checkpoint (.pt, .safetensors) of a run or a released one."""

    data_dir: Annotated[Path, tyro.conf.arg(aliases=("--data-root",))]
    """Folder that holds the studies."""

    labels: Annotated[Path | None, tyro.conf.arg(aliases=("--input-filename",))] = None
    """CSV of labels, also looked for in --data-dir and the folder above."""

    protocol: Protocol = "corrected"
    """published: reproduce known defects of the published evaluation, to compare with its numbers."""

    allow_missing: bool = False
    """Go on without listed studies that are not on disk or cannot be read; otherwise they are an error."""

    model: str = "HLIPSN_BiomedBERT_81616_itemizedclip"
    """Config of a released checkpoint; checkpoints of runs carry their own."""

    text_model: str | None = None
    """BERT folder or hub name whose tokenizer a released checkpoint uses; default: the hub name of its config."""

    use_serienames: bool = True
    """Accepted for published commands; whether the model reads series names is part of its config."""

    batch_size: int = 1
    """Studies per forward pass and process; those with as many series as each other are encoded together."""

    workers: int = 2
    """Processes that read studies; 0: none besides this one."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    precision: Literal["fp32", "amp_bf16", "auto"] = "fp32"
    """Of the towers; scores are always float32."""

    output: Path | None = None
    """Folder of results and scores; default: beside the checkpoint, named after it and the benchmark."""

    resume_scores: bool = True
    """Take over scores of an evaluation with the same weights, texts and settings; otherwise score all anew."""

    distributed: Annotated[DistributedSettings, tyro.conf.arg(name="")] = field(default_factory=DistributedSettings)

    family: ClassVar[str] = ""
    """Ending of the output folder's name."""

    def __post_init__(self) -> None:
        for name, value, lowest in (("batch-size", self.batch_size, 1), ("workers", self.workers, 0)):
            if value < lowest:
                raise UserError(f"--{name} is {value}; expected at least {lowest}")

    @property
    def output_folder(self) -> Path:
        """Where results and scores go."""
        return self.output or self.resume.with_suffix(f".zero_shot_{self.family}")

    @abstractmethod
    def open(self) -> Benchmark:
        """The benchmark's studies and labels.

        Raises:
            FileNotFoundError, ValueError: what is missing or wrong, in one sentence.
        """

    def fit_to_model(self, benchmark: Benchmark, loaded: LoadedModel) -> Benchmark:
        """The benchmark as this model takes its studies; every rank calls it.

        Raises:
            ValueError: a model for other studies.
        """
        return benchmark

    @abstractmethod
    def measure(
        self, scores_NC: np.ndarray, labels_NC: np.ndarray, classes: Sequence[str], studies: Sequence[str]
    ) -> Measures:
        """The benchmark's measures; `studies` are the N ids."""


@dataclass(frozen=True)
class Measures:
    """What comes of scores and labels.

    Attributes:
        metrics: name → value.
        facts: how they were taken, for the result file.
        table: for people.
        figures: part of the file name → picture, written beside the result file.
    """

    metrics: dict[str, float]
    facts: dict[str, Any]
    table: Table
    figures: dict[str, Figure] = field(default_factory=dict)


def find_labels(given: Path | None, usual_names: Sequence[str], data_dir: Path) -> Path:
    """The label file: the one given, or the usual one, also looked for in the data folder and the folder above.

    Raises:
        FileNotFoundError: it is in none of these.
    """
    names = [Path(name) for name in usual_names] if given is None else [given.expanduser()]
    folders = [data_dir.expanduser(), data_dir.expanduser().parent]
    candidates = [*names] if given is not None else []
    candidates += [folder / name for folder in folders for name in names if not name.is_absolute()]
    for path in candidates:
        if path.is_file():
            return path
    asked = " or ".join(map(str, names))
    raise MissingFileError(
        f"no label file {asked} here, in {folders[0]} or in {folders[1]}; give its path with --labels"
    )


# --- scores on disk --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StudyScores:
    """The scores of one study.

    Attributes:
        study: its id.
        series: names of all its series; a study whose series have changed is scored again.
        skipped: why series could not be used; such a study is scored again, it may have been mended.
        scores: C scores.
    """

    study: str
    series: list[str]
    skipped: list[str]
    scores: list[float]


class ScoreLog:
    """Scores of studies as JSON lines, one file per process; all scores in it belong to one key.

    Args:
        folder: where the files are.
        key: what the scores depend on; a short fingerprint of it is part of the files' names.
        classes: C names.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], classes: Sequence[str]) -> None:
        self.folder = folder
        self.classes = list(classes)
        self.fingerprint = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]

    def path(self, rank: int) -> Path:
        """The file that one process appends to."""
        return self.folder / f"scores.{self.fingerprint}{f'.rank{rank}' if rank else ''}.jsonl"

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob(f"scores.{self.fingerprint}*.jsonl"))

    def discard(self) -> None:
        """Delete the scores of this key."""
        for path in self._paths():
            path.unlink()

    def read(self) -> dict[str, StudyScores]:
        """Scores by study, of all processes; lines that a killed process left unfinished are passed over."""
        found: dict[str, StudyScores] = {}
        for path in self._paths():
            unreadable = 0
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entry = self._parse(json.loads(line))
                except (ValueError, TypeError, KeyError):
                    unreadable += 1
                    continue
                found[entry.study] = entry
            if unreadable:
                logger.warning("%s: %d unfinished lines passed over; those studies are scored again", path, unreadable)
        return found

    def _parse(self, line: dict[str, Any]) -> StudyScores:
        scores = [float(line["scores"][name]) for name in self.classes]
        if not all(map(math.isfinite, scores)):
            raise UserError("scores that are not finite")
        return StudyScores(str(line["study"]), list(line["series"]), list(line["skipped"]), scores)

    @contextmanager
    def appending(self, rank: int) -> Iterator[_Writer]:
        """Append to one process's file inside the block."""
        path = self.path(rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            yield _Writer(file, self.classes)


@dataclass
class _Writer:
    """Appends lines; each is on its way to the disk before the next study is scored."""

    file: Any
    classes: list[str]

    def add(self, entry: StudyScores) -> None:
        line = {
            "study": entry.study,
            "scores": dict(zip(self.classes, entry.scores)),
            "series": entry.series,
            "skipped": entry.skipped,
        }
        self.file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self.file.flush()


def score_key(options: ZeroShotOptions, loaded: LoadedModel, benchmark: Benchmark) -> dict[str, Any]:
    """Everything that scores depend on."""
    return {
        "version": _SCORES_VERSION,
        "checkpoint_sha256": file_sha256(options.resume),
        "model_config": loaded.config,
        "classes": ClassPrompts(benchmark.classes, [[prompt] for prompt in benchmark.prompts]).sha256,
        "data_dir": str(options.data_dir.expanduser().resolve()),
        "reader": benchmark.reader.facts(),
        "precision": options.precision,
    }


# --- scoring ---------------------------------------------------------------------------------------------------------


@dataclass
class _Read:
    """A study as a loader process hands it over; `error` when nothing of it can be used."""

    row: int
    image: Tensor | None = None
    series_names: Tensor | None = None
    skipped: list[str] = field(default_factory=list)
    error: str = ""


@dataclass
class _Studies(Dataset[_Read]):
    benchmark: Benchmark
    size: Size

    def __len__(self) -> int:
        return len(self.benchmark)

    def __getitem__(self, row: int) -> _Read:
        try:
            study = self.benchmark.load(row, size=self.size)
        except BadSampleError as error:
            return _Read(row, error=str(error))
        return _Read(row, study.image, study.series_names, [message for _, message in study.skipped])


def _as_list(studies: list[_Read]) -> list[_Read]:
    return studies


def plan_batches(num_series: Mapping[int, int], batch_size: int) -> list[list[int]]:
    """Rows in batches of one number of series, most first: what does not fit into memory then fails at once.

    Args:
        num_series: row → series on disk.
        batch_size: rows of a batch.
    """
    order = sorted(num_series, key=lambda row: (-num_series[row], row))
    batches: list[list[int]] = []
    for row in order:
        if batches and len(batches[-1]) < batch_size and num_series[batches[-1][0]] == num_series[row]:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


@torch.no_grad()
def score_studies(
    model: DualEncoder, classifier: ZeroShotClassifier, studies: Sequence[_Read], precision: Precision
) -> dict[int, list[float]]:
    """Row → C scores. Studies of one shape share a forward pass.

    Raises:
        ValueError: scores that are not finite.
    """
    device = next(model.parameters()).device
    by_shape: dict[tuple[int, ...], list[_Read]] = {}
    for study in studies:
        if study.image is not None:
            by_shape.setdefault(tuple(study.image.shape), []).append(study)
    scores: dict[int, list[float]] = {}
    for group in by_shape.values():
        images = torch.stack([study.image for study in group if study.image is not None]).to(device)
        names = None
        if _reads_names(model):
            names = torch.stack([study.series_names for study in group if study.series_names is not None]).to(device)
        with precision.autocast():
            features = model.encode_image(images, series_names=names)
        scores_BC = classifier.score(features).cpu()
        if not torch.isfinite(scores_BC).all():
            raise UserError("scores are not finite: check the weights (--resume) and use --precision fp32")
        scores |= {study.row: row_scores for study, row_scores in zip(group, scores_BC.tolist())}
    return scores


def _reads_names(model: DualEncoder) -> bool:
    return bool(model.config["vision_cfg"].get("series_names", False))


@dataclass
class Scored:
    """What scoring gave, the same on every rank.

    Attributes:
        scores: row → C scores.
        unusable: row → why the study could not be scored.
        skipped: messages about series left out of studies that were scored.
    """

    scores: dict[int, list[float]]
    unusable: dict[int, str]
    skipped: list[str]


def score_benchmark(
    options: ZeroShotOptions, loaded: LoadedModel, benchmark: Benchmark, log: ScoreLog, ranks: Ranks
) -> Scored:
    """Scores of all studies: those on disk, and the others computed, this rank its share."""
    classes = ClassPrompts(benchmark.classes, [[prompt] for prompt in benchmark.prompts])
    precision = resolve_precision(options.precision, ranks.device)
    known = on_main(lambda: _take_over(options, benchmark, log))
    series = {row: len(study.series) for row, study in enumerate(benchmark.studies) if row not in known}
    own = plan_batches(series, options.batch_size)[ranks.rank :: ranks.world_size]
    model = loaded.model.to(ranks.device)
    classifier = ZeroShotClassifier(
        model,
        loaded.tokenizer,
        classes,
        normalise_tokens=True,
        options=EncodingOptions(autocast_dtype=precision.autocast_dtype),
    )
    loader = DataLoader(
        _Studies(benchmark, _volume_size(loaded)),
        batch_sampler=own,
        num_workers=options.workers,
        collate_fn=_as_list,
    )
    scores: dict[int, list[float]] = {}
    unusable: dict[int, str] = {}
    skipped: list[str] = []
    with log.appending(ranks.rank) as writer, progress_bar("Scoring studies", enabled=ranks.is_main) as advance:
        done, to_do = 0, sum(map(len, own))
        for batch in loader:
            for study in batch:
                for message in [*study.skipped, *([study.error] if study.error else [])]:
                    logger.warning(message)
            new = score_studies(model, classifier, batch, precision)
            for study in batch:
                if study.error:
                    unusable[study.row] = study.error
                    continue
                skipped += study.skipped
                entry = benchmark.studies[study.row]
                names = [file.name for file in entry.series]
                writer.add(StudyScores(entry.study_id, names, study.skipped, new[study.row]))
            scores |= new
            done += len(batch)
            advance(done, to_do)
    merged = Scored(dict(known), {}, [])
    for share in gather_objects(Scored(scores, unusable, skipped)):
        merged.scores |= share.scores
        merged.unusable |= share.unusable
        merged.skipped += share.skipped
    return merged


def _volume_size(loaded: LoadedModel) -> Size:
    d, h, w = loaded.config["vision_cfg"]["volume_size"]
    return d, h, w


def _take_over(options: ZeroShotOptions, benchmark: Benchmark, log: ScoreLog) -> dict[int, list[float]]:
    """Row → scores of an earlier evaluation."""
    if not options.resume_scores:
        log.discard()
    found = log.read()
    known = {}
    for row, study in enumerate(benchmark.studies):
        entry = found.get(study.study_id)
        if entry is not None and not entry.skipped and entry.series == [file.name for file in study.series]:
            known[row] = entry.scores
    if known:
        logger.info("%d of %d studies were scored before (%s)", len(known), len(benchmark), log.path(0))
    return known


# --- evaluation ------------------------------------------------------------------------------------------------------


def evaluate(options: ZeroShotOptions) -> dict[str, float]:
    """Load, score, print a table, write results.json; all ranks return the same numbers.

    Raises:
        CheckpointError, FileNotFoundError, ValueError, SetupError: each one sentence with its remedy.
    """
    with launch(options.device, options.distributed) as ranks:
        benchmark = on_main(lambda: _open(options))
        loaded = _load(options)
        _check_model(options, loaded)
        for note in loaded.notes if ranks.is_main else ():
            logger.info("%s: %s", options.resume, note)
        benchmark = options.fit_to_model(benchmark, loaded)
        key = on_main(lambda: score_key(options, loaded, benchmark))
        log = ScoreLog(options.output_folder, key, benchmark.classes)
        scored = score_benchmark(options, loaded, benchmark, log, ranks)
        return on_main(lambda: _report(options, benchmark, key, log, scored))


def _open(options: ZeroShotOptions) -> Benchmark:
    if not options.data_dir.expanduser().is_dir():
        raise MissingFileError(f"{options.data_dir}: no such folder; expected the benchmark's studies (--data-dir)")
    if not options.resume.exists():
        raise MissingFileError(f"{options.resume}: no such checkpoint (--resume)")
    try:
        options.output_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{options.output_folder}: cannot be made ({error.strerror}); give another folder with --output"
        ) from None
    if not os.access(options.output_folder, os.W_OK):
        raise UserError(f"{options.output_folder}: cannot be written to; give another folder with --output")
    benchmark = options.open()
    logger.info(benchmark.describe())
    return benchmark


def _load(options: ZeroShotOptions) -> LoadedModel:
    """The checkpoint, with the text model of a released one."""
    if options.text_model is not None:
        on_main(lambda: bert_config_of(str(options.text_model)))  # one download, one message
    return load_pretrained(options.resume, config=options.model, text_model=options.text_model)


def _check_model(options: ZeroShotOptions, loaded: LoadedModel) -> None:
    if loaded.config["vision_cfg"].get("tower") != "hlip":
        raise UserError(f"{options.resume}: its model takes no studies; give one of train_mri, train_ct, train_ctrate")
    if _reads_names(loaded.model) and not options.use_serienames:
        raise UserError(f"{options.resume}: its model reads series names; drop --no-use-serienames")


def _report(
    options: ZeroShotOptions, benchmark: Benchmark, key: Mapping[str, Any], log: ScoreLog, scored: Scored
) -> dict[str, float]:
    """Measure, write, show."""
    if scored.unusable and not options.allow_missing:
        first = next(iter(scored.unusable.values()))
        raise BadSampleError(
            f"{len(scored.unusable)} of {len(benchmark)} studies cannot be read, the first: {first}. The scores of the "
            f"others are kept in {log.folder}: mend the studies, or leave them out with --allow-missing, and go on"
        )
    if not scored.scores:
        raise BadSampleError(f"{options.data_dir}: no study can be read, the first: {scored.unusable[0]}")
    scores_NC, labels_NC, studies = scores_and_labels(benchmark, scored)
    measures = options.measure(scores_NC, labels_NC, benchmark.classes, studies)
    facts = {
        "num_studies": len(scored.scores),
        "studies_per_class": {name: int((labels_NC[:, c] == 1).sum()) for c, name in enumerate(benchmark.classes)},
        "prompts": dict(zip(benchmark.classes, benchmark.prompts)),
        "normalise_tokens": True,
        "volume_size": key["model_config"]["vision_cfg"]["volume_size"],
        "missing": benchmark.missing,
        "missing_scored_zero": benchmark.missing_score_zero and len(scores_NC) > len(scored.scores),
        "unusable": {benchmark.studies[row].study_id: message for row, message in scored.unusable.items()},
        "excluded": benchmark.excluded,
        "num_unlisted": len(benchmark.unlisted),
        "skipped_series": scored.skipped,
        "notes": benchmark.notes,
        "scores": log.path(0).name,
        **{name: value for name, value in key.items() if name not in ("model_config", "classes", "version")},
        **measures.facts,
    }
    published = ".published" if options.protocol == "published" else ""
    path = options.output_folder / f"{benchmark.name}{published}.results.json"
    name = benchmark.name
    write_results(path, EvaluationReport(name, benchmark.protocol, str(options.resume), measures.metrics, facts))
    written = [path]
    for part, figure in measures.figures.items():
        written.append(options.output_folder / f"{benchmark.name}{published}.{part}.png")
        figure.savefig(written[-1], metadata={"Software": None})
    console = Console()
    console.print(measures.table)
    left_out = len(benchmark.missing) + len(scored.unusable)
    if left_out:
        line = f"{left_out:,} listed studies are missing or cannot be read; see {path.name}"
        console.print(literal(line), soft_wrap=True)
    console.print(literal(f"written to {' and '.join(map(str, written))}"), soft_wrap=True)
    return measures.metrics


def scores_and_labels(benchmark: Benchmark, scored: Scored) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Scores float64 (N, C), labels int8 (N, C) and ids of what is measured, in the order of the label file.

    Where the protocol says so, studies that are missing or cannot be read follow, with score 0.
    """
    rows = sorted(scored.scores)
    scores_NC = np.array([scored.scores[row] for row in rows], dtype=np.float64)
    labels_NC = benchmark.labels_NC[rows]
    studies = [benchmark.studies[row].study_id for row in rows]
    if benchmark.missing_score_zero and (benchmark.missing or scored.unusable):
        absent_MC = [benchmark.labels_NC[sorted(scored.unusable)]]
        absent_MC += [benchmark.missing_labels_MC] if benchmark.missing else []
        labels_MC = np.concatenate(absent_MC)
        scores_NC = np.concatenate([scores_NC, np.zeros(labels_MC.shape)])
        labels_NC = np.concatenate([labels_NC, labels_MC])
        studies += [benchmark.studies[row].study_id for row in sorted(scored.unusable)] + benchmark.missing
    return scores_NC, labels_NC, studies


def finding_measures(title: str, scores_NC: np.ndarray, labels_NC: np.ndarray, classes: Sequence[str]) -> Measures:
    """AUC of each finding and their mean; unrated studies do not count for a finding.

    Raises:
        ValueError: no finding has studies with and without it.
    """
    labels = np.where(labels_NC < 0, np.nan, labels_NC.astype(np.float64))
    aucs = class_aucs(torch.from_numpy(scores_NC), labels)
    known = {name: auc for name, auc in zip(classes, aucs) if auc is not None}
    if not known:
        raise UserError(f"{title}: no finding has both studies with and without it, so no AUC exists")
    metrics = {"mean_auc": float(np.mean(list(known.values()))), **{f"auc/{name}": auc for name, auc in known.items()}}
    table = Table(title=f"{title}: {len(scores_NC):,} studies", title_justify="left")
    table.add_column("finding")
    for column in ("with it", "rated", "AUC"):
        table.add_column(column, justify="right", no_wrap=True)
    for c, name in enumerate(classes):
        shown = format_measure("auc", known[name]) if name in known else "undefined"
        positive, rated = int((labels_NC[:, c] == 1).sum()), int((labels_NC[:, c] >= 0).sum())
        table.add_row(name, f"{positive:,}", f"{rated:,}", shown)
    table.add_section()
    table.add_row("mean", "", "", format_measure("auc", metrics["mean_auc"]))
    return Measures(metrics, {"undefined_classes": [name for name in classes if name not in known]}, table)


def parse_and_evaluate(
    kind: type[ZeroShotOptions], argv: Sequence[str] | None, *, prog: str, description: str
) -> dict[str, float]:
    """Entry point of the scripts."""
    with reported_errors(prog):
        return evaluate(read_flags(kind, argv, prog=prog, description=description))
