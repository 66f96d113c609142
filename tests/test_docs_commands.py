"""Every command and Python block of README, CONTRIBUTING and docs: run here as it stands, or named in a table."""

from __future__ import annotations

import base64
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

from s2p_deploy import CalibratedModel, PromptSet, Recipe
from s2p_deploy.cli import main
from s2p_deploy.families import resolve_base
from tests.random_loras import in_peft, random_layers, write_lora
from tests.small_pipelines import shared_small_base, shared_small_components
from tests.test_docs import BY_HAND, ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.shared_folder import SharedFolder

PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{name}" for name in BY_HAND))
PROGRAMS = r"s2p-deploy|make|pip|python|\.venv/bin/python|accelerate|curl|openssl|tritonserver|pre-commit|cd"
COMMAND = re.compile(rf"(?:[A-Z_]+=\S+ )?(?:{PROGRAMS}) \S.*")
SPAN = re.compile(rf"`((?:{PROGRAMS}) [^`\n]+)`")
RUN = ("s2p-deploy", "make", "curl", "openssl", "cd")  # programs whose commands are run as they stand

# Commands that are not run here, and why. A test that is named is there.
_ADAPTERS = "tests/cli/test_adapters.py::test_the_way_of_the_documentation"
ELSEWHERE = {
    "s2p-deploy export calib --controlnet --out graph": f"needs a ControlNet: {_ADAPTERS}",
    "s2p-deploy generate engine --prompt TEXT --controlnet FOLDER --control-image edges.png"
    " --out picture.png": _ADAPTERS,
    "s2p-deploy serve engine --controlnet edges=FOLDER": "tests/serve/test_controls.py"
    "::test_a_client_sends_pictures_in_its_request",
    "s2p-deploy calibrate MODEL --controlnet FOLDER --control-images PICTURES --recipe w8a8 --prompts prompts.txt"
    " --out calib": "tests/calib/test_controlnet.py::test_a_calibrated_one_takes_the_place_of_diffusers_own",
    "s2p-deploy export CALIB --image-tokens 16 --image-adapters 2 --out graph": f"needs an IP-Adapter: {_ADAPTERS}",
    "s2p-deploy generate ENGINE --prompt TEXT --ip-adapter FILE --ip-image cat.png --ip-scale 0.6"
    " --out picture.png": _ADAPTERS,
    "s2p-deploy serve ENGINE --ip-adapter style=FILE": "tests/serve/test_image_prompts.py"
    "::test_a_client_sends_pictures_in_its_request",
    "s2p-deploy join engine --low-noise fp-engine --out joined": "needs two engines: tests/cli/test_join.py"
    "::test_what_join_writes_is_used_as_an_engine",
    "accelerate launch --multi_gpu --num_processes 4 -m s2p_deploy.cli dataset MODEL --recipe w8a8"
    " --prompts prompts.txt --out data": "needs four GPUs; two processes on the CPU:"
    " tests/cli/test_dataset.py::test_two_launched_processes_make_the_bytes_of_one",
    "pip install onnxruntime-ep-nv-tensorrt-rtx": "another project's package, which is installed from a network",
    "pip uninstall onnxruntime": "would change the environment that runs the tests",
    "pip wheel --no-deps .": "`make typecheck` builds and installs the same; tests/test_layout.py::"
    "test_the_contracts_see_calib_export_and_engines looks at the result",
    "pre-commit install": "writes into .git",
    "python -m benchmarks.pages.write": "writes into the repository; what it writes:"
    " tests/test_pages.py::test_the_committed_page_is_what_the_script_makes",
    "s2p-deploy demo --out demo": "tests/cli/test_demo.py::test_demo",
    "tritonserver --model-repository REPO": "needs `make triton`:"
    " tests/serve/triton/test_real_server.py::test_a_picture_is_the_one_that_generate_draws",
}
# Python blocks that are not run here, by a line of theirs.
PYTHON_ELSEWHERE = {
    'client = tritonclient.http.InferenceServerClient("localhost:8000")': "needs `make triton`:"
    " tests/serve/triton/test_real_server.py::test_a_picture_is_the_one_that_generate_draws",
    'state = torch.load("pt_inception-2015-12-05-6726825d.pth", weights_only=True)': "needs weights that are not here;"
    " what reads the result: tests/validation/test_perceptual.py",
}
# Python programs run with more options, which make them short. --help parses the options before it and stops.
SHORTER = {
    "python examples/shapes/evaluate.py": ["--prompts", "4", "--steps", "2", "--guidance", "2.0", "--out", "grid.png"],
    "python examples/shapes ": ["--help"],  # trains for 80 minutes
    "python examples/shapes/train_lora.py": ["--help"],  # tests/shapes/test_adapters.py draws fewer pictures
    "python -m benchmarks.engines.lowering_overhead": ["--help"],  # minutes of an idle machine
    "python -m benchmarks.engines.rescheduled_engines": ["--help"],  # an hour
    "python -m tools.check_backends": ["--help"],  # tests/tools/test_check_backends.py runs it
    ".venv/bin/python -m pytest": ["--collect-only", "-q", "-p", "no:cacheprovider"],
}
# Options that make calibrations of MODEL short; those of the bundled pipeline stand as the pages have them.
QUICK = {
    "sampling": {"steps": 20},
    "dataset": {"prompts": 2, "samples_per_prompt": 20, "width": 2},
    "scales": {"latents": 2},
    "training": {"iterations": 2, "batch": 2},
    "validation": {"pictures": 2, "latents": 4},
}
QUICK_OPTIONS = [
    part
    for name, section in QUICK.items()
    for key, value in section.items()
    for part in ("--set", f"{name}.{key}={value}")
]
SHORT = {
    "calibrate": QUICK_OPTIONS,
    "compare": [*QUICK_OPTIONS, "--set", "training.selection={prompts: 1, every: 1}"],
}
# What an ellipsis stands for.
ELLIPSIS = {
    "compare": ["--prompts", "prompts.txt", "--held-out", "held_out.txt", "--out", "compared"],
    "generate": ["--prompt", "a small red circle", "--out", "picture.png"],
    "validate": ["--prompts", "held_out.txt", "--out", "report"],
}
# Commands that begin another way through their page, in a folder of its own.
ANEW = {"s2p-deploy calibrate MODEL --recipe w8a8 --prompts prompts.txt --dataset data --out calib"}
# How commands end where TensorRT or the cluster is absent: exit code, and what the one line says.
ABSENT = {
    "s2p-deploy build graph --backend tensorrt --out engine": (4, "tensorrt"),
    "RAY_AUTH_TOKEN=... s2p-deploy serve ENGINE --ray --replicas 8 --ray-address HOST:6379": (4, "HOST:6379"),
}
NEED_WHAT_IS_ABSENT = {("docs/quickstart-gpu.md", "s2p-deploy validate engine --prompts held_out.txt --out report")}
SAME_AS_README = {"docs/quickstart-cpu.md"}
PROMPTS = (
    "a large red circle at the top left, white background\na small blue square, gray background\n"
    "a small green square at the top right\n"
)
TOKEN = "a-token-of-some-length"
FILES = {"docs/serving.md": f"{TOKEN}\n"}  # what FILE is on a page; elsewhere prompts


