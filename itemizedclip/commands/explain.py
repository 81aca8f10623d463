"""The command `itemizedclip explain`: where items look, as pictures and volumes of one input or as numbers over a set.

    itemizedclip explain scene.png --checkpoint epoch_3.pt --items "a small red seven;a large cyan two"
    itemizedclip explain STUDY/ --checkpoint epoch_24.pt --items-file report.txt --output study
    itemizedclip explain --scenes lattice --checkpoint epoch_3.pt
    itemizedclip explain --folder studies/ --items-json findings.json --masks masks/ --checkpoint epoch_24.pt
    torchrun --nproc_per_node 4 -m itemizedclip.commands.explain --folder …          the same numbers

Axes: K items of one input.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from itemizedclip.commands.questions import QuestionOptions, SeriesSettings, items_to_ask, score_table
from itemizedclip.data.scenes import LEVELS, ScenesDataset
from itemizedclip.evaluation.encoding import EncodingOptions
from itemizedclip.evaluation.explanation import ExplainEvaluator
from itemizedclip.evaluation.results import EvaluationReport, metrics_table, write_results
from itemizedclip.models.factory import LoadedModel, create_transform, load_pretrained
from itemizedclip.models.weights import given_checkpoint
from itemizedclip.runtime.errors import UserError, reported_errors
from itemizedclip.runtime.files import file_sha256
from itemizedclip.runtime.flags import read_flags
from itemizedclip.runtime.logs import literal, progress_bar, shown
from itemizedclip.runtime.precision import Precision, resolve_precision
from itemizedclip.runtime.processes import DistributedSettings, Ranks, launch, main_first, on_main
from itemizedclip.viewer.dicom import check_highdicom
from itemizedclip.viewer.explanation import Explainer, Explanation
from itemizedclip.viewer.files import ExplanationFiles, write_explanation
from itemizedclip.viewer.inputs import ModelInput, SeriesChoice, open_input
from itemizedclip.viewer.sets import open_explain_set

logger = logging.getLogger(__name__)

PROG = "itemizedclip explain"
DESCRIPTION = (
    "Where items look. With INPUT: pictures, and of a study NIfTI volumes. With --scenes or --folder: measures over a "
    "set (MLL, mAMS; with masks also pointing game and mIoU)."
)


@dataclass(frozen=True)
class SetSettings:
    """Measures over a set, instead of one input."""

    scenes: str | None = None
    """Itemized scenes of this level (such as lattice or hard, see docs/scenes.md): made here, with masks."""

    num_scenes: int = 500
    """Test scenes."""

    seed: int = 0
    """Seed of the scenes."""

    folder: Path | None = None
    """Folder of images, studies or scans."""

    items_json: Path | None = None
    """Their items: {"NAME": ["item", …]}, or findings.json of a synthetic cohort."""

    masks: Path | None = None
    """Folder of their masks, by name: .npz, .pt, or a folder of .png (docs/explain.md)."""

    allow_missing: bool = False
    """Go on without names of --items-json that are not in --folder; otherwise they are an error."""

    on_bad_sample: Literal["skip", "stop"] = "stop"
    """An image or study that cannot be read is left out, named and counted, or ends the evaluation."""

    tolerance: float = 0.5
    """Pointing game: a peak this near to the mask still hits, in patches; 0 asks for the mask itself."""

    batch_size: int | None = None
    """Images per forward pass; default 32, of studies 1."""

    workers: int = 0
    """Processes that read inputs; 0: none besides this one."""

    def __post_init__(self) -> None:
        if self.scenes is not None and self.scenes not in LEVELS:
            raise UserError(f"--scenes is {self.scenes!r}; expected one of {', '.join(LEVELS)}")
        if self.scenes is not None and self.folder is not None:
            raise UserError("--scenes and --folder: give one of them")
        if self.folder is not None and self.items_json is None:
            raise UserError("--folder needs --items-json, the items of its images or studies")
        if self.folder is None and (self.items_json is not None or self.masks is not None):
            raise UserError("--items-json and --masks need --folder")
        for name, value, lowest in (
            ("num-scenes", self.num_scenes, 1), ("tolerance", self.tolerance, 0), ("workers", self.workers, 0),
            ("batch-size", self.batch_size or 1, 1),
        ):  # fmt: skip
            if value < lowest:
                raise UserError(f"--{name} is {value}; expected at least {lowest}")


@dataclass(frozen=True, kw_only=True)
class ExplainOptions(QuestionOptions):
    """One input or a set, by which model, and where the results go."""

    input: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="INPUT")] = None
    """An image file, or what the model's family reads: a study folder, a scan."""

    output: Path | None = None
    """Folder of the results; default: NAME.explain here, of a set CHECKPOINT.explain beside the checkpoint."""

    files: Annotated[ExplanationFiles, tyro.conf.arg(name="")] = field(default_factory=ExplanationFiles)
    over: Annotated[SetSettings, tyro.conf.arg(name="")] = field(default_factory=SetSettings)
    distributed: Annotated[DistributedSettings, tyro.conf.arg(name="")] = field(default_factory=DistributedSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.input is None) == (self.over.scenes is None and self.over.folder is None):
            raise UserError("give one input (a file or folder), or a set by --scenes LEVEL or --folder DIR")


