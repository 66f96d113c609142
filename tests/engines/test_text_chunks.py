"""Engines of texts of several chunks: what they take, what they refuse, and that they compute what the network does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest

from s2p_deploy.calib import fake_quant_denoiser
from s2p_deploy.engines import (
    BuildOptions,
    ShapeProfile,
    Span,
    TorchRunner,
    build_engine,
    engine_subgraphs,
    load_engine,
)
from s2p_deploy.engines.options import profile_for, profile_shapes
from s2p_deploy.engines.profile import largest_tensor
from s2p_deploy.engines.runner import BoundRunner
from s2p_deploy.errors import InputError
from s2p_deploy.export import export_graph
from s2p_deploy.records import CalibratedModel, Engine, ExportedGraph, TensorSpec
from s2p_deploy.records.exported_graph import TextChunks
from s2p_deploy.serve.triton.backend import remote_inputs
from tests.artifacts import TOKENS, tiny_calibrated, tiny_inputs

if TYPE_CHECKING:
    from tests.engines.conftest import GraphOf

BACKENDS = ("onnxruntime", "openvino")
LEVEL = 25  # dB: rounding flips
SPAN = Span(TOKENS, TOKENS, 4 * TOKENS)

EngineFor = Callable[[str], Engine]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> CalibratedModel:
    return tiny_calibrated(tmp_path_factory.mktemp("chunks") / "calib")


@pytest.fixture(scope="module")
def graph(calibrated: CalibratedModel) -> ExportedGraph:
    return export_graph(calibrated, calibrated.folder.parent / "graph", chunks=(1, 4))


@pytest.fixture(scope="module")
def engine_for(graph: ExportedGraph) -> EngineFor:
    """Backend -> its engine."""

    @cache
    def built(backend: str) -> Engine:
        return build_engine(graph, graph.folder.parent / backend, backend=backend)

    return built


def inputs(tokens: int, batch: int = 2) -> dict[str, np.ndarray]:
    text = np.random.default_rng(2).standard_normal((batch, tokens, 48)).astype(np.float32)
    return tiny_inputs(batch) | {"encoder_hidden_states": text}


def sqnr(expected: np.ndarray, found: np.ndarray) -> float:
    return float(10 * np.log10(np.square(expected).sum() / np.square(found - expected).sum().clip(1e-30)))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_engine_takes_every_text_in_its_range(
    calibrated: CalibratedModel, engine_for: EngineFor, backend: str
) -> None:
    """One chunk, for which OpenVINO compiles, and others, for which it compiles once."""
    engine, reference = engine_for(backend), TorchRunner(fake_quant_denoiser(calibrated))
    assert engine.profile.tokens == SPAN
    with load_engine(engine) as runner:
        assert next(s.shape for s in runner.inputs if s.name == "encoder_hidden_states") == ("batch", TOKENS, 48)
        for tokens, batch in ((TOKENS, 2), (2 * TOKENS, 2), (4 * TOKENS, 3), (TOKENS + 5, 2)):
            given = inputs(tokens, batch)
            assert sqnr(reference.infer(given)["noise_pred"], runner.infer(given)["noise_pred"]) > LEVEL
        for tokens in (TOKENS - 1, 4 * TOKENS + 1, 5 * TOKENS):
            with pytest.raises(InputError, match=f"takes texts of 6 to 24 tokens, got {tokens}: build one for that"):
                runner.infer(inputs(tokens))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_an_engine_take_several_chunks(graph: ExportedGraph, engine_for: EngineFor, backend: str) -> None:
    given = inputs(3 * TOKENS)
    with load_engine(engine_for(backend)) as whole, engine_subgraphs(engine_for(backend), graph) as parts:
        expected = whole.infer(given)["noise_pred"]
        assert parts is not None
        part = parts.between(["sample"], ["noise_pred"])
        found = part.runner.infer(given | {"act_scales": graph.scales.scales})["noise_pred"]
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)


@pytest.mark.slow
def test_triton_is_told_that_the_text_has_any_number_of_tokens(engine_for: EngineFor) -> None:
    text = next(spec for spec in remote_inputs(engine_for("onnxruntime")) if spec.name == "encoder_hidden_states")
    assert text == TensorSpec("encoder_hidden_states", "float32", ("batch", -1, 48))


class Answering:
    """A runner that is never called."""

    def infer(self, inputs: object) -> dict[str, np.ndarray]:
        raise AssertionError(inputs)

    def close(self) -> None:
        """Nothing."""


@pytest.mark.slow
def test_an_engine_of_one_chunk_says_how_to_get_more(calibrated: CalibratedModel) -> None:
    specs = (
        TensorSpec("sample", "float32", ("batch", 4, 8, 8)),
        TensorSpec("timestep_index", "int64", ("batch",)),
        TensorSpec("encoder_hidden_states", "float32", ("batch", TOKENS, 48)),
    )
    runner = BoundRunner(Answering(), specs, calibrated.timesteps)
    with pytest.raises(
        InputError, match=r"\[2, 12, 48\], the engine takes \[2, 6, 48\]: .* export and build with --ch"
    ):
        runner.infer(inputs(2 * TOKENS))
    with pytest.raises(InputError, match=r"the engine takes \[2, 6, 48\]\Z"):
        runner.infer(inputs(TOKENS) | {"encoder_hidden_states": np.zeros((2, TOKENS, 40), np.float32)})


@pytest.mark.slow
def test_a_profile_spans_the_graphs_chunks_or_fewer(graph: ExportedGraph, graph_of: GraphOf) -> None:
    assert profile_for(graph, ShapeProfile(1, 2, 8)) == ShapeProfile(1, 2, 8, tokens=SPAN)
    fewer = ShapeProfile(1, 2, 8, tokens=Span(2 * TOKENS, 2 * TOKENS, 3 * TOKENS))
    assert profile_for(graph, fewer) == fewer
    shapes = profile_shapes((graph.inputs[2],), fewer, timesteps=1)
    assert shapes["encoder_hidden_states"] == ((1, 12, 48), (2, 12, 48), (8, 18, 48))
    for span in (Span(1, 6, 6), Span(6, 6, 25)):
        with pytest.raises(InputError, match="takes 1 to 4 chunks of 6 tokens, export it with other --chunks"):
            profile_for(graph, replace(fewer, tokens=span))
    with pytest.raises(InputError, match="takes texts of one length: export it with --chunks"):
        profile_for(graph_of("fp32", "int8"), fewer)


@pytest.mark.slow
def test_the_longest_text_counts_for_the_memory_of_a_batch(graph: ExportedGraph) -> None:
    """Scores of 8 heads between 64 positions: of the picture's own tokens, and of the text's where it is longer."""
    import onnx_ir as ir

    model = ir.load(graph.onnx_file)
    sizes = {"height": 8, "width": 8}
    heads = next(node.outputs[0].shape[1] for node in model.graph if node.op_type == "Softmax")
    assert largest_tensor(model, sizes | {"tokens": 10}) == largest_tensor(model, sizes | {"tokens": 1})
    assert largest_tensor(model, sizes | {"tokens": 4096}) == heads * 64 * 4096 * 4


def test_chunks_of_a_record_are_ascending() -> None:
    assert (TextChunks(77, 1, 4).fewest_tokens, TextChunks(77, 1, 4).most_tokens) == (77, 308)
    assert str(Span(77, 77, 308)) == "77 to 308"
    profile = ShapeProfile(tokens=Span(77, 77, 308))
    assert profile.sizes("maximum") == {"batch": 32, "tokens": 308}
    profile.check_tokens(100)
    ShapeProfile().check_tokens(10**6)  # of one length: its inputs say which
    with pytest.raises(InputError, match="texts of 77 to 308 tokens, got 309"):
        profile.check_tokens(309)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_the_products_of_the_text_it_answers_the_same(
    graph: ExportedGraph, calibrated: CalibratedModel, engine_for: EngineFor, backend: str
) -> None:
    folder = graph.folder.parent
    apart = export_graph(calibrated, folder / f"apart-{backend}", chunks=(1, 4), text_projections="input")
    engine = build_engine(apart, folder / f"engine-{backend}", backend=backend)
    with load_engine(engine) as one, load_engine(engine_for(backend)) as other:
        for tokens in (TOKENS, 4 * TOKENS, TOKENS):
            given = inputs(tokens)
            assert sqnr(other.infer(given)["noise_pred"], one.infer(given)["noise_pred"]) > LEVEL
        with pytest.raises(InputError, match="takes texts of 6 to 24 tokens, got 30"):
            one.infer(inputs(5 * TOKENS))


@pytest.mark.slow
def test_bfloat16_on_openvino_takes_several_chunks(
    graph: ExportedGraph, calibrated: CalibratedModel, engine_for: EngineFor
) -> None:
    """Its attention passes look at numbers of tokens."""
    out = graph.folder.parent / "bf16"
    engine = build_engine(graph, out, backend="openvino", options=BuildOptions(precision="bf16"))
    with load_engine(engine) as half, load_engine(engine_for("openvino")) as full:
        for tokens in (TOKENS, 4 * TOKENS):
            given = inputs(tokens)
            assert sqnr(full.infer(given)["noise_pred"], half.infer(given)["noise_pred"]) > 15


@pytest.mark.trt
@pytest.mark.slow
def test_rtx_builds_ahead_of_time_with_a_range_of_chunks(calibrated: CalibratedModel, tmp_path: object) -> None:
    pytest.importorskip("tensorrt_rtx")
    folder = calibrated.folder.parent
    half = export_graph(calibrated, folder / "half", dtype="fp16", chunks=(1, 4))
    options = BuildOptions(profile=ShapeProfile(1, 2, 4, tokens=Span(TOKENS, 2 * TOKENS, 4 * TOKENS)))
    engine = build_engine(half, folder / "rtx", backend="tensorrt_rtx", options=options)
    assert engine.profile.tokens == Span(TOKENS, 2 * TOKENS, 4 * TOKENS)
    assert engine.inputs[2].shape == ("batch", "tokens", 48)
