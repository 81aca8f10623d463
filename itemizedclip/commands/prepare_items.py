"""The command `itemizedclip prepare items`: reports or redundant captions → independent text items.

    itemizedclip prepare items reports.csv --to items/
    itemizedclip prepare items train.json --to items/ --context-of HLIPSN_BiomedBERT_81616_itemizedclip
    itemizedclip prepare items captions.jsonl --to items/ --encoder epoch_30.pt
    itemizedclip prepare items reports/ --to items/ --endpoint http://127.0.0.1:8000/v1 --endpoint-model NAME

Axes: N texts.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from itemizedclip.data.item_endpoint import EndpointError, ItemEndpoint
from itemizedclip.data.itemize import Itemized, ItemizeOptions, Similarity, itemize
from itemizedclip.data.report_files import ReportSource, read_reports, write_item_files, write_review
from itemizedclip.runtime.errors import UserError, reported_errors
from itemizedclip.runtime.files import check_writable, write_json
from itemizedclip.runtime.flags import at_least, check, read_flags
from itemizedclip.runtime.logs import logging_to_console, progress_bar

logger = logging.getLogger(__name__)

PROG = "itemizedclip prepare items"
DESCRIPTION = (
    "Reports or redundant captions → independent text items, in the files that training reads, with a table and a page "
    "to review what became of each report. SOURCE: a .json, .jsonl or .csv file, or a folder of .txt or .csv files "
    "(docs/prepare-items.md). Everything stays on this machine unless --endpoint names another."
)
_MOST_LISTED = 5


@dataclass(frozen=True)
class EndpointSettings:
    """A language model that cuts the reports instead of the rules."""

    endpoint: str = ""
    """Base URL of an OpenAI-compatible API, to which the reports are sent. Empty: none, rules on this machine."""

    endpoint_model: str = ""
    """Name of the model there."""

    endpoint_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the key, where the endpoint asks for one."""

    endpoint_workers: int = 4
    """Reports under way at once."""

    endpoint_cache: Path | None = None
    """Folder of kept answers; default: endpoint-cache in --to. They hold report text."""

    def __post_init__(self) -> None:
        at_least(self, endpoint_workers=1)
        check(
            not self.endpoint or bool(self.endpoint_model), "--endpoint needs --endpoint-model, the model's name there"
        )


@dataclass(frozen=True, kw_only=True)
class PrepareItemsOptions:
    """What to cut, and where the items go."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Reports: .json, .jsonl, .csv, or a folder of .txt or .csv files."""

    to: Path
    """Folder for the results."""

    name_column: str | None = None
    """Column of a .csv with the names of studies or images; default: the first of the usual names."""

    text_columns: tuple[str, ...] = ()
    """Columns of a .csv with text; default: all that are called like a section or a text."""

    image_pattern: str = ""
    """Path of the images with {key} for the name, such as "images/{key}.jpg"; makes items.jsonl for the recipe own."""

    mark_normal: bool = True
    """Begin studies without findings with the sentence that --normal-check of training recognises."""

    context_of: str = "ViT-B-16-ItemizedCLIP"
    """Model name or config whose text context the lengths are compared with."""

    encoder: str = ""
    """Checkpoint whose text tower judges which items say the same (semantic duplicates). Empty: none."""

    encoder_model: str | None = None
    """Model name or config .json of --encoder; only for released checkpoints."""

    rules: ItemizeOptions = field(default_factory=ItemizeOptions)

    language_model: EndpointSettings = field(default_factory=EndpointSettings)


def run(options: PrepareItemsOptions) -> dict[str, Any]:
    """Cut, write, count.

    Returns:
        the statistics, as in statistics.json.

    Raises:
        UserError: a source that is none, or a folder that cannot be written to.
    """
    source = read_reports(options.source, name_column=options.name_column, text_columns=options.text_columns)
    folder = check_writable(options.to, "--to")
    similarity = text_similarity(options.encoder, options.encoder_model) if options.encoder else None
    settings = options.language_model
    endpoint = None
    if settings.endpoint:
        key = os.environ.get(settings.endpoint_key_env, "")
        cache = settings.endpoint_cache or folder / "endpoint-cache"
        endpoint = ItemEndpoint(settings.endpoint, settings.endpoint_model, cache, key)
        if not endpoint.is_local:
            logger.warning("the reports of %s are sent to %s", options.source, settings.endpoint)

    def cut(number: int) -> Itemized:
        report = source.reports[number]
        if endpoint is not None:
            try:
                return endpoint.itemize(report.texts)
            except UserError as error:
                if not isinstance(error, EndpointError) and "answer of" not in str(error):
                    raise
                endpoint.use.failures[report.key] = str(error)
        return itemize(report.texts, options.rules, similarity=similarity)

    results: dict[str, Itemized] = {}
    count = len(source.reports)
    with progress_bar("Cutting reports") as on_progress:
        if endpoint is None:
            for number in range(count):
                results[source.reports[number].key] = cut(number)
                on_progress(number + 1, count)
        else:
            with ThreadPoolExecutor(settings.endpoint_workers) as pool:
                for number, result in enumerate(pool.map(cut, range(count))):
                    results[source.reports[number].key] = result
                    on_progress(number + 1, count)
    statistics = statistics_of(source, results, options.context_of)
    if endpoint is not None:
        statistics["endpoint"] = {"url": settings.endpoint, "model": settings.endpoint_model, **asdict(endpoint.use)}
    written = write_item_files(
        source, results, folder, mark_normal=options.mark_normal, image_pattern=options.image_pattern
    )
    written += write_review(source, results, folder)
    write_json(folder / "statistics.json", statistics)
    _report(statistics, [*written, folder / "statistics.json"])
    return statistics


