"""Text encoder and autoencoder on every backend that runs them, as an artifact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch

from s2p_deploy.engines.component_engines import build_component_engines, load_component_engines
from s2p_deploy.errors import InputError, IntegrityError, MissingEnvironmentError
from s2p_deploy.export.float_networks import component_model
from s2p_deploy.export.tensors import write_model
from s2p_deploy.families import BasePipeline, resolve_base
from s2p_deploy.families.components import load_component
from s2p_deploy.records import Execution, ShapeProfile, Span, read_manifest, write_artifact
from s2p_deploy.records.engine import ComponentEngines
from tests.open_runners import watch_runners
from tests.shared_folder import SharedFolder
from tests.small_pipelines import PIPELINES, shared_small_base, shared_small_components, small_base, t5_base

NETWORKS = ("text_encoder", "vae_decoder", "vae_encoder")
SIZES = {"text_encoder": (24,), "vae_decoder": (4, 10, 6), "vae_encoder": (3, 20, 12)}


@pytest.fixture(scope="module")
def base(shared: SharedFolder) -> BasePipeline:
    return shared_small_base(shared)


@pytest.fixture(scope="module", params=["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def made(request: pytest.FixtureRequest, shared: SharedFolder) -> ComponentEngines:
    pytest.importorskip(request.param)
    return shared_small_components(shared, request.param)


@pytest.fixture
def parts(made: ComponentEngines, tmp_path: Path) -> ComponentEngines:
    """A copy that a test may spoil."""
    shutil.copytree(made.folder, tmp_path / "parts")
    return ComponentEngines.open(tmp_path / "parts")


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_answers_as_pytorchs_does(made: ComponentEngines, base: BasePipeline, name: str) -> None:
    component = load_component(base, name)
    shape = (3, *SIZES[name])
    given = torch.randint(0, 270, shape) if name == "text_encoder" else torch.randn(shape)
    with torch.no_grad():
        expected = component.network(given)
    runner = load_component_engines(made)[name]
    found = runner.infer({component.input: given.numpy()})
    tensors = expected if isinstance(expected, tuple) else (expected,)
    for output, tensor in zip(component.outputs, tensors, strict=True):
        np.testing.assert_allclose(found[output], tensor.numpy(), atol=1e-4)
    runner.close()


def test_the_manifest_says_what_was_made_of_what(made: ComponentEngines, base: BasePipeline) -> None:
    assert made.manifest.kind == "ComponentEngines"
    assert made.manifest.base.digest == base.base.digest
    assert set(made.networks) == set(NETWORKS)
    assert made.networks["vae_decoder"].input.shape == ("batch", 4, "height", "width")
    assert made.networks["text_encoder"].config["hidden_size"] == 128
    assert set(made.manifest.files) == {file for network in made.networks.values() for file in network.files}
    assert not [path for path in made.folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_changed_byte_is_found_before_it_is_loaded(parts: ComponentEngines, network: str) -> None:
    for name in parts.networks[network].files:
        data = (parts.folder / name).read_bytes()
        (parts.folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(IntegrityError, match="was changed after it was written: make the artifact again"):
            load_component_engines(ComponentEngines.open(parts.folder))
        (parts.folder / name).write_bytes(data)


def test_one_that_cannot_be_loaded_leaves_none_open(parts: ComponentEngines, monkeypatch: pytest.MonkeyPatch) -> None:
    if parts.backend != "onnxruntime":
        pytest.skip("its sessions are counted")
    opened, still_open = watch_runners(monkeypatch)
    *_, last = parts.networks.values()
    (parts.folder / last.files[0]).unlink()
    with pytest.raises(IntegrityError):
        load_component_engines(parts)
    assert len(opened) == len(parts.networks) - 1
    assert not still_open


def test_a_file_that_nobody_described_is_refused(parts: ComponentEngines) -> None:
    (parts.folder / "more.bin").write_bytes(b"x")
    with pytest.raises(IntegrityError, match=r"more\.bin is not in the manifest"):
        ComponentEngines.open(parts.folder)


def test_an_artifact_that_describes_its_networks_wrongly_is_refused(made: ComponentEngines, tmp_path: Path) -> None:
    for number, spoil in enumerate((_no_sizes, _a_file_of_two)):
        content = json.loads(json.dumps(made.manifest.content))
        spoil(content)
        out = tmp_path / f"spoiled-{number}"
        write_artifact(out, kind="ComponentEngines", base=made.manifest.base, recipe={}, fill=_filled(made, content))
        with pytest.raises(IntegrityError, match="is damaged"):
            ComponentEngines.open(out)


def test_another_environment_is_refused(made: ComponentEngines, tmp_path: Path) -> None:
    content = made.manifest.content | {"environment": made.environment | {made.backend: "0.1"}}
    out = tmp_path / "other"
    write_artifact(out, kind="ComponentEngines", base=made.manifest.base, recipe={}, fill=_filled(made, content))
    with pytest.raises(MissingEnvironmentError, match=f"needs {made.backend} 0.1"):
        load_component_engines(ComponentEngines.open(out))


def test_what_cannot_be_made_is_refused_before_work(base: BasePipeline, tmp_path: Path) -> None:
    out = tmp_path / "parts"
    with pytest.raises(InputError, match="onnxruntime takes batches and pictures of any size"):
        build_component_engines(base, out, backend="onnxruntime", profile=ShapeProfile())
    with pytest.raises(InputError, match="knows no optimization 'magic'"):
        build_component_engines(base, out, backend="onnxruntime", execution=Execution(optimization="magic"))
    out.mkdir()
    with pytest.raises(InputError, match="exists"):
        build_component_engines(base, out, backend="onnxruntime")
    assert list(tmp_path.iterdir()) == [out]


def test_a_half_text_encoder_computes_in_half(base: BasePipeline, tmp_path: Path) -> None:
    """What TensorRT's plans are built from; ONNX Runtime computes it here."""
    component = load_component(base, "text_encoder", torch.float16)
    model = component_model(component, "text_encoder")
    kinds = {value.dtype for value in (*model.graph.initializers.values(), *model.graph.outputs)}
    assert onnx_ir.DataType.FLOAT16 in kinds
    assert onnx_ir.DataType.FLOAT not in kinds
    ids = torch.randint(0, 270, (3, 24))
    states = answers(model, tmp_path / "text.onnx", {"input_ids": ids.numpy()})[0]
    with torch.no_grad():
        expected = load_component(base, "text_encoder").network(ids)[0].numpy()
    assert states.dtype == np.float16
    np.testing.assert_allclose(states.astype(np.float32), expected, atol=2e-2)


