"""``s2p-deploy build``: its options, and through the real command, children that crash, hang, starve or are killed."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from s2p_deploy.cli.build import gpu_lines, precision_line, profile_from_option, quantized_layers
from s2p_deploy.cli.options import bytes_from_option
from s2p_deploy.engines import ShapeProfile
from s2p_deploy.errors import InputError
from s2p_deploy.records import Base, write_artifact
from s2p_deploy.records.engine import LayerPrecision
from tests.cli.commands import Run
from tests.engines.small_graph import small_graph

COMMAND = [sys.executable, "-c", "import sys; from s2p_deploy.cli import main; sys.exit(main())"]
Change = Callable[[onnx.ModelProto], None]


@pytest.mark.parametrize(
    ("text", "size"),
    [("8G", 8 * 10**9), ("8GB", 8 * 10**9), ("1.5 gib", 3 * 2**29), ("512MiB", 2**29), ("1000", 1000), ("64k", 64000)],
)
def test_a_size(text: str, size: int) -> None:
    assert bytes_from_option(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "0", "1e9", "nan", "8X", "8 G B", "٣G", "9" * 40])
def test_no_size(text: str) -> None:
    with pytest.raises(InputError, match="--memory-limit"):
        bytes_from_option(text)


def test_batch_sizes() -> None:
    assert profile_from_option("1:4:8") == ShapeProfile(1, 4, 8)


@pytest.mark.parametrize("text", ["", "4", "1:2", "1:2:3:4", "a:b:c", "4:2:1", "0:1:2", "1: 2:3", "-1:2:3"])
def test_no_batch_sizes(text: str) -> None:
    with pytest.raises(InputError, match="batch"):
        profile_from_option(text)


def test_it_is_told_what_computes_in_which_type() -> None:
    def layer(name: str, bits: int, compute: str) -> LayerPrecision:
        return LayerPrecision(name, "conv", "rescale", 8, bits, compute)

    layers = [layer("a", 8, "fp32"), layer("b", 8, "int8"), layer("c", 8, "int8"), layer("d", 16, "fp16")]
    types = quantized_layers(layers)
    assert types == {"int8": 2, "fp32": 1}
    assert precision_line(4, types) == "3 of 4 layers have quantized activations, computed in int8 (2), fp32 (1)"
    assert precision_line(1, quantized_layers(layers[-1:])) == "none of 1 layers has quantized activations"


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_graph(tmp_path_factory.mktemp("graph") / "graph").folder


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--timeout", "0"], "--timeout"),
        (["--timeout", "nan"], "--timeout"),
        (["--memory-limit", "lots"], "--memory-limit"),
        (["--memory-limit", "1M"], "too small"),
        (["--lowering", "magic"], "--lowering"),
        (["--static-tolerance", "-1"], "--static-tolerance"),
        (["--static-tolerance", "nan"], "--static-tolerance"),
        (["--batch", "3:2:1"], "batch"),
        (["--backend", "nonsense"], "nonsense"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(
    run: Run, graph: Path, tmp_path: Path, options: list[str], named: str
) -> None:
    ended = run("build", graph, "--backend", "onnxruntime", "--out", tmp_path / "engine", *options)
    assert ended.code == 2
    assert named in ended.err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_what_a_build_will_take_is_said_before_and_what_it_took_after(run: Run, graph: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    options = ("--batch", "1:3:4", "--memory-limit", "4G", "--json")
    ended = run("build", graph, "--backend", "onnxruntime", "--out", out, *options)
    assert ended.code == 0, ended.err
    assert ended.err.startswith("build: about ")
    estimate = ended.data["estimate"]
    assert 0 < estimate["memory"] <= estimate["likely_memory"] < 2**31
    assert 0 < estimate["disk"] < 2**24
    assert 0 < estimate["likely_seconds"] < 60
    assert 0 < ended.data["peak_rss_bytes"] < 2**32
    assert ended.data["build_seconds"] > 0
    content = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["content"]
    assert content["profile"] == {"minimum": 1, "optimum": 3, "maximum": 4}


@pytest.fixture
def fp16_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt_rtx")
    return small_graph(tmp_path_factory.mktemp("graph") / "fp16", "fp16").folder


def test_a_compute_capability_that_the_library_does_not_name_is_refused(
    run: Run, fp16_graph: Path, tmp_path: Path
) -> None:
    options = ("--backend", "tensorrt_rtx", "--out", tmp_path / "engine", "--compute-capability", "9.0")
    ended = run("build", fp16_graph, *options)
    assert ended.code == 2
    said = ended.err.splitlines()[-1]
    assert "tensorrt_rtx does not build for compute capability '9.0': use 7.5, 8.0, 8.6, 8.9, 12.0, 12.1" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.trt
@pytest.mark.slow
def test_a_build_for_turing_says_so_and_how_its_batches_were_chosen(run: Run, fp16_graph: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    options = ("--backend", "tensorrt_rtx", "--out", out, "--compute-capability", "7.5", "--compute-capability", "8.6")
    ended = run("build", fp16_graph, *options)
    assert ended.code == 0, ended.err
    assert "for compute capability 7.5, 8.6" in ended.out
    assert "build: batches of 1:2:32, for " in ended.err
    assert "--batch sets others" in ended.err
    content = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["content"]
    assert content["options"]["compute_capabilities"] == ["7.5", "8.6"]
    assert content["profile"] == {"minimum": 1, "optimum": 2, "maximum": 32}


def test_what_an_engine_takes_on_a_gpu_is_said() -> None:
    memory = {"weights": 3 * 2**30, "tuned": 2**29, "largest": 2**33}
    assert gpu_lines({"target": "compute capability 7.5", "gpu_memory": memory}) == (
        "for compute capability 7.5",
        "GPU memory: weights 3.00 GiB, a step of the size tuned for 0.50 GiB, a step of the largest 8.00 GiB",
    )
    assert gpu_lines({"not inspected": "it is for others"}) == ("its layers were not inspected: it is for others",)
    assert gpu_lines({"processor": "some CPU"}) == ()


def changed_graph(folder: Path, change: Change) -> Path:
    """The small graph with something in it that no exported graph has, as a whole artifact."""
    source = small_graph(folder / "source")

    def fill(out: Path) -> dict[str, Any]:
        for name in source.manifest.files:
            shutil.copyfile(source.folder / name, out / name)
        model = onnx.load(out / "denoiser.onnx")
        change(model)
        for name in ("denoiser.onnx", "denoiser.onnx.data"):
            (out / name).unlink(missing_ok=True)
        onnx.save(model, out / "denoiser.onnx", save_as_external_data=True, location="denoiser.onnx.data")
        return dict(source.manifest.content)

    out = folder / "graph"
    write_artifact(out, kind="ExportedGraph", base=Base("small", "0" * 64), recipe={"name": "test"}, fill=fill)
    return out


def constant(graph: onnx.GraphProto, name: str, value: np.ndarray | np.generic) -> str:
    graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def never_ends(model: onnx.ModelProto) -> None:
    """300 products of 6000 x 6000 zeros, which take half an hour and more, go before the output. A loop is refused."""
    graph = model.graph
    graph.node[-1].output[0] = "before"
    size = constant(graph, "size", np.asarray([6000, 6000]))
    graph.node.append(helper.make_node("ConstantOfShape", [size], ["power_0"], name="power_0"))
    for turn in range(300):
        name = f"power_{turn + 1}"
        graph.node.append(helper.make_node("MatMul", [f"power_{turn}", "power_0"], [name], name=name))
    graph.node.append(helper.make_node("ReduceMax", ["power_300"], ["largest"], name="largest", keepdims=0))
    graph.node.append(helper.make_node("Add", ["before", "largest"], ["noise_pred"], name="sum_of_both"))


def eats_memory(model: onnx.ModelProto) -> None:
    """The largest of 2^33 zeros, 32 GiB, is added to the output."""
    graph = model.graph
    graph.node[-1].output[0] = "before"
    size = constant(graph, "size", np.asarray([2**33]))
    graph.node.append(helper.make_node("ConstantOfShape", [size], ["zeros"], name="zeros"))
    graph.node.append(helper.make_node("ReduceMax", ["zeros"], ["largest"], name="largest", keepdims=0))
    graph.node.append(helper.make_node("Add", ["before", "largest"], ["noise_pred"], name="sum_of_both"))


def finished(*arguments: object, file_size: int | None = None) -> subprocess.CompletedProcess[str]:
    """The command in its own process, which may write files of ``file_size`` bytes at most."""

    def limit() -> None:
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    command = [*COMMAND, "--debug", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit, timeout=300)


def children_of(pid: int) -> list[int]:
    """Processes that a process started, whose command line is a build's child."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in task.read_text(encoding="ascii").split()]
    return [child for child in found if "engines.build" in Path(f"/proc/{child}/cmdline").read_text(encoding="utf-8")]


