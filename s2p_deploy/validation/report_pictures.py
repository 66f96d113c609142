"""The report's picture pairs: both drawings, their difference, and how they lie in the folder and on the page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.validation.pictures import to_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL.Image import Image

    from s2p_deploy.records import PromptSet
    from s2p_deploy.validation.pictures import Drawing

AMPLIFICATION = 16
MOST_PAIRS = 64
_SHOWN_SIDE = 256  # larger pictures are shown smaller; in full they lie in the folder
_PNG_SIDE = 96  # larger ones are shown as JPEG, which photographs need to stay small
_JPEG_SIDE, _JPEG_QUALITY = 192, 88


@dataclass(frozen=True)
class Drawings:
    """Both drawings of the same prompts."""

    prompts: PromptSet
    reference: Drawing
    candidate: Drawing

    @property
    def pairs(self) -> Pairs:
        """What the page shows of them."""
        texts = tuple(prompt.text for prompt in self.prompts.prompts)
        return Pairs(texts, to_bytes(self.reference.pictures), to_bytes(self.candidate.pictures))


@dataclass(frozen=True)
class Pairs:
    """Pictures uint8 [n, H, W, 3] of the pipeline and of the engine, and what they were to show."""

    texts: tuple[str, ...]
    reference: NDArray[np.uint8]
    candidate: NDArray[np.uint8]


def write_pictures(drawings: Drawings, folder: Path) -> None:
    """As :func:`write_pairs`."""
    write_pairs(drawings.pairs, folder)


def write_pairs(pairs: Pairs, folder: Path) -> None:
    """Every picture of both as PNG: ``000-fp.png``, ``000-engine.png``, in the prompts' order."""
    from PIL import Image

    folder.mkdir()
    for name, pictures in (("fp", pairs.reference), ("engine", pairs.candidate)):
        for index, picture in enumerate(pictures):
            Image.fromarray(picture).save(folder / f"{index:03d}-{name}.png")


def read_pairs(folder: Path, texts: Sequence[str]) -> Pairs:
    """What :func:`write_pairs` wrote, one pair per text."""
    from PIL import Image

    def stack(name: str) -> NDArray[np.uint8]:
        found = []
        for index in range(len(texts)):
            with Image.open(folder / f"{index:03d}-{name}.png") as opened:
                found.append(np.asarray(opened.convert("RGB")))
        return np.stack(found)

    return Pairs(tuple(texts), stack("fp"), stack("engine"))


def shown_pairs(pairs: Pairs, psnr: Sequence[float | None]) -> list[dict[str, Any]]:
    """At most :data:`MOST_PAIRS` of the pairs, evenly spread over the PSNR, worst first, as the page needs them."""
    scores = np.array([-np.inf if value is None else value for value in psnr])
    order = np.argsort(scores, kind="stable")
    shown = order[np.linspace(0, len(order) - 1, min(MOST_PAIRS, len(order))).round().astype(np.int64)]
    return [
        {
            "index": index,
            "text": pairs.texts[index],
            "psnr": psnr[index],
            "reference": thumbnail(pairs.reference[index]),
            "candidate": thumbnail(pairs.candidate[index]),
            "difference": thumbnail(difference(pairs.reference[index], pairs.candidate[index])),
        }
        for index in shown.tolist()
    ]


def difference(reference: NDArray[np.uint8], candidate: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The absolute difference of two pictures, :data:`AMPLIFICATION` times amplified."""
    gap = np.abs(reference.astype(np.int16) - candidate)
    amplified: NDArray[np.uint8] = np.minimum(gap * AMPLIFICATION, 255).astype(np.uint8)
    return amplified


def thumbnail(picture: NDArray[np.uint8]) -> str:
    """A picture uint8 [H, W, 3] inside an address: a small one as it is, a large one as a smaller JPEG."""
    from PIL import Image

    if max(picture.shape[:2]) <= _PNG_SIDE:
        return data_uri(picture)
    image = Image.fromarray(picture)
    image.thumbnail((_JPEG_SIDE, _JPEG_SIDE))
    return _address(image, "JPEG", quality=_JPEG_QUALITY, optimize=True)


def data_uri(picture: NDArray[np.uint8]) -> str:
    """A picture uint8 [H, W, 3] as a PNG inside an address, smaller where it is large."""
    from PIL import Image

    image = Image.fromarray(picture)
    image.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
    return _address(image, "PNG", optimize=True)


def _address(image: Image, form: str, **options: Any) -> str:  # noqa: ANN401 - Pillow's options of a format
    out = io.BytesIO()
    image.save(out, format=form, **options)
    return f"data:image/{form.lower()};base64," + base64.b64encode(out.getvalue()).decode("ascii")
