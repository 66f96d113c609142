"""The container file: it copies what the package is built from, and asks for extras that exist."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINES = (ROOT / "Containerfile").read_text(encoding="utf-8").splitlines()
COPIES = [words[1:] for words in (line.split() for line in LINES) if words and words[0] == "COPY"]


def test_its_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [extra for line in LINES for found in re.findall(r"EXTRAS=([a-z,]+)", line) for extra in found.split(",")]
    assert set(named) == {"tensorrt", "rtx", "serve"}
    assert set(named) <= set(project["optional-dependencies"])


def test_its_python_is_one_that_the_package_takes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (image,) = [line.split()[1] for line in LINES if line.startswith("FROM ")]
    found = re.fullmatch(r"python:(\d+\.\d+)-slim-\w+", image)
    assert found is not None
    assert project["requires-python"] == f">={found[1]}"


@pytest.mark.slow
def test_what_it_copies_builds_the_whole_package(tmp_path: Path) -> None:
    """The wheel has the modules and the data of one that is built from everything."""
    context = tmp_path / "context"
    context.mkdir()
    for *sources, target in COPIES:
        for source in sources:
            place = context / target / (source if target == "./" else "")
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(ROOT / source, place)
    names = set(wheel(context, tmp_path / "wheel"))
    for package in ("s2p_deploy", "calib", "export", "engines"):
        expected = {
            path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py") if path.parent.name != "tests"
        }
        prefix = "" if package == "s2p_deploy" else "s2p_deploy/"
        assert {prefix + name for name in expected} <= names
    assert "s2p_deploy/shapes/pipeline/model_index.json" in names
    assert "s2p_deploy/engines/templates/model_card.md.j2" in names


def wheel(folder: Path, out: Path) -> list[str]:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(out), str(folder)], check=True)
    (file,) = out.iterdir()
    return zipfile.ZipFile(file).namelist()
