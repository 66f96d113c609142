"""The small pipelines of the SD2, SDXL and SD3 kind through the whole chain: parity, pictures, mixed rows.

    python -m benchmarks.engines.siblings [--recipe w8a8] [--work build/siblings] [--pictures 64]

Each with its own scheduler and number of steps; what is there already is kept. Writes ``results/siblings.json``; with
``--build-only`` nothing but the engines, ``WORK/SIBLING-RECIPE/engine``, for ``s2p_research.yardsticks`` to compare.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from s2p_deploy.api import as_prompts
from s2p_deploy.bench.result import this_machine
from s2p_deploy.calib import calibrate
from s2p_deploy.engines import build_engine
from s2p_deploy.export import export_graph
from s2p_deploy.families import resolve_base
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import Engine, ExportedGraph, ValidationReport
from s2p_deploy.validation import validate

BENCHMARKS = Path(__file__).resolve().parents[1]
PIPELINES = BENCHMARKS.parent / "tests" / "assets" / "pipelines"
STEPS = {"sd2": 50, "sdxl": 30, "sd3": 28}
TEXT_PADDING = 8  # tokens in the place of SD3's third text encoder, which is not there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="w8a8")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--only", choices=STEPS, action="append", help="a sibling; all if omitted")
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("build/siblings"))
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results" / "siblings.json")
    asked = parser.parse_args()
    for name in asked.only or STEPS:
        steps, work = STEPS[name], asked.work / f"{name}-{Path(asked.recipe).stem}"
        engine = built(name, asked.recipe, asked.pictures, work, asked.work / f"{name}-dataset")
        if asked.build_only:
            continue
        report = validate(engine, as_prompts("shapes:held_out").first(asked.pictures), work / "report", replace=True)
        known = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {}
        known.setdefault(asked.recipe, {})[name] = figures(report, steps)
        asked.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        print(json.dumps({name: known[asked.recipe][name]["gates"]}, indent=1), flush=True)


def built(name: str, recipe: str, pictures: int, work: Path, dataset: Path) -> Engine:
    """The OpenVINO engine (f32) of one sibling; recipes share its dataset."""
    overrides: dict[str, Any] = {
        "sampling": {"steps": STEPS[name], "max_sequence_length": TEXT_PADDING},
        "validation": {"pictures": pictures},
    }
    base, train = resolve_base(str(PIPELINES / f"shapes-{name}")), as_prompts("shapes:train")
    model = calibrate(base, Recipe.load(recipe, overrides), train, work / "calib", dataset=dataset)
    folder = work / "graph"
    graph = ExportedGraph.open(folder) if folder.exists() else export_graph(model, folder)
    folder = work / "engine"
    return Engine.open(folder) if folder.exists() else build_engine(graph, folder, backend="openvino")


def figures(report: ValidationReport, steps: int) -> dict[str, Any]:
    """What the gates found, with numbers of pictures and steps."""
    gates = [
        {"name": gate.name, "limit": gate.limit, "found": gate.value, "n": gate.n, "status": gate.status}
        for gate in report.gates
    ]
    return {
        "machine": this_machine().model_dump(),
        "steps": steps,
        "verdict": report.verdict,
        "gates": gates,
        "pictures": report.data["pictures"],
    }


if __name__ == "__main__":
    main()
