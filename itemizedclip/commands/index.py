"""`itemizedclip index IMAGES --checkpoint FILE`: encode a folder of images once, so that they can be searched.

Under several processes: torchrun --nproc_per_node 4 -- -m itemizedclip.commands.index IMAGES --checkpoint FILE
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from itemizedclip.data.images import DECODER_VERSION
from itemizedclip.evaluation.encoding import EncodingOptions
from itemizedclip.models.factory import LoadedModel, create_transform, transform_spec
from itemizedclip.models.weights import CheckpointError, given_checkpoint
from itemizedclip.runtime.errors import UserError, reported_errors
from itemizedclip.runtime.files import file_sha256, open_csv, read_lines
from itemizedclip.runtime.flags import loader_processes, read_flags
from itemizedclip.runtime.logs import literal, progress_bar
from itemizedclip.runtime.precision import Precision, resolve_precision
from itemizedclip.runtime.processes import DistributedSettings, Ranks, launch, main_first, on_main
from itemizedclip.search.build import BuildReport, build_index
from itemizedclip.search.index import ImageIndex, load_photograph_model
from itemizedclip.search.lance import DEFAULT_TOKENS, LargeIndex, create_large
from itemizedclip.search.plan import BuildOptions
from itemizedclip.search.recall import BUILT_IN_QUERIES, PrefilterRecall
from itemizedclip.search.store import INDEX_FILE, FeatureSource, FeatureStore, Storage, read_manifest, write_manifest

logger = logging.getLogger(__name__)

PROG = "itemizedclip index"
DESCRIPTION = (
    "Encode every image below a folder once, so that `itemizedclip search` finds them by text. On disk: one global "
    "feature and all image tokens per image, 2·D·(L + 1) bytes; at ViT-B/16 (L 196, D 512) 202 kB per image, 2 GB per "
    "10,000. Run it again to bring the index up to date: only new and changed images are encoded, deleted ones are "
    "dropped. A build that is stopped goes on where it was."
)

REMEASURE_FRACTION = 0.1
"""The recall is measured again when more than this share of the images changed."""


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """What to encode, by which model, and where to keep it."""

    images: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="IMAGES")]
    """Folder of images, searched with all folders below; hidden files are passed over."""

    checkpoint: Path
    """Checkpoint (.pt, .safetensors) of a run or a released one, of a model of photographs."""

    model: str | None = None
    """Model name or config .json; only for released checkpoints, which do not carry their config."""

    output: Path | None = None
    """Folder of the index; default: IMAGES.index beside the image folder."""

    batch_size: int = 32
    """Images per forward pass and process."""

    workers: int | None = None
    """Processes that decode images; None: one per core that this process has, at most 8; 0: none besides this one."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    precision: Literal["fp32", "amp_bf16", "auto"] = "auto"
    """Of the image tower; auto: that of the index when there is one, else bfloat16 where the device computes it."""

    storage: Storage = "float16"
    """How features are kept: float16 is the finer one, bfloat16 holds larger numbers."""

    max_bad_fraction: float = 0.01
    """Share of the images that may be unreadable; they are reported and skipped. More of them stop the build."""

    shard_size: int = 256
    """Images per file of the index; a stopped build loses at most one unfinished file per process."""

    engine: Literal["embedded", "lance"] = "embedded"
    """embedded: up to some million images, nothing else needed; lance: also append the images, their tokens merged, to
    a large index that LanceDB searches (--table)."""

    table: Path | None = None
    """Folder of the large index; default: IMAGES.lance beside the image folder. Several image folders may share one."""

    stored_tokens: int = DEFAULT_TOKENS
    """Of the large index: merged tokens an image, 8 bits a number; 8, 27 and 64 were measured (docs/search.md)."""

    metadata: Path | None = None
    """Of the large index: CSV with a column path and others, which --where of a search filters by."""

    recall_queries: str = "built-in"
    """What the recall of the prefilter is measured on: built-in phrases, a text file with one query a line, or none."""

    distributed: Annotated[DistributedSettings, tyro.conf.arg(name="")] = field(default_factory=DistributedSettings)

    @property
    def folder(self) -> Path:
        """The image folder, absolute."""
        return self.images.expanduser().resolve()

    @property
    def index_folder(self) -> Path:
        """The folder of the index, absolute."""
        if self.output is not None:
            return self.output.expanduser().resolve()
        return self.folder.with_name(f"{self.folder.name}.index")

    @property
    def table_folder(self) -> Path:
        """The folder of the large index, absolute."""
        if self.table is not None:
            return self.table.expanduser().resolve()
        return self.folder.with_name(f"{self.folder.name}.lance")

    def build_options(self, precision: Precision) -> BuildOptions:
        """How to encode on this process."""
        encoding = EncodingOptions(
            batch_size=self.batch_size,
            num_workers=loader_processes(self.workers),
            autocast_dtype=precision.autocast_dtype,
        )
        return BuildOptions(encoding, self.shard_size, self.max_bad_fraction)