def running_build(out: Path, graph: Path) -> tuple[subprocess.Popen[str], int]:
    """A build that does not end, and the process id of its child."""
    parent = subprocess.Popen(
        [*COMMAND, "build", str(graph), "--backend", "onnxruntime", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 240
    while not list(out.parent.rglob("denoiser.onnx")):  # then the child is at work
        assert parent.poll() is None, parent.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (child,) = children_of(parent.pid)
    return parent, child


def gone(pid: int) -> bool:
    """Whether a process ends within seconds."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def left(out: Path) -> list[str]:
    """What stands where the engine should."""
    return sorted(path.name for path in out.parent.iterdir())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where to build: an empty folder of its own."""
    (tmp_path / "engines").mkdir()
    return tmp_path / "engines" / "engine"


@pytest.mark.slow
def test_a_build_that_hangs_is_stopped(tmp_path: Path, out: Path) -> None:
    graph = changed_graph(tmp_path, never_ends)
    ended = finished("build", graph, "--backend", "onnxruntime", "--out", out, "--timeout", "25")
    assert ended.returncode == 1
    assert "the build did not finish in 25 s and was stopped" in ended.stderr
    assert left(out) == []


@pytest.mark.slow
def test_a_build_that_eats_memory_is_stopped(tmp_path: Path, out: Path) -> None:
    graph = changed_graph(tmp_path, eats_memory)
    ended = finished("build", graph, "--backend", "onnxruntime", "--out", out, "--memory-limit", "3GiB")
    assert ended.returncode == 1
    assert "the build ran out of memory (limit 3.00 GiB)" in ended.stderr
    assert left(out) == []


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_disk_that_fills_leaves_nothing(tmp_path: Path, out: Path, graph: Path, backend: str) -> None:
    """Stands for it: no file may be longer than 20,000 bytes, and the weights are."""
    pytest.importorskip(backend)
    ended = finished("build", graph, "--backend", backend, "--out", out, file_size=20_000)
    assert ended.returncode == 1
    assert "the build" in ended.stderr
    assert left(out) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, "the build was killed, most likely because memory ran out"),  # the kernel's way
        (signal.SIGSEGV, "the build crashed with SIGSEGV"),
    ],
)
def test_a_child_that_dies_of_a_signal_is_an_error(tmp_path: Path, out: Path, number: int, said: str) -> None:
    """The builder's own crash: tests/tools, on a pattern that no graph which passes the guards can hold."""
    parent, child = running_build(out, changed_graph(tmp_path, never_ends))
    os.kill(child, number)
    _, err = parent.communicate(timeout=60)
    assert parent.returncode == 1
    assert said in err
    assert left(out) == []


@pytest.mark.slow
def test_ctrl_c_ends_the_child_too(tmp_path: Path, out: Path) -> None:
    parent, child = running_build(out, changed_graph(tmp_path, never_ends))
    parent.send_signal(signal.SIGINT)
    _, err = parent.communicate(timeout=60)
    assert parent.returncode == 130
    assert "interrupted" in err
    assert gone(child)
    assert left(out) == []


@pytest.mark.slow
def test_a_parent_that_is_killed_takes_the_child_along(tmp_path: Path, out: Path) -> None:
    parent, child = running_build(out, changed_graph(tmp_path, never_ends))
    parent.kill()
    parent.communicate(timeout=60)
    assert gone(child)
