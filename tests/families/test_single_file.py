"""Files of all families, made of the small pipelines by writing the original names, and files that are refused."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from benchmarks.full_size.original_names import DENOISER, OPEN_CLIP_OF_SD2, Tensors, autoencoder, original_tensors
from benchmarks.full_size.original_names import TEXT_ENCODERS as TEXT_ENCODERS_OF
from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.families import BasePipeline, base_of, resolve_base
from s2p_deploy.families.network_files import component_classes, network_on_meta
from s2p_deploy.families.single_file import SingleFile, convert_autoencoder
from s2p_deploy.families.sources import assembly_of_file
from s2p_deploy.records import Base, BaseOptions, Manifest, file_digest
from tests.single_files import write_single_file
from tests.small_pipelines import sibling, t5_base
from tests.tiny_networks import tiny_mmdit

CONFIGURATIONS = Path(__file__).parents[2] / "s2p_deploy" / "families" / "configurations"
KINDS = ("sd1", "sd2", "sdxl", "sd3")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
SCHEDULER = "scheduler/scheduler_config.json"


def folder_of(kind: str) -> Path:
    return resolve_base("shapes").folder if kind == "sd1" else sibling(kind).folder


def original(path: Path, kind: str, **options: object) -> Path:
    """The single file in which models of a kind are usually given: SD 3's has no text encoders."""
    usual: dict[str, object] = {"text": OPEN_CLIP_OF_SD2} if kind == "sd2" else {}
    if kind == "sd3":
        usual["without"] = TEXT_ENCODERS
    return write_single_file(path, folder_of(kind), **usual | options)  # type: ignore[arg-type]


def networks_of(folder: Path) -> dict[str, Tensors]:
    """Tensors of every network, without what newer versions of transformers leave out of names."""
    files = {path.parent.name: load_file(path) for path in folder.glob("*/*.safetensors")}
    return {part: {name.removeprefix("text_model."): t for name, t in file.items()} for part, file in files.items()}


def assert_same(made: dict[str, Tensors], expected: dict[str, Tensors]) -> None:
    assert {part: set(tensors) for part, tensors in made.items()} == {p: set(t) for p, t in expected.items()}
    for part, tensors in expected.items():
        for name, tensor in tensors.items():
            assert made[part][name].dtype == tensor.dtype, name
            assert torch.equal(made[part][name], tensor), f"{part}: {name}"


