"""Compute capabilities that a TensorRT-RTX engine is built for."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from s2p_deploy.engines import BuildOptions, ShapeProfile, build_engine
from s2p_deploy.engines.tensorrt.targets import described_targets, named_capabilities, runs_on, set_capabilities
from s2p_deploy.errors import InputError
from s2p_deploy.records import Engine
from tests.engines.conftest import GraphOf

NAMED = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")  # by TensorRT-RTX 1.7


def library(*names: str) -> ModuleType:
    made = ModuleType("tensorrt_rtx")
    made.__dict__["ComputeCapability"] = SimpleNamespace(__members__=dict.fromkeys(("NONE", "CURRENT", *names)))
    return made


@pytest.fixture
def rtx() -> ModuleType:
    module: ModuleType = pytest.importorskip("tensorrt_rtx")
    return module


def test_capabilities_are_those_that_the_library_names() -> None:
    assert named_capabilities(library("SM120", "SM75", "SM89")) == ((7, 5), (8, 9), (12, 0))
    assert named_capabilities(ModuleType("tensorrt")) == ()


def test_a_newer_library_brings_its_own() -> None:
    newer = library("SM75", "SM90", "SM130")
    assert [runs_on(newer, at) for at in ((7, 5), (8, 6), (9, 0), (13, 1))] == [True, False, True, True]
    assert described_targets(newer, ()) == "compute capability 9.0, 13.0 and later"


def test_the_installed_library_names_turing_and_is_told_it(rtx: ModuleType) -> None:
    assert described_targets(rtx, ()) == "compute capability 8.0, 8.6, 8.9, 12.0, 12.1 and later"
    assert described_targets(rtx, ("7.5", "8.6")) == "compute capability 7.5, 8.6"
    config: Any = rtx.Builder(rtx.Logger(rtx.Logger.ERROR)).create_builder_config()
    set_capabilities(rtx, config, ())
    assert config.num_compute_capabilities == 0
    set_capabilities(rtx, config, ("7.5", "12.0"))
    kinds = rtx.ComputeCapability
    assert [config.get_compute_capability(at) for at in range(2)] == [kinds.SM75, kinds.SM120]


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("name", ["9.0", "75", "7.5 ", "CURRENT"])
def test_an_unknown_capability_is_refused_with_those_there_are(graph_of: GraphOf, tmp_path: Path, name: str) -> None:
    options = BuildOptions(compute_capabilities=("8.6", name))
    with pytest.raises(InputError) as caught:
        build_engine(graph_of("fp16", "int8"), tmp_path / "out", backend="tensorrt_rtx", options=options)
    assert f"does not build for compute capability {name!r}: use {', '.join(NAMED)}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_other_backends_have_no_such_choice(graph_of: GraphOf, tmp_path: Path) -> None:
    options = BuildOptions(compute_capabilities=("8.6",))
    with pytest.raises(InputError, match="onnxruntime engines are not built for a compute capability that is named"):
        build_engine(graph_of("fp16", "int8"), tmp_path / "out", backend="onnxruntime", options=options)


@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.usefixtures("rtx")
def test_an_engine_says_what_it_is_for_and_its_digest_is_of_it(graph_of: GraphOf, tmp_path: Path) -> None:
    def built(*names: str) -> Engine:
        options = BuildOptions(profile=ShapeProfile(1, 2, 8), compute_capabilities=names)
        out = tmp_path / "-".join(("engine", *names))
        return build_engine(graph_of("fp16", "int8"), out, backend="tensorrt_rtx", options=options)

    default, turing = built(), built("7.5")
    content, other = turing.manifest.content, default.manifest.content
    assert (other["options"]["compute_capabilities"], content["options"]["compute_capabilities"]) == ([], ["7.5"])
    assert other["notes"]["target"] == "compute capability 8.0, 8.6, 8.9, 12.0, 12.1 and later"
    assert content["notes"]["target"] == "compute capability 7.5"
    assert default.manifest.digest != turing.manifest.digest
    plans = [(engine.folder / "denoiser.plan").read_bytes() for engine in (default, turing)]
    assert len(plans[1]) > len(plans[0]) + 100_000  # Turing has kernels of its own
