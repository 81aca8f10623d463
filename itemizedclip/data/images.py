"""The one decoder of photographs: training, retrieval, index, search, report and explain get theirs here.

A photograph is upright (its EXIF orientation is carried out), RGB with 8 bits, without transparency (laid on white),
and the first frame of several. Greys of more bits are scaled by the range of their type, not by what is in them, so
that an image does not depend on its brightest pixel. Colour profiles are not applied, as in the published training.

Only the formats below are opened: Pillow knows others that start programs. Sizes are judged from the header, before
anything is decoded.

Axes: H, W rows and columns.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from itemizedclip.data.batch import BadSampleError

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
"""Pillow's names of the formats that are opened; JPEG includes MPO, of which the first picture counts."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")
"""Files that are taken for photographs by their names; what they hold is told by their content."""

MAX_PIXELS = 178_956_970
"""Largest H · W that is decoded (537 MB as RGB)."""

MAX_ASPECT = 200
"""Largest ratio of the sides: a model resizes the shorter one, so that a thin strip would become gigabytes."""

WHITE, BLACK = (255, 255, 255), (0, 0, 0)

DECODER_VERSION = 2
"""Changes when the same file may decode to other pixels; kept with what is computed from them and stored."""

_EXPECTED = "expected a JPEG, PNG, WebP, TIFF, BMP or GIF file"
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → what makes the image upright."""

_BEGINNINGS = {
    b"%!": "PostScript",
    b"\xc5\xd0\xd3\xc6": "PostScript",
    b"%PDF": "a PDF",
    b"<": "a web page, SVG or other text",
    b"{": "JSON or other text",
}
_OWN_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"II*\0", b"MM\0*", b"BM", b"GIF8")


def decode_photograph(
    data: bytes | str | Path | BinaryIO, *, source: str, background: tuple[int, int, int] = WHITE
) -> Image.Image:
    """An RGB image of an encoded photograph, upright and decoded to the end.

    Args:
        data: content of an image file, its path, or the open file.
        source: what messages call it: the path, or where the bytes come from.
        background: colour under what is transparent.

    Raises:
        BadSampleError: no such file, no image of `FORMATS`, a damaged or truncated one, too large, or grey values whose
            range is not known; one sentence that names the source, what was expected and what to do.
    """
    if isinstance(data, bytes):
        data = io.BytesIO(data)
    elif isinstance(data, str):
        data = Path(data)
    try:
        if isinstance(data, Path):
            _check_file(data, source)
        with Image.open(data, formats=FORMATS) as image:
            _check_size(image.size, source)
            image.load()
            return _upright(_in_colour(image, source, background), image)
    except BadSampleError:
        raise
    except Image.DecompressionBombError:
        raise BadSampleError(
            f"{source}: has more than the {MAX_PIXELS:,} pixels that are read; scale it down or leave it out"
        ) from None
    except Image.UnidentifiedImageError:
        raise BadSampleError(
            f"{source}: no readable image ({_what_it_is(data)}); {_EXPECTED}; save it as one of these, or copy it again"
        ) from None
    except Exception as error:  # Pillow's decoders raise many types for damaged data
        if isinstance(error, OSError) and error.errno and error.strerror:
            reason = error.strerror
        else:
            reason = (str(error) or type(error).__name__).split("\n")[0][:120]
        raise BadSampleError(
            f"{source}: no readable image ({reason}); {_EXPECTED}, whole; copy it again, or save it anew"
        ) from None


def decode_mask(data: bytes | Path | BinaryIO, *, source: str) -> np.ndarray:
    """bool (H, W) of an image that is white where something is; transparent is not.

    Raises:
        BadSampleError: see `decode_photograph`.
    """
    return np.asarray(decode_photograph(data, source=source, background=BLACK).convert("L")) > 127


# --- before decoding -------------------------------------------------------------------------------------------------


def _check_file(path: Path, source: str) -> None:
    """A regular file: a pipe would never end."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "no such file"
        raise BadSampleError(f"{source}: {what}; {_EXPECTED}; copy it there, or correct the path")


