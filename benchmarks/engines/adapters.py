"""Engines with adapters against the floating-point pipeline with the same ones: as close as without?

    python -m benchmarks.engines.adapters shapes w8a8=ENGINE w4a8=ENGINE [--controlnet-engine FOLDER] [--pictures 32]
    python -m benchmarks.engines.adapters shapes w8a8=ENGINE --calls [--pictures 8]
    python -m benchmarks.engines.adapters sdxl sdxl-w8a8=ENGINE --steps 30

Engines have slots for everything: ``export --lora-rank 64 --controlnet --image-tokens 4``, with ``--lora-layers`` for
the layers that a LoRA changes. Prompts are those of ``shapes:held_out``, noise is equal; ControlNets read the edges of
other prompts' scenes, IP-Adapters the prompt's own scene in other colours, and once its text is empty. Every engine
draws every case once more with its ControlNet quantized, where one is given. Figures go into ``results/adapters.json``
under the engine's name: PSNR in dB to floating point, and how far every picture's is from the same picture's without.

``--calls`` measures single calls instead: the SQNR in dB of an engine's predictions at the inputs that floating point
had in every step of its pictures, mean over the calls: what quantization does. Pictures say what becomes of it.
``NAME=noise:35`` in place of an engine is the floating-point pipeline with white noise, 35 dB under every prediction:
how much of a loss is due to pictures that part sooner, with adapters that lead them where nothing was trained.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from s2p_deploy.api import as_prompts
from s2p_deploy.bench.result import this_machine
from s2p_deploy.cli.options import schedule_from_option
from s2p_deploy.families import denoiser_of, load_pipeline, resolve_base
from s2p_deploy.families.controlnets import with_controlnets
from s2p_deploy.families.lora import GivenLora, Lora
from s2p_deploy.families.lora_fusing import fused, loadable_networks, weights_in_memory
from s2p_deploy.metrics import median_of, psnr_db, quantile_of, sqnr_db
from s2p_deploy.pipeline import Schedule, initial_noise, open_controlnet, open_pipeline, with_schedule
from s2p_deploy.pipeline.lora_files import loras_acting
from s2p_deploy.records import Engine
from s2p_deploy.shapes.scenes import BACKGROUNDS, COLOURS, Scene, parse, render

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from diffusers import DiffusionPipeline
    from numpy.typing import NDArray

    from s2p_deploy.families import BasePipeline
    from s2p_deploy.records import Number, Prompt

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "tests" / "assets"
IP_WEIGHTS = "ip-adapter.safetensors"
WITHOUT, NOISE = "without", "noise:"
LEAST_GRADIENT = 24.0  # of an edge, in levels per pixel: as the ControlNets were trained
BATCH = 8
_SEED = 24


@dataclass(frozen=True)
class Kind:
    """A pipeline and its trained adapters, LoRAs by the names of their cases.

    ``empty_texts``: whether it was trained with them; SDXL puts zeros in their place.
    """

    model: str
    loras: dict[str, tuple[GivenLora, ...]]
    controlnet: Path
    ip_adapter: Path
    empty_texts: bool


def _lora(name: str, weight: float = 1.0) -> GivenLora:
    return GivenLora(ASSETS / "loras" / f"{name}.safetensors", weight)


KINDS = {
    "shapes": Kind(
        "shapes",
        {
            "LoRA of rank 8": (_lora("next-colour"),),
            "LoRA of rank 4": (_lora("triangles"),),
            "LoRA of rank 32": (_lora("mirrored"),),
            "LoRA of rank 4 at 0.5": (_lora("triangles", 0.5),),
            "LoRA of rank 4 at 0.25": (_lora("triangles", 0.25),),
            "LoRAs of rank 4 and 8": (_lora("triangles"), _lora("next-colour")),
        },
        ASSETS / "controlnets" / "edges",
        ASSETS / "ip-adapters" / "scenes",
        empty_texts=True,
    ),
    "sdxl": Kind(
        str(ASSETS / "pipelines" / "shapes-sdxl"),
        {
            "LoRA of rank 8": (_lora("sdxl-triangles"),),
            "LoRA of rank 8 at 0.5": (_lora("sdxl-triangles", 0.5),),
        },
        ASSETS / "controlnets" / "sdxl-edges",
        ASSETS / "ip-adapters" / "sdxl-scenes",
        empty_texts=False,
    ),
}


@dataclass(frozen=True)
class Case:
    """What acts while pictures are drawn. ``texts`` replace the prompts' own, ``like`` names the case without."""

    name: str
    loras: tuple[GivenLora, ...] = ()
    control: Path | None = None
    image_scale: float | None = None
    empty: bool = False
    like: str = WITHOUT


