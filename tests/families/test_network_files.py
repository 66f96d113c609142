from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from s2p_deploy.errors import InputError
from s2p_deploy.families import load_pipeline, resolve_base
from s2p_deploy.families.components import load_component
from s2p_deploy.families.network_files import check_components, check_network, component_classes
from tests.small_pipelines import sibling

WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
# A tensor of each network, by the end of its name, and one of another kind for networks with several.
COMPONENTS = [
    ("sd2", "unet", "mid_block.resnets.0.conv1.weight"),
    ("sd2", "unet", "conv_out.bias"),
    ("sd2", "vae", "decoder.conv_out.weight"),
    ("sd2", "vae", "quant_conv.bias"),
    ("sd2", "text_encoder", "layers.1.mlp.fc1.weight"),
    ("sd2", "text_encoder", "token_embedding.weight"),
    ("sdxl", "unet", "add_embedding.linear_1.weight"),
    ("sdxl", "text_encoder_2", "text_projection.weight"),
    ("sd3", "transformer", "time_text_embed.timestep_embedder.linear_1.bias"),
    ("sd3", "transformer", "pos_embed.proj.weight"),
    ("sd3", "text_encoder_2", "final_layer_norm.bias"),
]
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def pipeline(tmp_path: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(sibling(name).folder, tmp_path / name))

    return copy


def file_of(folder: Path, component: str) -> Path:
    return folder / component / f"{WEIGHTS[component]}.safetensors"


def rewrite(file: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


def name_of(file: Path, end: str) -> str:
    return next(name for name in load_file(file) if name.endswith(end))


def shard(file: Path) -> None:
    """Divides a file into two shards with an index."""
    tensors = load_file(file)
    halves = [dict(list(tensors.items())[start::2]) for start in (0, 1)]
    names = [file.with_name(f"{file.stem}-0000{n}-of-00002.safetensors") for n in (1, 2)]
    for path, half in zip(names, halves, strict=True):
        save_file(half, path, metadata={"format": "pt"})
    found = {name: path.name for path, half in zip(names, halves, strict=True) for name in half}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": found}))
    file.unlink()


def refused(folder: Path, *words: str) -> None:
    """Both the check and the loading refuse, in one line that has the words."""
    for act in (lambda: check_components(folder), lambda: load_pipeline(resolve_base(str(folder)))):
        with pytest.raises(InputError) as caught:
            act()
        assert "\n" not in str(caught.value)
        assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize("name", ["sd2", "sdxl", "sd3"])
def test_whole_pipelines_fit(name: str) -> None:
    check_components(sibling(name).folder)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(("name", "component", "end"), COMPONENTS)
def test_a_missing_tensor(
    pipeline: Callable[[str], Path], name: str, component: str, end: str, *, sharded: bool
) -> None:
    folder = pipeline(name)
    file = file_of(folder, component)
    gone = name_of(file, end)
    rewrite(file, lambda tensors: tensors.pop(gone))
    if sharded:
        shard(file)
    refused(folder, file.name, f"lacks {gone.removeprefix('text_model.')}"[-len(end) :], f"the {component} (")


@pytest.mark.parametrize(("name", "component", "end"), COMPONENTS)
def test_a_tensor_of_another_shape(pipeline: Callable[[str], Path], name: str, component: str, end: str) -> None:
    folder = pipeline(name)
    file = file_of(folder, component)
    changed = name_of(file, end)
    rewrite(file, lambda tensors: tensors.update({changed: torch.cat([tensors[changed]] * 2)}))
    refused(folder, str(file), end, f"the {component} (", "takes")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
@pytest.mark.parametrize(("name", "component", "end"), COMPONENTS[::3])
def test_integers(pipeline: Callable[[str], Path], name: str, component: str, end: str, dtype: torch.dtype) -> None:
    folder = pipeline(name)
    file = file_of(folder, component)
    changed = name_of(file, end)
    rewrite(file, lambda tensors: tensors.update({changed: tensors[changed].to(dtype)}))
    refused(folder, str(file), changed, f"the {component} (", "takes floating-point numbers")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_floating_point_of_another_width_fits(
    pipeline: Callable[[str], Path], component: str, dtype: torch.dtype
) -> None:
    folder = pipeline("sd2")
    rewrite(file_of(folder, component), lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}))
    check_components(folder)
    load_pipeline(resolve_base(str(folder)))


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_tensor_too_many(pipeline: Callable[[str], Path], component: str) -> None:
    folder = pipeline("sd2")
    file = file_of(folder, component)
    rewrite(
        file, lambda tensors: tensors.update({"lora.up.weight": torch.zeros(2), "lora.down.weight": torch.zeros(2)})
    )
    refused(folder, str(file), "holds lora.down.weight and 1 others", f"the {component} (", "no place for")


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_file_that_is_not_whole(pipeline: Callable[[str], Path], component: str) -> None:
    folder = pipeline("sd2")
    file = file_of(folder, component)
    file.write_bytes(file.read_bytes()[:-7])
    refused(folder, str(file), "damaged or not whole")


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_pointer_of_git_lfs(pipeline: Callable[[str], Path], component: str) -> None:
    folder = pipeline("sd2")
    file = file_of(folder, component)
    file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123\n")
    refused(folder, str(file), "git lfs pull")


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_no_file(pipeline: Callable[[str], Path], component: str) -> None:
    folder = pipeline("sd2")
    file_of(folder, component).unlink()
    refused(folder, str(file_of(folder, component)), "is missing")


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_shards(pipeline: Callable[[str], Path], component: str) -> None:
    folder = pipeline("sd2")
    file = file_of(folder, component)
    whole = load_file(file)
    shard(file)
    check_components(folder)
    loaded = load_pipeline(resolve_base(str(folder))).components[component].state_dict()
    assert sum(tensor.numel() for tensor in loaded.values()) == sum(tensor.numel() for tensor in whole.values())
    second = file.with_name(f"{file.stem}-00002-of-00002.safetensors")
    second.unlink()
    refused(folder, str(second), "is missing")


