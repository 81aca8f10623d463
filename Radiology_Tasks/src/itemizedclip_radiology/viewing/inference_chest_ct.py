"""One chest CT and any findings in words: a score for each, and where the model looked for it.

    python3 inference_chest_ct.py scan.nii.gz --resume epoch_80.pt
    python3 inference_chest_ct.py DICOM_FOLDER --resume epoch_80.pt --findings "pleural effusion;lung nodule"

Writes a table of scores, explanation.json, a montage of the slices that matter, and for each finding a NIfTI volume
that opens aligned with the scan. Without findings the 16 of CT-RATE are asked, in their published words. Scores are
those of the zero-shot evaluation: TCSim with L2-normalised image tokens.

Axes: K findings.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from itemizedclip.commands.explain import (
    folder_named_after,
    make_output_folder,
    open_to_explain,
    print_written,
    write_with_progress,
)
from itemizedclip.commands.questions import SeriesSettings, check_texts_flags, read_items_file, score_table, split_texts
from itemizedclip.models.factory import LoadedModel, load_pretrained
from itemizedclip.runtime.errors import UserError, reported_errors
from itemizedclip.runtime.files import file_sha256
from itemizedclip.runtime.flags import read_flags
from itemizedclip.runtime.logs import logging_to_console
from itemizedclip.runtime.precision import resolve_precision
from itemizedclip.runtime.processes import check_device_name, choose_device
from itemizedclip.viewer.explanation import Explainer, Explanation
from itemizedclip.viewer.files import ExplanationFiles
from itemizedclip_radiology.benchmarks.chest_ct import CHEST_CLASSES, chest_prompt
from itemizedclip_radiology.data.chest import ChestSettings, DoubleRescale, parse_input_info
from itemizedclip_radiology.viewing.inputs import body_of, open_input

logger = logging.getLogger(__name__)

PROG = "inference_chest_ct.py"
DESCRIPTION = "Score one chest CT for any findings in words, and show where the model looked for each."


@dataclass(frozen=True)
class InferenceOptions:
    """What to read, by which model, what to look for."""

    scan: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SCAN")]
    """NIfTI file, .pt volume in HU at 3×1×1 mm, DICOM folder, or a DICOM file that stands for its series."""

    resume: Annotated[Path, tyro.conf.arg(aliases=("--checkpoint",))]
    """Checkpoint (.pt, .safetensors) of a run or the released one."""

    findings: str | None = None
    """Findings in words, joined by ';', such as "pleural effusion;lung nodule"; default: the 16 of CT-RATE."""

    findings_file: Path | None = None
    """The same from a file: one finding per line, or a .json list."""

    model: str = "CTRATE_HLIP_BiomedBERT_itemizedclip"
    """Config of a released checkpoint; checkpoints of runs carry their own."""

    text_model: str | None = None
    """BERT folder or hub name whose tokenizer a released checkpoint uses; default: the hub name of its config."""

    input_info: tuple[str, str, str] | None = None
    """Lower HU, upper HU, crop or resize; None: as the checkpoint was trained, else -1150 350 crop (published)."""

    double_rescale: DoubleRescale = "refuse"
    """A scan whose HU were shifted down by a second rescale: refuse it, or undo the shift."""

    read_as_is: bool = False
    """Take a scan that does not look like a chest CT in HU all the same, as it is."""

    output: Path | None = None
    """Folder of the results; default: NAME.findings in the current folder."""

    device: str = "auto"
    """auto (a GPU when there is one), cpu, cuda or cuda:N."""

    precision: Literal["fp32", "amp_bf16", "auto"] = "auto"
    """Of the towers; scores and maps are always float32. auto: bfloat16 where the device computes it (docs/training.md
    says what that does to scores)."""

    of_study: Annotated[SeriesSettings, tyro.conf.arg(name="")] = field(default_factory=SeriesSettings)
    files: Annotated[ExplanationFiles, tyro.conf.arg(name="")] = field(default_factory=ExplanationFiles)

    def __post_init__(self) -> None:
        check_device_name(self.device)
        check_texts_flags("findings", self.findings, self.findings_file, example="pleural effusion;lung nodule")
        if self.input_info is not None:
            parse_input_info(self.input_info)

    @property
    def names(self) -> list[str]:
        """The K findings to look for, each once."""
        if self.findings_file is not None:
            return list(dict.fromkeys(read_items_file(self.findings_file)))
        return list(dict.fromkeys(split_texts(self.findings or ""))) or list(CHEST_CLASSES)


def prompt_of(finding: str) -> str:
    """The published text of one of the 16 classes, by its name; any other words as they are."""
    classes = {name.lower(): name for name in CHEST_CLASSES}
    name = classes.get(finding.strip().lower())
    return finding if name is None else chest_prompt(name)


def load_chest_model(options: InferenceOptions) -> LoadedModel:
    """The model, on its device.

    Raises:
        CheckpointError: a checkpoint that cannot be used.
        SetupError: a GPU is asked for that does not exist.
        ValueError: a model of something else than chests.
    """
    device = choose_device(options.device, 0, 1)
    loaded = load_pretrained(options.resume, config=options.model, text_model=options.text_model)
    if loaded.input_kind != "studies" or body_of(loaded.config) != "chest":
        raise UserError(
            f"{options.resume}: is no chest CT model; expected a checkpoint of train_ctrate (other models are asked by "
            "itemizedclip explain)"
        )
    for note in loaded.notes:
        logger.info("%s: %s", options.resume, note)
    loaded.model.to(device)
    return loaded


def run(options: InferenceOptions) -> Explanation:
    """Score, write, show.

    Raises:
        BadSampleError, CheckpointError, FileNotFoundError, SetupError, ValueError: each one sentence with its remedy.
    """
    names = options.names
    loaded = load_chest_model(options)
    settings = ChestSettings(options.input_info, options.double_rescale, options.read_as_is)
    chest = settings.chest_input(loaded.config["vision_cfg"]["volume_size"], loaded.meta.get("transform"))
    source = open_to_explain(
        options.of_study, options.scan, lambda path, choice: open_input(path, loaded, choice, chest), options.files
    )
    folder = make_output_folder(options.output or folder_named_after(options.scan, "findings"))
    prompts = [prompt_of(name) for name in names]
    precision = resolve_precision(options.precision, loaded.model.logit_scale.device)
    explainer = Explainer(loaded, source, normalise_tokens=True, autocast_dtype=precision.autocast_dtype)
    explanation = explainer.explain(prompts)
    shown = replace(explanation, items=names)
    facts = {
        "checkpoint": str(options.resume),
        "checkpoint_sha256": file_sha256(options.resume),
        "model": loaded.config.get("name", ""),
        "prompts": dict(zip(names, prompts)),
        "normalise_tokens": True,
        "precision": precision.name,
        "window_hu": [chest.window.hu_min, chest.window.hu_max],
        "fit": chest.fit,
        "score": "TCSim, a cosine between -1 and 1; no probability: compare a finding's score with that of other scans",
    }
    written = write_with_progress(shown, folder, options.files, facts, options.scan)
    Console().print(score_table(shown))
    print("A score is no probability: compare it with the same finding's in other scans. For research only.")
    print_written(folder, written)
    return shown


def main(argv: Sequence[str] | None = None) -> Explanation:
    """Command line."""
    with reported_errors(PROG), logging_to_console(0):
        return run(read_flags(InferenceOptions, argv, prog=PROG, description=DESCRIPTION))
