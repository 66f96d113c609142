from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from s2p_deploy.calib import calibrate, fake_quant_denoiser
from s2p_deploy.context import Context
from s2p_deploy.errors import InputError
from s2p_deploy.families import BasePipeline, resolve_base
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import CalibratedModel, PromptSet

SMALL: dict[str, Any] = {
    "sampling": {"steps": 2},
    "dataset": {"prompts": 1, "samples_per_prompt": 1, "width": 1},
    "scales": {"latents": 1},
}
STREAMED: dict[str, Any] = SMALL | {"scales": {"latents": 1, "activations": "default"}}
W4 = {"weights": "int4"}
RULE = {"match": "*.attn1.*", "weights": "int4"}
EVERY_CALL = {"dataset": SMALL["dataset"] | {"samples_per_prompt": 9}}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def shapes() -> BasePipeline:
    return resolve_base("shapes")


def in_memory(base: BasePipeline, out: Path, prompts: PromptSet, overrides: dict[str, Any]) -> CalibratedModel:
    return calibrate(base, Recipe.load("ptq", SMALL | overrides), prompts, out)


def streamed(base: BasePipeline, out: Path, overrides: dict[str, Any] | None = None) -> CalibratedModel:
    return calibrate(base, Recipe.load("ptq", STREAMED | (overrides or {})), None, out)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(W4, id="w4"),
        pytest.param(
            {
                "transforms": {"split_shortcut": "all", "shift": "channel"},
                "rules": [{"match": "*.attn1.*", "weights": "int4"}],
            },
            id="w8",
        ),
    ],
)
def test_weights_and_their_scales_are_those_of_a_calibration_in_memory(
    shapes: BasePipeline, prompts: PromptSet, tmp_path: Path, overrides: dict[str, Any]
) -> None:
    expected = in_memory(shapes, tmp_path / "memory", prompts, overrides | EVERY_CALL)
    given = Recipe.load("ptq", SMALL | overrides | {"scales": {"latents": 1, "activations": "given"}})
    found = calibrate(shapes, given, None, tmp_path / "streamed", initial=expected)
    assert expected.transforms.split  # some tensors are slices
    assert expected.transforms.shifted  # some are made
    assert expected.transforms.shifted_norms
    for one, other in ((found.weights(), expected.weights()), (found.weight_scales(), expected.weight_scales())):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)
    table, reference = found.time_table(), expected.time_table()
    np.testing.assert_array_equal(table.projections, reference.projections)
    assert table.slices == reference.slices
    assert (found.plan, found.transforms, found.tokens) == (expected.plan, expected.transforms, expected.tokens)
    np.testing.assert_array_equal(found.scales.scales, expected.scales.scales)
    config = "denoiser_config.json"
    assert (found.folder / config).read_text() == (expected.folder / config).read_text()
    assert found.manifest.content["average_bits"] == expected.manifest.content["average_bits"]
    assert found.manifest.content.keys() == expected.manifest.content.keys() - {"dataset", "training"}


def test_placeholders_shift_nothing(shapes: BasePipeline, tmp_path: Path) -> None:
    weights = streamed(shapes, tmp_path / "streamed").weights()
    shifts = {name: value for name, value in weights.items() if name.endswith(".shift")}
    assert shifts
    assert not any(value.any() for value in shifts.values())
    source = load_file(shapes.denoiser_folder / WEIGHTS)
    path = "mid_block.resnets.0.conv1"
    assert np.array_equal(weights[f"network.{path}.layer.bias"], source[f"{path}.bias"].float())


def test_floating_point_is_streamed_too(shapes: BasePipeline, tmp_path: Path) -> None:
    model = calibrate(shapes, Recipe.load("fp"), None, tmp_path / "model")
    source = load_file(shapes.denoiser_folder / WEIGHTS)
    weights = model.weights()
    assert weights.keys() < {f"network.{name}" for name in source}  # the time path is gone
    assert all(np.array_equal(value, source[name.removeprefix("network.")].float()) for name, value in weights.items())
    assert model.weight_scales() == {}
    assert model.scales.scales.shape == (1000, 0)
    assert len(model.timesteps.calibrated) == 50


@torch.no_grad()
def test_the_reference_runs_on_half_precision_weights(base: BasePipeline, tmp_path: Path) -> None:
    as_stored(base, tmp_path / "pipeline", torch.float16)
    model = streamed(resolve_base(str(tmp_path / "pipeline")), tmp_path / "model", W4)
    output = fake_quant_denoiser(model)(torch.randn(2, 4, 8, 8), torch.tensor([3, 980]), torch.randn(2, 5, 128))
    assert output.dtype == torch.float32
    assert bool(output.isfinite().all())


