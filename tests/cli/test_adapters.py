"""The way of docs/adapters.md on the command line: one engine takes a LoRA, a ControlNet and an IP-Adapter by turns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from s2p_deploy.cli.app import main

if TYPE_CHECKING:
    from pathlib import Path

LORA = "tests/assets/loras/triangles.safetensors"
CONTROLNET = "tests/assets/controlnets/edges"
IP_ADAPTER = "tests/assets/ip-adapters/scenes/ip-adapter.safetensors"
PROMPT = "a large red circle on the left, white background"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the bundled pipeline in floating point, with inputs for all three."""
    folder = tmp_path_factory.mktemp("adapters")
    adapters = ["--lora-rank", "8", "--controlnet", "--image-tokens", "16", "--image-adapters", "2"]
    calib, graph, built = (str(folder / name) for name in ("calib", "graph", "engine"))
    assert main(["calibrate", "shapes", "--recipe", "fp", "--out", calib]) == 0
    assert main(["export", calib, "--out", graph, *adapters]) == 0
    assert main(["build", graph, "--backend", "onnxruntime", "--out", built]) == 0
    return folder / "engine"


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A blue square, as a condition of either kind."""
    file = tmp_path_factory.mktemp("pictures") / "square.png"
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[20:44, 30:54] = (0, 0, 255)
    Image.fromarray(pixels).save(file)
    return file


def drawn(engine: Path, out: Path, *options: str) -> np.ndarray:
    asked = ["generate", str(engine), "--prompt", PROMPT, "--steps", "4", "--out", str(out), *options]
    assert main(asked) == 0
    return np.asarray(Image.open(out))


@pytest.mark.slow
def test_the_way_of_the_documentation(engine: Path, picture: Path, tmp_path: Path) -> None:
    plain = drawn(engine, tmp_path / "plain.png")
    changed = {
        "lora": ["--lora", f"{LORA}:0.8"],
        "controlnet": ["--controlnet", CONTROLNET, "--control-image", str(picture)],
        "ip-adapter": ["--ip-adapter", IP_ADAPTER, "--ip-image", str(picture), "--ip-scale", "0.6"],
    }
    for name, options in changed.items():
        found = drawn(engine, tmp_path / f"{name}.png", *options)
        assert np.abs(found.astype(int) - plain).mean() > 1, name
    np.testing.assert_array_equal(drawn(engine, tmp_path / "again.png"), plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lora", "nowhere.safetensors"], "LoRA nowhere.safetensors does not exist"),
        (["--lora", "README.md"], "LoRA README.md is damaged or not whole"),
        (["--controlnet", CONTROLNET], "control-image"),
        (["--controlnet", "tests", "--control-image", "PICTURE"], "tests"),
        (["--ip-adapter", LORA, "--ip-image", "PICTURE"], "is no IP-Adapter"),
        (["--ip-adapter", "nowhere.safetensors", "--ip-image", "PICTURE"], "nowhere.safetensors"),
    ],
)
def test_what_is_no_adapter_is_refused_in_one_line(
    engine: Path,
    picture: Path,
    options: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(picture) if option == "PICTURE" else option for option in options]
    out = tmp_path / "picture.png"
    assert main(["generate", str(engine), "--prompt", PROMPT, "--steps", "2", "--out", str(out), *given]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("s2p-deploy:")]
    assert len(said) == 1
    assert words in said[0]
    assert not out.exists()