def of_file(path: Path, kind: str, **options: object) -> BasePipeline:
    return resolve_base(str(path), BaseOptions(components=str(folder_of(kind)), **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_becomes_the_folder_that_it_was_made_of(kind: str, tmp_path: Path) -> None:
    base = of_file(original(tmp_path / "m.safetensors", kind), kind)
    whole = resolve_base(str(folder_of(kind)))
    assert_same(networks_of(base.folder), networks_of(whole.folder))
    assert base.denoiser_config() == whole.denoiser_config()
    assert (base.default_guidance, base.pipeline_class) == (whole.default_guidance, whole.pipeline_class)
    for name in ("scheduler/scheduler_config.json", "tokenizer/tokenizer.json"):
        assert (base.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert base.base.file == file_digest(tmp_path / "m.safetensors")


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_tensors_keep_their_type(dtype: torch.dtype, tmp_path: Path) -> None:
    def cast(tensors: Tensors) -> Tensors:
        return {name: tensor.to(dtype) for name, tensor in tensors.items()}

    base = of_file(original(tmp_path / "m.safetensors", "sd1", change=cast), "sd1")
    assert_same(networks_of(base.folder), {part: cast(t) for part, t in networks_of(folder_of("sd1")).items()})


def test_text_encoders_of_sd3_in_the_file(tmp_path: Path) -> None:
    """Its first encoder has no projection: whatever the file says of one, pooled text is taken as it is."""
    folder = t5_base(tmp_path / "t5").folder
    file = write_single_file(tmp_path / "m.safetensors", folder)
    made = networks_of(resolve_base(str(file), BaseOptions(components=str(folder))).folder)
    expected = networks_of(folder)
    projection = expected["text_encoder"]["text_projection.weight"]
    expected["text_encoder"]["text_projection.weight"] = torch.eye(len(projection), dtype=projection.dtype)
    assert_same(made, expected)


def test_dual_attention_and_norms_of_sd35(tmp_path: Path) -> None:
    network = tiny_mmdit(dual=(0, 1))
    folder = tmp_path / "pipeline"
    for part in ("vae", "scheduler", "tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"):
        (folder / part).parent.mkdir(exist_ok=True)
        (folder / part).symlink_to(folder_of("sd3") / part)
    (folder / "model_index.json").write_bytes((folder_of("sd3") / "model_index.json").read_bytes())
    network.save_pretrained(folder / "transformer")
    file = write_single_file(tmp_path / "m.safetensors", folder, without=TEXT_ENCODERS)
    assembly = assembly_of_file(SingleFile(file), BaseOptions(components=str(folder)))
    converted = assembly.networks["transformer/diffusion_pytorch_model.safetensors"]
    state = network.state_dict()
    assert converted.deferred.keys() == state.keys()
    assert all(torch.equal(converted.read(name), tensor) for name, tensor in state.items())


def with_averages(tensors: Tensors) -> Tensors:
    """Adds averaged weights as trainings keep them: twice the last ones, so that they can be told."""
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(DENOISER)}
    flat = {name: "model_ema.diffusion_model" + name.removeprefix(DENOISER).replace(".", "") for name in own}
    return tensors | {flat[name]: 2 * tensor for name, tensor in own.items()} | {"model_ema.decay": torch.tensor(0.9)}


def test_averaged_weights_are_taken_where_they_are_asked_for(tmp_path: Path) -> None:
    file = original(tmp_path / "m.safetensors", "sd1", change=with_averages)
    own = networks_of(folder_of("sd1"))
    assert_same(networks_of(of_file(file, "sd1").folder), own)
    averaged = own | {"unet": {name: 2 * tensor for name, tensor in own["unet"].items()}}
    assert_same(networks_of(of_file(file, "sd1", ema=True).folder), averaged)
    with pytest.raises(InputError, match=r"lacks model_ema\.diffusion_model\w+: it has no averaged weights"):
        of_file(original(tmp_path / "plain.safetensors", "sd1"), "sd1", ema=True)


def test_what_is_no_weight_is_left_out(tmp_path: Path) -> None:
    def with_buffers(tensors: Tensors) -> Tensors:
        text = "cond_stage_model.transformer.text_model.embeddings.position_ids"
        return tensors | {
            text: torch.arange(24),
            "alphas_cumprod": torch.ones(9),
            "first_stage_model.loss.x": torch.ones(1),
            "cond_stage_model.transformer.text_projection.weight": torch.ones(2, 2),
        }

    base = of_file(original(tmp_path / "m.safetensors", "sd1", change=with_buffers), "sd1")
    assert_same(networks_of(base.folder), networks_of(folder_of("sd1")))


def test_a_denoiser_alone_takes_the_rest_from_the_components(tmp_path: Path) -> None:
    def alone(tensors: Tensors) -> Tensors:
        return {n.removeprefix(DENOISER): t for n, t in tensors.items() if n.startswith(DENOISER)}

    base = of_file(original(tmp_path / "m.safetensors", "sdxl", change=alone), "sdxl")
    assert_same(networks_of(base.folder), networks_of(folder_of("sdxl")))


@pytest.mark.parametrize(
    "form", ["file", *(pytest.param(form, marks=pytest.mark.slow) for form in ("diffusers file", "folder", "pipeline"))]
)
def test_another_autoencoder(form: str, tmp_path: Path) -> None:
    tensors = {name: 2 * t for name, t in networks_of(folder_of("sd1"))["vae"].items()}
    config = (folder_of("sd1") / "vae" / "config.json").read_text()
    if form.endswith("file"):
        named = autoencoder(tensors, json.loads(config)) if form == "file" else tensors
        place = tmp_path / "vae.safetensors"
        save_file({name: t.contiguous() for name, t in named.items()}, place)
    else:
        place = tmp_path / "given"
        folder = place / "vae" if form == "pipeline" else place
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(config)
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    without = original(tmp_path / "m.safetensors", "sd1", without=("vae",))
    expected = networks_of(folder_of("sd1")) | {"vae": tensors}
    assert_same(networks_of(of_file(without, "sd1", vae=str(place)).folder), expected)
    whole = resolve_base("shapes", BaseOptions(vae=str(place)))
    assert_same(networks_of(whole.folder), expected)
    assert whole.base.digest != resolve_base("shapes").base.digest


@pytest.mark.parametrize(
    ("says", "given", "expected"),
    [
        ({}, None, "epsilon"),  # as the components say
        ({}, "v_prediction", "v_prediction"),
        ({"v_pred": torch.empty(0)}, None, "v_prediction"),
        ({"v_pred": torch.empty(0)}, "epsilon", "epsilon"),
        ({"modelspec.prediction_type": "v"}, None, "v_prediction"),
    ],
)
def test_what_the_denoiser_predicts(
    says: dict[str, torch.Tensor | str], given: str | None, expected: str, tmp_path: Path
) -> None:
    metadata = {name: value for name, value in says.items() if isinstance(value, str)}
    more = {name: value for name, value in says.items() if isinstance(value, torch.Tensor)}
    file = original(tmp_path / "m.safetensors", "sdxl", change=lambda tensors: tensors | more, metadata=metadata)
    options = BaseOptions(components=str(folder_of("sdxl")), prediction_type=given)  # type: ignore[arg-type]
    assembly = assembly_of_file(SingleFile(file), options)
    text = assembly.texts.get(SCHEDULER) or assembly.files[SCHEDULER].read_text()
    assert json.loads(text)["prediction_type"] == expected


def test_zero_terminal_snr_is_said_by_the_file(tmp_path: Path) -> None:
    def marked(tensors: Tensors) -> Tensors:
        return tensors | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}

    file = original(tmp_path / "m.safetensors", "sdxl", change=marked)
    assembly = assembly_of_file(SingleFile(file), BaseOptions(components=str(folder_of("sdxl"))))
    assert json.loads(assembly.texts[SCHEDULER])["rescale_betas_zero_snr"]
    with pytest.raises(InputError, match="PNDMScheduler, which has no rescale_betas_zero_snr"):
        of_file(original(tmp_path / "n.safetensors", "sd1", change=marked), "sd1")


def test_flow_matching_predicts_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="FlowMatchEulerDiscreteScheduler, which has no prediction_type"):
        of_file(original(tmp_path / "m.safetensors", "sd3"), "sd3", prediction_type="epsilon")


