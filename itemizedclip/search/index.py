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

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from itemizedclip.data.batch import BadSampleError
from itemizedclip.data.images import decode_photograph
from itemizedclip.evaluation.attention import ItemMaps, maps_of_features
from itemizedclip.evaluation.encoding import EncodingOptions, encode_texts
from itemizedclip.evaluation.tcsim import GlobalScorer, top_images
from itemizedclip.evaluation.tcsim_folded import scorer_of_stored_tokens
from itemizedclip.models.dual_encoder import ImageFeatures
from itemizedclip.models.factory import LoadedModel, create_transform, expect_photographs, load_pretrained
from itemizedclip.models.tokenizers import ClipTokenizer
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.files import file_sha256
from itemizedclip.runtime.processes import choose_device
from itemizedclip.search.recall import CANDIDATE_COUNTS, RECALL_TOP, PrefilterRecall, default_candidates, measure_recall
from itemizedclip.search.regions import AttendedRegion, attended_region
from itemizedclip.search.store import FeatureStore, ImageIndexError, IndexedImage, read_manifest
from itemizedclip.viewer.figures import attention_figure
from itemizedclip.viewer.geometry import Geometry, Upsampling, map_to_input
from itemizedclip.viewer.inputs import photograph_geometry


@dataclass(frozen=True)
class Hit:
    """One image found.

    Attributes:
        rank: 1 is the best.
        image: what the index knows of it.
        file: where it lies.
        score: TCSim, −1 … 1.
        region: where the text looked, in pixels of the upright image.
        maps: the text's attention over the token grid (T = 1).
    """

    rank: int
    image: IndexedImage
    file: Path
    score: float
    region: AttendedRegion
    maps: ItemMaps


@dataclass(frozen=True)
class Found:
    """The best images of one text, best first."""

    text: str
    hits: list[Hit]


class ImageIndex:
    """An index with the model it was made with; open it by `open_index`.

    Args:
        store: features of the images.
        loaded: the model, in evaluation mode, on the store's device.
    """

    def __init__(self, store: FeatureStore, loaded: LoadedModel) -> None:
        self.store = store
        self.manifest = store.manifest
        self.loaded = loaded
        self._transform = create_transform(loaded.config, is_train=False)
        self._geometry = functools.lru_cache(maxsize=1024)(self._geometry_of_size)

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

    def draw(self, text: str, hit: Hit, *, upsampling: Upsampling = "nearest") -> Figure:
        """The image of a hit and where the text looked; save it with `itemizedclip.viewer.figures.save_figure`.

        Raises:
            BadSampleError: an image that is gone, unreadable, or not the one that was encoded.
        """
        picture = decode_photograph(hit.file, source=str(hit.file))
        status, image = hit.file.stat(), hit.image
        if (status.st_size, status.st_mtime_ns) != (image.size, image.mtime_ns):
            raise BadSampleError(f"{hit.file}: changed since it was encoded; run `itemizedclip index` again")
        maps = map_to_input(hit.maps.times_uniform(), self._geometry((image.height, image.width)), upsampling)
        return attention_figure(
            picture,
            [text],
            maps,
            hit.maps.scores.tolist(),
            nowhere=hit.maps.nowhere.tolist(),
            peaks=hit.maps.peaks.tolist(),
            title=image.path,
        )

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Text features (M, D), float32, on the device."""
        return encode_texts(self.loaded.model, self.loaded.tokenizer, list(texts), EncodingOptions())

    def cut_texts(self, texts: Sequence[str]) -> list[str]:
        """Texts that fill the text tower's whole context, so that their end may be cut off."""
        tokenizer = self.loaded.tokenizer
        if not isinstance(tokenizer, ClipTokenizer):
            return []
        return [text for text, cut in zip(texts, tokenizer.is_truncated(tokenizer(list(texts)))) if cut]

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
        maps = maps_of_features(self.loaded.model.head, features, text_D.expand(len(numbers), 1, -1))
        hits = []
        for rank, (number, score, own) in enumerate(zip(numbers, scores, maps), start=1):
            image = self.manifest.images[number]
            geometry = self._geometry((image.height, image.width))
            region = attended_region(own.weights[0].numpy(), float(own.nowhere[0]), geometry)
            hits.append(Hit(rank, image, Path(self.manifest.folder) / image.path, score, region, own))
        return hits

    def _geometry_of_size(self, size: tuple[int, int]) -> Geometry:
        return photograph_geometry(self.loaded.config, self._transform, size)


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
    path = Path(checkpoint).expanduser() if checkpoint is not None else Path(manifest.checkpoint)
    if not path.is_file():
        raise ImageIndexError(
            f"{path}: the checkpoint that {folder} was made with is not there; searching needs its text tower and "
            "head: give the file by --checkpoint"
        )
    digest = file_sha256(path)
    if digest != manifest.source.checkpoint_sha256:
        raise ImageIndexError(
            f"{path}: not the checkpoint that {folder} was made with (sha256 {digest[:12]}…, expected "
            f"{manifest.source.checkpoint_sha256[:12]}…); give that one by --checkpoint, or make the index anew"
        )
    loaded = load_photograph_model(path, manifest.source.model_config)
    if loaded.config["embed_dim"] != manifest.source.model_config["embed_dim"]:
        raise ImageIndexError(
            f"{folder}: its features have width {manifest.source.model_config['embed_dim']}, the model in {path} has "
            f"{loaded.config['embed_dim']}; make the index anew"
        )
    loaded.model.to(place)
    return ImageIndex(FeatureStore(folder, manifest, place), loaded)


def load_photograph_model(path: Path, config: str | dict | None) -> LoadedModel:
    """The model of a checkpoint.

    Raises:
        CheckpointError: a checkpoint that cannot be used, or of a model that reads volumes.
    """
    loaded = load_pretrained(path, config=config)
    expect_photographs(loaded, path)
    return loaded
