"""What a child feeds an engine: every dynamic size by its own name, one row, the prompt's inputs the same."""

from __future__ import annotations

import numpy as np
import pytest

from s2p_deploy.bench.worker import random_inputs
from s2p_deploy.errors import InputError
from s2p_deploy.records import TensorSpec

SPECS = (
    TensorSpec("sample", "float32", ("batch", 4, "height", "width")),
    TensorSpec("timestep_index", "int64", ("batch",)),
    TensorSpec("encoder_hidden_states", "float16", ("batch", 3, 5)),
)
SIZES = {"batch": 2, "height": 8, "width": 6}


def test_sizes_go_by_name() -> None:
    found = random_inputs(SPECS, SIZES, 7, 0)
    assert {name: value.shape for name, value in found.items()} == {
        "sample": (2, 4, 8, 6),
        "timestep_index": (2,),
        "encoder_hidden_states": (2, 3, 5),
    }
    assert found["timestep_index"].tolist() == [7, 7]
    assert found["encoder_hidden_states"].dtype == np.float16


def test_only_the_prompts_inputs_stay_from_step_to_step() -> None:
    first, second = (random_inputs(SPECS, SIZES, 7, number) for number in (0, 1))
    assert np.array_equal(first["encoder_hidden_states"], second["encoder_hidden_states"])
    assert not np.array_equal(first["sample"], second["sample"])


def test_a_size_nobody_gives_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="'height'"):
        random_inputs(SPECS, {"batch": 2}, 7, 0)
