"""The model card of a validated engine: ``README.md`` in the report's folder, with figures, gates and pictures."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from huggingface_hub import EvalResult, ModelCardData

from s2p_deploy.engines.model_card import card_environment, card_metadata, shown_source
from s2p_deploy.records import Skipped
from s2p_deploy.validation.report_page import picture_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from s2p_deploy.validation.report import ReportData

_SHOWN_PICTURES = 3  # the worst, the median and the best
_NOT_FIGURES = ("pixel_shift_median",)


def report_card(data: ReportData, license_name: str | None) -> str:
    """Writes the card of an engine that was validated.

    Args:
        data: the report's content.
        license_name: the base pipeline's licence, where it names one.
    """
    pictures = None if isinstance(data.pictures, Skipped) else data.pictures
    rows = [row for row in picture_rows(pictures, _NOT_FIGURES) if row.value is not None] if pictures else []
    described = {"backend": data.engine.backend, "layers": [vars(layer) for layer in data.engine.layers]}
    # of others' names only digests
    results = [
        EvalResult(
            task_type="text-to-image",
            dataset_type="prompts",
            dataset_name=f"{len(data.prompts)} prompts, {data.digests['prompts'][:16]}",
            metric_type=row.name.replace(", ", "_").replace(" ", "_"),
            metric_name=f"{row.name}, to FP",
            metric_value=row.value,
        )
        for row in rows
    ]
    metadata = ModelCardData(
        **card_metadata(data.base, license_name, described),
        model_name=f"s2p-deploy engine {data.digests['engine'][:16]}" if results else None,
        eval_results=results or None,
    )
    return (
        card_environment("s2p_deploy.validation")
        .get_template("model_card.md.j2")
        .render(
            metadata=f"---\n{metadata.to_yaml()}\n---",
            data=data,
            source=shown_source(data.base),
            pictures=pictures,
            rows=rows,
            shown=_shown(pictures.values["psnr"]) if pictures else [],
            prompts=[prompt.text for prompt in data.prompts],
        )
    )


def _shown(psnr: Sequence[float]) -> list[tuple[int, float | None]]:
    """Chooses the pictures with the worst, the median and the best PSNR; returns their places and their PSNR."""
    scores = [value if math.isfinite(value) else -math.inf for value in psnr]
    order = sorted(range(len(psnr)), key=scores.__getitem__)
    chosen = dict.fromkeys(order[place] for place in (0, len(order) // 2, len(order) - 1))
    return [(index, psnr[index] if math.isfinite(psnr[index]) else None) for index in list(chosen)[:_SHOWN_PICTURES]]
