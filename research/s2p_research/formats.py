"""Integer formats that no engine has, and the weights that use fewer codes than INT4."""

from __future__ import annotations

from typing import TYPE_CHECKING

from s2p_deploy.numerics import IntegerFormat, format_by_name

if TYPE_CHECKING:
    from s2p_deploy.records import LayerPlan

INT10 = IntegerFormat("int10", -512, 511)  # PCR's relaxed activations (arXiv 2311.06322)
# BitsFusion's balanced integers for "1, 2 and 3 bits" (arXiv 2406.04333): 2^n + 1 levels, zero in the middle.
LEVELS3, LEVELS5, LEVELS9 = (IntegerFormat(f"levels{levels}", -(levels // 2), levels // 2) for levels in (3, 5, 9))
LOW_BIT = (LEVELS3, LEVELS5, LEVELS9)


def weight_format(layer: LayerPlan) -> IntegerFormat | None:
    """Returns the format of a layer's weights.

    In a plan a low-bit layer is INT4, whose codes include those of 3, 5 and 9 levels; its rule ends with the name of
    its format.
    """
    return next((fmt for fmt in LOW_BIT if layer.rule.endswith(f", {fmt.name}")), format_by_name(layer.weights))
