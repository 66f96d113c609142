from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from s2p_deploy.engines import PreparedParts
from s2p_deploy.records import ScaleTable
from s2p_deploy.validation import Chain
from s2p_deploy.validation.agreement import REFERENCE
from s2p_deploy.validation.tables import constant_time_gap, scale_gap


def changed(table: ScaleTable, row: int, column: int, factor: float) -> ScaleTable:
    scales = table.scales.copy()
    scales[row, column] *= factor
    return replace(table, scales=scales)


@pytest.mark.parametrize("factor", [1.01, 0.5])
def test_the_largest_difference_of_scales_is_placed(chain: Chain, factor: float) -> None:
    table = chain.calibrated.scales
    gap = scale_gap("scale table", changed(table, 7, 3, factor), table)
    assert gap.difference == pytest.approx(abs(factor - 1), rel=1e-4)
    assert gap.where == f"{table.points[3]}, row 7"
    assert gap.n == table.scales.size


def test_equal_scales_have_no_difference_and_other_ones_no_number(chain: Chain) -> None:
    table = chain.calibrated.scales
    assert scale_gap("scale table", table, table).difference == 0.0
    renamed = replace(table, points=tuple(f"other {name}" for name in table.points))
    assert np.isnan(scale_gap("scale table", renamed, table).difference)
    assert np.isnan(scale_gap("scale table", replace(table, scales=table.scales[:-1]), table).difference)
    none = ScaleTable(np.zeros((1000, 0), np.float32), (), ())
    assert scale_gap("scale table", none, none).n == 0


def test_the_time_table_of_a_graph_is_the_models(chain: Chain) -> None:
    gap = constant_time_gap("time table", PreparedParts(chain.graph, *REFERENCE), chain.calibrated, half=False)
    assert gap is not None
    assert (gap.difference, gap.n) == (0.0, 1000)
