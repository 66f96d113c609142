from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from s2p_deploy.errors import InputError
from s2p_deploy.families import resolve_base
from s2p_deploy.families.components import component_networks, component_of, load_component
from tests.small_pipelines import sibling, t5_base, tiny_base

if TYPE_CHECKING:
    from pathlib import Path

HALVES = ("vae_decoder", "vae_encoder")


def test_every_network_but_the_denoiser_is_a_component(tmp_path: Path) -> None:
    assert component_networks(resolve_base("shapes")) == ("text_encoder", *HALVES)
    assert component_networks(sibling("sdxl")) == ("text_encoder", "text_encoder_2", *HALVES)
    three = ("text_encoder", "text_encoder_2", "text_encoder_3")
    assert component_networks(t5_base(tmp_path / "pipeline")) == (*three, *HALVES)


def test_both_halves_are_of_the_autoencoder() -> None:
    assert [component_of(name) for name in ("text_encoder_2", *HALVES)] == ["text_encoder_2", "vae", "vae"]


def test_a_text_encoder_says_what_goes_in_and_out() -> None:
    component = load_component(sibling("sdxl"), "text_encoder_2")
    assert component.example.shape == (2, 24)
    assert component.outputs == ("last_hidden_state", "hidden_states", "pooled")
    assert component.config["projection_dim"] == 96
    assert not component.network.training
    json.dumps(component.config)


@pytest.mark.parametrize(
    ("part", "name", "other"),
    [("text_encoder", "text_encoder", "BertModel"), ("vae", "vae_encoder", "AutoencoderTiny")],
)
def test_a_network_of_another_class_is_refused(part: str, name: str, other: str, tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "pipeline")
    file = base.folder / "model_index.json"
    index = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(index | {part: [index[part][0], other]}), encoding="utf-8")
    with pytest.raises(InputError, match=f"{part} of .* is a {other}, which cannot be exported"):
        load_component(base, name)


def test_missing_weights_are_said_to_be_missing(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "pipeline")
    (base.folder / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"text_encoder/model\.safetensors is missing"):
        load_component(base, "text_encoder")