@dataclass(frozen=True)
class Snippet:
    """A command, or a block of Python, of a page."""

    page: str
    text: str
    python: bool = False

    @property
    def words(self) -> list[str]:
        """The command's words, without assignments of variables."""
        words = shlex.split(self.text)
        return words[1:] if re.match("[A-Z_]+=", words[0]) else words

    @property
    def elsewhere(self) -> str | None:
        """Why it is not run here, where it is not."""
        if self.python:
            return next((why for line, why in PYTHON_ELSEWHERE.items() if line in self.text), None)
        return ELSEWHERE.get(self.text)

    @property
    def shorter(self) -> list[str] | None:
        return next((more for start, more in SHORTER.items() if self.text.startswith(start)), None)


def snippets(page: str) -> list[Snippet]:
    """Every command and Python block of a page, in order: fenced, indented by four spaces, and in the text."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = r"(?:^```(?P<language>\w*)\n(?P<fenced>.*?)^```$)|(?P<indented>(?<=\n\n)(?: {4}[^\n]*\n|\n(?= {4}))+)"
    found: list[tuple[int, Snippet]] = []
    for match in re.finditer(blocks, text, re.DOTALL | re.MULTILINE):
        block = match["fenced"] or re.sub("^ {4}", "", match["indented"], flags=re.MULTILINE)
        if match["language"] == "yaml":
            continue
        if match["language"] == "python" or not COMMAND.match(block):
            found.append((match.start(), Snippet(page, block.strip(), python=True)))
            continue
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            if command := re.sub(r"(^|\s+)#.*", "", line).strip():
                found.append((match.start(), Snippet(page, command)))
    found += [(match.start(1), Snippet(page, match[1])) for match in SPAN.finditer(text)]
    return [snippet for _, snippet in sorted(found, key=lambda pair: pair[0])]


def replaced(text: str, replacements: dict[str, str]) -> str:
    for old, new in replacements.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


ALL = {page: snippets(page) for page in PAGES}
WITH_COMMANDS = [page for page, found in ALL.items() if any(not one.python for one in found)]


@pytest.mark.parametrize("page", PAGES)
def test_every_snippet_is_run_or_in_a_table(page: str) -> None:
    for one in ALL[page]:
        if one.elsewhere is None and not one.python:
            assert COMMAND.fullmatch(one.text), f"{page}: what is {one.text!r}?"
            installs = re.fullmatch(r"pip install 's2p-deploy\[[\w,]+\]'", one.text)
            assert one.words[0] in RUN or one.shorter is not None or installs, f"{page} has a new command: {one.text}"
        if one.elsewhere is None and one.python:
            assert any(line in one.text for line in PYTHON_BLOCKS), f"{page} has a new block:\n{one.text}"


def test_the_tables_name_what_is_there() -> None:
    every = [one for found in ALL.values() for one in found]
    texts = {one.text for one in every}
    assert set(ELSEWHERE) | ANEW | set(ABSENT) | {text for _, text in NEED_WHAT_IS_ABSENT} <= texts
    assert all(any(line in text for text in texts) for line in (*PYTHON_ELSEWHERE, *PYTHON_BLOCKS))
    assert all(any(text.startswith(start) for text in texts) for start in SHORTER)
    for why in (*ELSEWHERE.values(), *PYTHON_ELSEWHERE.values()):
        for file, _, test in (name.partition("::") for name in re.findall(r"tests/[\w/]+\.py(?:::\w+)?", why)):
            assert f"def {test}" in (ROOT / file).read_text(encoding="utf-8"), why


@pytest.mark.parametrize("page", sorted(SAME_AS_README))
def test_what_is_not_run_again_is_run_with_the_readme(page: str) -> None:
    of_readme = [one.text for one in ALL["README.md"]]
    first = [text for one in ALL[page] if (text := one.text).startswith("s2p-deploy") and "first/" in text]
    assert [text for text in of_readme if text in first] == sorted(first, key=of_readme.index)


@pytest.fixture(scope="module")
def placeholders(shared: SharedFolder) -> Path:
    """A folder of what the pages' placeholders name. MODEL is a pipeline of the SD1 kind whose step takes 1 ms."""

    def make(folder: Path) -> None:
        shutil.copytree(shared_small_base(shared).folder, folder / "MODEL")
        shutil.copytree(shared_small_components(shared, "onnxruntime").folder, folder / "COMPONENTS")
        (folder / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
        (folder / "held_out.txt").write_text("a large green triangle\na small red square\n", encoding="utf-8")
        (folder / "FILE").write_text(PROMPTS, encoding="utf-8")
        layers = random_layers(shared_small_base(shared), {"unet": ["conv_in", "time_embedding.linear_1"]})
        write_lora(folder / "ink.safetensors", in_peft(layers))
        to_q, to_v = (f"mid_block.attentions.0.transformer_blocks.0.attn1.{name}" for name in ("to_q", "to_v"))
        text = ["encoder.layers.0.self_attn.q_proj"]
        layers = random_layers(shared_small_base(shared), {"unet": [to_q, to_v], "text_encoder": text})
        write_lora(folder / "wash.safetensors", in_peft(layers))
        (folder / "DIR").mkdir()
        (folder / "DIR" / "weights").write_text("weights", encoding="utf-8")
        for recipe, calib, engine in (("w8a8", "CALIB", "ENGINE"), ("fp", "FP_CALIB", "FP_ENGINE")):
            given = ["--prompts", f"{folder}/prompts.txt", *QUICK_OPTIONS] if recipe == "w8a8" else []
            graph = f"{folder}/{calib}-graph"
            for command in (
                ["calibrate", f"{folder}/MODEL", "--recipe", recipe, "--out", f"{folder}/{calib}", *given],
                ["export", f"{folder}/{calib}", "--out", graph],
                ["build", graph, "--backend", "openvino", "--out", f"{folder}/{engine}"],
            ):
                assert main(command) == 0, command

    return shared.made("placeholders", make)


@pytest.fixture
def folder(placeholders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy of them, which is the current one."""
    copy = tmp_path / "page"
    shutil.copytree(placeholders, copy)
    monkeypatch.chdir(copy)
    return copy


class Ended(NamedTuple):
    code: int
    err: str


class Shell:
    """Runs a page's commands in the current folder."""

    def __init__(
        self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, requests: list[Snippet]
    ) -> None:
        self._capfd, self._monkeypatch, self._requests = capfd, monkeypatch, requests

    def run(self, snippet: Snippet) -> Ended:
        words = snippet.words
        match words:
            case ["s2p-deploy", "serve", *options]:
                return self._serve(options, answers=snippet.text not in ABSENT)
            case ["s2p-deploy", *arguments]:
                self._capfd.readouterr()
                code = main(self._in_full(arguments))
                return Ended(code, self._capfd.readouterr().err)
            case ["curl", *_]:
                return Ended(0, "")  # when the page's server runs
            case ["make", *targets]:
                return finished(["make", "-n", *targets], ROOT)
            case ["pip", "install", package]:
                extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
                assert set(re.fullmatch(r"s2p-deploy\[(.*)\]", package)[1].split(",")) <= set(extras)  # type: ignore[index]
                return Ended(0, "")
            case [program, "-m", "pytest", *_] if program.endswith("python"):
                return finished([sys.executable, *words[1:], *(snippet.shorter or [])], ROOT)
            case ["python", *_]:
                return self._python(words[1:] + (snippet.shorter or []))
            case _:
                return finished(["sh", "-c", snippet.text], Path.cwd())

    def _in_full(self, arguments: list[str]) -> list[str]:
        """The page's arguments, what its ellipsis stands for, and what makes a calibration of MODEL short."""
        name = arguments[0]
        given = arguments[:-1] + ELLIPSIS[name] if arguments[-1] == "..." else arguments
        return given + SHORT.get(name, []) if "MODEL" in given else given

    def _python(self, words: list[str]) -> Ended:
        """Runs a program of the repository in this process, which has imported PyTorch already."""
        program = words[1] if words[0] == "-m" else str(ROOT / words[0])
        arguments = words[2:] if words[0] == "-m" else words[1:]
        self._monkeypatch.setattr(sys, "argv", [program, *arguments])
        run = runpy.run_module if words[0] == "-m" else runpy.run_path
        if words[0] != "-m":
            self._monkeypatch.syspath_prepend(Path(program).parent)  # as Python itself does
        try:
            run(program, run_name="__main__")
        except SystemExit as ended:
            return Ended(int(ended.code or 0), self._capfd.readouterr().err)
        return Ended(0, "")

    def _serve(self, options: list[str], *, answers: bool) -> Ended:
        """Starts a server on a free port, waits until it is ready, sends the page's requests, and ends it."""
        command = [sys.executable, "-m", "s2p_deploy.cli", "serve", *options, "--port", "0"]
        if not answers:
            return finished(command, Path.cwd(), RAY_AUTH_TOKEN=TOKEN)
        with serving(command) as (process, port):
            if "--token-file" not in options:
                for request in self._requests:
                    if ('"lora"' in request.text) == ("--lora" in options):  # to a server that has it
                        send(request, port)
            process.send_signal(signal.SIGTERM)
            return Ended(process.wait(timeout=120), "")


@contextmanager
def serving(command: list[str]) -> Iterator[tuple[subprocess.Popen[str], int]]:
    with (
        Path("serve.log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            address = re.search(r"http://\S+:(\d+)", first)
            assert address, f"{first}{Path('serve.log').read_text()}"
            wait_until_ready(process, int(address[1]))
            yield process, int(address[1])
        finally:
            process.kill()


def wait_until_ready(process: subprocess.Popen[str], port: int) -> None:
    deadline = time.monotonic() + 300
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=30):
                return
        except OSError:  # nobody listens, or 503
            assert process.poll() is None, Path("serve.log").read_text()
            assert time.monotonic() < deadline, Path("serve.log").read_text()
            time.sleep(0.2)


def send(request: Snippet, port: int) -> None:
    """Sends a request of a page, its curl command or its Python block, to this server."""
    if request.python:
        text = replaced(request.text, {"127.0.0.1:8000": f"127.0.0.1:{port}", "64x64": "16x16"})  # MODEL's size
        assert run_block(text, {"base64": base64})["png"].startswith(b"\x89PNG")
        return
    words = [word.replace("localhost:8000", f"localhost:{port}") for word in request.words]
    if shutil.which("curl"):
        answer = subprocess.run([*words, "--silent", "--show-error"], capture_output=True, text=True, check=True).stdout
    else:
        headers = dict(word.split(": ", 1) for flag, word in pairwise(words) if flag == "-H")
        body = next(word for flag, word in pairwise(words) if flag == "-d")
        asked = urllib.request.Request(f"http://{words[1]}", body.encode(), headers)
        with urllib.request.urlopen(asked, timeout=120) as opened:
            answer = opened.read().decode()
    assert base64.b64decode(json.loads(answer)["data"][0]["b64_json"]).startswith(b"\x89PNG")


def run_block(text: str, values: dict[str, Any]) -> dict[str, Any]:
    """Runs Python with these names defined, and returns all that are defined afterwards."""
    file = Path("block.py")
    file.write_text(text, encoding="utf-8")
    return values | runpy.run_path(str(file), values)


def finished(command: list[str], folder: Path, **variables: str) -> Ended:
    run = subprocess.run(
        command, cwd=folder, env=os.environ | variables, capture_output=True, text=True, check=False, timeout=600
    )
    return Ended(run.returncode, run.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in WITH_COMMANDS if page not in SAME_AS_README])
def test_the_commands_of_a_page_work(
    page: str, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "FILE").write_text(FILES.get(page, PROMPTS), encoding="utf-8")
    recipes = re.findall(r"```yaml\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    for recipe in recipes:
        (folder / "mine.yaml").write_text(recipe, encoding="utf-8")
    shown = [one for one in ALL[page] if one.elsewhere is None]
    requests = [one for one in shown if one.text.startswith("curl") or (one.python and "openai" in one.text)]
    for name in (name for one in shown if not one.python for name in written_by(one)):
        shutil.rmtree(folder / name, ignore_errors=True)  # a placeholder that this page makes itself
    shell = Shell(capfd, monkeypatch, requests)
    for one in shown:
        if one.python or (page, one.text) in NEED_WHAT_IS_ABSENT:
            continue
        if one.text in ANEW:
            shutil.copytree(
                folder, folder / "anew", ignore=shutil.ignore_patterns("calib*", "graph", "engine", "report")
            )
            monkeypatch.chdir(folder / "anew")
        assert what_is_wrong(one, shell.run(one)) is None, one


def written_by(one: Snippet) -> list[str]:
    """Files and folders that a command of this package writes."""
    options = {"--out", "--plan-out"} if one.words[0] == "s2p-deploy" else {}
    return [value for option, value in pairwise(one.words) if option in options]


def what_is_wrong(one: Snippet, ended: Ended) -> str | None:
    """Says what is wrong with the exit code, with the one line of an error, or with what --out names."""
    if one.text in ABSENT and ended.code:
        code, said = ABSENT[one.text]
        lines = [line for line in ended.err.splitlines() if line.startswith("s2p-deploy: ")]
        right = ended.code == code and lines == ended.err.splitlines()[-1:] and said in lines[0]
        return None if right else f"ended with {ended.code}: {ended.err}"
    # So little training need not meet the gates, nor so small a network gain any speed.
    gates = one.text.startswith("s2p-deploy validate") or "--speedup" in one.text
    if ended.code not in ({0, 3} if gates else {0}):
        return f"ended with {ended.code}: {ended.err}"
    missing = [name for name in written_by(one) if not Path(name).exists()]
    return f"{missing} is not there" if missing else None


def python_values(page: str) -> dict[str, Any]:
    """What a page's blocks take as given."""
    if page == "CONTRIBUTING.md":
        recipe, prompts = Recipe.load("w8a8", QUICK), PromptSet.of(PROMPTS.splitlines())
        return {"base": resolve_base("MODEL"), "recipe": recipe, "prompts": prompts, "out": Path("calib")}
    rng = np.random.default_rng(0)
    return {
        "prompts": PROMPTS.splitlines(),
        "held_out": ["a large green triangle", "a small red square"],
        "latents": rng.standard_normal((2, 4, 8, 8)).astype(np.float32),
        "indices": np.asarray([1, 951]),
        "text": rng.standard_normal((2, 24, 128)).astype(np.float32),
        "quick": Recipe.load("w8a8", QUICK),
    }


# Python blocks that are run, by a line of theirs, with what is replaced in them.
PYTHON_BLOCKS = {
    "from openai import OpenAI": {},  # `send` runs it
    'pipe = StableDiffusionPipeline.from_pretrained("my-model")': {
        '"my-model"': '"MODEL"',
        'recipe="w8a8"': "recipe=quick",
        'device="cuda"': 'device="cpu"',
    },
    "from diffusers import AutoPipelineForImage2Image": {},
    "from s2p_deploy.calib.hooks import Hooks": {},
    "from s2p_deploy import load_engine": {},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "defined"),
    [
        ("CONTRIBUTING.md", {"RootBalanced", "loss"}),
        ("docs/python-api.md", {"calibrated", "graph", "engine", "report", "picture", "image_to_image", "noise"}),
    ],
)
def test_the_python_blocks_of_a_page_work(page: str, defined: set[str], folder: Path) -> None:
    values = python_values(page)
    for one in (one for one in ALL[page] if one.python):
        replacements = next(new for line, new in PYTHON_BLOCKS.items() if line in one.text)
        values = run_block(replaced(one.text, replacements), values)
    assert defined <= set(values)
    if "noise" in defined:
        assert values["report"].verdict in {"passed", "failed", "not verified"}
        assert values["picture"].size == (16, 16)
        assert type(values["image_to_image"]).__name__ == "StableDiffusionImg2ImgPipeline"
        assert values["noise"].shape == (2, 4, 8, 8)
    else:
        assert CalibratedModel.open(folder / "calib").plan.layers
