"""Late calls: which calls floating point makes, and what the table says of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from s2p_research.late_calls import HandingOver, line_of, table_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray


class Giving:
    def __init__(self, value: float) -> None:
        self.value = value

    def infer(self, _inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return {"noise_pred": np.full(2, self.value)}

    def close(self) -> None: ...


def test_calls_of_some_timesteps_are_the_other_runners() -> None:
    runner = HandingOver(Giving(8.0), Giving(32.0), frozenset({1, 21}))
    found = [runner.infer({"timestep_index": np.full(2, index)})["noise_pred"][0] for index in (981, 41, 21, 1)]
    assert found == [8.0, 8.0, 32.0, 32.0]
    with pytest.raises(ValueError, match="too many values"):
        runner.infer({"timestep_index": np.array([1, 981])})


def test_a_row_says_which_calls_were_handed_over() -> None:
    row = {"task": "pndm:50@2", "name": "w8a8", "psnr": [40.0, 40.0], "same": [1, 1], "of": 51}
    rows = [row | {"from": 0, "to": 0, "calls": 0}, row | {"from": 0, "to": 62, "calls": 4}]
    rows.append(row | {"from": 200, "to": None, "calls": 41})
    assert [line_of(one)[1] for one in rows] == ["none", "last 4 of 51", "first 41 of 51"]
    text = table_of({"pictures": 2, "prompts": "p", "rows": rows})
    assert "| w8a8 | last 4 of 51 | 40.00 (40.00 to 40.00) |" in text
