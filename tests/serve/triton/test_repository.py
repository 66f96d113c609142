"""What is written: the same bytes each time, whole or not at all, configurations that protobuf reads."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from s2p_deploy.engines import BuildOptions, build_engine, load_engine, usable_backend
from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.records import Engine, TensorSpec, verify_chain
from s2p_deploy.records.artifacts import verified_files
from s2p_deploy.records.engine import EngineOptions
from s2p_deploy.serve.triton.denoiser_model import predictions
from s2p_deploy.serve.triton.loop_model import check_request, native_binding
from s2p_deploy.serve.triton.model_config import denoiser_config, loop_config
from s2p_deploy.serve.triton.repository import RepositoryOptions, check_native, export_repository
from tests.engines.small_graph import small_graph, small_inputs

if TYPE_CHECKING:
    from pathlib import Path

    from tests.serve.conftest import Tiny

OPTIONS = RepositoryOptions("tiny")


def parsed(text: str) -> Any:  # noqa: ANN401 - protobuf's
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("small")
    return build_engine(small_graph(folder / "graph"), folder / "engine", backend="onnxruntime")


def test_the_same_bytes_each_time_and_the_engine_as_it_is(tiny: Tiny, tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "models", tmp_path / "b" / "models"
    for out in (first, second):
        export_repository(tiny.engine, tiny.base, out, OPTIONS)
    assert contents(first) == contents(second)
    for model in ("tiny", "tiny_denoiser"):
        inner = first / model / "1" / "engine"
        assert contents(inner) == contents(tiny.engine.folder)
        assert Engine.open(inner).manifest == tiny.engine.manifest
    assert {link.kind for link in verify_chain(first)} >= {"TritonRepository", "Engine"}


def test_an_existing_folder_stays_unless_it_may_be_replaced(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "models"
    export_repository(tiny.engine, tiny.base, out, OPTIONS)
    with pytest.raises(InputError, match="exists"):
        export_repository(tiny.engine, tiny.base, out, OPTIONS)
    export_repository(tiny.engine, tiny.base, out, replace(OPTIONS, name="other"), replace=True)
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "other", "other_denoiser"]


def test_a_changed_engine_leaves_nothing(tiny: Tiny, tmp_path: Path) -> None:
    import shutil

    spoiled = tmp_path / "engine"
    shutil.copytree(tiny.engine.folder, spoiled)
    with (spoiled / "denoiser.onnx.data").open("ab") as opened:
        opened.write(b"x")
    with pytest.raises(IntegrityError, match="was changed"):
        export_repository(Engine.open(spoiled), tiny.base, tmp_path / "models", OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine"]


def test_the_pipeline_can_travel_along(tiny: Tiny, tmp_path: Path) -> None:
    from s2p_deploy.families import resolve_base

    export_repository(tiny.engine, tiny.base, tmp_path / "models", replace(OPTIONS, with_pipeline=True))
    copied = resolve_base(str(tmp_path / "models" / "tiny" / "1" / "pipeline"))
    assert copied.base.digest == tiny.base.base.digest


def test_triton_runs_the_file_itself_where_that_is_asked_for(tiny: Tiny, tmp_path: Path) -> None:
    import onnxruntime

    export_repository(tiny.engine, tiny.base, tmp_path / "models", replace(OPTIONS, native=True))
    version = tmp_path / "models" / "tiny_denoiser" / "1"
    assert not (version / "model.py").exists()
    assert (version / "model.onnx").read_bytes() == (tiny.engine.folder / "denoiser.onnx").read_bytes()
    session = onnxruntime.InferenceSession(version / "model.onnx")  # finds its data beside it
    config = parsed((version.parent / "config.pbtxt").read_text())
    assert (config.platform, config.max_batch_size) == ("onnxruntime_onnx", 0)
    assert {entry.name: len(entry.dims) for entry in config.input} == {
        entry.name: len(entry.shape) for entry in session.get_inputs()
    }


def test_a_tensorrt_engine_is_a_plan_on_a_gpu(tiny: Tiny) -> None:
    engine = replace(tiny.engine, backend="tensorrt", dtype="fp16", environment={"device": "CUDA GPU"})
    config = parsed(denoiser_config(engine, replace(OPTIONS, native=True), []))
    assert (config.platform, config.max_batch_size) == ("tensorrt_plan", 0)
    assert config.instance_group[0].kind == 1  # KIND_GPU
    shapes = {entry.name: list(entry.dims) for entry in config.input}
    assert shapes["sample"] == [-1, 4, 8, 8]
    assert shapes["act_scales"] == [1000, len(engine.scales.quantizers)]
    assert not config.HasField("dynamic_batching")


def test_steps_meet_unless_an_engine_takes_one_timestep_at_a_time(tiny: Tiny) -> None:
    config = parsed(denoiser_config(tiny.engine, replace(OPTIONS, instances=3, queue_delay=77), []))
    assert list(config.dynamic_batching.preferred_batch_size) == [6]
    assert config.dynamic_batching.max_queue_delay_microseconds == 77
    alone = parsed(denoiser_config(replace(tiny.engine, mixed_timesteps=False), OPTIONS, []))
    assert not alone.HasField("dynamic_batching")
    assert alone.max_batch_size == 32


def test_every_loop_instance_draws_a_picture(tiny: Tiny) -> None:
    config = parsed(loop_config(tiny.engine, replace(OPTIONS, instances=5), "base", [[1.5, 0.25]]))
    assert config.instance_group[0].count == 5
    assert config.parameters["schedules"].string_value == "[[1.5, 0.25]]"
    assert [entry.name for entry in config.input if not entry.optional] == ["prompt"]


@given(st.text())
def test_no_text_ends_its_quotes(small: Engine, text: str) -> None:
    config = parsed(loop_config(small, OPTIONS, text, []))
    assert config.parameters["base"].string_value == text
    assert config.name == "tiny"


@pytest.mark.parametrize("name", ["", "1a", "../up", 'a"b', "a b", "a\n", "ä", "x" * 65])
def test_a_name_is_checked(name: str) -> None:
    with pytest.raises(InputError, match="no name for a model"):
        RepositoryOptions(name)


@pytest.mark.parametrize("wrong", [{"instances": 0}, {"queue_delay": -1}, {"steps": (0,)}, {"steps": (101,)}])
def test_numbers_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"give (0|1) to"):
        RepositoryOptions("tiny", **wrong)


def test_what_triton_cannot_run_itself_is_refused(tiny: Tiny) -> None:
    with pytest.raises(InputError, match="no backend of its own for openvino"):
        check_native(replace(tiny.engine, backend="openvino"))
    with pytest.raises(InputError, match="holds no weights"):
        check_native(replace(tiny.engine, backend="tensorrt", options=EngineOptions(stripped=True)))


@pytest.mark.parametrize(
    "optional",
    [TensorSpec("lora_strengths", "float32", ("batch", 8)), TensorSpec("mid_residual", "float32", ("batch", 8, 4, 4))],
)
def test_inputs_of_adapters_stay_with_this_package(tiny: Tiny, optional: TensorSpec) -> None:
    """Its runner fills them with zeros."""
    adapted = replace(tiny.engine, inputs=(*tiny.engine.inputs, optional))
    assert denoiser_config(adapted, OPTIONS, []) == denoiser_config(tiny.engine, OPTIONS, [])
    with pytest.raises(InputError, match=f"takes {optional.name} for adapters.*leave --native out"):
        check_native(adapted)


def test_a_bare_engine_with_its_table_given_per_call_answers_as_a_loaded_one(small: Engine) -> None:
    inputs = small_inputs()
    with usable_backend("onnxruntime").load(small, verified_files(small), {}) as bare, load_engine(small) as loaded:
        found = native_binding(small, [])(bare).infer(inputs)["noise_pred"]
        np.testing.assert_array_equal(found, loaded.infer(inputs)["noise_pred"])


def test_one_wrong_call_costs_the_others_nothing(small: Engine) -> None:
    good, bad = small_inputs(2), small_inputs(1) | {"timestep_index": np.array([10**6])}
    with load_engine(small) as runner:
        expected = runner.infer(good)["noise_pred"]
        first, wrong, last = predictions(runner.infer, [good, bad, good])
    assert isinstance(wrong, InputError)
    for found in (first, last):
        assert isinstance(found, np.ndarray)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("padded", [0, 2, 8])
def test_padding_is_cut_off_again(small: Engine, padded: int) -> None:
    calls = [small_inputs(2, seed=1), small_inputs(1, seed=2)]
    with load_engine(small) as runner:
        found = predictions(runner.infer, calls, padded)
        for call, answer in zip(calls, found, strict=True):
            assert isinstance(answer, np.ndarray)
            np.testing.assert_array_equal(answer, runner.infer(call)["noise_pred"])


def test_a_batch_is_padded_to_what_all_loops_bring(tiny: Tiny) -> None:
    options = replace(OPTIONS, instances=3, fixed_batch=True)
    assert parsed(denoiser_config(tiny.engine, options, [])).parameters["padded_batch"].string_value == "6"
    with pytest.raises(InputError, match="fixed batch"):
        replace(options, native=True)


def test_only_engines_of_one_timestep_per_batch_need_one(tmp_path: Path) -> None:
    graph = small_graph(tmp_path / "graph")
    engine = build_engine(graph, tmp_path / "engine", backend="onnxruntime", options=BuildOptions(lowering="runtime_q"))
    assert "dynamic_batching" not in denoiser_config(engine, OPTIONS, [])


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"steps": 11}, {"seed": -1}, {"size": (0, 8)}, {"guidance_scale": -0.5}]
)
def test_a_request_is_checked(wrong: dict[str, Any]) -> None:
    from s2p_deploy.serve.request import ImageRequest

    asked = ImageRequest("a", 5, 2.0, 0)
    check_request(asked, 10)
    with pytest.raises(InputError):
        check_request(replace(asked, **wrong), 10)
