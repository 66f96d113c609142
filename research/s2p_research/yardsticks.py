"""Engines' pictures on several schedules and guidance scales, beside the floor: floating point rounded otherwise.

    python -m s2p_research.yardsticks NAME=ENGINE... --task pndm:50@2 [--task ddim:20@7.5 ...] [--floors] --out FILE

An engine's schedule may be ``own`` (as it was calibrated for). A name may repeat: several trainings of one recipe.
Gains are per picture over the engine of the first name that comes in the same place among its namesakes. Two pictures
are the same where their PSNR is at least SAME dB and the shapes checker reads the same scene in both. The floors draw
as the reference does, the denoiser in bfloat16 (autocast), or everything on one thread more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from s2p_deploy.api import as_prompts
from s2p_deploy.bench.result import this_machine
from s2p_deploy.calib import fp_denoiser
from s2p_deploy.cli.options import schedule_from_option
from s2p_deploy.engines import TorchRunner, load_engine
from s2p_deploy.families import denoiser_of, load_pipeline, with_denoiser
from s2p_deploy.metrics import mean_of, median_of, psnr_db, quantile_of, to_bytes
from s2p_deploy.pipeline import Schedule, engine_denoiser, pipeline_with_engine, timesteps_of
from s2p_deploy.records import Engine, Number
from s2p_deploy.shapes.checker import read_picture
from s2p_deploy.validation.chain import open_chain
from s2p_deploy.validation.pictures import generate_pictures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from diffusers import DiffusionPipeline
    from numpy.typing import NDArray
    from torch import Tensor

    from s2p_deploy.records import PromptSet
    from s2p_deploy.validation.chain import Chain

KIND = "Yardsticks"
SAME = 35.0
BF16, OTHER_THREADS = "FP, denoiser in BF16", "FP, one thread more"
_OWN = "own"


@dataclass(frozen=True)
class Task:
    """A schedule and a guidance scale; ``text`` as it was asked for."""

    text: str
    schedule: Schedule
    guidance_scale: float

    @staticmethod
    def of(text: str, own: Schedule) -> Task:
        """Parses ``NAME:STEPS@GUIDANCE`` or ``own@GUIDANCE``."""
        name, _, guidance = text.partition("@")
        schedule = own if name == _OWN else schedule_from_option(name)
        return Task(text, replace(schedule, max_sequence_length=own.max_sequence_length), float(guidance))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="+", metavar="NAME=ENGINE")
    parser.add_argument("--task", action="append", required=True)
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--prompts", default="shapes:held_out")
    parser.add_argument("--floors", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("build/yardsticks"), help="keeps what was drawn")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    named = [one.partition("=")[::2] for one in options.engines]
    chains = [(name, open_chain(Engine.open(Path(folder)))) for name, folder in named]
    prompts = as_prompts(options.prompts).first(options.pictures)
    own = Schedule.of(chains[0][1].recipe.sampling)
    rows: list[dict[str, Any]] = []
    about = {"kind": KIND, "machine": this_machine().model_dump(), "threads": torch.get_num_threads(), "same": SAME}
    about |= {"pictures": len(prompts.prompts), "prompts": options.prompts}
    about["source"] = Path(chains[0][1].base.base.source).name
    for text in options.task:
        rows += rows_of(Task.of(text, own), chains, prompts, options.work, floors=options.floors)
        options.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
        for line in lines_of(rows, text):
            print(*line, sep=" | ", flush=True)


def rows_of(
    task: Task, chains: Sequence[tuple[str, Chain]], prompts: PromptSet, work: Path, *, floors: bool
) -> list[dict[str, Any]]:
    """Draws a task in floating point and with every engine; returns a row with every picture's numbers for each.

    What was drawn is kept in ``work``, and not drawn again.
    """
    base = chains[0][1].base
    pipe = load_pipeline(base)
    asked = (base.base.digest, prompts.digest, task.schedule, task.guidance_scale, torch.get_num_threads())

    def pictures(by: str, drawing: Callable[[], DiffusionPipeline]) -> NDArray[np.float32]:
        file = work / f"{hashlib.sha256(repr((by, asked)).encode()).hexdigest()[:24]}.npy"
        if not file.exists():
            work.mkdir(parents=True, exist_ok=True)
            drawn = generate_pictures(drawing(), prompts, task.schedule, task.guidance_scale).pictures
            unfinished = file.with_suffix(".part.npy")
            np.save(unfinished, drawn)
            unfinished.replace(file)
        found: NDArray[np.float32] = np.load(file, allow_pickle=False)
        return found

    reference = pictures("FP", lambda: pipe)
    rows = []
    if floors:
        rows.append(compared_row(task, BF16, reference, pictures(BF16, lambda: _rounded(pipe, chains[0][1]))))
        with _one_thread_more():
            rows.append(compared_row(task, OTHER_THREADS, reference, pictures(OTHER_THREADS, lambda: pipe)))
    for name, chain in chains:
        with load_engine(chain.engine, chain.graph, schedules=[timesteps_of(pipe, task.schedule)]) as runner:
            with_engine = partial(pipeline_with_engine, pipe, chain.engine, runner)
            drawn = pictures(chain.engine.manifest.digest, with_engine)
        rows.append(compared_row(task, name, reference, drawn))
    return rows


def lines_of(rows: Sequence[Mapping[str, Any]], task: str) -> list[list[str]]:
    """Writes a line per row of a task: name, PSNR in dB (median, 10th percentile, worst), gain, share of the same."""
    here = [row for row in rows if row["task"] == task]
    by_name: dict[str, list[NDArray[np.float64]]] = {}
    for row in here:
        by_name.setdefault(row["name"], []).append(np.array(row["psnr"]))
    measured = [name for name in by_name if name not in {BF16, OTHER_THREADS}]
    lines, places = [], dict.fromkeys(by_name, 0)
    for row in here:
        name, psnr = row["name"], np.array(row["psnr"])
        place, places[name] = places[name], places[name] + 1
        first = by_name[measured[0]]
        gains = "" if name not in measured[1:] else _with_interval(mean_of(psnr - first[place]))
        many = len(by_name[name]) > 1
        lines.append([f"{name}, {place + 1}" if many else name, *spread(psnr), gains, _share(row["same"])])
        if many and place + 1 == len(by_name[name]) and name in measured[1:]:
            together = np.mean([mine - other for mine, other in zip(by_name[name], first, strict=True)], axis=0)
            lines.append([f"{name}, mean of all", "", "", "", _with_interval(mean_of(together)), ""])
    return lines


def table_of(found: Mapping[str, Any]) -> str:
    """Writes a Markdown table per task."""
    about = (
        f"{found['pictures']} pictures of {found['prompts']}, {found['source']}. PSNR in dB; gain: mean of every"
        f" picture's PSNR less the same picture's under the first; same: PSNR of at least {found['same']:g} dB and the"
        " same scene to the checker."
    )
    head = ["drawn by", "median", "10th pct", "worst", "gain", "same"]
    parts = [about]
    for task in dict.fromkeys(row["task"] for row in found["rows"]):
        schedule, _, guidance = task.partition("@")
        name, _, steps = schedule.partition(":")
        title = "own schedule" if name == _OWN else f"{name.upper()}, {steps} steps"
        lines = [head, ["---"] * len(head), *lines_of(found["rows"], task)]
        parts += [f"{title}, guidance {guidance}:", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return "\n" + "\n\n".join(parts) + "\n\n"


def compared_row(task: Task, name: str, reference: NDArray[np.float32], drawn: NDArray[np.float32]) -> dict[str, Any]:
    """Compares pictures float32 [n, 64, 64, 3] in [0, 1] one by one: PSNR in dB, and whether both are the same."""
    psnr = psnr_db(reference, drawn)
    pairs = zip(to_bytes(reference), to_bytes(drawn), strict=True)
    alike = np.array([read_picture(first) == read_picture(second) for first, second in pairs])
    same = (psnr >= SAME) & alike
    return {"task": task.text, "name": name, "psnr": np.round(psnr, 3).tolist(), "same": same.astype(int).tolist()}


def spread(psnr: NDArray[np.float64]) -> list[str]:
    return [_with_interval(median_of(psnr)), _with_interval(quantile_of(psnr, 0.1)), f"{psnr.min():.1f}"]


def _share(same: Sequence[int]) -> str:
    found = mean_of(np.array(same, dtype=np.float64))
    return f"{found.value:.0%} ({found.low:.0%} to {found.high:.0%})".replace("%", " %")


def _with_interval(number: Number) -> str:
    return f"{number.value:.2f} ({number.low:.2f} to {number.high:.2f})"


class RoundedDenoiser(torch.nn.Module):
    """A denoiser that computes in bfloat16 where autocast does, and returns float32."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, *inputs: Any) -> Tensor:  # noqa: ANN401 - an indexed denoiser's own
        """Returns the prediction, float32."""
        with torch.autocast("cpu", torch.bfloat16):
            found: Tensor = self.denoiser(*inputs).float()
        return found


def _rounded(pipe: DiffusionPipeline, chain: Chain) -> DiffusionPipeline:
    """Makes the pipeline whose denoiser computes in bfloat16."""
    timesteps = chain.calibrated.timesteps
    rounded = TorchRunner(RoundedDenoiser(fp_denoiser(chain.base, timesteps.steps)))
    return with_denoiser(pipe, engine_denoiser(rounded, denoiser_of(pipe).config, timesteps))


@contextmanager
def _one_thread_more() -> Iterator[None]:
    own = torch.get_num_threads()
    torch.set_num_threads(own + 1)
    try:
        yield
    finally:
        torch.set_num_threads(own)


if __name__ == "__main__":
    main()
