"""Encoded photographs of every kind that is read or refused, with their pixels or the words of the refusal."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 24, 36

TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}
"""EXIF orientation → what makes stored pixels upright, by its definition."""


@dataclass(frozen=True)
class Case:
    """An encoded file and what it should be.

    Attributes:
        encoded: its content.
        pixels: uint8 (H, W, 3); None: it is refused.
        words: of the refusal.
        rounding: by how much a value may differ: 1 where something is half transparent.
    """

    encoded: bytes
    pixels: np.ndarray | None = None
    words: str = ""
    rounding: int = 0


def encode(image: Image.Image, kind: str, **settings) -> bytes:
    buffer = io.BytesIO()
    # Copies: Pillow keeps the settings of a JPEG in the image for the next format.
    more = [frame.copy() for frame in settings.pop("append_images", [])]
    image.copy().save(buffer, kind, **settings, **({"append_images": more} if more else {}))
    return buffer.getvalue()


def plain(encoded: bytes) -> np.ndarray:
    """Pixels as Pillow alone gives them."""
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def picture() -> np.ndarray:
    """Colours that differ in every corner and under every turn."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.stack([255 * x // WIDTH, 255 * y // HEIGHT, 100 + 3 * (x + y) // 2], axis=2).astype(np.uint8)
    pixels[:6, :9] = (250, 10, 10)
    return pixels


def ramp(largest: int) -> np.ndarray:
    """Greys from 0 to `largest` over the image."""
    return np.rint(np.linspace(0, largest, HEIGHT * WIDTH)).reshape(HEIGHT, WIDTH)


def grey(values_0_to_1: np.ndarray) -> np.ndarray:
    return np.rint(255 * values_0_to_1).astype(np.uint8)[..., None].repeat(3, axis=2)


def over(pixels: np.ndarray, alpha: np.ndarray, below: int = 255) -> np.ndarray:
    """Colours on a ground of one grey."""
    share = alpha[..., None] / 255
    return np.rint(pixels * share + below * (1 - share)).astype(np.uint8)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def tiff(values: bytes, *, bits: int, order: str = "<", white_is_zero: bool = False, sample_format: int = 1) -> bytes:
    """An uncompressed TIFF of greys: one strip, after the header, before the tags."""
    tags = [
        (256, 4, WIDTH), (257, 4, HEIGHT), (258, 3, bits), (259, 3, 1), (262, 3, 0 if white_is_zero else 1),
        (273, 4, 8), (277, 3, 1), (278, 4, HEIGHT), (279, 4, len(values)), (339, 3, sample_format),
    ]  # fmt: skip
    directory = struct.pack(f"{order}H", len(tags))
    for tag, kind, value in tags:
        packed = struct.pack(f"{order}H", value) + b"\0\0" if kind == 3 else struct.pack(f"{order}I", value)
        directory += struct.pack(f"{order}HHI", tag, kind, 1) + packed
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}I", 8 + len(values)) + values + directory + b"\0\0\0\0"


def pack_12_bits(values: np.ndarray) -> bytes:
    pairs = values.astype(np.uint16).reshape(-1, 2)
    first, second = pairs[:, 0], pairs[:, 1]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1)
    return packed.astype(np.uint8).tobytes()


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG of any size, with next to nothing in it."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    content = png_chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + header + content + png_chunk(b"IEND", b"")


def with_transparent_value(png: bytes, value: int) -> bytes:
    """A PNG of greys, one of which is transparent; the header takes 33 bytes."""
    return png[:33] + png_chunk(b"tRNS", struct.pack(">H", value)) + png[33:]


def with_broken_exif(jpeg: bytes) -> bytes:
    block = b"Exif\0\0MM\0*" + b"\xff" * 40
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + jpeg[2:]


