from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from s2p_deploy.calib import calibrate
from s2p_deploy.calib.plan import Transforms, planned_layers
from s2p_deploy.calib.shifts import input_ranges, middle
from s2p_deploy.context import Context, silent
from s2p_deploy.errors import InputError
from s2p_deploy.families import ShiftedLayer, apply_transforms, module_of_type
from s2p_deploy.records import TransformSpec

if TYPE_CHECKING:
    from pathlib import Path

    from s2p_deploy.calib.trajectories import FloatPipeline
    from s2p_deploy.families import BasePipeline, IndexedDenoiser
    from s2p_deploy.recipe import Recipe
    from s2p_deploy.records import LatentDataset, PromptSet

CONV = "mid_block.resnets.0.conv1"
BLOCK = "mid_block.attentions.0.transformer_blocks.0"
GEGLU = f"{BLOCK}.ff.net.2"


@pytest.fixture
def shifting(recipe: Recipe) -> Recipe:
    data = {"transforms": {"split_shortcut": "shortcut", "shift": "channel"}, "scales": {"activations": "max"}}
    return type(recipe).model_validate(recipe.model_dump() | data)


def test_ranges_are_over_all_samples_timesteps_and_branches(
    float_denoiser: IndexedDenoiser, dataset: LatentDataset
) -> None:
    apply_transforms(float_denoiser, TransformSpec(shifted=(CONV,)))
    seen: list[torch.Tensor] = []
    float_denoiser.network.get_submodule(CONV).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    count = len(dataset.timestep_indices)
    ranges = input_ranges(float_denoiser, (CONV, GEGLU), dataset, count, silent)
    everything = torch.cat(seen)
    assert len(everything) == 2 * count
    low, high = ranges[CONV]
    assert torch.equal(low, everything.amin((0, 2, 3)))
    assert torch.equal(high, everything.amax((0, 2, 3)))
    assert ranges[GEGLU][0].shape == (module_width(float_denoiser, GEGLU),)


def module_width(denoiser: IndexedDenoiser, path: str) -> int:
    return int(denoiser.network.get_submodule(path).in_features)


def test_so_many_samples_of_a_timestep_decide(float_denoiser: IndexedDenoiser, dataset: LatentDataset) -> None:
    seen: list[int] = []
    float_denoiser.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    input_ranges(float_denoiser, (CONV,), dataset, 1, silent)
    assert sum(seen) == 2 * len(np.unique(dataset.timestep_indices))
    seen.clear()
    whole = input_ranges(float_denoiser, (CONV,), dataset, 4, silent)
    seen.clear()
    parts = input_ranges(float_denoiser, (CONV,), dataset, 4, silent, samples_per_call=3)
    assert max(seen) == 3
    for one, other in zip(parts[CONV], whole[CONV], strict=True):
        torch.testing.assert_close(one, other)


def test_the_middle_is_exact_in_half_precision() -> None:
    found = middle(torch.tensor([-0.28, -1.0]), torch.tensor([10.0, 1.0]))
    assert found[1] == 0
    assert abs(float(found[0]) - 4.86) < 4e-3
    assert torch.equal(found, found.half().float())


def test_what_is_not_finite_is_named(float_denoiser: IndexedDenoiser, dataset: LatentDataset) -> None:
    with torch.no_grad():
        float_denoiser.network.get_submodule("mid_block.resnets.0.norm1").bias.fill_(torch.nan)
    with pytest.raises(InputError, match=f"the activation {CONV} is not finite, though every weight is"):
        input_ranges(float_denoiser, (CONV,), dataset, 1, silent)


def test_layers_that_read_a_tensor_of_their_own_are_shifted(source: FloatPipeline, shifting: Recipe) -> None:
    given = Transforms(TransformSpec(split={"up_blocks.1.resnets.0.conv_shortcut": 16}))
    config = source.denoiser.config
    transforms, layers, plan = planned_layers(shifting, given, config, source.time_source, None)
    shifted = transforms.spec.shifted
    assert {CONV, GEGLU, "up_blocks.1.resnets.0.conv_shortcut.head"} <= set(shifted)
    norms = transforms.spec.shifted_norms
    assert norms[f"{BLOCK}.norm1"] == tuple(f"{BLOCK}.attn1.to_{name}" for name in "qkv")
    assert not {reader for readers in norms.values() for reader in readers} & set(shifted)
    assert "conv_in" not in shifted, "its activations are not quantized"
    names = {layer.name for layer in layers}
    assert {f"{name}.layer" for name in shifted} <= names
    together = [quantizer.layers for quantizer in plan.activation_quantizers if len(quantizer.layers) == 3]
    assert norms[f"{BLOCK}.norm1"] in together, "queries, keys and values still share a quantizer"
    assert {layer.name for layer in plan.layers} == names
    again = planned_layers(shifting, transforms, config, source.time_source, plan)
    assert again[0] == transforms


def test_a_rule_finds_a_shifted_layer_by_its_own_name(source: FloatPipeline, shifting: Recipe) -> None:
    data = shifting.model_dump() | {"rules": [{"match": CONV, "weights": "int4"}]}
    ruled = type(shifting).model_validate(data)
    _, _, plan = planned_layers(ruled, Transforms(TransformSpec()), source.denoiser.config, source.time_source, None)
    assert next(layer.weights for layer in plan.layers if layer.name == f"{CONV}.layer") == "int4"


def test_shifts_are_found_once_and_stored_with_the_model(
    base: BasePipeline, shifting: Recipe, prompts: PromptSet, tmp_path: Path
) -> None:
    stages: list[str] = []

    def stop(stage: str, _done: int, _total: int) -> None:
        stages.append(stage)
        if stage == "starting error":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(base, shifting, prompts, tmp_path / "model", context=Context(progress=stop))
    assert "ranges" in stages
    stages.clear()
    watch = Context(progress=lambda stage, _done, _total: stages.append(stage))
    model = calibrate(base, shifting, prompts, tmp_path / "model", context=watch)
    assert "ranges" not in stages
    whole = calibrate(base, shifting, prompts, tmp_path / "whole")
    assert whole.manifest.files == model.manifest.files
    shift = model.weights()[f"network.{CONV}.shift"]
    assert np.abs(shift).max() > 0
    assert CONV in model.transforms.shifted
    assert np.abs(model.weights()[f"network.{BLOCK}.norm1.shift"]).max() > 0


def test_a_shift_makes_the_peak_of_a_silu_smaller(float_denoiser: IndexedDenoiser, dataset: LatentDataset) -> None:
    apply_transforms(float_denoiser, TransformSpec(shifted=(CONV,)))
    module = module_of_type(float_denoiser, CONV, ShiftedLayer)
    before = input_ranges(float_denoiser, (f"{CONV}.layer",), dataset, 4, silent)[f"{CONV}.layer"]
    module.set_shift(middle(*input_ranges(float_denoiser, (CONV,), dataset, 4, silent)[CONV]))
    after = input_ranges(float_denoiser, (f"{CONV}.layer",), dataset, 4, silent)[f"{CONV}.layer"]
    assert float(torch.cat(after).abs().max()) < 0.7 * float(torch.cat(before).abs().max())


def test_modelopt_does_not_know_shifts(
    base: BasePipeline, shifting: Recipe, prompts: PromptSet, tmp_path: Path
) -> None:
    scales = shifting.scales.model_copy(update={"calibrator": "modelopt"})
    recipe = shifting.model_copy(update={"scales": scales})
    with pytest.raises(InputError, match=r"has transforms\.shift, which modelopt does not know: set it to none"):
        calibrate(base, recipe, prompts, tmp_path / "model")