def run(options: ExplainOptions) -> dict[str, float]:
    """Explain one input, or measure a set; returns the measures of a set.

    Raises:
        BadSampleError, CheckpointError, FileNotFoundError, SetupError, ValueError: each one sentence with its remedy.
    """
    with launch(options.device, options.distributed) as ranks:
        texts = options.texts
        options = replace(options, checkpoint=main_first(lambda: given_checkpoint(options.checkpoint)))
        loaded = load_pretrained(options.checkpoint, config=options.model, text_model=options.text_model)
        loaded.model.to(ranks.device)
        precision = resolve_precision(options.precision, ranks.device)
        if options.input is not None:
            on_main(lambda: explain_one(options, loaded, texts, precision))
            return {}
        return measure(options, loaded, ranks, precision)


# --- one input -------------------------------------------------------------------------------------------------------


def explain_one(options: ExplainOptions, loaded: LoadedModel, texts: list[str], precision: Precision) -> None:
    """Write pictures, volumes and JSON of one input, print its scores."""
    assert options.input is not None
    source = open_to_explain(
        options.of_study, options.input, lambda path, choice: open_input(path, loaded, choice), options.files
    )
    remedy = 'give texts by --items "a runway;parked planes" or --items-file'
    items = items_to_ask(texts, options.input, source, remedy=remedy)
    folder = make_output_folder(options.output or folder_named_after(options.input, "explain"))
    explainer = Explainer(
        loaded, source, normalise_tokens=options.normalise_tokens, autocast_dtype=precision.autocast_dtype
    )
    explanation = explainer.explain(items)
    facts = {
        "checkpoint": str(options.checkpoint),
        "checkpoint_sha256": file_sha256(options.checkpoint),
        "model": loaded.config.get("name", ""),
        "normalise_tokens": options.normalise_tokens,
        "precision": precision.name,
        "cut_items": [text for text, cut in zip(items, explainer.cut_items(items)) if cut],
    }
    written = write_with_progress(explanation, folder, options.files, facts, options.input)
    Console().print(score_table(explanation))
    if facts["cut_items"]:
        print(shown(f"Longer than the text tower reads, or just as long: {'; '.join(facts['cut_items'])}"))
    print_written(folder, written)


def open_to_explain(
    settings: SeriesSettings, path: Path, opener: Callable[[Path, SeriesChoice], ModelInput], files: ExplanationFiles
) -> ModelInput:
    """Read an input; where DICOM is to be written, make sure that it can be.

    Raises:
        MissingExtraError: highdicom is not installed.
        UserError: an input that is no DICOM.
    """
    if files.dicom:
        check_highdicom()
    source = settings.open(path, opener, keep_headers=files.dicom)
    if files.dicom and not all(view.sources for view in source.views):
        raise UserError(f"{path}: is no DICOM study; --dicom writes results that refer to one: leave it out")
    return source


def folder_named_after(source: Path, suffix: str) -> Path:
    """NAME.suffix in the current folder, NAME being the input's without what tells its format."""
    path = source.expanduser().resolve()
    name = path.name if path.is_dir() else path.name.removesuffix(".gz").rpartition(".")[0]
    return Path(f"{name or path.name or 'input'}.{suffix}")


