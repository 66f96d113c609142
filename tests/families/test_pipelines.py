from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path

import pytest
import torch

from s2p_deploy.errors import InputError
from s2p_deploy.families import denoiser_of, load_pipeline, resolve_base, with_denoiser
from s2p_deploy.families.pipelines import check_draws_from_text
from tests.small_pipelines import sibling

BUNDLED = Path(str(resources.files("s2p_deploy") / "shapes" / "pipeline"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The bundled pipeline without its large files."""
    copy = tmp_path / "pipeline"
    shutil.copytree(BUNDLED, copy, ignore=shutil.ignore_patterns("*.safetensors", "prompts"))
    return copy


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_the_bundled_pipeline_is_found_by_name_and_by_path() -> None:
    by_name, by_path = resolve_base("shapes"), resolve_base(str(BUNDLED))
    assert by_name.base.digest == by_path.base.digest
    assert by_name.base.source == "shapes"
    assert by_name.default_guidance == json.loads((BUNDLED / "sampling.json").read_text())["guidance_scale"]


def test_without_hints_guidance_is_stable_diffusions(folder: Path) -> None:
    (folder / "sampling.json").unlink()
    assert resolve_base(str(folder)).default_guidance == 7.5


@pytest.mark.parametrize(
    "name", ["model_index.json", "sampling.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"]
)
def test_the_digest_follows_every_file_that_matters(folder: Path, name: str) -> None:
    before = resolve_base(str(folder)).base.digest
    (folder / name).write_text((folder / name).read_text() + " ")
    assert resolve_base(str(folder)).base.digest != before


def test_the_digest_does_not_follow_other_files(folder: Path) -> None:
    before = resolve_base(str(folder)).base.digest
    (folder / "README.md").write_text("hello")
    assert resolve_base(str(folder)).base.digest == before


@pytest.mark.parametrize("source", ["no_such_folder", "./no/such", "/no/such/folder", "a/b/c"])
def test_a_missing_pipeline(source: str) -> None:
    with pytest.raises(InputError, match="does not exist"):
        resolve_base(source)


def test_a_hub_id_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="neither a local folder nor reachable"):
        resolve_base("nobody/nothing")


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no model_index\.json"):
        resolve_base(str(tmp_path))


def test_another_kind_of_pipeline(folder: Path) -> None:
    edit(folder / "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(
        InputError, match="FluxPipeline: supported pipelines are LatentConsistencyModelPipeline, StableDiffusion3"
    ):
        resolve_base(str(folder))


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_damaged_configuration(folder: Path, text: str) -> None:
    (folder / "unet" / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"unet/config\.json"):
        resolve_base(str(folder))


@pytest.mark.parametrize("key", ["custom_pipeline", "auto_map", "_attn_implementation_internal"])
@pytest.mark.parametrize("name", ["model_index.json", "text_encoder/config.json"])
def test_code_from_a_configuration_is_refused(folder: Path, key: str, name: str) -> None:
    edit(folder / name, **{key: "evil"})
    with pytest.raises(InputError, match=f"asks for code to be run .{key}"):
        resolve_base(str(folder))


def test_a_pipeline_without_weights_is_one_clear_line(folder: Path) -> None:
    with pytest.raises(InputError, match=r"text_encoder/model\.safetensors is missing") as caught:
        load_pipeline(resolve_base(str(folder)))
    assert "\n" not in str(caught.value)


def test_the_bundled_pipeline_loads_in_float32() -> None:
    pipe = load_pipeline(resolve_base("shapes"))
    assert pipe.unet.dtype == torch.float32
    assert type(pipe.unet).__name__ == "UNet2DConditionModel"


@pytest.mark.parametrize(("name", "component"), [("sd2", "unet"), ("sdxl", "unet"), ("sd3", "transformer")])
def test_another_denoiser_in_a_pipeline_of_the_same_class(name: str, component: str) -> None:
    pipe = load_pipeline(sibling(name))
    own = denoiser_of(pipe)
    assert own is getattr(pipe, component)
    other = type(own).from_config(own.config)
    made = with_denoiser(pipe, other)
    assert type(made) is type(pipe)
    assert denoiser_of(made) is other
    assert denoiser_of(pipe) is own
    assert made.vae is pipe.vae
    assert made.text_encoder is pipe.text_encoder
    assert made.scheduler is not pipe.scheduler
    assert made.scheduler.config == pipe.scheduler.config
    for key in ("force_zeros_for_empty_prompt", "requires_safety_checker"):
        assert made.config.get(key) == pipe.config.get(key)


@pytest.mark.parametrize(("version", "size", "expected"), [("0.6.0", 32, 64), ("0.8.1", 8, 64), ("0.9.0", 32, 32)])
def test_the_size_that_diffusers_makes_of_an_old_configuration(
    folder: Path, version: str, size: int, expected: int
) -> None:
    edit(folder / "unet" / "config.json", _diffusers_version=version, sample_size=size)
    assert resolve_base(str(folder)).denoiser_config()["sample_size"] == expected


@pytest.mark.parametrize("absent", ["mid_block_type", "only_cross_attention", "out_channels", "dropout"])
def test_what_a_configuration_leaves_out_is_diffusers_default(folder: Path, absent: str) -> None:
    whole = resolve_base(str(folder)).denoiser_config()
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != absent}))
    assert resolve_base(str(folder)).denoiser_config() == whole


@pytest.mark.parametrize(
    "changes",
    [
        {"sample_size": None},
        {"sample_size": 8.0},
        {"sample_size": [8]},
        {"cross_attention_dim": None},
        {"cross_attention_dim": [128, 64]},
        {"block_out_channels": None},
        {"layers_per_block": None},
        {"in_channels": "4"},
        {"_diffusers_version": None},
        {"_diffusers_version": "abc"},
    ],
)
def test_a_configuration_that_makes_no_network_is_one_clear_line(folder: Path, changes: dict[str, object]) -> None:
    edit(folder / "unet" / "config.json", **changes)
    with pytest.raises(InputError) as caught:
        resolve_base(str(folder))
    assert "\n" not in str(caught.value)
    assert "config.json" in str(caught.value) or next(iter(changes)) in str(caught.value)


@pytest.mark.parametrize("form", [[8, 16], [16, 8]])
def test_height_and_width_of_the_latents(folder: Path, form: list[int]) -> None:
    edit(folder / "unet" / "config.json", sample_size=form)
    assert resolve_base(str(folder)).denoiser_config()["sample_size"] == form


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("sd2", "text_encoder"),
        ("sd2", "vae"),
        ("sdxl", "text_encoder_2"),
        ("sdxl", "tokenizer"),
        ("sd3", "text_encoder_2"),
        ("sd3", "scheduler"),
    ],
)
def test_a_pipeline_without_a_component_that_it_needs(tmp_path: Path, name: str, gone: str) -> None:
    copy = Path(shutil.copytree(sibling(name).folder, tmp_path / name))
    edit(copy / "model_index.json", **{gone: [None, None]})
    with pytest.raises(InputError, match=f"has no {gone}, which its StableDiffusion"):
        resolve_base(str(copy))


@pytest.mark.parametrize(
    ("name", "component", "changes", "message"),
    [
        ("sdxl", "unet", {"projection_class_embeddings_input_dim": 7}, "numbers of pooled text and sizes"),
        ("sdxl", "text_encoder", {"hidden_size": 64}, "numbers per token"),
        ("sd2", "text_encoder", {"hidden_size": 64}, "numbers per token"),
        ("sd2", "vae", {"latent_channels": 8}, "channels of latents"),
        ("sd3", "text_encoder_2", {"projection_dim": 8}, "numbers of pooled text"),
    ],
)
def test_components_of_two_models(
    tmp_path: Path, name: str, component: str, changes: dict[str, object], message: str
) -> None:
    copy = Path(shutil.copytree(sibling(name).folder, tmp_path / name))
    edit(copy / component / "config.json", **changes)
    with pytest.raises(InputError, match=message):
        resolve_base(str(copy))


def test_a_latent_consistency_pipeline_is_drawn_by_the_stock_one_that_takes_its_network() -> None:
    base = sibling("lcm")
    assert json.loads((base.folder / "model_index.json").read_text())["_class_name"] == "LatentConsistencyModelPipeline"
    assert (base.pipeline_class, base.task, base.default_strength) == ("StableDiffusionPipeline", "text-to-image", 1.0)
    check_draws_from_text(base.pipeline_class)


@pytest.mark.parametrize(("name", "task", "strength"), [("inpaint", "inpainting", 1.0), ("refiner", "refining", 0.3)])
def test_what_changes_pictures_is_told_from_its_class(name: str, task: str, strength: float) -> None:
    base = sibling(name)
    assert (base.task, base.default_strength) == (task, strength)
    with pytest.raises(InputError, match=f"a {base.pipeline_class} does not draw from text alone: give it"):
        check_draws_from_text(base.pipeline_class)


@pytest.mark.parametrize(
    ("name", "written", "words"),
    [
        ("inpaint", "StableDiffusionPipeline", "reads a mask and a picture too.*: name the Inpaint class"),
        ("sd2", "StableDiffusionInpaintPipeline", "reads latents alone.*: name the text-to-image class"),
    ],
)
def test_a_class_that_feeds_another_network_is_refused(name: str, written: str, words: str, tmp_path: Path) -> None:
    shutil.copytree(sibling(name).folder, tmp_path / "pipeline")
    edit(tmp_path / "pipeline" / "model_index.json", _class_name=written)
    with pytest.raises(InputError, match=words):
        resolve_base(str(tmp_path / "pipeline"))


def test_a_refiner_that_is_told_no_score_is_refused(tmp_path: Path) -> None:
    shutil.copytree(sibling("refiner").folder, tmp_path / "pipeline")
    edit(tmp_path / "pipeline" / "model_index.json", requires_aesthetics_score=False)
    with pytest.raises(InputError, match="numbers of pooled text and sizes"):
        resolve_base(str(tmp_path / "pipeline"))