def read_queries(path: Path) -> list[str]:
    """Queries of a text file, one per line; empty lines are left out.

    Raises:
        ValueError: no such file, no text file, or no query in it.
    """
    queries = read_lines(path, holding="one query per line")
    if not queries:
        raise UserError(f"{path}: holds no query; expected one per line")
    return queries


def run(options: IndexOptions) -> BuildReport:
    """Build or update the index, measure its prefilter, say what was done; the same on every rank.

    Raises:
        CheckpointError, ImageIndexError, BadSampleError, SetupError, ValueError: each one sentence with its remedy.
    """
    with launch(options.device, options.distributed) as ranks:
        queries = on_main(lambda: _queries(options.recall_queries))
        checkpoint = main_first(lambda: given_checkpoint(options.checkpoint)).expanduser().resolve()
        digest = on_main(lambda: _digest(checkpoint))
        loaded = load_photograph_model(checkpoint, options.model)
        loaded.model.to(ranks.device)
        for note in loaded.notes if ranks.is_main else ():
            logger.warning(note)
        precision = resolve_precision(on_main(lambda: _precision_name(options)), ranks.device)
        # An index of photographs that were decoded by another rule would mix both.
        transform = transform_spec(loaded.config) | {"decoder": DECODER_VERSION}
        source = FeatureSource(digest, loaded.config, transform, options.storage, precision.name)
        with progress_bar("Encoding images", enabled=ranks.is_main) as on_progress:
            report = build_index(
                loaded.model,
                options.folder,
                options.index_folder,
                checkpoint=checkpoint,
                transform=create_transform(loaded.config, is_train=False),
                source=source,
                options=options.build_options(precision),
                on_progress=on_progress,
            )
        recall = _measure(options, report, queries, loaded, ranks)
        if options.engine == "lance":
            on_main(lambda: append_to_table(options))
        if ranks.is_main:
            print_report(Console(), options.index_folder, report, recall)
        return report


def append_to_table(options: IndexOptions) -> LargeIndex:
    """Append what is new in the index to the large one, and index that anew.

    Raises:
        ImageIndexError, UserError: a table of another model, or metadata that are none.
    """
    metadata = {} if options.metadata is None else read_metadata(options.metadata)
    large = create_large(options.table_folder, options.index_folder, tokens=options.stored_tokens, metadata=metadata)
    with progress_bar("Appending to the large index") as on_progress:
        added = large.add_index(options.index_folder, metadata=metadata, on_progress=on_progress)
    if added:
        large.build()
    logger.info(
        "%s: %s images (%s appended now), version %d", options.table_folder, f"{len(large):,}", f"{added:,}",
        large.version,
    )  # fmt: skip
    return large


def read_metadata(path: Path) -> dict[str, dict[str, Any]]:
    """Path → the other columns of a CSV; what reads as numbers in every row becomes numbers.

    Raises:
        UserError: no column path, a row of another length, or a path twice.
    """
    with open_csv(path, holding="a column path and others") as rows:
        header = next(rows, [])
        if "path" not in header or len(set(header)) < len(header):
            raise UserError(f"{path}: columns are {', '.join(header)[:200]}; expected path and others, each once")
        table: list[dict[str, Any]] = []
        for row in rows:
            if len(row) != len(header):
                raise UserError(f"{path}: line {rows.line} has {len(row)} cells; expected {len(header)}")
            table.append(dict(zip(header, row)))
    for name in header:
        for kind in (int, float):
            try:
                values = [None if entry[name] == "" else kind(entry[name]) for entry in table]
            except ValueError:
                continue
            if name != "path":
                for entry, value in zip(table, values):
                    entry[name] = value
            break
    found = {entry.pop("path"): entry for entry in table}
    if len(found) < len(table):
        raise UserError(f"{path}: a path stands in two rows; keep one of them")
    return found