def photograph_cases() -> dict[str, Case]:
    """Every case by name."""
    pixels = picture()
    image = Image.fromarray(pixels)
    alpha = np.rint(np.linspace(0, 255, HEIGHT * WIDTH)).reshape(HEIGHT, WIDTH).astype(np.uint8)
    black = Image.new("RGBA", (WIDTH, HEIGHT), (0, 0, 0, 0))
    black.paste((0, 0, 0, 255), (8, 8, 20, 16))
    logo = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    logo[8:16, 8:20] = 0
    unit = ramp(65535) / 65535
    sixteen = ramp(65535).astype(np.uint16)
    floats = unit.astype(np.float32)
    jpeg = encode(image, "JPEG", quality=95)
    other = Image.new("RGB", image.size, (1, 2, 3))
    paletted = image.quantize(16)
    hidden = paletted.getpixel((0, 0))
    paletted_pixels = np.asarray(paletted.convert("RGB")).copy()
    holed = paletted_pixels.copy()
    holed[np.asarray(paletted) == hidden] = 255
    l_image = Image.fromarray(pixels[..., 0])
    rgb_holed = pixels.copy()
    rgb_holed[:6, :9] = 255
    sixteen_holed = grey(unit)
    sixteen_holed[0, 0] = 255
    cases = {
        "JPEG": Case(jpeg, plain(jpeg)),
        "JPEG, progressive": Case(p := encode(image, "JPEG", progressive=True), plain(p)),
        "JPEG, grey": Case(g := encode(image.convert("L"), "JPEG"), plain(g)),
        "JPEG, CMYK": Case(c := encode(image.convert("CMYK"), "JPEG"), plain(c)),
        "JPEG, broken EXIF": Case(with_broken_exif(jpeg), plain(jpeg)),
        "MPO": Case(m := encode(image, "MPO", save_all=True, append_images=[other]), plain(m)),
        "PNG": Case(encode(image, "PNG"), pixels),
        "PNG, one bit": Case(b := encode(image.convert("1"), "PNG"), plain(b)),
        "PNG, palette": Case(encode(paletted, "PNG"), paletted_pixels),
        "WebP": Case(w := encode(image, "WEBP", lossless=True), plain(w)),
        "TIFF": Case(encode(image, "TIFF"), pixels),
        "TIFF, compressed": Case(encode(image, "TIFF", compression="tiff_lzw"), pixels),
        "BMP": Case(encode(image, "BMP"), pixels),
        "GIF, two frames": Case(
            encode(paletted, "GIF", save_all=True, append_images=[other.quantize(4)]), paletted_pixels
        ),
        "WebP, two frames": Case(encode(image, "WEBP", lossless=True, save_all=True, append_images=[other]), pixels),
        "PNG, two frames": Case(encode(image, "PNG", save_all=True, append_images=[other]), pixels),
        "TIFF, two pages": Case(encode(image, "TIFF", save_all=True, append_images=[other]), pixels),
        "alpha: black on nothing": Case(encode(black, "PNG"), logo),
        "alpha: RGBA": Case(
            encode(Image.merge("RGBA", [*image.split(), Image.fromarray(alpha)]), "PNG"),
            over(pixels, alpha),
            rounding=1,
        ),
        "alpha: grey": Case(
            encode(Image.merge("LA", [l_image, Image.fromarray(alpha)]), "PNG"),
            over(pixels[..., :1].repeat(3, 2), alpha),
            rounding=1,
        ),
        "alpha: WebP": Case(
            encode(Image.merge("RGBA", [*image.split(), Image.fromarray(alpha)]), "WEBP", lossless=True, exact=True),
            over(pixels, alpha),
            rounding=1,
        ),
        "alpha: PNG palette": Case(encode(paletted, "PNG", transparency=hidden), holed),
        "alpha: GIF": Case(encode(paletted, "GIF", transparency=hidden), holed),
        "alpha: one colour of a PNG": Case(encode(image, "PNG", transparency=(250, 10, 10)), rgb_holed),
        "16 bits: PNG": Case(encode(Image.fromarray(sixteen), "PNG"), grey(unit)),
        "16 bits: PNG with a transparent value": Case(
            with_transparent_value(encode(Image.fromarray(sixteen), "PNG"), int(sixteen[0, 0])), sixteen_holed
        ),
        "16 bits: TIFF": Case(tiff(sixteen.astype("<u2").tobytes(), bits=16), grey(unit)),
        "16 bits: TIFF, big-endian": Case(tiff(sixteen.astype(">u2").tobytes(), bits=16, order=">"), grey(unit)),
        "16 bits: TIFF, compressed": Case(encode(Image.fromarray(sixteen), "TIFF", compression="tiff_lzw"), grey(unit)),
        "16 bits: TIFF, white is 0": Case(
            tiff(sixteen.astype("<u2").tobytes(), bits=16, white_is_zero=True), 255 - grey(unit)
        ),
        "12 bits: TIFF": Case(tiff(pack_12_bits(ramp(4095)), bits=12), grey(ramp(4095) / 4095)),
        "float: 0 to 1": Case(tiff(floats.tobytes(), bits=32, sample_format=3), grey(unit)),
        "float: 0 to 255": Case(
            tiff((255 * floats).tobytes(), bits=32, sample_format=3), words="floats from 0 to 255; expected 0 to 1"
        ),
        "float: not a number": Case(
            tiff(np.where(unit > 0.5, np.nan, unit).astype("<f4").tobytes(), bits=32, sample_format=3),
            words="floats that are not all numbers; expected 0 to 1",
        ),
        "signed 16 bits": Case(
            tiff((sixteen.astype(np.int32) - 32768).astype("<i2").tobytes(), bits=16, sample_format=2),
            words="signed or have 32 bits, from -32768 to 32767",
        ),
        "32 bits": Case(
            tiff(sixteen.astype("<u4").tobytes(), bits=32), words="signed or have 32 bits, from 0 to 65535"
        ),
        "PostScript": Case(encode(image, "EPS"), words="it seems to be PostScript"),
        "no image format of ours": Case(encode(image, "PPM"), words="of no known format"),
        "web page": Case(b"\n<!DOCTYPE html><title>404</title>", words="it seems to be a web page"),
        "empty": Case(b"", words="it is empty"),
        "damaged header": Case(b"\x89PNG\r\n\x1a\n" + b"\0" * 30, words="no readable image"),
        "bomb: PNG": Case(png_header(60_000, 60_000), words="more than the 178,956,970 pixels"),
        "bomb: thin strip": Case(
            png_header(1, 65_000), words="is 1 × 65000 pixels; expected a longer side of at most 200"
        ),
    }
    gif = bytearray(encode(paletted, "GIF"))
    gif[6:10] = b"\xff\xff\xff\xff"
    cases["bomb: GIF"] = Case(bytes(gif), words="more than the 178,956,970 pixels")
    for kind in ("JPEG", "PNG", "WebP", "TIFF", "BMP", "GIF, two frames"):
        encoded = cases[kind].encoded
        cases[f"cut: {kind}"] = Case(encoded[: len(encoded) // 3], words="no readable image")
    for orientation, turn in TURNS.items():
        for kind, settings in (("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
            if orientation in (1, 6) or kind == "JPEG":
                encoded = encode(image, kind, exif=turned(orientation), **settings)
                upright = turn(plain(jpeg) if kind == "JPEG" else pixels)
                cases[f"EXIF {orientation}: {kind}"] = Case(encoded, upright)
    return cases
