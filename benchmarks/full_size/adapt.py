"""A LoRA put into a calibrated SD v1-4, random weights, down to an OpenVINO engine: processor seconds, stage by stage.

    python -m benchmarks.full_size.pipeline sd14 --out build/full_size/sd14/pipeline
    python -m benchmarks.full_size.stream sd14 w8a8
    python -m benchmarks.full_size.adapt attention|everything [--work build/full_size]

``attention`` is kohya's default: rank 16 on every linear layer and 1x1 convolution of the transformers and on the text
encoder. ``everything`` is a LoCon on every layer. Stages are those of ``s2p-deploy adapt --engine``; the child that
builds is counted. Figures go into ``results/full_size_adapt.json``.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.full_size.pipeline import gigabytes
from s2p_deploy import adapt, build_engine, export_graph
from s2p_deploy.calib.fused_pipeline import fuse_loras
from s2p_deploy.families import resolve_base
from s2p_deploy.families.checkpoint import DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS, Checkpoint
from s2p_deploy.families.lora import GivenLora

RANK = 16
FORMS = ("attention", "everything")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=FORMS)
    parser.add_argument("--work", type=Path, default=Path("build/full_size"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "full_size_adapt.json")
    asked = parser.parse_args()
    found = measure(asked.work / "sd14", asked.form)
    known = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(known | {asked.form: found}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


def measure(work: Path, form: str) -> dict[str, Any]:
    """Adapts ``work/model-w8a8`` and builds its engine; what an earlier run fused is not used again."""
    pipeline = work / "pipeline"
    lora = work / f"{form}.safetensors"
    layers = write_lora(lora, pipeline, form)
    folder = work / f"adapted-{form}"
    folder.mkdir(exist_ok=True)
    stages = Stages()
    fused = stages("fuse", lambda: fuse_loras(resolve_base(str(pipeline)), [GivenLora(lora, 0.8)], folder))
    model = stages("adapt", lambda: adapt(work / "model-w8a8", lora=f"{lora}:0.8", out=folder / "model", force=True))
    graph = stages("export", lambda: export_graph(model, out=folder / "graph", force=True))
    engine = stages("build", lambda: build_engine(graph, backend="openvino", out=folder / "engine", force=True))
    return {
        "layers": layers,
        "rank": RANK,
        "lora_gb": round(lora.stat().st_size / 1e9, 3),
        "threads": torch.get_num_threads(),
        "processor_seconds": stages.processor,
        "seconds": stages.wall,
        "processor_seconds_together": round(sum(stages.processor.values()), 1),
        "peak_memory_gb": stages.peak,
        "fused_pipeline_gb": gigabytes(fused.folder),
        "engine_gb": gigabytes(engine.folder),
    }


class Stages:
    """Runs stages and notes the processor time of each, its children's too."""

    def __init__(self) -> None:
        self.processor: dict[str, float] = {}
        self.wall: dict[str, float] = {}
        self.peak: dict[str, float] = {}

    def __call__(self, name: str, run: Callable[[], Any]) -> Any:  # noqa: ANN401 - what a stage returns
        """Runs one stage."""
        used, start = processor_seconds(), time.perf_counter()
        made = run()
        self.processor[name] = round(processor_seconds() - used, 1)
        self.wall[name] = round(time.perf_counter() - start, 1)
        self.peak[name] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)
        print(name, self.processor[name], self.wall[name], self.peak[name], flush=True)
        return made


def processor_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def write_lora(file: Path, pipeline: Path, form: str) -> int:
    """Writes a random LoRA in kohya's layout, half precision; returns its number of layers."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in layers_of(pipeline, form):
        down = torch.randn(RANK, *shape[1:], generator=generator)
        up = torch.randn(shape[0], RANK, *[1] * (len(shape) - 2), generator=generator)
        up *= 0.1 / (RANK * down[0].numel()) ** 0.5  # a tenth of random_tensor's weights
        tensors |= {f"{name}.lora_down.weight": down.half(), f"{name}.lora_up.weight": up.half()}
        tensors[f"{name}.alpha"] = torch.tensor(float(RANK))
    save_file(tensors, file)
    return len(tensors) // 3


def layers_of(pipeline: Path, form: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields kohya's name and the weight's shape of every layer that a form changes."""
    for component, prefix, stem in (
        ("unet", "lora_unet_", DIFFUSERS_WEIGHTS),
        ("text_encoder", "lora_te_text_model_", TRANSFORMERS_WEIGHTS),
    ):
        for name, stored in Checkpoint(pipeline / component, stem).tensors.items():
            path = name.removesuffix(".weight")
            is_layer = name.endswith(".weight") and len(stored.shape) in {2, 4} and "embeddings." not in name
            in_transformer = ".attentions." in path or component == "text_encoder"
            if is_layer and (form == "everything" or in_transformer):
                yield prefix + path.removeprefix("text_model.").replace(".", "_"), stored.shape


if __name__ == "__main__":
    main()