@pytest.mark.parametrize("left", ["shards and their index", "shards"])
@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_leftovers_of_file_and_shards(pipeline: Callable[[str], Path], component: str, left: str) -> None:
    folder = pipeline("sd2")
    file = file_of(folder, component)
    data = file.read_bytes()
    shard(file)
    file.write_bytes(data)
    if left == "shards":
        file.with_name(f"{file.name}.index.json").unlink()
    refused(folder, f"{component} has both {file.name} and")


def test_shards_without_an_index(pipeline: Callable[[str], Path]) -> None:
    folder = pipeline("sd2")
    file = file_of(folder, "unet")
    shard(file)
    index = file.with_name(f"{file.name}.index.json")
    index.unlink()
    refused(folder, str(index), "is missing")


@pytest.mark.parametrize("without", ["tokenizer.json", "the folder"])
def test_a_tokenizer_without_vocabulary(pipeline: Callable[[str], Path], without: str) -> None:
    folder = pipeline("sdxl")
    if without == "the folder":
        shutil.rmtree(folder / "tokenizer_2")
    else:
        (folder / "tokenizer_2" / without).unlink()
    refused(folder, "tokenizer_2", "is missing")


@pytest.mark.parametrize("text", ["{", "[]", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer(pipeline: Callable[[str], Path], name: str, text: str) -> None:
    folder = pipeline("sd2")
    (folder / "tokenizer" / name).write_text(text)
    refused(folder, str(folder / "tokenizer" / name))


def test_a_tokenizer_of_older_files(pipeline: Callable[[str], Path]) -> None:
    folder = pipeline("sd2")
    place = folder / "tokenizer"
    model = json.loads((place / "tokenizer.json").read_text())["model"]
    (place / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    (place / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (place / "tokenizer.json").unlink()
    check_components(folder)
    load_pipeline(resolve_base(str(folder)))
    (place / "merges.txt").unlink()
    refused(folder, "merges.txt is missing")


def old_name(name: str) -> str:
    """The name that a tensor of the autoencoder's attention had in 2022."""
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        name = name.replace(f"mid_block.attentions.0.{new}.", f"mid_block.attentions.0.{old}.")
    return name


def test_old_names_of_the_autoencoders_attention(pipeline: Callable[[str], Path]) -> None:
    folder = pipeline("sd2")
    file = file_of(folder, "vae")
    before = load_pipeline(resolve_base(str(folder))).vae.state_dict()
    old = {old_name(name): tensor for name, tensor in load_file(file).items()}
    assert old.keys() != before.keys()
    rewrite(file, lambda tensors: (tensors.clear(), tensors.update(old)))
    after = load_pipeline(resolve_base(str(folder))).vae.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    rewrite(file, lambda tensors: tensors.pop("decoder.mid_block.attentions.0.query.weight"))
    refused(folder, "lacks decoder.mid_block.attentions.0.to_q.weight")


def test_buffers_that_transformers_does_not_read(pipeline: Callable[[str], Path]) -> None:
    folder = pipeline("sd2")
    ids = torch.arange(77)[None]
    rewrite(file_of(folder, "text_encoder"), lambda t: t.update({"text_model.embeddings.position_ids": ids}))
    check_components(folder)
    load_pipeline(resolve_base(str(folder)))


@pytest.mark.parametrize("stored", [{"shared.weight"}, {"encoder.embed_tokens.weight"}, set()])
def test_the_tied_embeddings_of_t5(tmp_path: Path, stored: set[str]) -> None:
    from transformers import T5Config, T5EncoderModel

    network = T5EncoderModel(T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4))
    network.save_pretrained(tmp_path)
    file, table = tmp_path / "model.safetensors", network.shared.weight.detach()
    both = {"shared.weight", "encoder.embed_tokens.weight"}
    rewrite(file, lambda tensors: [tensors.pop(name, None) for name in both])
    rewrite(file, lambda tensors: tensors.update({name: table.clone() for name in stored}))
    # a whole T5's decoder is no part of its encoder
    rewrite(file, lambda tensors: tensors.update({"decoder.block.0.layer.0.layer_norm.weight": torch.ones(32)}))
    if stored:
        check_network(tmp_path, T5EncoderModel)
    else:
        with pytest.raises(InputError, match=r"lacks encoder\.embed_tokens\.weight and 1 others"):
            check_network(tmp_path, T5EncoderModel)


@pytest.mark.parametrize(("network", "component"), [("vae_decoder", "vae"), ("text_encoder", "text_encoder")])
def test_a_component_that_is_loaded_alone(pipeline: Callable[[str], Path], network: str, component: str) -> None:
    folder = pipeline("sd2")
    file = file_of(folder, component)
    gone = sorted(load_file(file))[0]
    rewrite(file, lambda tensors: tensors.pop(gone))
    with pytest.raises(InputError, match="lacks") as caught:
        load_component(resolve_base(str(folder)), network)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("entry", [["os", "PathLike"], ["diffusers", "NoSuchModel"], ["diffusers"]])
def test_a_class_that_no_library_has(pipeline: Callable[[str], Path], entry: list[str]) -> None:
    folder = pipeline("sd2")
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"vae": entry}))
    with pytest.raises(InputError, match="the vae is a"):
        component_classes(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("name", "component", "end"), COMPONENTS[::2])
def test_a_weight_that_is_no_number(
    pipeline: Callable[[str], Path], name: str, component: str, end: str, value: float
) -> None:
    folder = pipeline(name)
    file = file_of(folder, component)
    broken = name_of(file, end)
    rewrite(file, lambda tensors: tensors[broken].view(-1)[:1].fill_(value))
    with pytest.raises(InputError, match="holds NaN or infinity") as caught:
        load_pipeline(resolve_base(str(folder)))
    assert f"{file}: " in str(caught.value)
    assert f"{end} of the {component} (" in str(caught.value)
