"""A model of full size with random weights as one file, under the names of its original code.

    python -m benchmarks.full_size.single_file {sd1,sdxl,sd3-medium} [--work build/full_size]

All networks are those of the packaged configuration, in half precision; tensors are drawn and written one at a time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.full_size.original_names import TEXT_ENCODERS, original_tensors
from benchmarks.full_size.pipeline import random_tensor
from s2p_deploy.families.checkpoint import TensorForm
from s2p_deploy.families.network_files import component_classes, network_on_meta
from s2p_deploy.families.sources import PACKAGED
from s2p_deploy.families.streamed_tensors import write_tensor_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("sd1", "sdxl", "sd3-medium"))
    parser.add_argument("--work", type=Path, default=Path("build/full_size"))
    asked = parser.parse_args()
    file = asked.work / asked.model / "model.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_model(file, PACKAGED / asked.model)


def write_model(file: Path, configuration: Path) -> None:
    """Writes the networks of a configuration into one file."""
    networks = {}
    for name, network_class in component_classes(configuration, torch.nn.Module).items():
        config = json.loads((configuration / name / "config.json").read_text(encoding="utf-8"))
        networks[name] = (network_on_meta(configuration / name, network_class).state_dict(), config)
    pipeline = json.loads((configuration / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    shapes = {name: tuple(t.shape) for name, t in original_tensors(networks, TEXT_ENCODERS[pipeline]).items()}
    forms = {name: TensorForm(torch.float16, shape) for name, shape in shapes.items()}
    write_tensor_file(file, forms, lambda name: random_tensor(name, shapes[name]))


if __name__ == "__main__":
    main()
