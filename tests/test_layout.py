"""Rules of the repository that no linter holds; what each import may reach is a contract in pyproject.toml."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("calib", "export", "engines")
DRAWERS = {"utils.py", "helpers.py", "common.py", "manager.py"}
MAX_FILE_LINES = 700
MAX_TEXT_BYTES = 2_000_000

# Written in parts, so that this file passes its own test.
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|root|farm)" + r"/|\.\./" + r"shared\b")


def tracked_files() -> list[Path]:
    """What git tracks or would track; without git, everything outside hidden and build folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        skipped = re.compile(r"^(\.(?!ci$|github$|gitignore$|pre-commit).*|build|__pycache__|.*\.egg-info)$")
        paths = (path.relative_to(ROOT) for path in ROOT.rglob("*"))
        kept = [path for path in paths if not any(skipped.match(part) for part in path.parts)]
    else:
        kept = [Path(name) for name in listing.split("\0") if name]
    return sorted(ROOT / path for path in kept if (ROOT / path).is_file())


def text_files() -> dict[str, str]:
    """Path from the root -> content, of files without a NUL byte."""
    contents = {str(path.relative_to(ROOT)): path.read_bytes() for path in tracked_files()}
    return {name: data.decode("utf-8", "replace") for name, data in contents.items() if b"\0" not in data}


def test_no_drawers() -> None:
    assert [str(path) for path in tracked_files() if path.name in DRAWERS] == []


def test_files_are_short() -> None:
    lines = {name: text.count("\n") for name, text in text_files().items() if name.endswith(".py")}
    assert {name: count for name, count in lines.items() if count > MAX_FILE_LINES} == {}


def test_no_text_file_is_oversized() -> None:
    assert [name for name, text in text_files().items() if len(text) > MAX_TEXT_BYTES] == []


def test_no_machine_paths() -> None:
    found = [
        f"{name}:{number}"
        for name, text in text_files().items()
        for number, line in enumerate(text.splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("text", ["/{}/main", "open('/{}/a.txt')", "in /{}/x"])
@pytest.mark.parametrize("folder", ["work", "root", "farm"])
def test_a_machine_path_would_be_found(text: str, folder: str) -> None:
    assert MACHINE_PATH.search(text.format(folder))
    assert not MACHINE_PATH.search(f"build/{folder}/x")


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The modules of the package as they are installed, like the tree that ``make typecheck`` makes."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    for package in settings["packages"]:
        mapped = max((name for name in settings["package-dir"] if f"{package}.".startswith(f"{name}.")), key=len)
        source = ROOT / settings["package-dir"][mapped] / Path(*package.removeprefix(mapped).split("."))
        target = tmp_path / Path(*package.split("."))
        target.mkdir(exist_ok=True)
        for file in source.glob("*.py"):
            shutil.copy(file, target)
    (tmp_path / "s2p_research").mkdir()
    (tmp_path / "s2p_research" / "__init__.py").touch()
    return tmp_path


def test_the_extras_for_onnxruntimes_tensorrt_provider_are_of_one_major() -> None:
    """The provider is linked to libnvinfer.so.10; pip would take 11, which it cannot load."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (tensorrt,) = (Requirement(line) for line in extras["tensorrt"])
    assert "10.16.1.11" in tensorrt.specifier
    assert "11.0.0.114" not in tensorrt.specifier
    linked = importlib.util.find_spec("onnxruntime")
    library = Path(str(linked.origin)).parent / "capi" / "libonnxruntime_providers_tensorrt.so" if linked else Path()
    if library.is_file():
        assert b"libnvinfer.so.10" in library.read_bytes()


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, str(ROOT / "pyproject.toml"), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_imports_keep_their_contracts(installed: Path) -> None:
    result = lint_imports(installed)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("content", "contract"),
    [
        ("def late():\n    from s2p_deploy import cli\n", "Imports point one way BROKEN"),
        ("import s2p_research\n", "does without the laboratory, the tests and the tools BROKEN"),
    ],
)
def test_the_contracts_see_calib_export_and_engines(installed: Path, content: str, contract: str) -> None:
    """The folders that the checkout maps into the package must not be blind spots."""
    for stage in STAGES:
        (installed / "s2p_deploy" / stage / "stray.py").write_text(content, encoding="utf-8")
    result = lint_imports(installed)
    assert result.returncode == 1
    assert contract in result.stdout
    assert all(f"s2p_deploy.{stage}.stray" in result.stdout for stage in STAGES)


def test_a_module_without_a_place_in_the_order_is_found(installed: Path) -> None:
    (installed / "s2p_deploy" / "stray.py").touch()
    result = lint_imports(installed)
    assert result.returncode == 1
    assert "s2p_deploy.stray" in result.stdout
