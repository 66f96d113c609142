"""The same three inputs, whatever runs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

from s2p_deploy.engines.runner import BoundRunner, ClosingRunner, TensorRunner, TorchRunner
from s2p_deploy.errors import InputError
from s2p_deploy.records import TensorSpec, TimestepTable

INPUTS = (
    TensorSpec("sample", "float16", ("batch", 4, 8, 8)),
    TensorSpec("timestep_index", "int64", ("batch",)),
    TensorSpec("encoder_hidden_states", "float16", ("batch", 6, 48)),
)
ROWS = TimestepTable("DDIMScheduler", {}, 3, (1, 501, 981), np.linspace(0.03, 1.5, 1000))


class Echo(ClosingRunner):
    """Gives back what it was given."""

    closed = False

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"noise_pred": inputs["sample"], **inputs}

    def close(self) -> None:
        self.closed = True


def given(batch: int = 2) -> dict[str, np.ndarray]:
    return {
        "sample": np.full((batch, 4, 8, 8), 0.1, np.float32),
        "timestep_index": np.arange(batch, dtype=np.int32),
        "encoder_hidden_states": np.zeros((batch, 6, 48), np.float64),
    }


def test_inputs_are_cast_to_what_the_engine_takes() -> None:
    outputs = BoundRunner(Echo(), INPUTS, ROWS).infer(given())
    assert {name: outputs[name].dtype.name for name in given()} == {spec.name: spec.dtype for spec in INPUTS}


def test_a_call_takes_the_step_and_gives_the_prediction() -> None:
    values = given()
    result = BoundRunner(Echo(), INPUTS, ROWS)(
        values["sample"], values["timestep_index"], values["encoder_hidden_states"]
    )
    assert np.array_equal(result, values["sample"].astype(np.float16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": np.zeros((2, 4, 16, 16))}, r"sample has shape \[2, 4, 16, 16\], the engine takes \[2, 4, 8, 8\]"),
        ({"timestep_index": np.asarray([0])}, "sample has shape"),
        ({"timestep_index": np.asarray([0, 1000])}, "indices are 0 to 999"),
        ({"timestep_index": np.asarray([0, -1])}, "indices are 0 to 999"),
        ({"act_scales": np.ones((1000, 2))}, "no input 'act_scales'"),
    ],
)
def test_wrong_inputs_are_refused(change: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BoundRunner(Echo(), INPUTS, ROWS).infer(given() | change)


def test_a_missing_input_is_named() -> None:
    values = given()
    del values["encoder_hidden_states"]
    with pytest.raises(InputError, match="encoder_hidden_states"):
        BoundRunner(Echo(), INPUTS, ROWS).infer(values)


def test_an_added_condition_goes_to_a_torch_denoiser_where_it_is_given() -> None:
    def denoiser(sample: torch.Tensor, rows: torch.Tensor, text: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        assert added.dtype == text.dtype == torch.float32
        return sample + added.sum(1).view(-1, 1, 1, 1)

    added = np.asarray([[1, 2], [3, 4]], np.float64)
    output = TorchRunner(denoiser).infer(given() | {"added_cond": added})["noise_pred"]
    assert np.allclose(output[:, 0, 0, 0], [3.1, 7.1])


def test_leaving_the_context_closes() -> None:
    echo = Echo()
    with BoundRunner(echo, INPUTS, ROWS):
        assert not echo.closed
    assert echo.closed


def test_a_torch_denoiser_runs_behind_the_same_call() -> None:
    def denoiser(sample: torch.Tensor, rows: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        assert rows.dtype == torch.int64
        assert not torch.is_grad_enabled()
        return sample * rows.view(-1, 1, 1, 1) + text.mean()

    with TorchRunner(denoiser) as runner:
        output = runner.infer(given())["noise_pred"]
    assert output.dtype == np.float32
    assert np.allclose(output[1], 0.1)
    assert np.allclose(output[0], 0.0)


def test_a_bfloat16_result_becomes_float32() -> None:
    runner = TorchRunner(lambda sample, _rows, _text: sample, torch.bfloat16)
    assert runner.infer(given())["noise_pred"].dtype == np.float32


class Denoiser(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen: list[tuple[torch.device, torch.dtype]] = []

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        self.seen = [(tensor.device, tensor.dtype) for tensor in inputs]
        return inputs[0] * self.weight


def test_a_torch_denoiser_takes_tensors_and_is_fed_where_its_weights_are() -> None:
    """On the device without memory, which is another one for every operator; it may go there between two calls."""
    tensors = {name: torch.from_numpy(value) for name, value in given().items()}
    denoiser = Denoiser()
    runner = TorchRunner(denoiser)
    assert isinstance(runner, TensorRunner)
    assert torch.equal(runner.infer_tensors(tensors)["noise_pred"], tensors["sample"])
    denoiser.to("meta")
    output = runner.infer_tensors(tensors)["noise_pred"]
    meta = torch.device("meta")
    assert (output.device, output.shape) == (meta, tensors["sample"].shape)
    assert denoiser.seen == [(meta, torch.float32), (meta, torch.int64), (meta, torch.float32)]


class Shaped(Echo):
    """Remembers what it was told."""

    def tune(self, shapes: Sequence[Mapping[str, tuple[int, ...]]]) -> None:
        self.shapes = list(shapes)


def test_a_batch_to_be_fast_at_reaches_the_runner_as_the_shapes_of_its_inputs() -> None:
    inner = Shaped()
    BoundRunner(inner, INPUTS, ROWS).tune(4, 8)
    four, eight = inner.shapes
    assert four == {"sample": (4, 4, 8, 8), "timestep_index": (4,), "encoder_hidden_states": (4, 6, 48)}
    assert eight["sample"] == (8, 4, 8, 8)
    BoundRunner(Echo(), INPUTS, ROWS).tune(4)  # to whom it is all the same
