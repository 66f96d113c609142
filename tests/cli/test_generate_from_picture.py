"""``generate`` from a picture, all of it or what a mask marks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from s2p_deploy.shapes.scenes import parse, render
from tests.cli.commands import Chain, Finished, Run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PROMPT = "a large blue square at the top left, white background"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(render(parse("a large red square at the top right, white background"))).save(tmp_path / "p.png")
    return tmp_path / "p.png"


@pytest.fixture
def draw(run: Run, made_chain: Chain, tmp_path: Path) -> Callable[..., Finished]:
    def draw_here(*options: object) -> Finished:
        asked = ("--prompt", PROMPT, "--seed", 3, "--steps", 5, "--scheduler", "ddim", "--out", tmp_path / "out.png")
        return run("generate", made_chain.engine, *asked, *options, "--json")

    return draw_here


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_a_stronger_drawing_leaves_the_picture_further(
    draw: Callable[..., Finished], picture: Path, tmp_path: Path
) -> None:
    away = []
    for strength, calls in ((0.2, 1), (0.8, 4), (1.0, 5)):
        made = draw("--image", picture, "--strength", strength)
        assert made.code == 0, made.err
        assert sum(map(len, made.data["timesteps"].values())) == calls
        away.append(np.abs(pixels(tmp_path / "out.png") - pixels(picture)).mean())
    assert away == sorted(away)
    assert away[0] < away[2] / 2


def test_a_mask_says_what_is_drawn_anew(draw: Callable[..., Finished], picture: Path, tmp_path: Path) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / "mask.png")
    assert draw("--image", picture, "--mask", tmp_path / "mask.png").code == 0
    away = np.abs(pixels(tmp_path / "out.png") - pixels(picture))
    assert away[:, 40:].mean() < away[:, :24].mean() / 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--strength", 0.5], "--strength needs --image: pass the picture too"),
        (["--mask", "PICTURE"], "--mask needs --image: pass the picture too"),
        (["--image", "nothing.png"], "nothing.png cannot be read (No such file or directory)"),
        (["--image", "."], ". cannot be read (Is a directory)"),
        (["--image", "TEXT"], "the picture is no PNG, JPEG or WebP file: give one"),
        (["--image", "PICTURE", "--strength", 0], "give one above 0, up to 1"),
        (["--image", "PICTURE", "--strength", 1.5], "give one above 0, up to 1"),
        (["--image", "PICTURE", "--strength", 0.1], "leaves none of 5 steps: raise it, or take more steps"),
        (["--image", "PICTURE", "--height", 64], "leave --height and --width out"),
        (["--image", "PICTURE", "--mask", "SMALL"], "the mask has 32x32 pixels, the picture 64x64"),
        (["--image", "SMALL"], "the picture has 32x32 pixels: give one of a width of 64 and a height of 64"),
        (["--image", "PICTURE", "--mask", "BLACK"], "the mask marks nothing"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    draw: Callable[..., Finished], picture: Path, tmp_path: Path, options: list[object], said: str
) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "small.png")
    Image.new("L", (64, 64)).save(tmp_path / "black.png")
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    files = {name: tmp_path / f"{name.lower()}.png" for name in ("SMALL", "BLACK", "TEXT")} | {"PICTURE": picture}
    refused = draw(*(files.get(str(option), option) for option in options))
    assert refused.code == 2
    assert said in refused.data["error"]["message"]
    assert "\n" not in refused.data["error"]["message"]
    assert not (tmp_path / "out.png").exists()