# What later stages find


def test_later_stages_find_the_file_and_check_it(tmp_path: Path) -> None:
    file = original(tmp_path / "m.safetensors", "sd1")
    base = of_file(file, "sd1")
    manifest = Manifest("Thing", base.base, {}, {})
    assert base_of(manifest).base == base.base
    moved = file.rename(tmp_path / "moved.safetensors")
    assert base_of(manifest, str(moved)).base.digest == base.base.digest
    assert base_of(manifest, str(base.folder)).base.digest == base.base.digest
    with pytest.raises(InputError, match=r"m\.safetensors cannot be read"):
        base_of(manifest)
    original(moved, "sd1", change=with_averages)
    with pytest.raises(IntegrityError, match=r"moved\.safetensors is not the pipeline .* give that one \(--model\)"):
        base_of(manifest, str(moved))


def test_the_options_go_with_the_base(tmp_path: Path) -> None:
    file = original(tmp_path / "m.safetensors", "sd1", change=with_averages)
    base = of_file(file, "sd1", ema=True, prediction_type="v_prediction")
    assert base.base.options == BaseOptions(str(folder_of("sd1")), None, "v_prediction", None, ema=True)
    assert base_of(Manifest("Thing", base.base, {}, {})).base == base.base
    assert base.place == str(base.folder.resolve())
    with pytest.raises(IntegrityError, match="its digest differs"):
        base_of(Manifest("Thing", Base(str(file), "0" * 64, base.base.options, base.base.file), {}, {}))


# Kinds of files that are refused


def damaged(path: Path) -> Path:
    original(path, "sd1")
    path.write_bytes(path.read_bytes()[:-100])
    return path


def pointer(path: Path) -> Path:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    return path


def gguf(path: Path) -> Path:
    path.write_bytes(b"GGUF" + bytes(64))
    return path


def holding(*names: str, dtype: torch.dtype = torch.float16) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        save_file({name: torch.zeros(2, 2, dtype=dtype) for name in names}, path)
        return path

    return write


def also_holding(*names: str, kind: str = "sd1", dtype: torch.dtype = torch.float16) -> Callable[[Path], Path]:
    more = {name: torch.zeros(2, 2, dtype=dtype) for name in names}
    return lambda path: original(path, kind, change=lambda tensors: tensors | more)


