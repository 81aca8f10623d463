"""`itemizedclip search "two planes near a hangar" --index INDEX`: the images of an index that fit a text best."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from time import perf_counter
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from itemizedclip.commands.index import read_queries
from itemizedclip.data.batch import BadSampleError
from itemizedclip.data.items import check_text
from itemizedclip.runtime.errors import UserError, reported_errors
from itemizedclip.runtime.flags import check, read_flags
from itemizedclip.runtime.logs import literal, logging_to_console
from itemizedclip.runtime.processes import check_device_name
from itemizedclip.search.index import Found, Hit, ImageIndex, Searcher, open_searcher
from itemizedclip.search.recall import DEFAULT_CANDIDATES, PrefilterRecall
from itemizedclip.search.serve import SearchServer
from itemizedclip.search.store import ImageIndexError
from itemizedclip.viewer.figures import save_figure
from itemizedclip.viewer.geometry import Upsampling

logger = logging.getLogger(__name__)

PROG = "itemizedclip search"
DESCRIPTION = (
    "Find images of an index by text. The images whose global features are nearest are scored exactly (TCSim), unless "
    "--exact scores all. Printed with each image: its score and the box of pixels where the text looked."
)


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What to look for, and where."""

    texts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TEXT …")] = ()
    """Texts to look for, each in quotes."""

    index: Path
    """Folder that `itemizedclip index` made."""

    queries: Path | None = None
    """Text file with more texts, one per line."""

    top: int = 10
    """Images per text."""

    exact: bool = False
    """Score every image instead of the prefilter's candidates."""

    candidates: int | None = None
    """Images that the prefilter leaves for exact scoring; default: all of up to 2,000, of more the fewest measured to
    find 95 % of the best (the index keeps the measurement), at most 2,000; 500 when nothing was measured."""

    skip: int = 0
    """Images passed over for each text: the pages before."""

    where: str | None = None
    """Of a large index: SQL over its columns, such as "height > 500 AND camera = 'x'"."""

    version: int | None = None
    """Of a large index: search it as it was at this version."""

    serve: bool = False
    """Serve a page and an HTTP API of the index on this machine, at an address with a token, instead of one search."""

    port: int = 0
    """Where to serve; 0: any free one."""

    measure_recall: bool = False
    """Also search exactly, and say which share of the best images the prefilter kept for these texts."""

    output: Path | None = None
    """Folder for hits.json and pictures of where each text looked."""

    upsampling: Upsampling = "nearest"
    """In pictures: nearest shows the patches as they are, smooth interpolates between their centres."""

    json: bool = False
    """Print JSON instead of tables."""

    checkpoint: Path | None = None
    """The checkpoint of the index, when it lies elsewhere now."""

    device: str = "auto"
    """auto (a GPU when there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        for name in ("top", "candidates"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; expected at least 1")
        check_device_name(self.device)
        check(self.skip >= 0, f"--skip is {self.skip}; expected at least 0")
        check(0 <= self.port < 65536, f"--port is {self.port}; expected 0 to 65535")
        check(self.serve or self.port == 0, "--port belongs to --serve")

    def all_texts(self) -> list[str]:
        """Texts of the command line and of the file.

        Raises:
            ValueError: none, or a file that cannot be read.
        """
        texts = [check_text(text, "TEXT") for text in self.texts]
        texts += read_queries(self.queries) if self.queries is not None else []
        if not texts or any(not text.strip() for text in texts):
            raise UserError(f'no text to look for; expected such as: {PROG} "two planes near a hangar" --index INDEX')
        return texts


@dataclass(frozen=True)
class SearchReport:
    """A search and its circumstances.

    Attributes:
        index: what was searched.
        folder: where it lies.
        found: the hits of every text.
        exact: whether every image was scored.
        candidates: images scored per text.
        load_seconds: reading the model and opening the index.
        search_seconds: encoding the texts, searching, finding the regions.
        recall: of the prefilter: measured on these texts, or what the index keeps; None when neither.
        is_recall_of_these_texts: which of the two.
    """

    index: Searcher
    folder: Path
    found: list[Found]
    exact: bool
    candidates: int
    load_seconds: float
    search_seconds: float
    recall: PrefilterRecall | None
    is_recall_of_these_texts: bool

    def recall_sentence(self) -> str:
        """How much the prefilter may have missed, and how that is known."""
        if self.exact:
            return f"all {len(self.index):,} images were scored"
        known = self.recall.lower_bound(self.candidates) if self.recall is not None else None
        start = f"{self.candidates:,} of {len(self.index):,} images were scored per text"
        if self.recall is None or known is None:
            return f"{start}; the recall of the prefilter was not measured (--measure-recall does)"
        count, share = known
        where = "these texts" if self.is_recall_of_these_texts else self.recall.queries
        at_least = "" if count == self.candidates else f" with {count:,} candidates"
        return (
            f"{start}; the prefilter keeps {share:.1%} of the exact first {self.recall.k}{at_least} (measured on "
            f"{where}, {self.recall.num_images:,} images)"
        )

    def plain(self) -> dict[str, Any]:
        """For programs."""
        return {
            "index": str(self.folder),
            "image_folder": str(self.index.image_folder),
            "num_images": len(self.index),
            "mode": "exact" if self.exact else "prefiltered",
            "candidates": self.candidates,
            "load_seconds": round(self.load_seconds, 3),
            "search_seconds": round(self.search_seconds, 3),
            "prefilter_recall": None if self.recall is None else asdict(self.recall),
            "is_recall_of_these_texts": self.is_recall_of_these_texts,
            "queries": [{"text": one.text, "hits": [_plain_hit(hit) for hit in one.hits]} for one in self.found],
        }


def _plain_hit(hit: Hit) -> dict[str, Any]:
    return {
        "rank": hit.rank,
        "path": hit.image.path,
        "score": hit.score,
        "box": list(hit.region.box),
        "box_share": hit.region.share,
        "nowhere": hit.region.nowhere,
        "width": hit.image.width,
        "height": hit.image.height,
    }


def run(options: SearchOptions) -> SearchReport:
    """Open the index and search it.

    Raises:
        ImageIndexError, CheckpointError, SetupError, ValueError: each one sentence with its remedy.
    """
    texts = options.all_texts()
    start = perf_counter()
    index = open_searcher(options.index, checkpoint=options.checkpoint, device=options.device, version=options.version)
    for text in index.cut_texts(texts):
        logger.warning("longer than the text tower reads, or just as long: %s", text)
    loaded = perf_counter()
    recall = None
    if isinstance(index, ImageIndex):
        check(
            options.where is None, "--where filters a large index; make one with `itemizedclip index … --engine lance`"
        )
        top = options.skip + options.top
        found = index.search(texts, top, exact=options.exact, candidates=options.candidates)
        found = [Found(one.text, one.hits[options.skip :]) for one in found]
        searched = perf_counter()
        num_hits = index.num_hits(top)
        num_scored = index.num_scored(num_hits, exact=options.exact, candidates=options.candidates)
        recall = index.manifest.recall
        if options.measure_recall:
            recall = index.recall(texts, queries="the texts of this search", k=num_hits, candidates=num_scored)
    else:
        check(
            not options.exact and not options.measure_recall,
            "--exact and --measure-recall read every token, which a large index has merged; drop them",
        )
        found = [
            index.page(text, options.top, skip=options.skip, candidates=options.candidates, where=options.where)
            for text in texts
        ]
        searched = perf_counter()
        num_scored = min(len(index), max(options.candidates or DEFAULT_CANDIDATES, options.skip + options.top))
    return SearchReport(
        index=index,
        folder=options.index.expanduser(),
        found=found,
        exact=num_scored == len(index),
        candidates=num_scored,
        load_seconds=loaded - start,
        search_seconds=searched - loaded,
        recall=recall,
        is_recall_of_these_texts=options.measure_recall,
    )


def serve(options: SearchOptions) -> None:
    """Serve the index until Ctrl-C.

    Raises:
        ImageIndexError, CheckpointError, UserError: each one sentence with its remedy.
    """
    index = open_searcher(options.index, checkpoint=options.checkpoint, device=options.device, version=options.version)
    with SearchServer(index, port=options.port) as server:
        print(f"{len(index):,} images: {server.url}   (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


# --- output ----------------------------------------------------------------------------------------------------------


def write_output(report: SearchReport, folder: Path, upsampling: Upsampling) -> list[Path]:
    """Write hits.json and a picture per hit; images that cannot be drawn are reported and left out.

    Raises:
        ImageIndexError: a folder that cannot be written to.
    """
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hits.json").write_text(json.dumps(report.plain(), indent=2) + "\n", encoding="utf-8")
        for number, one in enumerate(report.found, start=1):
            for hit in one.hits:
                try:
                    figure = report.index.draw(one.text, hit, upsampling=upsampling)
                except BadSampleError as error:
                    logger.warning("%s; no picture of it", error)
                    continue
                stem = re.sub(r"[^\w.-]+", "_", PurePosixPath(hit.image.path).stem)[:100]
                written.append(save_figure(figure, folder / f"{number}_{hit.rank:03d}_{stem}.png"))
    except OSError as error:
        raise ImageIndexError(
            f"{folder}: cannot put pictures here ({error.strerror or error}); give a writable folder by --output"
        ) from error
    return written


def print_report(console: Console, report: SearchReport) -> None:
    """Tables and circumstances, for the terminal."""
    for one in report.found:
        console.print(literal(one.text), style="bold", soft_wrap=True)
        console.print(hit_table(one))
    lines = [
        "looked at: left,top–right,bottom in pixels, and how much of the text's attention rests there",
        report.recall_sentence(),
        f"searched in {report.search_seconds:.2f} s (model and index loaded in {report.load_seconds:.1f} s)",
    ]
    console.print(literal("\n".join(lines)), soft_wrap=True)


def hit_table(found: Found) -> Table:
    """The hits of one text."""
    table = Table()
    table.add_column("", justify="right")
    table.add_column("image", overflow="fold", ratio=1)
    table.add_column("TCSim", justify="right", no_wrap=True)
    table.add_column("looked at", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    for hit in found.hits:
        left, top, right, bottom = hit.region.box
        box = f"{left},{top}–{right},{bottom}"
        table.add_row(str(hit.rank), literal(hit.image.path), f"{hit.score:.3f}", box, f"{hit.region.share:.0%}")
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `itemizedclip search`."""
    with reported_errors(PROG), logging_to_console(0):
        options = read_flags(SearchOptions, argv, prog=PROG, description=DESCRIPTION)
        if options.serve:
            serve(options)
            return
        report = run(options)
        if options.json:
            print(json.dumps(report.plain(), indent=2))
        else:
            print_report(Console(), report)
        if options.output is not None:
            pictures = write_output(report, options.output.expanduser(), options.upsampling)
            logger.info("%d pictures and hits.json in %s", len(pictures), options.output.expanduser().resolve())


if __name__ == "__main__":
    main()
