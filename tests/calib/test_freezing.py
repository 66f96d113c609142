from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from s2p_deploy.calib.freezing import Oscillation, WeightTrack, freeze_layers
from s2p_deploy.calib.quantized_denoiser import QuantizedLinear, WeightQuantizer
from s2p_deploy.calib.training_state import TrainingState
from s2p_deploy.errors import InputError
from s2p_deploy.numerics import INT4
from s2p_deploy.recipe import Freezing


@pytest.fixture
def layer() -> QuantizedLinear:
    """One output channel of scale 0.5."""
    linear = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.45, 0.0, -9.0]]))
    return QuantizedLinear(linear, nn.Identity(), WeightQuantizer(torch.full((1, 1), 0.5), INT4))


def move(track: WeightTrack, weight: list[float], limit: float | None = None) -> None:
    with torch.no_grad():
        track.weight.copy_(torch.tensor([weight]))
    track.follow(limit)


def test_flips_are_counted_by_hand(layer: QuantizedLinear) -> None:
    track = WeightTrack(layer, momentum=0.25)
    assert track.code.tolist() == [[1, 0, -8]]
    move(track, [1.0, 0.5, -9.0])  # 1 -> 2 and 0 -> 1: first changes, nothing to reverse
    assert track.flips.tolist() == [[0, 0, 0]]
    assert track.mean.tolist() == [[1.25, 0.25, -8]]
    move(track, [0.5, 1.0, -9.0])  # 2 -> 1 reverses, 1 -> 2 goes on
    assert track.flips.tolist() == [[0.25, 0, 0]]
    move(track, [0.5, 1.0, -9.0])  # nothing changes; the last direction is remembered
    move(track, [1.0, 0.5, -9.0])
    torch.testing.assert_close(track.flips, torch.tensor([[0.25 * 0.75**2 + 0.25, 0.25, 0]]))


def test_what_flips_too_often_stays_at_its_mean_code(layer: QuantizedLinear) -> None:
    track = WeightTrack(layer, momentum=0.5)
    for weight in (1.5, 0.5, 1.5):  # codes 1, 3, 1, 3: the mean is 2.25
        move(track, [weight, 0.0, -9.0])
    track.follow(0.5)
    assert track.frozen.tolist() == [[False, False, False]]  # flips are 0.375 after another look
    move(track, [0.5, 0.0, -9.0], limit=0.5)  # 0.6875
    assert track.frozen.tolist() == [[True, False, False]]
    mean = float(track.mean[0, 0])
    assert 1.5 < mean < 2.5
    assert layer.weight.tolist() == [[1.0, 0.0, -9.0]]
    assert isinstance(layer.weight_quantizer, WeightQuantizer)
    with torch.no_grad():
        layer.weight_quantizer.log_scale.copy_(torch.tensor([[0.25]]).log())
    move(track, [7.0, 0.3, -9.0])  # an update may push it: it stays 2 steps of the new size
    torch.testing.assert_close(layer.weight.detach(), torch.tensor([[0.5, 0.3, -9.0]]))


def test_a_frozen_weights_scale_learns_by_its_code(layer: QuantizedLinear) -> None:
    track = WeightTrack(layer, momentum=0.5)
    track.frozen.fill_(value=True)
    track.follow(None)  # weights are 1, 0 and -8 steps now
    x = torch.tensor([[2.0, 5.0, 0.25]])
    layer(x).sum().backward()
    track.pass_gradient_on()
    log_scale = torch.tensor(0.5).log().requires_grad_()
    codes = torch.tensor([1.0, 0.0, -8.0])
    (x[0] * codes * log_scale.exp()).sum().backward()
    assert isinstance(layer.weight_quantizer, WeightQuantizer)
    found, expected = layer.weight_quantizer.log_scale.grad, log_scale.grad
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found.flatten()[0], expected * (3 * 7) ** -0.5)
    assert layer.weight.grad is not None
    assert layer.weight.grad.tolist() == [[0, 0, 0]]


def test_the_threshold_falls_by_a_cosine(state: TrainingState) -> None:
    found = Oscillation(state, Freezing(what="oscillation", start=0.04, end=0.01), 100)
    assert [found.threshold(updates) for updates in (0, 50, 100)] == pytest.approx([0.04, 0.025, 0.01])


def test_oscillation_watches_every_quantized_weight(state: TrainingState) -> None:
    freezing = Freezing(what="oscillation", every=2, start=0.0, end=0.0)
    found = Oscillation(state, freezing, 100)
    assert set(found.tracks) == {layer.name for layer in state.denoiser.plan.layers if layer.weights != "none"}
    track = found.tracks["conv_out"]
    scale = state.denoiser.weight_scales()["conv_out"]
    steps: list[Tensor] = [track.code.clamp(-8, 6) + offset for offset in (1, 0)]
    for updates, codes in enumerate(steps, 1):
        with torch.no_grad():
            track.weight.copy_(codes * scale)
        if updates == 2:
            assert found.frozen() == 0
        found.after_update(updates)
    flipped = track.flips > 0
    assert 0 < found.frozen() == int(flipped.sum())
    assert found.oscillating(2) == 0
    copy = Oscillation(state, freezing, 100)
    copy.restore({name: value.clone() for name, value in found.tensors().items()})
    assert copy.frozen() == found.frozen()


def test_only_the_most_sensitive_layers_train_their_weights(state: TrainingState) -> None:
    plan = state.denoiser.plan
    scored = (replace(layer, sensitivity=float(place)) for place, layer in enumerate(plan.layers))
    state.denoiser.plan = replace(plan, layers=tuple(scored))
    freeze_layers(state, 0.25)
    layers = [layer.name for layer in plan.layers]
    count = round(0.25 * len(layers))
    trained = [layer for layer in layers if state.denoiser.layer(layer).weight.requires_grad]
    assert trained == layers[len(layers) - count :]
    named = dict(state.denoiser.inner.named_parameters())
    assert all(p.requires_grad for name, p in named.items() if name.endswith(("log_scale", "bias", "norm1.weight")))


def test_a_layer_without_a_score_is_named(state: TrainingState) -> None:
    with pytest.raises(InputError, match=r"freezing\.what: layers needs the sensitivity of conv_in"):
        freeze_layers(state, 0.25)