def lacking(ending: str, kind: str = "sd1") -> Callable[[Path], Path]:
    def without(tensors: Tensors) -> Tensors:
        kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(ending)}
        assert len(kept) < len(tensors)
        return kept

    return lambda path: original(path, kind, change=without)


def not_a_number(path: Path) -> Path:
    def broken(tensors: Tensors) -> Tensors:
        return tensors | {DENOISER + "out.2.bias": torch.full_like(tensors[DENOISER + "out.2.bias"], torch.nan)}

    return original(path, "sd1", change=broken)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path, r"m\.safetensors cannot be read \(No such file"),
        (damaged, "is damaged or not whole"),
        (pointer, "is a pointer of git-lfs"),
        (gguf, "is GGUF, whose weights are quantized already"),
        (holding("lora_unet_down_blocks_0.lora_up.weight"), "so it is a LoRA, which is no model"),
        (holding("unet.down_blocks.0.to_q.lora_A.weight"), "so it is a LoRA"),
        (holding("lora_te_text_model.hada_w1_a"), "so it is a LoRA"),
        (holding("control_model.input_blocks.0.0.weight"), "so it is a ControlNet"),
        (holding("controlnet_cond_embedding.conv_in.weight"), "so it is a ControlNet"),
        (also_holding("control_model.zero_convs.0.0.weight"), "so it is a ControlNet"),
        (
            holding("first_stage_model.encoder.conv_in.weight"),
            r"is an autoencoder \(VAE\) without a denoiser: .*vae",
        ),
        (holding("encoder.conv_in.weight"), "is an autoencoder"),
        (holding("text_model.embeddings.token_embedding.weight"), "is a text encoder without a denoiser"),
        (holding("down_blocks.0.resnets.0.conv1.weight"), "holds one network under diffusers' names: give the folder"),
        (holding("transformer_blocks.0.attn.to_q.weight"), "under diffusers' names"),
        (
            holding("double_blocks.0.img_attn.norm.key_norm.scale"),
            "is of the kind flux-schnell, which is not",
        ),
        (
            holding("a.weight", "b.weight"),
            r"is no Stable Diffusion model .* tensors: a\.weight, b\.weight\)",
        ),
        (also_holding("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"), r"two models \(unet and transf"),
        (
            also_holding("conditioner.embedders.0.transformer.x"),
            r"two models \(cond_stage_model\.transf.* and cond",
        ),
        (
            also_holding("conditioner.embedders.1.model.x"),
            "has a text_encoder_2, and .* has none: they are of two",
        ),
        (also_holding(DENOISER + "input_blocks.1.0.in_layers.2.scale_weight"), "so its weights are quantized already"),
        (also_holding(DENOISER + "out.2.weight", dtype=torch.float8_e4m3fn), "is F8_E4M3: give weights in F32"),
        (also_holding(DENOISER + "out.2.weight", dtype=torch.int8), "is I8: give weights in"),
        (
            also_holding(DENOISER + "out.7.weight"),
            r"holds model\.diffusion_model\.out\.7\.weight, which the unet",
        ),
        (
            also_holding(DENOISER + "out.2.weight"),
            r"conv_out\.weight is \[2, 2\], and the unet .* takes \[",
        ),
        (lacking("out.2.bias"), r"lacks conv_out\.bias of the unet"),
        (lacking("input_blocks.0.0.weight"), r"lacks conv_in\.weight of the unet"),
        (lacking("decoder.conv_in.bias"), r"lacks decoder\.conv_in\.bias of the vae"),
        (lacking("layers.1.mlp.fc1.weight"), r"lacks encoder\.layers\.1\.mlp\.fc1\.weight of the text_encoder"),
        (not_a_number, r"m\.safetensors: model\.diffusion_model\.out\.2\.bias holds NaN"),
    ],
)
def test_wrong_files_are_refused_in_one_line(write: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        of_file(write(tmp_path / "m.safetensors"), "sd1")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "m.safetensors") in str(caught.value)


def test_what_sd3s_file_lacks_has_its_original_name(tmp_path: Path) -> None:
    write = lacking("joint_blocks.3.x_block.attn.qkv.bias", "sd3")
    with pytest.raises(
        InputError, match=r"lacks model\.diffusion_model\.joint_blocks\.3\.x_block\.attn\.qkv\.bias of the"
    ):
        of_file(write(tmp_path / "m.safetensors"), "sd3")


