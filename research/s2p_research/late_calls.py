"""Pictures of an engine whose last calls, those at the lowest noise, floating point makes instead: where errors are.

    python -m s2p_research.late_calls NAME=ENGINE... --task pndm:50@2 --below 0 62 182 --out FILE

A call below a timestep is floating point's; ``0`` leaves all calls to the engine. ``--above`` gives it those from a
timestep on instead.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.api import as_prompts
from s2p_deploy.bench.result import this_machine
from s2p_deploy.calib import fp_denoiser
from s2p_deploy.engines import TorchRunner, load_engine
from s2p_deploy.engines.runner import ClosingRunner
from s2p_deploy.families import denoiser_of, load_pipeline, with_denoiser
from s2p_deploy.pipeline import Schedule, engine_denoiser, timesteps_of
from s2p_deploy.records import Engine
from s2p_deploy.validation.chain import open_chain
from s2p_deploy.validation.pictures import generate_pictures
from s2p_research.yardsticks import Task, compared_row, spread

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from s2p_deploy.engines import Runner
    from s2p_deploy.records import PromptSet
    from s2p_deploy.validation.chain import Chain

KIND = "LateCalls"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="+", metavar="NAME=ENGINE")
    parser.add_argument("--task", action="append", required=True)
    parser.add_argument("--below", type=int, nargs="+", default=[0], metavar="TIMESTEP")
    parser.add_argument("--above", type=int, nargs="+", default=[], metavar="TIMESTEP")
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--prompts", default="shapes:held_out")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    prompts = as_prompts(options.prompts).first(options.pictures)
    about = {"kind": KIND, "machine": this_machine().model_dump(), "prompts": options.prompts}
    about |= {"pictures": len(prompts.prompts), "rows": []}
    spans = [(0, end) for end in options.below] + [(start, None) for start in options.above]
    for text in options.task:
        for name, _, folder in (one.partition("=") for one in options.engines):
            rows = rows_of(text, name, open_chain(Engine.open(Path(folder))), prompts, spans)
            about["rows"] += rows
            for row in rows:
                print(text, *line_of(row), sep=" | ", flush=True)
            options.out.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def rows_of(
    text: str, name: str, chain: Chain, prompts: PromptSet, spans: Sequence[tuple[int, int | None]]
) -> list[dict[str, Any]]:
    """Draws a task once for each span of timesteps that floating point takes; returns a row with every PSNR for each.

    A span is its first timestep, and the one that it ends before (None: it has no end). Of spans with the same calls
    the first is drawn.
    """
    task = Task.of(text, Schedule.of(chain.recipe.sampling))
    pipe = load_pipeline(chain.base)
    steps = chain.calibrated.timesteps
    whole = TorchRunner(fp_denoiser(chain.base, steps.steps))
    reference = generate_pictures(pipe, prompts, task.schedule, task.guidance_scale).pictures
    timesteps = timesteps_of(pipe, task.schedule)
    rows = []
    with load_engine(chain.engine, chain.graph, schedules=[timesteps]) as engine:
        calls: dict[tuple[bool, ...], tuple[int, int | None, NDArray[np.bool_]]] = {}
        for start, end in spans:
            handed = (timesteps >= start) & (timesteps < (np.inf if end is None else end))
            calls.setdefault(tuple(handed.tolist()), (start, end, handed))
        for start, end, handed in calls.values():
            runner = HandingOver(engine, whole, frozenset(engine.indices(timesteps[handed]).tolist()))
            config = denoiser_of(pipe).config
            denoiser = engine_denoiser(runner, config, engine.timesteps, engine.profile, indices=engine.indices)
            drawn = generate_pictures(with_denoiser(pipe, denoiser), prompts, task.schedule, task.guidance_scale)
            row = compared_row(task, name, reference, drawn.pictures)
            row |= {"from": start, "to": end, "calls": int(handed.sum()), "of": len(timesteps)}
            rows.append(row)
    return rows


def line_of(row: Mapping[str, Any]) -> list[str]:
    """Writes a row: which calls floating point made, and PSNR in dB (median, 10th percentile, worst)."""
    calls, of = row["calls"], row["of"]
    where = "none" if not calls else f"last {calls} of {of}" if row["to"] else f"first {calls} of {of}"
    return [row["name"], where, *spread(np.array(row["psnr"]))]


def table_of(found: Mapping[str, Any]) -> str:
    """Writes a Markdown table per task."""
    head = ["engine", "calls in floating point", "median", "10th pct", "worst"]
    parts = [f"{found['pictures']} pictures of {found['prompts']}. PSNR in dB."]
    for task in dict.fromkeys(row["task"] for row in found["rows"]):
        lines = [head, ["---"] * len(head), *(line_of(row) for row in found["rows"] if row["task"] == task)]
        parts += [f"`{task}`:", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return "\n" + "\n\n".join(parts) + "\n\n"


class HandingOver(ClosingRunner):
    """An engine, in whose place another runner computes where a call's timestep index is among some."""

    def __init__(self, engine: Runner, other: Runner, indices: frozenset[int]) -> None:
        self._engine, self._other, self._indices = engine, other, indices

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Computes a call, whose samples have one timestep."""
        (index,) = set(inputs["timestep_index"].tolist())
        return (self._other if index in self._indices else self._engine).infer(inputs)

    def close(self) -> None:
        """Does nothing: both belong to the caller."""


if __name__ == "__main__":
    main()
