"""What the libraries read from the environment when they are imported: no chatter, no download bars, no spinning."""

from __future__ import annotations

import logging
import os
import warnings

_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",  # for child processes
    # OpenMP threads that wait for a core spin by default: on a busy machine that made a small UNet 30 times slower, and
    # sleeping costs a tenth on an idle one.
    "OMP_WAIT_POLICY": "PASSIVE",
}
_LOGGERS = (
    "torch",
    "torchvision",
    "transformers",
    "diffusers",
    "huggingface_hub",
    "accelerate",
    "onnxscript",
    "onnx_ir",
)


def quiet_libraries() -> None:
    """Sets what the libraries read when they are imported. A value that the user set stays."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