def as_stored(base: BasePipeline, folder: Path, dtype: torch.dtype, shards: int = 1) -> dict[str, torch.Tensor]:
    """Writes the pipeline again with its denoiser's weights in another dtype, in some shards; gives those weights."""
    shutil.copytree(base.folder, folder)
    state = {name: tensor.to(dtype) for name, tensor in load_file(folder / "unet" / WEIGHTS).items()}
    if shards == 1:
        save_file(state, folder / "unet" / WEIGHTS)
        return state
    (folder / "unet" / WEIGHTS).unlink()
    parts = [WEIGHTS.replace(".", f"-{part + 1:05}-of-{shards:05}.") for part in range(shards)]
    files = {name: parts[number % shards] for number, name in enumerate(state)}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in state.items() if files[name] == file}, folder / "unet" / file)
    (folder / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": files}))
    return state


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16")])
def test_weights_keep_the_dtype_of_their_source(
    base: BasePipeline, tmp_path: Path, dtype: torch.dtype, name: str
) -> None:
    state = as_stored(base, tmp_path / "pipeline", dtype)
    model = streamed(resolve_base(str(tmp_path / "pipeline")), tmp_path / "model")
    with safe_open(model.folder / "weights.safetensors", "pt") as opened:
        stored = {key: opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118 - no dictionary
    spec = model.transforms
    made = {f"network.{path}.{part}" for path in spec.shifted for part in ("shift", "layer.bias")}
    made |= {f"network.{norm}.{part}" for norm in spec.shifted_norms for part in ("shift", "bias")}
    made |= {f"network.{reader}.bias" for readers in spec.shifted_norms.values() for reader in readers}
    assert {stored[key] for key in stored.keys() - made} == {name}
    assert {stored[key] for key in made} == {"F32"}
    weights = model.weights()
    assert {value.dtype.name for value in weights.values()} == {"float32"}
    assert np.array_equal(model.tensor("network.conv_in.weight"), state["conv_in.weight"].float())
    assert np.array_equal(weights["network.conv_in.weight"], state["conv_in.weight"].float())


def test_shards_give_the_same_model(base: BasePipeline, tmp_path: Path) -> None:
    as_stored(base, tmp_path / "whole", torch.float16)
    as_stored(base, tmp_path / "parts", torch.float16, shards=3)
    models = [
        streamed(resolve_base(str(tmp_path / name)), tmp_path / f"{name}-model", W4) for name in ("whole", "parts")
    ]
    files = [model.manifest.files for model in models]
    assert files[0] == files[1]


def test_a_second_start_returns_the_finished_model(base: BasePipeline, prompts: PromptSet, tmp_path: Path) -> None:
    def refuse(stage: str, done: int, total: int) -> None:
        pytest.fail(f"{stage} ran again")

    recipe = Recipe.load("ptq-stream")
    first = calibrate(base, recipe, None, tmp_path / "model")
    again = calibrate(
        base, recipe, prompts, tmp_path / "model", context=Context(progress=refuse)
    )  # which prompts does not matter
    assert again.manifest.digest == first.manifest.digest


@pytest.mark.parametrize("stage", ["weight scales", "write weights"])
def test_what_is_interrupted_leaves_nothing_behind(base: BasePipeline, tmp_path: Path, stage: str) -> None:
    def interrupt(running: str, done: int, total: int) -> None:
        if running == stage and done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(
            base, Recipe.load("ptq-stream"), None, tmp_path / "out" / "model", context=Context(progress=interrupt)
        )
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("broken", ["missing", "shape", "not finite", "truncated"])
def test_broken_weights_are_one_line_and_leave_nothing_behind(base: BasePipeline, tmp_path: Path, broken: str) -> None:
    state = as_stored(base, tmp_path / "pipeline", torch.float32)
    file, name = tmp_path / "pipeline" / "unet" / WEIGHTS, "conv_out.weight"
    changed = {
        "missing": {key: tensor for key, tensor in state.items() if key != name},
        "shape": state | {name: state[name][:, :-1].contiguous()},
        "not finite": state | {name: torch.full_like(state[name], torch.inf)},
        "truncated": state,
    }[broken]
    save_file(changed, file)
    if broken == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError) as raised:
        streamed(resolve_base(str(tmp_path / "pipeline")), tmp_path / "out" / "model")
    assert "\n" not in str(raised.value)
    assert ("damaged" if broken == "truncated" else name) in str(raised.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_scales_of_a_sibling(base: BasePipeline, prompts: PromptSet, tmp_path: Path) -> None:
    given = in_memory(base, tmp_path / "given", prompts, W4 | EVERY_CALL)
    as_stored(base, tmp_path / "pipeline", torch.bfloat16)
    sibling, recipe = resolve_base(str(tmp_path / "pipeline")), {"weights": "int4", "scales": {"activations": "given"}}
    model = calibrate(sibling, Recipe.load("ptq", SMALL | recipe), None, tmp_path / "model", initial=given)
    np.testing.assert_array_equal(model.scales.scales, given.scales.scales)
    assert model.timesteps.calibrated == given.timesteps.calibrated
    assert model.manifest.content["request"]["initial model"] == given.manifest.digest
    with pytest.raises(InputError, match=r"scales\.activations: given: name the model that has them with --from"):
        calibrate(sibling, Recipe.load("ptq", SMALL | recipe), None, tmp_path / "other")
    with pytest.raises(InputError, match=r"scales\.activations: default: set it to given to take those of --from"):
        calibrate(sibling, Recipe.load("ptq-stream"), None, tmp_path / "other", initial=given)
    plain = Recipe.load("ptq", SMALL | recipe | {"transforms": {"shift": "none"}})
    with pytest.raises(
        InputError, match=r"given was calibrated with transforms\.shift: channel, .*: set it to channel"
    ):
        calibrate(sibling, plain, None, tmp_path / "other", initial=given)


@pytest.mark.parametrize(
    ("key", "overrides"),
    [
        ("training", {"training": {"iterations": 5}}),
        ("mixed", {"mixed": {"sensitivity": "fisher"}}),
        ("scales.calibrator", {"scales": {"calibrator": "modelopt"}}),
    ],
)
def test_what_needs_activations_is_refused_by_name(
    base: BasePipeline, tmp_path: Path, key: str, overrides: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=rf"recipe ptq-stream asks for {key}, which needs stored latents"):
        calibrate(base, Recipe.load("ptq-stream", overrides), None, tmp_path / "out" / "model")
    assert list((tmp_path / "out").iterdir()) == []
