"""What every index is asked: the best images of a text, page by page, and where the text looked.

Axes: N images of the index, k hits of a text, D joint width, h, w rows and columns of the token grid.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from itemizedclip.data.batch import BadSampleError
from itemizedclip.data.images import decode_photograph
from itemizedclip.evaluation.attention import ItemMaps, maps_of_features
from itemizedclip.evaluation.encoding import EncodingOptions, encode_texts
from itemizedclip.models.dual_encoder import ImageFeatures
from itemizedclip.models.factory import LoadedModel, create_transform
from itemizedclip.models.tokenizers import ClipTokenizer
from itemizedclip.runtime.errors import UserError
from itemizedclip.search.regions import AttendedRegion, attended_region
from itemizedclip.search.store import IndexedImage
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


def check_page(k: int, skip: int, candidates: int | None) -> None:
    """Refuse numbers that make no page.

    Raises:
        UserError: a k or number of candidates below 1, or a negative skip.
    """
    if k < 1 or skip < 0 or (candidates is not None and candidates < 1):
        raise UserError(f"{k} hits after {skip} among {candidates} candidates were asked for; expected at least 1")


class Searcher(ABC):
    """An index with the model it was made with.

    Args:
        loaded: the model, in evaluation mode.
        image_folder: where the images lie.
    """

    def __init__(self, loaded: LoadedModel, image_folder: Path) -> None:
        self.loaded = loaded
        self.image_folder = image_folder
        self._transform = create_transform(loaded.config, is_train=False)
        self._geometry = functools.lru_cache(maxsize=1024)(self._geometry_of_size)

    @abstractmethod
    def __len__(self) -> int:
        """N."""

    @abstractmethod
    def page(
        self,
        text: str,
        k: int = 10,
        *,
        skip: int = 0,
        candidates: int | None = None,
        where: str | None = None,
    ) -> Found:
        """The images of ranks skip + 1 … skip + k of a text.

        Args:
            text: what to look for.
            k: hits of the page; fewer when the index holds fewer images.
            skip: hits of the pages before.
            candidates: images that are scored exactly; at least skip + k.
            where: SQL over the columns of a large index.

        Raises:
            UserError: numbers below 1, or a filter that is not understood.
        """

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Text features (M, D), float32, on the device."""
        return encode_texts(self.loaded.model, self.loaded.tokenizer, list(texts), EncodingOptions())

    def cut_texts(self, texts: Sequence[str]) -> list[str]:
        """Texts that fill the text tower's whole context, so that their end may be cut off."""
        tokenizer = self.loaded.tokenizer
        if not isinstance(tokenizer, ClipTokenizer):
            return []
        return [text for text, cut in zip(texts, tokenizer.is_truncated(tokenizer(list(texts)))) if cut]

    def hits(
        self,
        text_D: Tensor,
        images: Sequence[IndexedImage],
        scores: Sequence[float],
        features: ImageFeatures,
        *,
        first_rank: int = 1,
    ) -> list[Hit]:
        """Hits of a text, best first, from the float32 features of their images."""
        maps = maps_of_features(self.loaded.model.head, features, text_D.expand(len(images), 1, -1))
        hits = []
        for rank, (image, score, own) in enumerate(zip(images, scores, maps), start=first_rank):
            geometry = self._geometry((image.height, image.width))
            region = attended_region(own.weights[0].numpy(), float(own.nowhere[0]), geometry)
            hits.append(Hit(rank, image, self.image_folder / image.path, score, region, own))
        return hits

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

    def _geometry_of_size(self, size: tuple[int, int]) -> Geometry:
        return photograph_geometry(self.loaded.config, self._transform, size)