@pytest.mark.parametrize("kind", ["sd2", "sdxl", "sd3"])
def test_components_of_another_model_are_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"of two models|of another model"):
        of_file(original(tmp_path / "m.safetensors", "sd1"), kind)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize(
    ("name", "converted"),
    [
        ("m.ckpt", "m.safetensors"),
        ("a model's.pt", "a model's.safetensors"),
        ("m.safetensors", "m.converted.safetensors"),
    ],
)
def test_the_command_in_a_pickles_refusal_converts_it(
    name: str, converted: str, wrapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(2, dtype=torch.float16)}
    content = {"state_dict": tensors, "global_step": 7} if wrapped else tensors
    torch.save(content, tmp_path / name)  # noqa: TID251 - what is refused
    with pytest.raises(InputError, match="is a pickle, which may run code when it is loaded: refused") as caught:
        resolve_base(str(tmp_path / name))
    program, option, code, *arguments = shlex.split(str(caught.value).partition("convert it: ")[2])
    assert (program, option) == ("python", "-c")
    monkeypatch.setattr(sys, "argv", ["-c", *arguments])
    exec(code, {})  # noqa: S102 - as the program would in a process of its own
    made = load_file(tmp_path / converted)
    assert made.keys() == tensors.keys()
    assert all(torch.equal(made[key], tensor) and made[key].dtype == tensor.dtype for key, tensor in tensors.items())


@pytest.mark.parametrize("name", ["m.ckpt", "m.bin", "m.pt", "m.pth", "m.gguf", "m.safetensors"])
def test_files_that_are_not_there(name: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"{name} cannot be read (No such file")):
        resolve_base(name)


def test_a_file_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "m.txt").write_text("hello")
    with pytest.raises(InputError, match=r"m\.txt is no diffusers pipeline, and no \.safetensors file"):
        resolve_base(str(tmp_path / "m.txt"))


def test_an_autoencoders_file_that_is_none(tmp_path: Path) -> None:
    folder = folder_of("sd1") / "vae"
    kind = component_classes(folder_of("sd1"))["vae"]
    with pytest.raises(InputError, match="holds no autoencoder: give a VAE to --vae"):
        convert_autoencoder(holding("a")(tmp_path / "a.safetensors"), folder, kind)


# Packaged configurations


def config_of(folder: Path) -> dict[str, object]:
    config: dict[str, object] = json.loads((folder / "config.json").read_text())
    return config


