"""The layout's rules: imports point one way, files and functions stay small, nothing unpickles, no machine's paths."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module may import from its own group and from those before it.
ORDER = (
    "errors",
    "progress",
    "numerics",
    "records",
    "signing",
    "timesteps",
    "recipe",
    "families",
    "shapes",
    "calib",
    "export",
    "engines",
    "schedulers",
    "pipeline",
    "validation",
    "bench",
    "serve",
    "cli",
)
# Import nothing of the package, and anyone may import them.
LEAVES = ("", "recipes")

# Folder at the top of the repository -> the package it is installed as (pyproject.toml says the same).
STAGES = {
    "s2p_deploy": "s2p_deploy",
    "calib": "s2p_deploy.calib",
    "export": "s2p_deploy.export",
    "engines": "s2p_deploy.engines",
}
OTHER_CODE = ("tests", "examples", "benchmarks")
DRAWERS = {"utils.py", "helpers.py", "common.py", "manager.py"}
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"torch.load", "torch.save", "yaml.load", "yaml.unsafe_load"}
MAX_FUNCTION_LINES, MAX_FILE_LINES = 60, 400
MAX_TEXT_BYTES = 2_000_000

# Written in parts, so that this file passes its own test.
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|root|farm)" + r"/|\.\./" + r"shared\b")


def package_files() -> dict[str, Path]:
    """Module name -> file, for everything that is installed."""
    found = {}
    for folder, package in STAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def python_files() -> list[Path]:
    others = [path for folder in OTHER_CODE for path in sorted((ROOT / folder).rglob("*.py"))]
    return [*package_files().values(), *others]


def tracked_files() -> list[Path]:
    """What git tracks or would track; without git, everything outside hidden and build folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        skipped = re.compile(r"^(\.(?!ci$|gitignore$).*|build|__pycache__|.*\.egg-info)$")
        paths = (path.relative_to(ROOT) for path in ROOT.rglob("*"))
        kept = [path for path in paths if not any(skipped.match(part) for part in path.parts)]
    else:
        kept = [Path(name) for name in listing.split("\0") if name]
    return sorted(ROOT / path for path in kept if (ROOT / path).is_file())


@cache
def syntax_tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def group_of(module: str) -> str:
    """``s2p_deploy.export.passes.fold`` -> ``export``; the package itself -> an empty name."""
    return [*module.split("."), ""][1]


def imported_modules(path: Path, modules: set[str]) -> list[tuple[int, str]]:
    """(line, module of this package) of every import, those for type checkers and those in functions included."""
    found = []
    for node in ast.walk(syntax_tree(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            source = node.module or ""
            deeper = [f"{source}.{alias.name}" for alias in node.names]
            found += [(node.lineno, name if name in modules else source) for name in deeper]
    return [(line, name) for line, name in found if name.split(".")[0] == "s2p_deploy"]


def order_violations(files: dict[str, Path], modules: set[str]) -> list[str]:
    problems = []
    for module, path in files.items():
        own = group_of(module)
        for line, name in imported_modules(path, modules):
            target = group_of(name)
            if target == own or target in LEAVES:
                continue
            if own in LEAVES or ORDER.index(target) > ORDER.index(own):
                problems.append(f"{module}, line {line}: {own or 's2p_deploy'} imports {target}")
    return problems


def test_every_module_has_a_place_in_the_order() -> None:
    unknown = sorted({group_of(module) for module in package_files()} - set(ORDER) - set(LEAVES))
    assert not unknown, f"give these a place in ORDER, or move them: {unknown}"


def test_imports_point_one_way() -> None:
    files = package_files()
    assert order_violations(files, set(files)) == []


@pytest.mark.parametrize(
    ("module", "source", "legal"),
    [
        ("s2p_deploy.engines.openvino.build", "from s2p_deploy.export import passes", True),
        ("s2p_deploy.export.check", "from s2p_deploy import __version__", True),
        ("s2p_deploy.export.check", "from s2p_deploy.export.passes import fold", True),
        ("s2p_deploy.export.check", "def late():\n    from s2p_deploy.engines import load", False),
        ("s2p_deploy.records.engine", "import s2p_deploy.cli", False),
        ("s2p_deploy.records.engine", "from s2p_deploy import cli", False),
        ("s2p_deploy", "from s2p_deploy.errors import S2PError", False),
    ],
)
def test_an_import_is_judged_by_its_direction(tmp_path: Path, module: str, source: str, legal: bool) -> None:
    file = tmp_path / "module.py"
    file.write_text(source, encoding="utf-8")
    assert (order_violations({module: file}, set(package_files())) == []) is legal


def test_stages_are_imported_by_their_package_name() -> None:
    bare = {"calib", "export", "engines"}
    problems = []
    for path in python_files():
        for node in ast.walk(syntax_tree(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            problems += [f"{path.relative_to(ROOT)}: {name}" for name in names if name.split(".")[0] in bare]
    assert problems == []


def test_the_package_list_names_every_folder_that_is_a_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {module for module, path in package_files().items() if path.name == "__init__.py"}
    assert set(settings["packages"]) == folders
    assert settings["packages"] == sorted(settings["packages"])
    assert settings["package-dir"] == {package: folder for folder, package in STAGES.items()}


def test_every_folder_of_modules_is_a_package() -> None:
    bare = {path.parent for path in package_files().values() if not (path.parent / "__init__.py").exists()}
    assert sorted(bare) == []


def test_no_drawers() -> None:
    assert [str(path.relative_to(ROOT)) for path in python_files() if path.name in DRAWERS] == []


def test_functions_are_short() -> None:
    problems = []
    for path in python_files():
        for node in ast.walk(syntax_tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    problems.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} has {lines} lines")
    assert problems == []


def test_files_are_short() -> None:
    sizes = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()}
    assert {str(path): lines for path, lines in sizes.items() if lines > MAX_FILE_LINES} == {}


def unsafe_uses(tree: ast.Module) -> list[str]:
    """Imports and calls that would run code found in a data file."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            found += [source] if source.split(".")[0] in UNSAFE_MODULES else []
            found += [name for name in (f"{source}.{alias.name}" for alias in node.names) if name in UNSAFE_CALLS]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in UNSAFE_CALLS:
            found.append(ast.unparse(node))
    return found


def test_nothing_unpickles() -> None:
    found = {str(path.relative_to(ROOT)): unsafe_uses(syntax_tree(path)) for path in python_files()}
    assert {path: uses for path, uses in found.items() if uses} == {}


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import loads", "from torch import load", "import torch\ntorch.load(path)"],
)
def test_unpickling_would_be_found(source: str) -> None:
    assert unsafe_uses(ast.parse(source))


def test_no_machine_paths() -> None:
    problems = []
    for path in tracked_files():
        data = path.read_bytes() if path.stat().st_size <= MAX_TEXT_BYTES else b"\0"
        if b"\0" in data:
            continue
        for number, line in enumerate(data.decode("utf-8", errors="replace").splitlines(), start=1):
            if MACHINE_PATH.search(line):
                problems.append(f"{path.relative_to(ROOT)}:{number}")
    assert problems == []


@pytest.mark.parametrize("text", ["/{}/main", "open('/{}/a.txt')", "in /{}/x"])
@pytest.mark.parametrize("folder", ["work", "root", "farm"])
def test_a_machine_path_would_be_found(text: str, folder: str) -> None:
    assert MACHINE_PATH.search(text.format(folder))
    assert not MACHINE_PATH.search(f"build/{folder}/x")
