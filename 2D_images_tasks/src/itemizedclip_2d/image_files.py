"""Decoding of image files, with one clear message for a file that cannot be used."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from itemizedclip.data.batch import BadSampleError
from itemizedclip_2d.rsicd_table import IMAGE_FORMATS


def decode_image(source: bytes | Path, *, name: str, remedy: str) -> Image.Image:
    """RGB image of encoded bytes or of a file, decoded to the end.

    Args:
        source: JPEG, PNG, WebP, TIFF or BMP.
        name: of the image, for messages.
        remedy: what to do when it cannot be read, for messages.

    Raises:
        BadSampleError: no such file, or no readable image.
    """
    if isinstance(source, Path) and not source.is_file():
        raise BadSampleError(f"{name}: no such file; expected an image. {remedy}")
    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=IMAGE_FORMATS) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many types for damaged data
        # Pillow names the memory address of the bytes, which helps nobody.
        reason = "no image of a known format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise BadSampleError(
            f"{name}: no readable image ({reason}); expected {'/'.join(IMAGE_FORMATS)} data. {remedy}"
        ) from None