def _check_size(size: tuple[int, int], source: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise BadSampleError(
            f"{source}: is {width} × {height} pixels, more than the {MAX_PIXELS:,} that are read; scale it down or "
            "leave it out"
        )
    if max(size) > MAX_ASPECT * min(size):
        raise BadSampleError(
            f"{source}: is {width} × {height} pixels; expected a longer side of at most {MAX_ASPECT} times the "
            "shorter; crop it or leave it out"
        )


def _what_it_is(data: Path | BinaryIO) -> str:
    """What bytes that no decoder takes seem to be."""
    if isinstance(data, Path):
        with data.open("rb") as file:
            begin = file.read(16)
    else:
        data.seek(0)
        begin = data.read(16)
    if not begin:
        return "it is empty"
    if begin[4:8] == b"ftyp":
        return "it seems to be HEIC, AVIF or a film"
    for first, name in _BEGINNINGS.items():
        if begin.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(first):
            return f"it seems to be {name}"
    if begin.startswith(_OWN_BEGINNINGS):
        return "its header is damaged, or of a kind that is not read"
    return "of no known format"


# --- what was decoded ------------------------------------------------------------------------------------------------


def _upright(picture: Image.Image, image: Image.Image) -> Image.Image:
    """`picture` as the EXIF orientation of `image`, which is loaded, asks; a damaged EXIF block asks for nothing."""
    try:
        # Pillow turns a TIFF when it loads it, and some of its versions leave the note about it in place.
        turn = None if image.format == "TIFF" else _TURNS.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # Pillow's EXIF reader raises many types
        turn = None
    # Nothing of the file stays with the picture: saved again, its EXIF block would turn it twice.
    picture.info = {}
    return picture if turn is None else picture.transpose(turn)


def _in_colour(image: Image.Image, source: str, background: tuple[int, int, int]) -> Image.Image:
    """RGB copy of a loaded image."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = _eight_bits(image, source)
        picture = Image.fromarray(grey).convert("RGB")
        if "transparency" in image.info:
            hidden = np.asarray(image) == image.info["transparency"]
            picture.paste(background, mask=Image.fromarray(hidden))
        return picture
    if not _has_alpha(image):
        return image.convert("RGB")  # a copy, also of RGB
    if image.mode == "La":
        image = image.convert("LA")  # Pillow would drop its alpha on the way to RGBA
    seen = image.convert("RGBA")
    picture = Image.new("RGB", image.size, background)
    picture.paste(seen, mask=seen)
    return picture


def _has_alpha(image: Image.Image) -> bool:
    palette = image.palette
    return (
        image.mode in ("RGBA", "LA", "PA", "RGBa", "La")
        or "transparency" in image.info
        or (image.mode == "P" and palette is not None and palette.mode.endswith("A"))
    )


def _eight_bits(image: Image.Image, source: str) -> np.ndarray:
    """uint8 (H, W) of an image of 16-bit or float greys, by the range of the type.

    Raises:
        BadSampleError: floats outside of 0 … 1, signed or 32-bit integers: what is white cannot be known.
    """
    values = np.asarray(image)
    tags: Any = getattr(image, "tag_v2", {})  # TIFF
    if image.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise BadSampleError(
                f"{source}: its grey values are floats {_range(values)}; expected 0 to 1; scale them to that, or save "
                "it with 8 or 16 bits"
            )
        grey = np.rint(values * 255).astype(np.uint8)
    elif image.mode != "I" or image.format == "PNG":
        largest = 2 ** min(16, int(tags.get(258, (16,))[0])) - 1
        grey = ((values.astype(np.uint32) * 255 + largest // 2) // largest).astype(np.uint8)
    else:
        raise BadSampleError(
            f"{source}: its grey values are signed or have 32 bits, {_range(values)}; expected 8 or 16 bits without "
            "a sign, or floats from 0 to 1; save it so"
        )
    # Pillow turns greys of 8 bits around when a TIFF calls 0 white, and no others.
    return 255 - grey if tags.get(262) == 0 else grey


def _range(values: np.ndarray) -> str:
    finite = values[np.isfinite(values)]
    if finite.size < values.size:
        return "that are not all numbers"
    return f"from {finite.min():g} to {finite.max():g}"