def text_similarity(checkpoint: str, model: str | None) -> Similarity:
    """Cosines of texts by the text tower of a checkpoint."""
    import torch.nn.functional as F

    from itemizedclip.evaluation.encoding import EncodingOptions, encode_texts
    from itemizedclip.models.factory import load_pretrained

    loaded = load_pretrained(Path(checkpoint), config=model)

    def similarity(texts: Sequence[str]) -> np.ndarray:
        features_ND = F.normalize(encode_texts(loaded.model, loaded.tokenizer, texts, EncodingOptions()), dim=-1)
        return (features_ND @ features_ND.T).cpu().numpy()

    return similarity


def statistics_of(source: ReportSource, results: Mapping[str, Itemized], context_of: str) -> dict[str, Any]:
    """Items per report, lengths against the text context, share of normal, what was left out."""
    from itemizedclip.models.factory import create_tokenizer, load_model_config

    counts = np.array([len(results[report.key].items) for report in source.reports])
    items = [item for report in source.reports for item in results[report.key].items]
    reasons = Counter(entry.reason for result in results.values() for entry in result.left_out)
    owners = Counter(item for result in results.values() for item in set(result.items))
    shared = sum(count for count in owners.values() if count > 1)
    statistics: dict[str, Any] = {
        "reports": len(counts),
        "items": len(items),
        "items_per_report": {
            "mean": float(counts.mean()),
            "median": float(np.median(counts)),
            "least": int(counts.min()),
            "most": int(counts.max()),
        },
        "without_items": [report.key for report in source.reports if not results[report.key].items],
        "normal_share": float(np.mean([result.normal for result in results.values()])),
        "items_in_several_reports_share": shared / max(1, len(items)),
        "left_out": dict(sorted(reasons.items())),
    }
    tokenizer: Any = create_tokenizer(load_model_config(context_of))
    if items:
        tokens_NC = tokenizer(items)
        lengths = (tokens_NC != tokenizer.pad_id).sum(1).numpy()
        statistics["tokens"] = {
            "context": int(tokenizer.context_length), "of": context_of, "median": float(np.median(lengths)),
            "most": int(lengths.max()), "cut_off": int(tokenizer.is_truncated(tokens_NC).sum()),
        }  # fmt: skip
    return statistics


def _report(statistics: Mapping[str, Any], written: Sequence[Path]) -> None:
    console = Console()
    table = Table(show_header=False)
    per = statistics["items_per_report"]
    table.add_row("reports", f"{statistics['reports']:,}")
    table.add_row("items", f"{statistics['items']:,}")
    table.add_row("items per report", f"{per['mean']:.1f} ({per['least']} to {per['most']})")
    table.add_row("reports without a finding", f"{statistics['normal_share']:.1%}")
    table.add_row("items that other reports have too", f"{statistics['items_in_several_reports_share']:.1%}")
    if "tokens" in statistics:
        tokens = statistics["tokens"]
        shown = f"{tokens['median']:.0f}, longest {tokens['most']}; {tokens['cut_off']:,} cut at {tokens['context']}"
        table.add_row("tokens per item, median", shown)
    for reason, count in statistics["left_out"].items():
        table.add_row(f"left out: {reason}", f"{count:,}")
    for name, value in statistics.get("endpoint", {}).items():
        shown = f"{len(value):,}" if name == "failures" else str(value)
        table.add_row(f"endpoint: {name.replace('_', ' ')}", shown)
    console.print(table)
    empty = statistics["without_items"]
    if empty:
        listed = ", ".join(empty[:_MOST_LISTED]) + (", …" if len(empty) > _MOST_LISTED else "")
        console.print(f"{len(empty):,} reports have no item and are left out: {listed}", soft_wrap=True)
    for key, why in list(statistics.get("endpoint", {}).get("failures", {}).items())[:_MOST_LISTED]:
        console.print(f"{key}: cut by rules, {why}", soft_wrap=True)
    console.print(f"written: {', '.join(map(str, written))}", soft_wrap=True, highlight=False)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `itemizedclip prepare items`."""
    options = read_flags(PrepareItemsOptions, argv, prog=PROG, description=DESCRIPTION)
    with reported_errors(PROG), logging_to_console(0):
        run(options)