def of_full_size(path: Path, name: str, *, without: tuple[str, ...] = ()) -> Path:
    """A file as large as the model of a packaged configuration, of which only the header is on the disk."""
    configuration = CONFIGURATIONS / name
    networks = {
        part: (network_on_meta(configuration / part, kind).half().state_dict(), config_of(configuration / part))
        for part, kind in component_classes(configuration, torch.nn.Module).items()
        if part not in without
    }
    family = json.loads((configuration / "model_index.json").read_text())["_class_name"]
    tensors = original_tensors(networks, OPEN_CLIP_OF_SD2 if name.startswith("sd2") else TEXT_ENCODERS_OF[family])
    start, entries = 0, {}
    for key, tensor in tensors.items():
        entries[key] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, start + tensor.nbytes]}
        start += tensor.nbytes
    header = json.dumps(entries).encode()
    with path.open("wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        opened.truncate(8 + len(header) + start)
    return path


@pytest.mark.parametrize(
    ("name", "components", "options"),
    [
        ("sd1", {"unet", "text_encoder", "vae"}, BaseOptions()),
        pytest.param(
            "sd2-epsilon",
            {"unet", "text_encoder", "vae"},
            BaseOptions(prediction_type="epsilon"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "sd2-v_prediction",
            {"unet", "text_encoder", "vae"},
            BaseOptions(prediction_type="v_prediction"),
            marks=pytest.mark.slow,
        ),
        pytest.param("sdxl", {"unet", "text_encoder", "text_encoder_2", "vae"}, BaseOptions(), marks=pytest.mark.slow),
        pytest.param(
            "sd3-medium",
            {"transformer", "text_encoder", "text_encoder_2", "vae"},
            BaseOptions(),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_models_of_full_size_need_no_components(
    name: str, components: set[str], options: BaseOptions, tmp_path: Path
) -> None:
    assembly = assembly_of_file(SingleFile(of_full_size(tmp_path / "m.safetensors", name)), options)
    assert {file.split("/")[0] for file in assembly.networks} == components
    assert assembly.files["tokenizer/vocab.json"].parent == CONFIGURATIONS / "clip_tokenizer"
    assert all(path.is_file() for path in assembly.files.values())
    own = {path.parent.parent for path in assembly.files.values() if path.name == "config.json"}
    assert own == {CONFIGURATIONS / name}


@pytest.mark.parametrize(
    ("name", "without", "message"),
    [
        ("sd1", ("vae",), "has no vae: give the diffusers folder, .* to --components, or an autoencoder to --vae"),
        (
            "sd1",
            ("text_encoder",),
            "has no text_encoder: give the diffusers folder, or hub id, of such a model to",
        ),
        ("sd2-epsilon", ("vae", "text_encoder"), "is of SD 2, which predicts either noise or v, .* --prediction-type"),
    ],
)
def test_what_a_full_size_file_leaves_open(name: str, without: tuple[str, ...], message: str, tmp_path: Path) -> None:
    file = of_full_size(tmp_path / "m.safetensors", name, without=without)
    with pytest.raises(InputError, match=message):
        resolve_base(str(file))


def test_a_small_model_has_no_packaged_configuration(tmp_path: Path) -> None:
    for kind in ("sd1", "sd3"):
        with pytest.raises(InputError, match=r"no packaged configuration has such a .* to --components"):
            resolve_base(str(original(tmp_path / f"{kind}.safetensors", kind)))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        (("sd1", "unet"), 859_520_964),
        (("sd1", "text_encoder"), 123_060_480),
        (("sd1", "vae"), 83_653_863),
        (("sd2-epsilon", "unet"), 865_910_724),
        (("sd2-v_prediction", "text_encoder"), 340_387_840),
        (("sdxl", "text_encoder_2"), 694_659_840),
        (("sd3-medium", "vae"), 83_819_683),
    ],
)
def test_packaged_configurations_are_of_the_originals(name: tuple[str, str], parameters: int) -> None:
    """The numbers of parameters that diffusers and transformers report for the published models."""
    folder, part = CONFIGURATIONS / name[0], name[1]
    network = network_on_meta(folder / part, component_classes(folder)[part])
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize("padding", ["<|endoftext|>", "!"])
def test_the_packaged_tokenizer_is_clips(padding: str) -> None:
    from transformers import CLIPTokenizer

    vocabulary, merges = (CONFIGURATIONS / "clip_tokenizer" / name for name in ("vocab.json", "merges.txt"))
    lines = merges.read_text(encoding="utf-8").splitlines()[1:]
    tokenizer = CLIPTokenizer(
        json.loads(vocabulary.read_text(encoding="utf-8")),
        [tuple(line.split()) for line in lines],
        pad_token=padding,
        model_max_length=77,
    )
    ids = tokenizer("a photo of a cat", padding="max_length").input_ids
    assert ids[:7] == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert set(ids[7:]) == {tokenizer.convert_tokens_to_ids(padding)}
    assert len(ids) == 77


# Any names at all

_NAMES = sorted(
    {"lora_te.x", "first_stage_model.encoder.conv_in.weight", "text_model.x", DENOISER + "out.2.bias"}
    | {DENOISER + "joint_blocks.0.x_block.attn.qkv.weight", DENOISER + "input_blocks.0.0.weight", "model_ema.decay"}
    | {name for value in CHECKPOINT_KEY_NAMES.values() for name in ([value] if isinstance(value, str) else value)}
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.sets(st.sampled_from(_NAMES) | st.text("ab._01", min_size=1, max_size=9), max_size=4),
    shape=st.sampled_from([(), (2,), (2, 3), (2, 9, 1, 1)]),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.int64, torch.float8_e5m2]),
)
def test_no_file_of_any_names_is_an_internal_error(
    names: set[str], shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    file = tmp_path / "m.safetensors"
    save_file({name: torch.zeros(shape).to(dtype) for name in names}, file)
    for options in (BaseOptions(), BaseOptions(components="shapes")):
        with pytest.raises(InputError) as caught:
            assembly_of_file(SingleFile(file), options)
        assert "\n" not in str(caught.value)
