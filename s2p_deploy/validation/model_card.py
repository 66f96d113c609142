"""The model card of a validated engine: ``README.md`` in the report's folder, with figures, gates and pictures."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from s2p_deploy.engines.model_card import card_environment, card_metadata, metadata_block, shown_source
from s2p_deploy.records import Base
from s2p_deploy.validation.report_numbers import number_rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from s2p_deploy.validation.report_numbers import Row

_SHOWN_PICTURES = 3  # the worst, the median and the best
_NOT_FIGURES = ("pixel_shift_median",)


def report_card(data: Mapping[str, Any], license_name: str | None) -> str:
    """The card of an engine that was validated.

    Args:
        data: what ``report.json`` holds.
        license_name: the base pipeline's licence, where it names one.
    """
    base = Base(**data["base"])
    pictures = {} if "skipped" in data["pictures"] else data["pictures"]
    rows = [row for row in number_rows(pictures, _NOT_FIGURES) if row.value is not None]
    metadata = card_metadata(base, license_name, data["engine"])
    if rows:
        metadata["model-index"] = [_results(data, rows)]
    return (
        card_environment("s2p_deploy.validation")
        .get_template("model_card.md.j2")
        .render(
            metadata=metadata_block(metadata),
            data=data,
            source=shown_source(base),
            pictures=pictures,
            rows=rows,
            shown=_shown(pictures["values"]["psnr"]) if pictures else [],
            prompts=[prompt["text"] for prompt in data.get("prompts", ())],
        )
    )


def _results(data: Mapping[str, Any], rows: list[Row]) -> dict[str, Any]:
    """The figures as model hubs index them; of others' names only digests."""
    prompts = {"type": "prompts", "name": f"{data['pictures']['n']} prompts, {data['digests']['prompts'][:16]}"}
    metrics = [
        {"type": row.name.replace(", ", "_").replace(" ", "_"), "name": f"{row.name}, to FP", "value": row.value}
        for row in rows
    ]
    task = {"type": "text-to-image"}
    name = f"s2p-deploy engine {data['digests']['engine'][:16]}"
    return {"name": name, "results": [{"task": task, "dataset": prompts, "metrics": metrics}]}


def _shown(psnr: list[float | None]) -> list[tuple[int, float | None]]:
    """Places of the pictures with the worst, the median and the best PSNR, and that PSNR."""
    scores = [-math.inf if value is None else value for value in psnr]
    order = sorted(range(len(psnr)), key=scores.__getitem__)
    chosen = dict.fromkeys(order[place] for place in (0, len(order) // 2, len(order) - 1))
    return [(index, psnr[index]) for index in list(chosen)[:_SHOWN_PICTURES]]
