"""How often a right engine fails: validations with different latents, prompts and noise, and the bound that they give.

    python -m benchmarks.engines.false_alarms ENGINE... [--seeds 10] [--latents 32] [--pictures 2]

Every seed takes its own half of the samples, its own held-out prompts and its own noise. Gates of pictures are
reported apart: their limits are meant for many pictures. Rows of other engines stay in ``results/false_alarms.json``.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline

from s2p_deploy.api import as_prompts
from s2p_deploy.calib import FakeQuantDenoiser, fake_quant_denoiser
from s2p_deploy.engines import BoundRunner, RunnableSubgraph, Subgraphs, engine_subgraphs, load_engine
from s2p_deploy.families import load_pipeline
from s2p_deploy.pipeline import Schedule, pipeline_with_engine
from s2p_deploy.records import Engine, GateResult, LatentDataset, Prompt, PromptSet, Skipped
from s2p_deploy.shapes.classifier import CLASSIFIER
from s2p_deploy.validation import Chain, open_chain
from s2p_deploy.validation.end_to_end import measure_end_to_end, whole_denoiser
from s2p_deploy.validation.gates import judge
from s2p_deploy.validation.measurements import Measurements, PictureComparison
from s2p_deploy.validation.parity import measure_parity
from s2p_deploy.validation.pictures import compare_pictures, generate_pictures
from s2p_deploy.validation.reference import choose_latents

CONFIDENCE = 0.95
_OF_PICTURES = ("pictures", "attribute")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--latents", type=int, default=32)
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--prompts", default="shapes:held_out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "false_alarms.json")
    asked = parser.parse_args()
    prompts = as_prompts(asked.prompts)
    for folder in asked.engine:
        chain = open_chain(Engine.open(folder))
        results: list[tuple[GateResult, ...]] = []
        with opened(chain) as right:
            for seed in range(asked.seeds):
                results.append(judged(right, prompts, seed, asked.latents, asked.pictures))
                known = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {}
                known[f"{chain.recipe.name}, {chain.engine.backend} {chain.engine.precision}"] = figures(
                    chain, results, asked
                )
                asked.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
                print(folder, seed, alarms(results[-1]), flush=True)


@dataclass(frozen=True)
class Opened:
    """A chain whose engine is loaded and whose parts are compiled once for all seeds."""

    chain: Chain
    pipe: DiffusionPipeline
    fake_quant: FakeQuantDenoiser
    runner: BoundRunner
    parts: Subgraphs | None


class CompiledOnce:
    """Parts that are cut out and compiled when they are first asked for."""

    def __init__(self, parts: Subgraphs) -> None:
        self.constant = parts.constant
        self._between = functools.cache(parts.between)

    def between(self, entries: Sequence[str], outputs: Sequence[str]) -> RunnableSubgraph:
        """See :class:`Subgraphs`."""
        return self._between(tuple(entries), tuple(outputs))


@contextmanager
def opened(chain: Chain) -> Iterator[Opened]:
    with load_engine(chain.engine, chain.graph) as runner, engine_subgraphs(chain.engine, chain.graph) as parts:
        once = None if parts is None else CompiledOnce(parts)
        yield Opened(chain, load_pipeline(chain.base), fake_quant_denoiser(chain.calibrated), runner, once)


def judged(right: Opened, prompts: PromptSet, seed: int, latents: int, pictures: int) -> tuple[GateResult, ...]:
    """All gates, on what a seed draws."""
    rng, chain = np.random.default_rng(seed), right.chain
    assert chain.dataset is not None  # a calibrated model has one
    chosen = choose_latents(half_of(chain.dataset, rng), latents)
    whole = whole_denoiser(right.pipe, chain.calibrated.timesteps)
    found = Measurements(
        **measure_parity(chain, right.fake_quant, chosen, right.runner, right.parts),
        end_to_end=measure_end_to_end(whole, right.fake_quant, right.runner, chosen),
        pictures=drawn(right, some_of(prompts, pictures, rng, seed)) if pictures else Skipped("no pictures asked for"),
    )
    return judge(found, chain.recipe.validation.gates)


def drawn(right: Opened, prompts: PromptSet) -> PictureComparison:
    schedule, guidance = Schedule.of(right.chain.recipe.sampling), right.chain.guidance_scale
    candidate = pipeline_with_engine(right.pipe, right.chain.engine, right.runner)
    first, second = (generate_pictures(pipe, prompts, schedule, guidance) for pipe in (right.pipe, candidate))
    return compare_pictures(first, second, prompts, schedule, guidance, CLASSIFIER)


def some_of(prompts: PromptSet, count: int, rng: np.random.Generator, seed: int) -> PromptSet:
    """Prompts under new names: their noise comes from the name."""
    chosen = [prompts.prompts[index] for index in rng.choice(len(prompts.prompts), count, replace=False)]
    return PromptSet(tuple(Prompt(f"{one.id}/{seed}", one.text, one.negative) for one in chosen))


def half_of(dataset: LatentDataset, rng: np.random.Generator) -> LatentDataset:
    """Half of a dataset's samples."""
    chosen = np.sort(rng.choice(len(dataset.timestep_indices), len(dataset.timestep_indices) // 2, replace=False))
    columns = ("latents", "timestep_indices", "cond", "uncond", "prompt")
    return replace(dataset, **{name: getattr(dataset, name)[chosen] for name in columns})


def alarms(results: tuple[GateResult, ...], *, of_pictures: bool = False) -> list[str]:
    """Names of the gates that failed, those of pictures or all others."""
    return [one.name for one in results if one.status == "failed" and one.name.startswith(_OF_PICTURES) == of_pictures]


def most_alarms(alarmed: int, runs: int, confidence: float = CONFIDENCE) -> float:
    """The largest false-alarm rate that ``alarmed`` of ``runs`` does not refute at ``confidence`` (Clopper-Pearson)."""
    from scipy.stats import beta

    return 1.0 if alarmed == runs else float(beta.ppf(confidence, alarmed + 1, runs - alarmed))


def figures(chain: Chain, results: list[tuple[GateResult, ...]], asked: argparse.Namespace) -> dict[str, Any]:
    """What the runs so far say; ``closest`` is the least that any of them had to spare, by gate."""
    numeric = [alarms(result) for result in results]
    alarmed = sum(map(bool, numeric))
    return {
        "engine": chain.engine.manifest.digest,
        "runs": len(results),
        "latents": asked.latents,
        "pictures": asked.pictures,
        "false_alarms": alarmed,
        "rate_at_most": most_alarms(alarmed, len(results)),
        "confidence": CONFIDENCE,
        "alarms": sorted({name for names in numeric for name in names}),
        "alarms_of_pictures": sum(bool(alarms(result, of_pictures=True)) for result in results),
        "closest": {name: closest(name, results) for name in gate_names(results)},
    }


def gate_names(results: list[tuple[GateResult, ...]]) -> list[str]:
    return list(dict.fromkeys(one.name for result in results for one in result if one.value is not None))


def closest(name: str, results: list[tuple[GateResult, ...]]) -> dict[str, Any]:
    """Value, limit and place of the run that came closest to a gate's limit, or passed it by most."""
    found = [one for result in results for one in result if one.name == name]
    known = [(one.value, one.limit, one) for one in found if one.value is not None and one.limit is not None]
    if not known:
        return {"not a number": len(found)}
    spare = [limit - value if "at most" in one.asks else value - limit for value, limit, one in known]
    value, limit, one = known[int(np.argmin(spare))]
    return {"asks": one.asks, "value": value, "limit": limit, "where": one.where}


if __name__ == "__main__":
    main()