def _precision_name(options: IndexOptions) -> str:
    """What to resolve: auto is the precision of an index that is there, so that a machine can update another's."""
    if options.precision != "auto" or not (options.index_folder / INDEX_FILE).is_file():
        return options.precision
    return read_manifest(options.index_folder).source.precision


def _digest(checkpoint: Path) -> str:
    if not checkpoint.is_file():
        what = "is a folder; give the .pt file inside" if checkpoint.is_dir() else "does not exist"
        raise CheckpointError(f"{checkpoint}: checkpoint {what}")
    return file_sha256(checkpoint)


def _queries(choice: str) -> tuple[str, list[str]]:
    """What queries are called, and the queries."""
    if choice == "none":
        return "", []
    if choice == "built-in":
        return f"{len(BUILT_IN_QUERIES)} built-in phrases", list(BUILT_IN_QUERIES)
    queries = read_queries(Path(choice))
    return f"{len(queries)} queries of {Path(choice).name}", queries


def _measure(
    options: IndexOptions, report: BuildReport, queries: tuple[str, list[str]], loaded: LoadedModel, ranks: Ranks
) -> PrefilterRecall | None:
    """The recall of the prefilter, measured and kept in the index unless what is there still holds."""
    name, texts = queries
    manifest = on_main(lambda: read_manifest(options.index_folder))
    known = manifest.recall
    changed = max(report.encoded + report.dropped, abs(len(manifest.images) - known.num_images) if known else 0)
    still_holds = known is not None and known.queries == name and changed <= REMEASURE_FRACTION * len(manifest.images)
    if not texts or still_holds:
        return known
    logger.info("Measuring the prefilter on %s (--recall-queries)", name)
    index = ImageIndex(FeatureStore(options.index_folder, manifest, ranks.device), loaded)
    recall = index.recall(texts, queries=name)
    on_main(lambda: write_manifest(options.index_folder, manifest.with_recall(recall)))
    return recall


def print_report(console: Console, folder: Path, report: BuildReport, recall: PrefilterRecall | None) -> None:
    """What was done, for the terminal."""
    parts = [f"{report.encoded:,} encoded now", f"{report.kept:,} kept", f"{report.dropped:,} dropped"]
    size = f"{report.num_bytes / 1e6:,.1f} MB"
    lines = [f"{folder}: {report.num_images:,} images ({', '.join(parts)}), {size}"]
    if report.unreadable:
        first = report.unreadable[0].reason
        lines.append(f"{len(report.unreadable):,} unreadable images were skipped, the first: {first}")
    if report.others:
        lines.append(f"{report.others:,} other files are no images by their names and were passed over")
    console.print(literal("\n".join(lines)), soft_wrap=True)
    if recall is not None:
        measured = f"measured on {recall.queries}, {recall.num_images:,} images"
        line = f"Prefilter: share of the exact first {recall.k} among the candidates, {measured}"
        console.print(literal(line), soft_wrap=True)
        console.print(recall_table(recall))


def recall_table(recall: PrefilterRecall) -> Table:
    """Candidates and recall."""
    table = Table()
    table.add_column("candidates", justify="right")
    table.add_column("recall", justify="right")
    for count, share in sorted(recall.at.items()):
        table.add_row(f"{count:,}", f"{share:.3f}")
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `itemizedclip index`."""
    options = read_flags(IndexOptions, argv, prog=PROG, description=DESCRIPTION)
    try:
        with reported_errors(PROG):
            run(options)
    except KeyboardInterrupt:
        print(f"{PROG}: stopped; the same command goes on where it was", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