def cases_of(kind: Kind, controlnet_engine: Path | None) -> list[Case]:
    """Lists the cases of a kind, each behind the one without adapters that it stands beside."""
    empty = f"{WITHOUT}, empty text"
    controls = {"ControlNet in FP": kind.controlnet}
    if controlnet_engine is not None:
        controls["ControlNet quantized"] = controlnet_engine
    scales = (1.0, 0.5)
    cases = [
        Case(WITHOUT),
        *(Case(name, loras=loras) for name, loras in kind.loras.items()),
        *(Case(name, control=folder) for name, folder in controls.items()),
        *(Case(f"IP-Adapter at {scale:g}", image_scale=scale) for scale in scales),
    ]
    if kind.empty_texts:
        cases.append(Case(empty, empty=True, like=empty))
        cases += [Case(f"IP-Adapter at {s:g}, empty text", image_scale=s, empty=True, like=empty) for s in scales]
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("engines", nargs="+", metavar="NAME=ENGINE")
    parser.add_argument("--controlnet-engine", type=Path)
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--calls", action="store_true", help="SQNR of single calls, no pictures of engines")
    parser.add_argument("--schedule", default=None, metavar="SCHEDULER:STEPS", help="the pipeline's own, if omitted")
    parser.add_argument("--steps", type=int, default=50, help="of the pipeline's own scheduler")
    parser.add_argument("--only", action="append", help="cases whose names begin so, and those without")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "adapters.json")
    asked = parser.parse_args()
    kind = KINDS[asked.kind]
    schedule = schedule_from_option(asked.schedule) if asked.schedule else Schedule(asked.steps)
    base = resolve_base(kind.model)
    inputs = Inputs.of(as_prompts("shapes:held_out").prompts, asked.pictures)
    cases = [
        case
        for case in cases_of(kind, asked.controlnet_engine)
        if not asked.only or case.name.startswith((WITHOUT, *asked.only))
    ]
    stock = load_pipeline(base)
    networks = loadable_networks(stock)
    known = weights_in_memory(networks)

    def fuse(loras: Sequence[GivenLora]) -> Any:  # noqa: ANN401 - a context
        return fused(networks, [(Lora(lora.file, known), lora.weight) for lora in loras])

    references: dict[str, NDArray[np.float32]] = {}
    calls: dict[str, list[Call]] = {}
    for case in cases:
        plain = replace(case, control=case.control and kind.controlnet)
        with recorded(denoiser_of(stock)) if asked.calls else nullcontext([]) as calls[case.name]:
            references[case.name] = Drawing(stock, base, schedule, kind, fuse).pictures(inputs, plain)
        print("floating point:", case.name, flush=True)
    for text in asked.engines:
        name, _, what = text.partition("=")
        with ExitStack() as stack:
            if what.startswith(NOISE):
                stack.enter_context(noise_in(denoiser_of(stock), float(what.removeprefix(NOISE))))
                drawing = Drawing(stock, base, schedule, kind, fuse)
            else:
                pipe = stack.enter_context(open_pipeline(Engine.open(Path(what)), base, schedules=[schedule])).pipe
                drawing = Drawing(pipe, base, schedule, kind, partial(loras_acting, pipe, base))
            scores: dict[str, NDArray[np.float64]] = {}
            rows = {}
            for case in cases:
                if asked.calls:
                    rows[case.name] = {"call_sqnr": round(drawing.call_sqnr(case, calls[case.name]), 2)}
                else:
                    scores[case.name] = psnr_db(references[case.name], drawing.pictures(inputs, case))
                    rows[case.name] = row_of(case, scores)
                print(name, case.name, json.dumps(rows[case.name]), flush=True)
        about = {"pictures": asked.pictures, "schedule": asked.schedule or asked.steps}
        write(asked.out, f"{name}, calls" if asked.calls else name, about | {"cases": rows})


@dataclass(frozen=True)
class Call:
    """What a denoiser was called with, and the prediction."""

    args: tuple[Any, ...]
    options: dict[str, Any]
    predicted: torch.Tensor


