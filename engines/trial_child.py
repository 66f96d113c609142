"""The child process of a trial: ``python -m s2p_deploy.engines.trial_child request.json result.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.engines.load import load_engine
from s2p_deploy.engines.runner import OUTPUT
from s2p_deploy.errors import IntegrityError, S2PError
from s2p_deploy.records import Engine

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PER_STEP = ("sample", "step_index", "encoder_hidden_states")


def try_engine(folder: Path, digest: str) -> None:
    """Loads an engine and runs it at its smallest and at its tuned batch.

    Raises:
        IntegrityError: it is not the engine of ``digest``, or gives something else than its manifest says.
    """
    engine = Engine.open(folder)
    if engine.manifest.digest != digest:
        raise IntegrityError(f"{folder} was changed while it was opened")
    profile = engine.manifest.content["profile"]
    with load_engine(engine, tried=True) as runner:
        for batch in sorted({profile["minimum"], profile["optimum"]}):
            inputs = _inputs(engine, batch)
            found = runner.infer(inputs)[OUTPUT]
            if found.shape != inputs["sample"].shape:
                raise IntegrityError(f"{folder} gives {OUTPUT} of shape {list(found.shape)}: build it again")


def _inputs(engine: Engine, batch: int) -> dict[str, NDArray[Any]]:
    """Zeros on a calibrated row."""
    shapes = {
        spec.name: [batch if isinstance(size, str) else size for size in spec.shape]
        for spec in engine.inputs
        if spec.name in _PER_STEP
    }
    row = engine.timesteps.calibrated[0]
    return {name: np.full(shape, row if name == "step_index" else 0) for name, shape in shapes.items()}


def main(request_file: str, result_file: str) -> None:
    """Reads the request, tries, writes the result; an expected error is a result too."""
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    result: dict[str, Any] = {}
    try:
        try_engine(Path(request["engine"]), request["digest"])
    except S2PError as error:
        result = {"error": type(error).__name__, "message": str(error)}
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
