"""A target of fidelity on the bundled pipeline: the search, and the engine on prompts that nothing has seen.

    python -m benchmarks.engines.target [--psnr 50] [--recipe w8a8] [--work build/target] [--pictures 256]
    python -m benchmarks.engines.target --narrow w4a8 [--work build/target] [--set KEY=VALUE ...]

The prompts of the search are drawn from the whole grammar, half of them with a combination that the pipeline was never
trained on, as ``shapes:held_out`` has in every one; none is of that file. What is there already is kept. Writes
``results/fidelity_target.json``. The second trains a recipe of INT4 weights with what the first left in A16, to the
engine ``WORK/RECIPE/engine``, for ``s2p_research.yardsticks`` to compare.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from s2p_deploy.api import as_prompts
from s2p_deploy.bench.result import this_machine
from s2p_deploy.calib import calibrate
from s2p_deploy.cli.options import overrides_from_settings
from s2p_deploy.context import Context
from s2p_deploy.engines import build_engine
from s2p_deploy.export import export_graph
from s2p_deploy.families import resolve_base
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import (
    CalibratedModel,
    Engine,
    ExportedGraph,
    PrecisionPlan,
    Prompt,
    PromptSet,
    ValidationReport,
)
from s2p_deploy.shapes.scenes import distinct_captions
from s2p_deploy.validation import validate

RESULTS = Path(__file__).resolve().parents[1] / "results"
TARGET = {"cost": "layers", "ranked": 32, "searched": 256, "verified": 64}
SEARCH_PROMPTS = 384  # for both rounds of verification
_SEED = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--psnr", type=float, default=50.0)
    parser.add_argument("--recipe", default="w8a8")
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--dataset", type=Path, default=None)
    parser.add_argument("--work", type=Path, default=Path("build/target"))
    parser.add_argument("--build-only", action="store_true", help="validate nothing")
    parser.add_argument("--narrow", metavar="RECIPE")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=RESULTS / "fidelity_target.json")
    asked = parser.parse_args()
    if asked.narrow:
        plan = CalibratedModel.open(asked.work / "calib").plan
        trained(Recipe.load(asked.narrow, overrides_from_settings(asked.set)), plan, asked.work, asked.dataset)
        return
    recipe = Recipe.load(
        asked.recipe, {"target": TARGET | {"psnr": asked.psnr}, "validation": {"pictures": asked.pictures}}
    )
    model = calibrate(
        resolve_base("shapes"),
        recipe,
        prompts_of_search(recipe.dataset.prompts),
        asked.work / "calib",
        dataset=asked.dataset,
        on_estimate=lambda estimate: print(estimate, flush=True),
        context=Context(
            threads=1, samples_per_call=32, progress=lambda stage, done, total: print(stage, done, total, flush=True)
        ),
    )
    engine = built(model, asked.work)
    found = {"machine": this_machine().model_dump()}
    found |= {"recipe": model.manifest.recipe["target"], "target": model.manifest.content["target"]}
    if not asked.build_only:
        held_out = as_prompts("shapes:held_out").first(asked.pictures)
        found |= figures(validate(engine, held_out, asked.work / "report", replace=True))
    asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(found["target"]["text"], flush=True)


def prompts_of_search(calibrating: int) -> PromptSet:
    """Takes the first prompts of ``shapes:train`` to calibrate, and behind them draws others from the whole grammar."""
    known = {prompt.text for name in ("train", "held_out") for prompt in as_prompts(f"shapes:{name}").prompts}
    drawn = [distinct_captions(np.random.default_rng(_SEED + unseen), held_out=unseen) for unseen in (False, True)]
    new = (text for text in chain.from_iterable(zip(*drawn, strict=True)) if text not in known)
    texts = islice(new, SEARCH_PROMPTS)
    search = (Prompt(f"search-{number:04d}", text) for number, text in enumerate(texts))
    return PromptSet((*as_prompts("shapes:train").first(calibrating).prompts, *search))


def built(model: CalibratedModel, work: Path) -> Engine:
    """Exports a model and builds its OpenVINO engine (f32), unless they are there."""
    folder = work / "graph"
    graph = ExportedGraph.open(folder) if folder.exists() else export_graph(model, folder)
    folder = work / "engine"
    return Engine.open(folder) if folder.exists() else build_engine(graph, folder, backend="openvino")


def narrowed(plan: PrecisionPlan, weights: str) -> PrecisionPlan:
    """Returns the plan with weights of another format, but for the first layer and the last."""
    ends = {"input", "output"}
    layers = (layer if layer.rule in ends else replace(layer, weights=weights) for layer in plan.layers)
    return replace(plan, layers=tuple(layers))


def trained(recipe: Recipe, found: PrecisionPlan, work: Path, dataset: Path | None) -> Engine:
    """Trains a recipe of INT4 weights with the activations of a plan, and builds its engine."""
    out = work / recipe.name
    model = calibrate(
        resolve_base("shapes"),
        recipe,
        as_prompts("shapes:train"),
        out / "calib",
        plan=narrowed(found, recipe.weights),
        dataset=dataset,
        context=Context(threads=1, progress=lambda *done: print(*done, flush=True)),
    )
    print("bits", json.dumps(model.manifest.content["average_bits"]), flush=True)
    return built(model, out)


def figures(report: ValidationReport) -> dict[str, Any]:
    """Collects what the gates found, and what the engine's pictures are."""
    gates = [
        {"name": gate.name, "limit": gate.limit, "found": gate.value, "n": gate.n, "status": gate.status}
        for gate in report.gates
    ]
    return {"gates": gates, "pictures": report.data["pictures"]}


if __name__ == "__main__":
    main()
