"""Searching an index from Python.

    from itemizedclip.search.index import open_index

    index = open_index("photos.index")
    for found in index.search(["two planes near a hangar", "a lake"], k=5):
        for hit in found.hits:
            print(found.text, hit.rank, hit.file, hit.score, hit.region.box)
    figure = index.draw(found.text, hit)

Axes: N images of the index, M texts, k hits of a text, D joint width, h, w rows and columns of the token grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from itemizedclip.evaluation.tcsim import GlobalScorer, top_images
from itemizedclip.evaluation.tcsim_folded import scorer_of_stored_tokens
from itemizedclip.models.dual_encoder import ImageFeatures
from itemizedclip.models.factory import LoadedModel, expect_photographs, load_pretrained
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.files import file_sha256
from itemizedclip.runtime.processes import choose_device
from itemizedclip.search.lance import LARGE_FILE, LargeImageIndex, open_large
from itemizedclip.search.recall import CANDIDATE_COUNTS, RECALL_TOP, PrefilterRecall, default_candidates, measure_recall
from itemizedclip.search.searcher import Found, Hit, Searcher, check_page
from itemizedclip.search.store import FeatureStore, ImageIndexError, read_manifest

__all__ = ["Found", "Hit", "ImageIndex", "Searcher", "load_photograph_model", "open_index", "open_searcher"]


class ImageIndex(Searcher):
    """An index with the model it was made with; open it by `open_index`.

    Args:
        store: features of the images.
        loaded: the model, in evaluation mode, on the store's device.
    """

    def __init__(self, store: FeatureStore, loaded: LoadedModel) -> None:
        super().__init__(loaded, Path(store.manifest.folder))
        self.store = store
        self.manifest = store.manifest

    def __len__(self) -> int:
        """N."""
        return len(self.store)

    def search(
        self, texts: Sequence[str], k: int = 10, *, exact: bool = False, candidates: int | None = None
    ) -> list[Found]:
        """The k best images of every text, by TCSim.

        The result of a text does not depend on the others, beyond rounding.

        Args:
            texts: at least one.
            k: hits per text; fewer when the index holds fewer images.
            exact: score all images, not only the prefilter's candidates.
            candidates: images with the largest global cosine that are scored, at least k; default:
                `recall.default_candidates`, all of up to 2,000 images.

        Raises:
            ValueError: no text, or a k or number of candidates below 1.
            ImageIndexError: a damaged shard.
        """
        if not texts or any(not text.strip() for text in texts):
            raise UserError('no text to search for; give at least one, such as "two planes near a hangar"')
        k, C = self.num_hits(k), self.num_scored(k, exact=exact, candidates=candidates)
        texts_MD = self.encode(texts)
        if len(self) > C:
            scores_Mk, images_Mk = self._search_candidates(texts_MD, k, C)
        else:
            scores_Mk, images_Mk = self._search_all(texts_MD, k)
        rows = zip(texts, texts_MD, scores_Mk.tolist(), images_Mk.tolist())
        return [Found(text, self._hits(text_D, scores, images)) for text, text_D, scores, images in rows]

    def page(
        self,
        text: str,
        k: int = 10,
        *,
        skip: int = 0,
        candidates: int | None = None,
        where: str | None = None,
    ) -> Found:
        """See `Searcher.page`; an index of this kind has no other columns to filter by."""
        check_page(k, skip, candidates)
        if where:
            raise UserError("--where filters a large index; make one with `itemizedclip index … --engine lance`")
        (found,) = self.search([text], min(skip + k, len(self)), candidates=candidates)
        return Found(text, found.hits[skip:])

    def num_hits(self, k: int) -> int:
        """Hits of a text when k are asked for."""
        if k < 1:
            raise UserError(f"{k} hits were asked for; expected at least 1")
        return min(k, len(self))

    def num_scored(self, k: int, *, exact: bool = False, candidates: int | None = None) -> int:
        """Images that a search scores exactly for each text; N when it scores all."""
        if candidates is not None and candidates < 1:
            raise UserError(f"{candidates} candidates were asked for; expected at least 1")
        if exact:
            return len(self)
        chosen = candidates or default_candidates(len(self), self.manifest.recall)
        return min(max(k, chosen), len(self))

    def recall(
        self,
        texts: Sequence[str],
        *,
        queries: str = "given queries",
        k: int = RECALL_TOP,
        candidates: int | None = None,
    ) -> PrefilterRecall:
        """What share of the exact best images the prefilter keeps for these texts.

        Args:
            texts: at least one.
            queries: what they are, for people.
            k: how many of the best images count.
            candidates: measure this number besides `recall.CANDIDATE_COUNTS`.
        """
        counts = CANDIDATE_COUNTS if candidates is None else (*CANDIDATE_COUNTS, candidates)
        head, texts_MD = self.loaded.model.head, self.encode(texts)
        return measure_recall(head, self.store, texts_MD, queries=queries, k=k, counts=counts)

    def _search_all(self, texts_MD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scorer = scorer_of_stored_tokens(self.loaded.model.head, texts_MD, normalise_tokens=False)
        return top_images(scorer, self.store.batches(), k, device=self.store.device)

    def _search_candidates(self, texts_MD: Tensor, k: int, candidates: int) -> tuple[Tensor, Tensor]:
        device = self.store.device
        _, kept_MC = top_images(GlobalScorer(texts_MD), self.store.global_batches(), candidates, device=device)
        best = []
        for text_D, kept_C in zip(texts_MD, kept_MC.tolist()):
            scorer = scorer_of_stored_tokens(self.loaded.model.head, text_D[None], normalise_tokens=False)
            best.append(top_images(scorer, self.store.chosen_batches(kept_C), k, device=device))
        scores, images = zip(*best)
        return torch.cat(scores), torch.cat(images)

    def _hits(self, text_D: Tensor, scores: Sequence[float], numbers: Sequence[int]) -> list[Hit]:
        stored = self.store.features(numbers)
        features = ImageFeatures(stored.global_BD.float(), stored.tokens_BLD.float(), stored.grid)
        return self.hits(text_D, [self.manifest.images[number] for number in numbers], scores, features)


def open_index(folder: str | Path, *, checkpoint: str | Path | None = None, device: str = "auto") -> ImageIndex:
    """An index and its model, ready to be searched.

    Args:
        folder: of the index.
        checkpoint: the file the index was made with, when it lies elsewhere now.
        device: auto (a GPU when there is one), cpu, cuda or cuda:N.

    Raises:
        ImageIndexError: no index, an unfinished or damaged one, or a checkpoint it was not made with.
        CheckpointError: a checkpoint that cannot be read.
        SetupError: a GPU is asked for that does not exist.
    """
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)
    place = choose_device(device, 0, 1)
    loaded = _model_of(
        folder, manifest.checkpoint, manifest.source.checkpoint_sha256, manifest.source.model_config, checkpoint, place
    )
    return ImageIndex(FeatureStore(folder, manifest, place), loaded)


def open_searcher(
    folder: str | Path, *, checkpoint: str | Path | None = None, device: str = "auto", version: int | None = None
) -> Searcher:
    """An index of either kind, as `open_index`; of a large one also an earlier version."""
    folder = Path(folder).expanduser()
    if not (folder / LARGE_FILE).is_file():
        if version is not None:
            raise UserError("--version belongs to a large index; make one with `itemizedclip index … --engine lance`")
        return open_index(folder, checkpoint=checkpoint, device=device)
    large = open_large(folder, version=version)
    facts = large.facts
    place = choose_device(device, 0, 1)
    sha256, config = facts.source["checkpoint_sha256"], facts.source["model_config"]
    return LargeImageIndex(large, _model_of(folder, facts.checkpoint, sha256, config, checkpoint, place))


def _model_of(
    folder: Path,
    noted: str,
    sha256: str,
    config: dict[str, Any],
    checkpoint: str | Path | None,
    device: torch.device,
) -> LoadedModel:
    path = Path(checkpoint).expanduser() if checkpoint is not None else Path(noted)
    if not path.is_file():
        raise ImageIndexError(
            f"{path}: the checkpoint that {folder} was made with is not there; searching needs its text tower and "
            "head: give the file by --checkpoint"
        )
    digest = file_sha256(path)
    if digest != sha256:
        raise ImageIndexError(
            f"{path}: not the checkpoint that {folder} was made with (sha256 {digest[:12]}…, expected "
            f"{sha256[:12]}…); give that one by --checkpoint, or make the index anew"
        )
    loaded = load_photograph_model(path, config)
    if loaded.config["embed_dim"] != config["embed_dim"]:
        raise ImageIndexError(
            f"{folder}: its features have width {config['embed_dim']}, the model in {path} has "
            f"{loaded.config['embed_dim']}; make the index anew"
        )
    loaded.model.to(device)
    return loaded


def load_photograph_model(path: Path, config: str | dict | None) -> LoadedModel:
    """The model of a checkpoint.

    Raises:
        CheckpointError: a checkpoint that cannot be used, or of a model that reads volumes.
    """
    loaded = load_pretrained(path, config=config)
    expect_photographs(loaded, path)
    return loaded
