"""Indices beyond a million images: a Lance table of global features and merged tokens, searched by LanceDB.

    TABLE/images.lance      path, size, mtime_ns, height, width, shard, any columns of --metadata, vector, tokens
    TABLE/large.json        what the features depend on, how tokens are kept

The images are encoded by `itemizedclip index` as always (any number of processes, stopped and continued); `add_index`
appends its shards, each in one transaction and once, to a table on a disk or in a store that Lance reads (s3://, gs://).
A search takes candidates by IVF-PQ over the global features, filtered by SQL over the other columns, and scores them by
TCSim from their merged tokens (`compressed`). Every append is a version; `version` opens an earlier one.

Axes: N images of the table, n images of a shard, M texts, k hits, D joint width, L image tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from itemizedclip.evaluation.tcsim_folded import scorer_of_stored_tokens
from itemizedclip.models.dual_encoder import ImageFeatures
from itemizedclip.models.factory import LoadedModel
from itemizedclip.runtime.errors import UserError, about
from itemizedclip.runtime.fields import Rule, check_fields, plain_object, several, text, whole
from itemizedclip.runtime.files import read_json, write_json
from itemizedclip.runtime.logs import OnProgress
from itemizedclip.runtime.registry import MissingExtraError
from itemizedclip.search.compressed import MergedTokens, merge_tokens
from itemizedclip.search.recall import DEFAULT_CANDIDATES
from itemizedclip.search.searcher import Found, Searcher, check_page
from itemizedclip.search.store import (
    FeatureStore,
    ImageIndexError,
    IndexedImage,
    Manifest,
    read_manifest,
    shard_path,
)

LARGE_FILE = "large.json"
TABLE_NAME = "images"

DEFAULT_TOKENS = 64
"""Merged tokens of an image."""

FEWEST_FOR_INDEX = 5000
"""Of fewer images every vector is compared, which is as quick."""

_OWN_COLUMNS = ("path", "size", "mtime_ns", "height", "width", "shard", "vector", "tokens")


def _lancedb() -> Any:
    try:
        import lancedb
    except ImportError as error:
        raise MissingExtraError("a large index needs the package lancedb: pip install -e '.[lance]'") from error
    return lancedb


@dataclass(frozen=True)
class LargeFacts:
    """Contents of large.json.

    Attributes:
        folder: of the images, absolute.
        checkpoint: file the model came from, absolute.
        source: what the features depend on, as in index.json.
        grid: how the L tokens lie in the image, (h, w).
        width: D.
        tokens: centroids an image.
    """

    folder: str
    checkpoint: str
    source: dict[str, Any]
    grid: tuple[int, ...]
    width: int
    tokens: int


_FACTS: dict[str, Rule] = {
    "folder": text(),
    "checkpoint": text(),
    "source": plain_object(),
    "grid": several(whole(1, 4096), longest=4),
    "width": whole(1, 2**16),
    "tokens": whole(1, 256),
}


class LargeIndex:
    """A table of images; `create_large` or `open_large` makes one.

    Attributes:
        folder: of the table.
        facts: what it holds.
    """

    def __init__(self, folder: Path, facts: LargeFacts, version: int | None = None) -> None:
        """Open the table, as it is or as it was."""
        self.folder = folder
        self.facts = facts
        connection = _lancedb().connect(str(folder))
        try:
            self._table = connection.open_table(TABLE_NAME)
            if version is not None:
                self._table.checkout(version)
        except Exception as error:
            what = f"has no version {version}" if version is not None else "cannot be opened"
            raise ImageIndexError(f"{folder}: {what} ({type(error).__name__}); make it with --engine lance") from None

    def __len__(self) -> int:
        return int(self._table.count_rows())

    @property
    def version(self) -> int:
        """Number of the present version."""
        return int(self._table.version)

    @property
    def columns(self) -> list[str]:
        """Columns that a filter may name."""
        return [name for name in self._table.schema.names if name not in ("vector", "tokens", "shard")]

    def shards(self) -> set[str]:
        """Identities of the shards that are in the table."""
        found = self._table.search().select(["shard"]).limit(len(self) or 1).to_arrow()
        return set(found["shard"].to_pylist())

    # --- writing

    def add_index(
        self,
        index: Path,
        *,
        metadata: Mapping[str, Mapping[str, Any]] | None = None,
        on_progress: OnProgress | None = None,
    ) -> int:
        """Append the images of an index that are not in the table; returns how many.

        Each shard is one transaction. One whose images are there already is passed over, so a command that was stopped
        goes on.

        Args:
            index: folder that `itemizedclip index` made, by the same model.
            metadata: path → value of each column; the columns are those of the table's first append.
            on_progress: called after each shard with shards done and to do.

        Raises:
            ImageIndexError: an index of another model.
        """
        import pyarrow as pa

        manifest = read_manifest(index)
        _check_same(self.facts, manifest, index)
        store = FeatureStore(index, manifest, torch.device("cpu"))
        by_shard: dict[int, list[int]] = {}
        for number, image in enumerate(manifest.images):
            by_shard.setdefault(image.shard, []).append(number)
        known, added = self.shards(), 0
        for done, (shard, numbers) in enumerate(sorted(by_shard.items()), start=1):
            identity = _identity(manifest, index, shard, numbers)
            if identity not in known:
                rows = self._rows(store, numbers, identity, metadata or {})
                # An image that was there with other content, or in another shard, is replaced.
                merge = self._table.merge_insert("path").when_matched_update_all().when_not_matched_insert_all()
                merge.execute(pa.Table.from_pylist(rows, schema=self._table.schema))
                added += len(rows)
            if on_progress:
                on_progress(done, len(by_shard))
        return added

    def _rows(
        self, store: FeatureStore, numbers: Sequence[int], identity: str, metadata: Mapping[str, Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        extra = [name for name in self._table.schema.names if name not in _OWN_COLUMNS]
        for start in range(0, len(numbers), 64):
            part = numbers[start : start + 64]
            features = store.features(part)
            merged = merge_tokens(features.tokens_BLD, self.facts.tokens).rows()
            for number, vector, tokens in zip(part, features.global_BD.float().numpy(), merged):
                image = store.manifest.images[number]
                own = metadata.get(image.path, {})
                rows.append(
                    {
                        "path": image.path, "size": image.size, "mtime_ns": image.mtime_ns, "height": image.height,
                        "width": image.width, "shard": identity, "vector": vector, "tokens": tokens,
                        **{name: own.get(name) for name in extra},
                    }
                )  # fmt: skip
        return rows

    def build(self, *, partitions: int | None = None, sub_vectors: int | None = None) -> bool:
        """Make the IVF-PQ index over the global features anew; False where there are too few images for one.

        Args:
            partitions: of the vectors; default √N, at most one of 256 vectors.
            sub_vectors: bytes that a vector is reduced to; default D / 8.
        """
        N = len(self)
        if N < FEWEST_FOR_INDEX:
            return False
        from lancedb.index import IvfPq

        config = IvfPq(
            distance_type="cosine",
            num_partitions=partitions or max(1, min(round(math.sqrt(N)), N // 256)),  # 256 train one
            num_sub_vectors=sub_vectors or max(1, self.facts.width // 8),
        )
        self._table.create_index("vector", config=config, replace=True)
        return True

    # --- searching

    def candidates(self, text_D: Tensor, count: int, *, where: str | None = None, probes: int | None = None) -> Any:
        """The images with the global features nearest to a text, nearest first: a pyarrow table.

        Args:
            text_D: text feature.
            count: how many.
            where: SQL over `columns`, such as "height > 500 AND camera = 'x'".
            probes: partitions looked into; default √N / 10 of √N, at least 20.

        Raises:
            UserError: a filter that Lance does not understand.
        """
        if probes is None:
            probes = max(20, round(math.sqrt(len(self)) / 10))
        query = self._table.search(text_D.float().cpu().numpy()).distance_type("cosine").nprobes(probes).limit(count)
        if where:
            query = query.where(where, prefilter=True)
        try:
            rows = query.to_arrow()
        except Exception as error:
            if not where:
                raise
            raise UserError(
                f"--where {where[:200]!r} is not understood ({str(error).splitlines()[0][:200]}); expected SQL over "
                f'{", ".join(self.columns)}, such as "height > 500"'
            ) from None
        return rows

    def features(self, rows: Any) -> ImageFeatures:
        """Global features and unpacked tokens of candidates."""
        L = math.prod(self.facts.grid)
        merged = MergedTokens.from_rows(
            rows.column("tokens").to_pylist(), num_tokens=L, width=self.facts.width, num_centroids=self.facts.tokens
        )
        vectors = rows.column("vector").combine_chunks().flatten().to_numpy(zero_copy_only=False)
        global_BD = torch.from_numpy(vectors.astype(np.float32).reshape(len(rows), self.facts.width))
        return ImageFeatures(global_BD, merged.unpacked(), self.facts.grid)


class LargeImageIndex(Searcher):
    """A table with the model it was made with; open it by `index.open_index`.

    Attributes:
        large: the table.
    """

    def __init__(self, large: LargeIndex, loaded: LoadedModel) -> None:
        super().__init__(loaded, Path(large.facts.folder))
        self.large = large

    def __len__(self) -> int:
        return len(self.large)

    def page(
        self,
        text: str,
        k: int = 10,
        *,
        skip: int = 0,
        candidates: int | None = None,
        where: str | None = None,
    ) -> Found:
        """See `Searcher.page`."""
        check_page(k, skip, candidates)
        text_D = self.encode([text])[0].cpu()
        rows = self.large.candidates(text_D, max(candidates or DEFAULT_CANDIDATES, skip + k), where=where)
        if not len(rows):
            return Found(text, [])
        features = self.large.features(rows)
        head = self.loaded.model.head
        scores = scorer_of_stored_tokens(head, text_D[None], normalise_tokens=False).score(features)[:, 0].tolist()
        # Equal scores go to the path that comes first, whatever order the engine gave.
        paths = rows.column("path").to_pylist()
        best = sorted(range(len(rows)), key=lambda n: (-scores[n], paths[n]))[skip : skip + k]
        chosen_rows = rows.select(["path", "size", "mtime_ns", "height", "width"]).take(best).to_pylist()
        images = [IndexedImage(**row, shard=0, row=0) for row in chosen_rows]
        chosen = ImageFeatures(features.global_BD[best], features.tokens_BLD[best], features.grid)
        return Found(text, self.hits(text_D, images, [scores[n] for n in best], chosen, first_rank=skip + 1))


def create_large(
    folder: Path,
    index: Path,
    *,
    tokens: int = DEFAULT_TOKENS,
    metadata: Mapping[str, Mapping[str, Any]] | None = None,
) -> LargeIndex:
    """A table for the images of an index, still empty; one that is there is opened.

    Args:
        folder: of the table.
        index: folder that `itemizedclip index` made; says what is held.
        tokens: merged tokens an image.
        metadata: path → value of each column; its types become the columns' types.

    Raises:
        ImageIndexError: an index of another model than the table's.
    """
    import pyarrow as pa

    manifest = read_manifest(index)
    if (folder / LARGE_FILE).is_file():
        large = open_large(folder)
        _check_same(large.facts, manifest, index)
        return large
    lancedb = _lancedb()
    width = manifest.source.model_config["embed_dim"]
    facts = LargeFacts(manifest.folder, manifest.checkpoint, vars(manifest.source), manifest.grid, width, tokens)
    fields = [
        ("path", pa.string()), ("size", pa.int64()), ("mtime_ns", pa.int64()), ("height", pa.int32()),
        ("width", pa.int32()), ("shard", pa.string()), ("vector", pa.list_(pa.float32(), width)),
        ("tokens", pa.binary()), *_types_of(metadata or {}),
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    lancedb.connect(str(folder)).create_table(TABLE_NAME, schema=pa.schema(fields), exist_ok=True)
    write_json(folder / LARGE_FILE, vars(facts))
    return LargeIndex(folder, facts)


def open_large(folder: Path, *, version: int | None = None) -> LargeIndex:
    """A table, as it is or as it was at a version.

    Raises:
        ImageIndexError: none, or a damaged one.
    """
    try:
        content = read_json(folder / LARGE_FILE, holding="a large image index")
        with about(folder / LARGE_FILE):
            facts = LargeFacts(**check_fields(content, _FACTS, required=_FACTS))
    except UserError as error:
        raise ImageIndexError(f"{error}. Make it with `itemizedclip index … --engine lance`") from error
    return LargeIndex(folder, LargeFacts(**{**vars(facts), "grid": tuple(facts.grid)}), version)


def _types_of(metadata: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Any]]:
    """Columns and their types: whole numbers, numbers, else texts."""
    import pyarrow as pa

    columns: dict[str, Any] = {}
    for row in metadata.values():
        for name, value in row.items():
            if name in _OWN_COLUMNS:
                raise UserError(f"--metadata: a column is called {name}, as one of the index is; call it otherwise")
            kind = pa.int64() if isinstance(value, int) else pa.float64() if isinstance(value, float) else pa.string()
            before = columns.get(name, kind)
            columns[name] = kind if before == kind else pa.string() if pa.string() in (kind, before) else pa.float64()
    return list(columns.items())


def _identity(manifest: Manifest, index: Path, shard: int, numbers: Sequence[int]) -> str:
    """Which images of which content a shard brings."""
    import hashlib

    images = [(image.path, image.size, image.mtime_ns) for image in (manifest.images[n] for n in numbers)]
    facts = [manifest.source.checkpoint_sha256, manifest.folder, shard_path(index, shard).name, images]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def _check_same(facts: LargeFacts, manifest: Manifest, index: Path) -> None:
    source = vars(manifest.source)
    different = [name for name in source if source[name] != facts.source.get(name)]
    if different:
        raise ImageIndexError(
            f"{index}: was made with another {different[0].replace('_', ' ')} than the table; give an index of the "
            "same model, or a new table"
        )
