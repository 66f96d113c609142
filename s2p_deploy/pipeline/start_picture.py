"""Pictures that a drawing starts from: read from a file's bytes, checked, and with a mask of what is drawn anew."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageOps
from PIL.ExifTags import Base

from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Collection

    from PIL.Image import Image as Picture

_FORMATS = ("PNG", "JPEG", "WEBP")
_MODES = {"1", "L", "LA", "P", "RGB", "RGBA"}
_PNG, _BIT_DEPTH = b"\x89PNG\r\n\x1a\n", 24  # where a PNG file says how many bits a sample has; Pillow does not tell
_MOST_SIDE = 8192  # pixels: 200 MB when it is decoded
_TURNED = {5, 6, 7, 8}  # orientations in which a photograph's height is its file's width
_STRENGTHS = {False: 0.8, True: 1.0}  # diffusers' own, of image to image and of inpainting


@dataclass(frozen=True)
class StartPicture:
    """A picture to start from.

    Attributes:
        picture: RGB.
        strength: how far it may be left, from above 0 to 1: the part of the steps that is run.
        mask: of the same size, in grey: white is drawn anew, black stays (None: all of it is drawn anew).
    """

    picture: Picture
    strength: float
    mask: Picture | None = None

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise InputError(f"a strength of {self.strength:g} is none: give one above 0, up to 1")
        if self.mask is None:
            return
        if self.mask.size != self.picture.size:
            (width, height), (other_width, other_height) = self.picture.size, self.mask.size
            raise InputError(
                f"the mask has {other_width}x{other_height} pixels, the picture {width}x{height}: give a mask of the"
                " picture's size"
            )
        if self.mask.getextrema()[1] < 128:  # type: ignore[operator]  # of one band: two numbers
            raise InputError("the mask marks nothing: what is white or transparent in it is drawn anew")

    @property
    def size(self) -> tuple[int, int]:
        """Returns height and width in pixels."""
        return self.picture.height, self.picture.width

    @staticmethod
    def blank(height: int, width: int, strength: float, *, masked: bool) -> StartPicture:
        """Makes a grey picture of a size in pixels, all of it masked or without a mask."""
        mask = Image.new("L", (width, height), "white") if masked else None
        return StartPicture(Image.new("RGB", (width, height), "grey"), strength, mask)

    @staticmethod
    def read(
        picture: bytes,
        mask: bytes | None = None,
        *,
        strength: float | None = None,
        alpha: bool = False,
        sizes: Collection[tuple[int, int]] | None = None,
    ) -> StartPicture:
        """Reads a picture, and a mask, whose transparent parts are drawn anew: where it has none, its white ones.

        Args:
            picture: a PNG, JPEG or WebP file; transparent parts become white.
            mask: the same.
            strength: as :attr:`strength` (None: 0.8, with a mask 1).
            alpha: takes the transparent parts of ``picture`` for the mask where there is none.
            sizes: heights and widths that are read; others are refused before they are decoded (None: up to 8192).

        Raises:
            InputError: one is no such file, is animated, of CMYK or of 16 bits, or has a size that is not allowed; as
                for :class:`StartPicture`.
        """
        opened = _decoded(picture, "picture", sizes)
        marked = None if mask is None else _mask_of(_decoded(mask, "mask", sizes))
        if marked is None and alpha and _has_transparency(opened):
            marked = _mask_of(opened)
        if strength is None:
            strength = _STRENGTHS[marked is not None]
        return StartPicture(_flat(opened), strength, marked)


def read_picture(data: bytes, what: str, sizes: Collection[tuple[int, int]] | None = None) -> Picture:
    """Reads a file as a picture in RGB, before white where it is transparent; ``what`` it is, for errors.

    Raises:
        InputError: as :meth:`StartPicture.read`.
    """
    return _flat(_decoded(data, what, sizes))


def _decoded(data: bytes, what: str, sizes: Collection[tuple[int, int]] | None) -> Picture:
    """Decodes a file; its size is looked at before, so that a small file cannot take much memory."""
    try:
        opened = Image.open(io.BytesIO(data), formats=_FORMATS)
        photograph = opened.format != "PNG"  # whose orientation lies behind the pixels, which are not decoded yet
        turned = photograph and opened.getexif().get(Base.Orientation, 1) in _TURNED
    except Image.DecompressionBombError as error:
        raise InputError(f"the {what} has too many pixels: give one of at most {_MOST_SIDE} on a side") from error
    except Exception as error:  # what a hostile file holds reaches any code of Pillow's
        raise InputError(f"the {what} is no PNG, JPEG or WebP file: give one") from error
    width, height = opened.size[::-1] if turned else opened.size
    if sizes is not None and (height, width) not in sizes:
        allowed = ", ".join(f"{one_width}x{one_height}" for one_height, one_width in sizes)
        raise InputError(f"the {what} has {width}x{height} pixels: give one of {allowed}")
    if max(width, height) > _MOST_SIDE:
        raise InputError(f"the {what} has {width}x{height} pixels: give one of at most {_MOST_SIDE} on a side")
    if getattr(opened, "n_frames", 1) > 1:
        raise InputError(f"the {what} is animated: give a single picture")
    if opened.mode not in _MODES or (data.startswith(_PNG) and data[_BIT_DEPTH] > 8):
        mode = "16 bits" if opened.mode in _MODES or opened.mode.startswith("I") else opened.mode
        raise InputError(f"the {what} is of {mode}: convert it to RGB, RGBA or grey of 8 bits")
    try:
        opened.load()
        return ImageOps.exif_transpose(opened) if photograph else opened
    except Exception as error:  # as above
        raise InputError(f"the {what} is damaged and cannot be decoded: give a whole file") from error


def _has_transparency(picture: Picture) -> bool:
    alpha = picture.convert("RGBA").getchannel("A")
    return bool(alpha.getextrema()[0] < 255)  # type: ignore[operator]  # of one band: two numbers


def _mask_of(picture: Picture) -> Picture:
    """Returns white where a picture is transparent; where it is nowhere, the picture in grey."""
    if _has_transparency(picture):
        return ImageOps.invert(picture.convert("RGBA").getchannel("A"))
    return picture.convert("RGB").convert("L")


def _flat(picture: Picture) -> Picture:
    """Returns a picture in RGB, before white where it is transparent."""
    if not _has_transparency(picture):
        return picture.convert("RGB")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