@contextmanager
def recorded(network: torch.nn.Module) -> Iterator[list[Call]]:
    """Records a network's calls while the context lasts."""
    calls: list[Call] = []

    def keep(_network: object, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:  # noqa: ANN401
        calls.append(Call(copy.deepcopy(args), copy.deepcopy(options), output[0].clone()))

    hook = network.register_forward_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


@contextmanager
def noise_in(network: torch.nn.Module, under_db: float) -> Iterator[None]:
    """Adds white noise to a network's predictions while the context lasts, so many dB under each sample's power."""
    generator = torch.Generator().manual_seed(_SEED)

    def noisy(_network: object, _inputs: object, output: Any) -> Any:  # noqa: ANN401 - of diffusers
        (clean,) = output
        power = clean.square().mean(tuple(range(1, clean.ndim)), keepdim=True)
        return (clean + torch.randn(clean.shape, generator=generator) * power.sqrt() * 10 ** (-under_db / 20),)

    hook = network.register_forward_hook(noisy)
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class Inputs:
    """Prompts, the edges of other prompts' scenes, and the prompts' scenes in other colours; RGB pictures."""

    prompts: tuple[Prompt, ...]
    edges: list[Image.Image]
    scenes: list[Image.Image]

    @staticmethod
    def of(prompts: Sequence[Prompt], count: int) -> Inputs:
        """Makes them of the first ``count`` prompts; the edges are those of the next."""
        own, others = prompts[:count], prompts[count : 2 * count]
        rng = np.random.default_rng(_SEED)
        edges = edge_map(np.stack([render(parse(prompt.text), rng) for prompt in others]))
        scenes = [render(in_other_colours(parse(prompt.text), rng), rng) for prompt in own]
        return Inputs(tuple(own), *([Image.fromarray(picture) for picture in some] for some in (edges, scenes)))


def edge_map(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Finds the edges of pictures uint8 [n, H, W, 3], as examples/shapes/train_controlnet.py does."""
    down, across = np.gradient(pictures.astype(np.float32), axis=(1, 2))
    is_edge = np.hypot(down, across).max(-1, keepdims=True) > LEAST_GRADIENT
    return np.where(is_edge, 255, 0).astype(np.uint8).repeat(3, -1)


def in_other_colours(scene: Scene, rng: np.random.Generator) -> Scene:
    """Draws colours for the objects and the background of a scene."""
    objects = tuple(dataclasses.replace(item, colour=COLOURS[rng.integers(len(COLOURS))]) for item in scene.objects)
    return Scene(objects, BACKGROUNDS[rng.integers(len(BACKGROUNDS))])


@dataclass(frozen=True)
class Drawing:
    """A pipeline that draws cases; ``act`` makes the context in which LoRAs are in it."""

    pipe: DiffusionPipeline
    base: BasePipeline
    schedule: Schedule
    kind: Kind
    act: Callable[[Sequence[GivenLora]], Any]

    def call_sqnr(self, case: Case, calls: Sequence[Call]) -> float:
        """Computes the mean SQNR in dB of the denoiser's predictions in a case, at the inputs of recorded calls."""
        with self._acting(case):
            network = denoiser_of(self.pipe)
            found = [
                sqnr_db(call.predicted.numpy(), network(*call.args, **call.options)[0].numpy()).mean() for call in calls
            ]
        return float(np.mean(found))

    def pictures(self, inputs: Inputs, case: Case) -> NDArray[np.float32]:
        """Draws a case; float32 [n, H, W, 3] in 0..1."""
        with self._acting(case):
            ready = self._controlled(case.control) if case.control is not None else self.pipe
            ready = with_schedule(ready, self.schedule)
            ready.set_progress_bar_config(disable=True)
            size = 1 if case.image_scale is not None else BATCH  # a pipeline gives all prompts of a call one image
            parts = [self._part(ready, inputs, case, start, size) for start in range(0, len(inputs.prompts), size)]
        return np.concatenate(parts)

    def _part(self, ready: DiffusionPipeline, inputs: Inputs, case: Case, start: int, size: int) -> NDArray[np.float32]:
        some = slice(start, start + size)
        prompts = inputs.prompts[some]
        given: dict[str, Any] = {}
        if case.control is not None:
            given["image"] = inputs.edges[some]
        if case.image_scale is not None:
            (given["ip_adapter_image"],) = inputs.scenes[some]
        drawn: NDArray[np.float32] = ready(
            prompt=["" if case.empty else prompt.text for prompt in prompts],
            num_inference_steps=self.schedule.steps,
            guidance_scale=self.base.default_guidance,
            latents=initial_noise([prompt.noise_seed for prompt in prompts], dict(denoiser_of(self.pipe).config)),
            output_type="np",
            **given,
        ).images
        return drawn

    @contextmanager
    def _acting(self, case: Case) -> Iterator[None]:
        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(self.act(case.loras) if case.loras else nullcontext())
            if case.image_scale is not None:
                stack.enter_context(self._ip_adapter(case.image_scale))
            yield

    def _controlled(self, folder: Path) -> DiffusionPipeline:
        network = open_controlnet(folder, dict(denoiser_of(self.pipe).config), self.pipe.vae_scale_factor)
        return with_controlnets(self.pipe, [network])

    @contextmanager
    def _ip_adapter(self, scale: float) -> Iterator[None]:
        self.pipe.load_ip_adapter(self.kind.ip_adapter, subfolder="", weight_name=IP_WEIGHTS)
        self.pipe.set_ip_adapter_scale(scale)
        try:
            yield
        finally:
            self.pipe.unload_ip_adapter()


def row_of(case: Case, scores: dict[str, NDArray[np.float64]]) -> dict[str, Any]:
    """Makes a case's figures in dB: of its pictures, and of every picture less the same without the adapter."""
    own, without = scores[case.name], scores[case.like]
    return {
        "psnr": rounded(median_of(own)),
        "p10": rounded(quantile_of(own, 0.1)),
        "worst": round(float(own.min()), 2),
        "median_less_that_without": round(float(np.median(own) - np.median(without)), 2),
        "per_picture": rounded(median_of(own - without)),
    }


def rounded(number: Number) -> list[float | None]:
    """A value and its interval, to a hundredth."""
    return [None if value is None else round(value, 2) for value in (number.value, number.low, number.high)]


def write(out: Path, name: str, found: dict[str, Any]) -> None:
    """Puts an engine's figures into the file of results, beside those of others."""
    known = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    known[name] = {"machine": this_machine().model_dump(), **found}
    out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
