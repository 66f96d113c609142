"""The ValidationReport's folder: the numbers, the page, the pictures, and all measurements for another judgement."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from s2p_deploy.engines.model_card import CARD, license_of
from s2p_deploy.records import ValidationReport, write_artifact
from s2p_deploy.records.validation_report import MEASUREMENTS, REPORT
from s2p_deploy.timesteps import row_origins
from s2p_deploy.validation.exact_json import exact_text
from s2p_deploy.validation.gates import judge, part_limit, verdict_of
from s2p_deploy.validation.model_card import report_card
from s2p_deploy.validation.numbers import Skipped
from s2p_deploy.validation.report import render_html
from s2p_deploy.validation.report_pictures import write_pairs
from s2p_deploy.validation.summary import plain, summary
from s2p_deploy.validation.training_figures import read_training_log

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from s2p_deploy.recipe import Gates
    from s2p_deploy.records import Manifest, PromptSet
    from s2p_deploy.validation.chain import Chain
    from s2p_deploy.validation.kept import Spent
    from s2p_deploy.validation.measurements import Measurements
    from s2p_deploy.validation.report_pictures import Pairs

SCHEMA = 1
PICTURES = "pictures"
_LIBRARIES = ("s2p-deploy", "torch", "diffusers", "transformers", "numpy", "onnx", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Finished:
    """What a validation found; ``pairs`` are the pictures, None where the engine could not draw here.

    ``weights`` are the digests of the files that metrics read, ``command`` and ``spent`` how and how long it ran,
    ``bench`` what ``s2p-deploy bench`` measured of the engine.
    """

    prompts: PromptSet
    found: Measurements
    pairs: Pairs | None
    weights: dict[str, str]
    command: str
    spent: Spent
    bench: Mapping[str, Any] | None = None


def write_report(chain: Chain, finished: Finished, gates: Gates, out: Path, *, replace: bool) -> ValidationReport:
    """Judges what was found and writes the report.

    Raises:
        InputError: ``out`` exists and ``replace`` is not set.
    """
    data = report_data(chain, finished, gates)
    engine, pairs = chain.engine, finished.pairs

    def fill(folder: Path) -> dict[str, Any]:
        (folder / REPORT).write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        (folder / MEASUREMENTS).write_text(exact_text(finished.found) + "\n", encoding="utf-8")
        html = render_html(data, chain.graph, pairs, training=read_training_log(chain.calibrated.folder))
        (folder / "report.html").write_text(html, encoding="utf-8")
        (folder / CARD).write_text(report_card(data, license_of(chain.base.folder)), encoding="utf-8")
        if pairs is not None:
            write_pairs(pairs, folder / PICTURES)
        return {"verdict": data["verdict"], "prompts": finished.prompts.digest}

    write_artifact(
        out,
        kind="ValidationReport",
        base=engine.manifest.base,
        recipe=engine.manifest.recipe,
        parents={"engine": (engine.folder, engine.manifest)},
        fill=fill,
        replace=replace,
    )
    return ValidationReport.open(out)


def report_data(chain: Chain, finished: Finished, gates: Gates) -> dict[str, Any]:
    """All that ``report.json`` says."""
    found = finished.found
    results = judge(found, gates)
    judged: dict[str, Any] = plain({"gates": results, "verdict": verdict_of(results)})
    data = _described(chain, finished, gates) | judged | summary(found)
    data["prompts"] = [asdict(prompt) for prompt in finished.prompts.prompts]
    data["rows"] = _row_origins(chain, found)
    data["block_limits"] = {
        error.block: part_limit(error.quantization, gates.block_margin, gates, half=found.engine_half)
        for error in found.block_errors
    }
    data["spent"] = asdict(finished.spent)
    return data | ({"bench": dict(finished.bench)} if finished.bench is not None else {})


def _described(chain: Chain, finished: Finished, gates: Gates) -> dict[str, Any]:
    """What was validated: names, digests, versions and sizes in bytes."""
    engine, graph, recipe = chain.engine, chain.graph, chain.recipe
    parts: dict[str, Manifest | None] = {
        "engine": engine.manifest,
        "graph": graph.manifest,
        "calib": chain.calibrated.manifest,
        "dataset": chain.dataset.manifest if chain.dataset else None,
    }
    return {
        "schema": SCHEMA,
        "recipe": {"name": recipe.name, "digest": recipe.digest(), "block_sqnr": gates.block_sqnr},
        "base": asdict(engine.manifest.base),
        "engine": {
            "backend": engine.backend,
            "hint": engine.hint,
            "dtype": engine.dtype,
            "environment": engine.environment,
            "sites": [asdict(site) for site in engine.sites],
        },
        "digests": {name: manifest.digest for name, manifest in parts.items() if manifest}
        | {"base": engine.manifest.base.digest, "prompts": finished.prompts.digest},
        "weights": finished.weights,
        "versions": {name: version for name in _LIBRARIES if (version := _version(name))},
        "command": finished.command,
        "sizes": {
            "engine": _bytes([engine.folder / n for n in engine.engine_files] + [*engine.folder.glob("text.onnx*")]),
            "graph": _bytes(file for name in ("denoiser", "text") for file in graph.folder.glob(f"{name}.onnx*")),
            "base_denoiser": _bytes(chain.base.denoiser_folder.glob("*.safetensors")),
        },
    }


def _row_origins(chain: Chain, found: Measurements) -> list[dict[str, Any]]:
    """For every schedule that was drawn: on how many timesteps the scales were trained, interpolated and held."""
    drawn = () if isinstance(found.pictures, Skipped) else (found.pictures, *found.other_schedules)
    table = chain.engine.timesteps
    return [
        {"scheduler": one.schedule.scheduler or "pipeline's own", "steps": one.schedule.steps}
        | {kind: len(timesteps) for kind, timesteps in asdict(row_origins(one.timesteps, table)).items()}
        for one in drawn
    ]


def _bytes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
