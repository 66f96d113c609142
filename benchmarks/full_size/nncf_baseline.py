"""NNCF's static INT8 of the same UNet, as an OpenVINO IR: the rival of ``full_size/engines.py time``.

    python -m benchmarks.full_size.nncf_baseline graph --work build/full_size            # in the project's environment
    NNCF_ENV/bin/python benchmarks/full_size/nncf_baseline.py quantize --work build/full_size

``graph`` writes the UNet of ``WORK/pipeline`` as plain ONNX, its time path included. ``quantize`` runs in an
environment of its own (``pip install nncf openvino``), which the project never depends on: ``nncf.quantize`` with the
mixed preset, as NNCF's documentation has it for diffusion models, except that biases are not corrected (that moves
values, no operator). Calibration inputs are random: values do not matter for speed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

BATCH, CHANNELS, SIZE, TOKENS, WIDTH = 2, 4, 64, 77, 768


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("step", choices=("graph", "quantize"))
    parser.add_argument("--work", type=Path, default=Path("build/full_size"))
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--model-type", choices=("transformer", "none"), default="transformer")
    asked = parser.parse_args()
    if asked.step == "graph":
        write_graph(asked.work / "pipeline", asked.work / "plain")
    else:
        out = asked.work / ("nncf" if asked.model_type == "transformer" else "nncf-plain")
        quantize(asked.work / "plain" / "unet.onnx", out, asked.samples, asked.model_type)


def write_graph(pipeline: Path, out: Path) -> None:
    """``unet.onnx`` with fixed shapes: sample, timestep [batch] and encoder_hidden_states to noise_pred, float32."""
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(pipeline / "unet").eval()
    examples = (
        torch.zeros(BATCH, CHANNELS, SIZE, SIZE),
        torch.zeros(BATCH, dtype=torch.int64),
        torch.zeros(BATCH, TOKENS, WIDTH),
    )
    out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        program = torch.onnx.export(
            unet,
            examples,
            dynamo=True,
            input_names=["sample", "timestep", "encoder_hidden_states"],
            output_names=["noise_pred"],
        )
    program.save(out / "unet.onnx", external_data=True)


def quantize(onnx_file: Path, out: Path, samples: int, model_type: str) -> None:
    """``denoiser.xml`` and ``.bin``, weights as INT8."""
    import nncf
    import numpy as np
    import openvino

    random = np.random.default_rng(0)
    inputs = [
        {
            "sample": random.standard_normal((BATCH, CHANNELS, SIZE, SIZE)).astype(np.float32),
            "timestep": np.full(BATCH, timestep, np.int64),
            "encoder_hidden_states": random.standard_normal((BATCH, TOKENS, WIDTH)).astype(np.float32),
        }
        for timestep in np.linspace(1, 981, samples).astype(int)
    ]
    start = time.perf_counter()
    quantized = nncf.quantize(
        openvino.Core().read_model(onnx_file),
        nncf.Dataset(inputs),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER if model_type == "transformer" else None,
        subset_size=samples,
        advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
    )
    out.mkdir(parents=True, exist_ok=True)
    openvino.save_model(quantized, out / "denoiser.xml", compress_to_fp16=False)
    about = {
        "nncf": nncf.__version__,
        "openvino": openvino.__version__,
        "preset": "mixed",
        "model_type": model_type,
        "samples": samples,
        "seconds": round(time.perf_counter() - start, 1),
    }
    (out / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
