from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from s2p_deploy.errors import InputError
from s2p_deploy.families import TimePath, denoiser_of, load_pipeline, load_time_path, resolve_base, time_table_of
from tests.small_pipelines import sibling, tiny_base

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import SD3Transformer2DModel, UNet2DConditionModel


@torch.no_grad()
def test_table_columns_by_hand(tiny_unet: UNet2DConditionModel) -> None:
    table = time_table_of(tiny_unet, 20)
    assert table.projections.shape == (20, sum(stop - start for start, stop in table.slices.values()))
    resnet = tiny_unet.get_submodule("mid_block.resnets.0")
    start, stop = table.slices["mid_block.resnets.0"]
    embedding = tiny_unet.time_embedding(tiny_unet.time_proj(torch.tensor([7])))
    expected = resnet.time_emb_proj(torch.nn.functional.silu(embedding))[0].numpy()
    assert table.projections[7, start:stop] == pytest.approx(expected, abs=1e-6)
    ends = [0, *(stop for _, stop in table.slices.values())]
    assert [start for start, _ in table.slices.values()] == ends[:-1], "slices stand side by side"


def test_features_that_depend_on_the_prompt_have_no_table(
    sdxl_unet: UNet2DConditionModel, mmdit: SD3Transformer2DModel
) -> None:
    assert time_table_of(sdxl_unet, 10) is None
    assert time_table_of(mmdit, 10) is None


@pytest.mark.parametrize("name", ["shapes", "sdxl", "sd3"])
@torch.no_grad()
def test_the_path_of_a_pipeline_is_that_of_its_denoiser(name: str) -> None:
    base = resolve_base(name) if name == "shapes" else sibling(name)
    network = denoiser_of(load_pipeline(base))
    loaded, own = load_time_path(base), TimePath(network)
    timesteps, added = torch.tensor([3.25, 999.0]), torch.rand(2, base.family.added_width(base.denoiser_config()))
    assert torch.equal(loaded(timesteps, added), own(timesteps, added))
    assert loaded.slices == own.slices


def test_a_pipeline_that_lacks_weights_of_its_time_path(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "pipeline")
    (base.denoiser_folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"unet/diffusion_pytorch_model\.safetensors is missing"):
        load_time_path(base)