def test_a_half_t5_keeps_the_products_that_overflow(tmp_path: Path) -> None:
    """As transformers does; its own network in float16 is the reference."""
    component = load_component(t5_base(tmp_path / "pipeline"), "text_encoder_3", torch.float16)
    model = component_model(component, "text_encoder_3")
    kept = {str(value.name) for value in model.graph.initializers.values() if value.dtype == onnx_ir.DataType.FLOAT}
    assert {name for name in kept if name.endswith(".weight")} == {
        f"encoder.block.{layer}.layer.1.DenseReluDense.wo.weight" for layer in (0, 1)
    }
    ids = torch.randint(0, 270, (2, 9))
    states = answers(model, tmp_path / "t5.onnx", {"input_ids": ids.numpy()})[0]
    with torch.no_grad():
        expected = component.network(ids).float().numpy()
    np.testing.assert_allclose(states.astype(np.float32), expected, atol=1e-2)


@pytest.mark.parametrize(("name", "upcast"), [("shapes-sdxl", True), ("shapes-sd2", False), ("shapes-sd3", False)])
def test_an_autoencoder_stays_float32_where_its_pipeline_would_upcast_it(name: str, upcast: bool) -> None:
    """All three configurations say ``force_upcast``, as diffusers writes it; SDXL's pipeline alone follows it."""
    decoder = load_component(resolve_base(str(PIPELINES / name)), "vae_decoder", torch.float16)
    assert decoder.example.dtype == (torch.float32 if upcast else torch.float16)


@pytest.mark.trt
@pytest.mark.slow
def test_tensorrt_rtx_builds_every_network_without_a_gpu(tmp_path: Path) -> None:
    """Text encoders of both kinds and both halves of the autoencoder, with a profile of their own."""
    pytest.importorskip("tensorrt_rtx")
    profile = ShapeProfile(1, 2, 4, height=Span(8, 8, 16), width=Span(8, 8, 8))
    made = build_component_engines(
        t5_base(tmp_path / "pipeline"), tmp_path / "plans", backend="tensorrt_rtx", profile=profile
    )
    assert set(made.networks) == {"text_encoder", "text_encoder_2", "text_encoder_3", "vae_decoder", "vae_encoder"}
    assert all(network.files == (f"{name}.plan",) for name, network in made.networks.items())
    assert made.profile == profile
    assert made.environment["device"] == "CUDA GPU"
    assert made.networks["text_encoder_3"].outputs[0].dtype == "float16"
    with pytest.raises(MissingEnvironmentError, match="needs device CUDA GPU"):
        load_component_engines(made)
    floating = build_component_engines(
        small_base(tmp_path / "small"), tmp_path / "f32", backend="tensorrt_rtx", execution=Execution(precision="f32")
    )
    assert floating.networks["text_encoder"].outputs[0].dtype == "float32"
    assert floating.profile is not None
    assert floating.profile.sizes("optimum") == {"batch": 1, "height": 8, "width": 8}


def test_another_kind_of_artifact_is_refused(tmp_path: Path, made: ComponentEngines) -> None:
    write_artifact(tmp_path / "x", kind="Engine", base=made.manifest.base, recipe={}, fill=lambda _folder: {})
    assert read_manifest(tmp_path / "x").kind == "Engine"
    with pytest.raises(InputError, match="is of kind Engine, expected ComponentEngines"):
        ComponentEngines.open(tmp_path / "x")


def answers(model: onnx_ir.Model, file: Path, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Runs a graph in ONNX Runtime."""
    write_model(model, file)
    return onnxruntime.InferenceSession(str(file)).run(None, inputs)


def _no_sizes(content: dict[str, dict[str, object]]) -> None:
    content["sizes"].clear()


def _a_file_of_two(content: dict[str, dict[str, dict[str, object]]]) -> None:
    content["networks"]["vae_encoder"]["files"] = content["networks"]["vae_decoder"]["files"]


def _filled(made: ComponentEngines, content: dict[str, object]) -> object:
    def fill(folder: Path) -> dict[str, object]:
        for name in made.manifest.files:
            shutil.copyfile(made.folder / name, folder / name)
        return content

    return fill
