"""Variants of folders, hubs, and what is made of them; single files have their own tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from s2p_deploy.errors import InputError
from s2p_deploy.families import BasePipeline, base_of, load_pipeline, resolve_base
from s2p_deploy.records import BaseOptions, Manifest
from tests.single_files import write_single_file
from tests.small_pipelines import sibling

BUNDLED = resolve_base("shapes").folder
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(
        shutil.copytree(BUNDLED, tmp_path / "pipeline", ignore=shutil.ignore_patterns("prompts", "classifier*"))
    )


def as_variant(folder: Path, component: str, variant: str, *, keep: bool = False) -> None:
    """Renames a network's file, or adds one of twice its numbers beside it."""
    plain = folder / component / f"{STEMS[component]}.safetensors"
    named = plain.with_name(f"{STEMS[component]}.{variant}.safetensors")
    if keep:
        save_file({name: 2 * t for name, t in load_file(plain).items()}, named, metadata={"format": "pt"})
    else:
        plain.rename(named)


def as_shards(folder: Path, component: str, variant: str, form: str) -> None:
    """Divides a network's file into two, named as ``form`` says."""
    plain = folder / component / f"{STEMS[component]}.safetensors"
    tensors = load_file(plain)
    plain.unlink()
    files = [form.format(stem=STEMS[component], variant=variant, number=f"0000{i}-of-00002") for i in (1, 2)]
    weight_map = {name: files[i % 2] for i, name in enumerate(tensors)}
    for file in files:
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(part, folder / component / file, metadata={"format": "pt"})
    index = folder / component / f"{STEMS[component]}.safetensors.index.{variant}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def weights(base: BasePipeline) -> dict[str, torch.Tensor]:
    pipe = load_pipeline(base)
    parts = {name: pipe.components[name].state_dict() for name in STEMS}
    return {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.items()}


def assert_doubled(base: BasePipeline, *components: str) -> None:
    own = weights(resolve_base("shapes"))
    for name, tensor in weights(base).items():
        factor = 2 if name.split(".")[0] in components else 1
        assert torch.equal(tensor, factor * own[name]), name


def test_a_folder_without_variants_is_read_where_it_is(folder: Path) -> None:
    as_variant(folder, "unet", "non_ema", keep=True)
    base = resolve_base(str(folder))
    assert base.folder == folder
    assert base.base.options == BaseOptions()


def test_the_only_variant_is_taken(folder: Path) -> None:
    for component in STEMS:
        as_variant(folder, component, "fp16")
    base = resolve_base(str(folder))
    assert base.base.source == str(folder)
    assert_doubled(base)
    assert base.base.digest == resolve_base(str(folder)).base.digest


@pytest.mark.parametrize("form", ["{stem}.{variant}-{number}.safetensors", "{stem}-{number}.{variant}.safetensors"])
def test_shards_of_a_variant(form: str, folder: Path) -> None:
    as_shards(folder, "unet", "fp16", form)
    as_shards(folder, "text_encoder", "fp16", form)
    assert_doubled(resolve_base(str(folder)))


def test_a_variant_is_taken_where_it_is_asked_for_and_there(folder: Path) -> None:
    as_variant(folder, "unet", "fp16", keep=True)
    base = resolve_base(str(folder), BaseOptions(variant="fp16"))
    assert_doubled(base, "unet")
    assert base_of(Manifest("Thing", base.base, {}, {})).base == base.base
    moved = folder.rename(folder.with_name("moved"))
    assert base_of(Manifest("Thing", base.base, {}, {}), str(moved)).base.digest == base.base.digest
    assert base_of(Manifest("Thing", base.base, {}, {}), str(base.folder)).base.digest == base.base.digest


def test_several_variants_have_to_be_chosen_from(folder: Path) -> None:
    as_variant(folder, "unet", "fp16", keep=True)
    as_variant(folder, "unet", "bf16")
    with pytest.raises(InputError, match=r"unet has its weights as bf16 and fp16 alone: give one to --variant"):
        resolve_base(str(folder))
    assert_doubled(resolve_base(str(folder), BaseOptions(variant="fp16")), "unet")


def test_a_variant_that_is_nowhere(folder: Path) -> None:
    with pytest.raises(InputError, match=r"has no files of the variant 'fp16': leave --variant away"):
        resolve_base(str(folder), BaseOptions(variant="fp16"))


def test_a_missing_shard_and_a_pointer(folder: Path) -> None:
    as_shards(folder, "unet", "fp16", "{stem}.{variant}-{number}.safetensors")
    shard = folder / "unet" / "diffusion_pytorch_model.fp16-00002-of-00002.safetensors"
    shard.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match=r"fp16-00002-of-00002\.safetensors is a pointer of git-lfs"):
        resolve_base(str(folder))
    shard.unlink()
    with pytest.raises(InputError, match=r"fp16-00002-of-00002\.safetensors cannot be read \(No such file"):
        resolve_base(str(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BaseOptions(components="shapes"), "--components is for a single file, and shapes is a whole pipeline"),
        (BaseOptions(ema=True), "--ema is for a single file"),
        (BaseOptions(vae="nowhere"), r"nowhere cannot be read \(No such file"),
        (BaseOptions(vae=str(BUNDLED / "prompts")), r"prompts has no config\.json of an autoencoder"),
    ],
)
def test_options_that_do_not_fit_a_folder(options: BaseOptions, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_base("shapes", options)


def test_what_a_folders_denoiser_predicts_can_be_said(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    base = resolve_base(str(folder), BaseOptions(prediction_type="v_prediction"))
    said = json.loads((base.folder / "scheduler" / "scheduler_config.json").read_text())
    assert said == json.loads((folder / "scheduler" / "scheduler_config.json").read_text()) | {
        "prediction_type": "v_prediction"
    }
    assert (base.folder / "README.md").is_file()  # which names the licence


def hub(cache: Path, name: str, folder: Path) -> Callable[[Path], bool]:
    """Puts a folder into the hub's cache, as a download would."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, place / "snapshots" / ("0" * 40))
    return (place / "snapshots" / ("0" * 40)).samefile


def test_components_of_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    whole = sibling("sd3").folder
    hub(tmp_path / "hub", "owner/name", whole)
    file = write_single_file(tmp_path / "m.safetensors", whole, without=("text_encoder", "text_encoder_2"))
    of_hub = resolve_base(str(file), BaseOptions(components="owner/name"))
    of_folder = resolve_base(str(file), BaseOptions(components=str(whole)))
    assert of_hub.base.digest == of_folder.base.digest
    with pytest.raises(InputError, match=r"'owner/other' is neither a local folder nor reachable on the hub"):
        resolve_base(str(file), BaseOptions(components="owner/other"))


def test_components_without_the_networks_that_the_file_lacks(tmp_path: Path) -> None:
    whole = sibling("sd3").folder
    texts = shutil.copytree(whole, tmp_path / "texts", ignore=shutil.ignore_patterns("*.safetensors"))
    file = write_single_file(tmp_path / "m.safetensors", whole, without=("text_encoder",))
    with pytest.raises(InputError, match=r"m\.safetensors has no text_encoder, and neither has .*texts/text_encoder"):
        resolve_base(str(file), BaseOptions(components=str(texts)))
