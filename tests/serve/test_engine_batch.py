from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from s2p_deploy.engines.runner import ClosingRunner
from s2p_deploy.serve.drawing import EngineCall
from s2p_deploy.serve.engine_batch import run_calls

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray


class Adding(ClosingRunner):
    """Adds each sample's row to it."""

    seen = 0

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self.seen = len(inputs["sample"])
        return {"noise_pred": inputs["sample"] + inputs["step_index"].reshape(-1, 1, 1, 1)}

    def close(self) -> None: ...


@pytest.mark.parametrize("batch", [3, 4, 8])
def test_every_call_gets_the_answer_to_its_own_samples_and_rows(batch: int) -> None:
    calls = [
        EngineCall({"sample": np.full((n, 1, 2, 2), 10.0 * n), "step_index": np.full(n, row)})
        for n, row in ((2, 5), (1, 7))
    ]
    runner = Adding()
    answers = run_calls(runner, calls, batch)
    assert runner.seen == batch
    assert [answer["noise_pred"].shape for answer in answers] == [(2, 1, 2, 2), (1, 1, 2, 2)]
    assert [set(answer["noise_pred"].ravel()) for answer in answers] == [{25.0}, {17.0}]
