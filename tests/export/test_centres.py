from __future__ import annotations

import numpy as np
import pytest

from s2p_deploy.errors import InputError
from s2p_deploy.export.centres import usable_centres
from s2p_deploy.records import ScaleTable


def table(*columns: list[float]) -> ScaleTable:
    return ScaleTable(np.asarray(columns, np.float32).T, tuple("ab"[: len(columns)]), (0,))


def test_centres_are_the_geometric_mean_of_the_ends() -> None:
    assert usable_centres(table([1.0, 2.0, 4.0], [0.5, 0.5, 0.5]), "fp32") == {"a": 2.0, "b": 0.5}


def test_half_centres_are_numbers_of_half_precision() -> None:
    centre = usable_centres(table([0.1, 0.1, 0.1]), "fp16")["a"]
    assert centre == float(np.float16(0.1)) != float(np.float32(0.1))


def test_no_points_have_no_centres() -> None:
    assert usable_centres(ScaleTable(np.ones((3, 0), np.float32), (), ()), "fp16") == {}


@pytest.mark.parametrize("column", [[1e-5, 1e5, 1.0], [1e-6, 1e-6, 1e-6], [1e5, 1e5, 1e5]])
def test_what_half_precision_cannot_hold_is_refused(column: list[float]) -> None:
    usable_centres(table([1.0, 1.0, 1.0], column), "fp32")
    with pytest.raises(InputError, match=r"act point b: its scales .* leave the range of fp16: use --dtype fp32"):
        usable_centres(table([1.0, 1.0, 1.0], column), "fp16")