def make_output_folder(folder: Path) -> Path:
    """Before anything is computed: the folder of the results.

    Raises:
        ValueError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot write there ({error.strerror}); give another folder") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output {folder}: cannot write there; give another folder")
    return folder


def write_with_progress(
    explanation: Explanation, folder: Path, settings: ExplanationFiles, facts: dict[str, Any], source: Path
) -> list[Path]:
    """`write_explanation` under a progress bar; a NIfTI file needs no copy of itself beside its volumes."""
    is_nifti = source.name.lower().endswith((".nii", ".nii.gz"))
    with progress_bar("Writing volumes", enabled=True) as advance:
        return write_explanation(explanation, folder, settings, facts, with_images=not is_nifti, on_progress=advance)


def print_written(folder: Path, written: Sequence[Path]) -> None:
    """Say what lies in the folder."""
    pictures = [path.name for path in written if path.suffix in (".png", ".pdf")]
    volumes = sum(path.name.endswith(".nii.gz") for path in written)
    print(shown(f"written to {folder.resolve()}: {', '.join([*pictures, written[-1].name])}"), end="")
    dicom = sum(path.suffix == ".dcm" for path in written)
    print(f", {volumes} volumes in volumes/" if volumes else "", end="")
    print(f", {dicom} files in dicom/" if dicom else "")


# --- a set -----------------------------------------------------------------------------------------------------------


def measure(options: ExplainOptions, loaded: LoadedModel, ranks: Ranks, precision: Precision) -> dict[str, float]:
    """MLL, mAMS and, with masks, pointing game and mIoU over a set; table and results.json."""
    over = options.over
    dataset: Any
    facts: dict[str, Any]
    if over.scenes is not None:
        dataset, facts = _scenes(over, loaded)
        name = f"itemized scenes, {over.scenes}"
    else:
        assert over.folder is not None
        assert over.items_json is not None
        dataset = open_explain_set(over.folder, over.items_json, loaded, over.masks, allow_missing=over.allow_missing)
        facts = {
            "folder": str(over.folder),
            "items_json": str(over.items_json),
            "missing": dataset.missing,
            "without_items": dataset.without_items,
        }
        name = f"{over.folder.resolve().name}, {len(dataset)} inputs"
    on_main(lambda: str(make_output_folder(output_of_set(options))))
    with progress_bar("Explaining", enabled=ranks.is_main) as advance:
        evaluator = ExplainEvaluator(
            dataset,
            loaded.tokenizer,
            normalise_tokens=options.normalise_tokens,
            tolerance_px=tuple(over.tolerance * size for size in patch_of(loaded.config)),
            encoding=EncodingOptions(
                batch_size=over.batch_size or (1 if loaded.input_kind == "studies" else 32),
                num_workers=over.workers,
                autocast_dtype=precision.autocast_dtype,
                on_bad_sample=over.on_bad_sample,
            ),
            on_progress=advance,
        )
        metrics = evaluator.run(loaded.model)
    on_main(lambda: _report(options, name, metrics, evaluator.facts | facts | {"precision": precision.name}))
    return metrics


def _scenes(over: SetSettings, loaded: LoadedModel) -> tuple[ScenesDataset, dict[str, Any]]:
    if loaded.input_kind != "photographs":
        raise UserError("--scenes are photographs; a model of studies is measured by --folder")
    dataset = ScenesDataset(
        split="test",
        num_scenes=over.num_scenes,
        level=over.scenes or "",
        seed=over.seed,
        transform=create_transform(loaded.config, is_train=False),
        shuffle_items=False,
    )
    return dataset, {"level": over.scenes, "seed": over.seed}


def output_of_set(options: ExplainOptions) -> Path:
    """Where the results of a set go."""
    return options.output or options.checkpoint.with_suffix(".explain")


def patch_of(config: dict[str, Any]) -> tuple[int, ...]:
    """Pixels or voxels of a patch along each axis."""
    size = config["vision_cfg"]["patch_size"]
    return (size, size) if isinstance(size, int) else tuple(size)


def _report(options: ExplainOptions, name: str, metrics: dict[str, float], facts: dict[str, Any]) -> None:
    facts = facts | {"checkpoint_sha256": file_sha256(options.checkpoint), "tolerance_patches": options.over.tolerance}
    path = output_of_set(options) / "results.json"
    write_results(path, EvaluationReport(name, "corrected", str(options.checkpoint), metrics, facts))
    console = Console()
    console.print(metrics_table(name, metrics))
    console.print(
        f"{facts['num_items']:,} items of {facts['num_images']:,} inputs, {facts['num_masks']:,} with a mask",
        soft_wrap=True,
    )
    left_out: dict[str, list[str]] = {
        "not in the folder": facts.get("missing", []),
        "without items": facts.get("without_items", []),
        "that cannot be read": list(facts.get("unusable", {})),
    }
    for what, names in left_out.items():
        if names:
            console.print(literal(f"{len(names):,} names {what} are left out, such as {names[0]}"), soft_wrap=True)
    console.print(literal(f"written to {path}"), soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Entry point of `itemizedclip explain`."""
    with reported_errors(PROG):
        return run(read_flags(ExplainOptions, argv, prog=PROG, description=DESCRIPTION))


if __name__ == "__main__":
    main()
