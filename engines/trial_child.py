"""The child process of a trial: ``python -m s2p_deploy.engines.trial_child request.json result.json``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.engines.isolation import answer_request
from s2p_deploy.engines.load import load_engine
from s2p_deploy.engines.runner import OUTPUT
from s2p_deploy.errors import IntegrityError
from s2p_deploy.records import Engine

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from s2p_deploy.engines.runner import BoundRunner


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
            inputs = _inputs(runner, engine.timesteps.calibrated_rows[0], batch)
            found = runner.infer(inputs)[OUTPUT]
            if found.shape != inputs["sample"].shape:
                raise IntegrityError(f"{folder} gives {OUTPUT} of shape {list(found.shape)}: build it again")


def _inputs(runner: BoundRunner, row: int, batch: int) -> dict[str, NDArray[Any]]:
    """Zeros on a row."""
    shapes = {spec.name: [batch if isinstance(size, str) else size for size in spec.shape] for spec in runner.inputs}
    return {name: np.full(shape, row if name == "step_index" else 0) for name, shape in shapes.items()}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Tries the engine that is asked for; there is nothing to say of one that runs."""
    try_engine(Path(request["engine"]), request["digest"])
    return {}


if __name__ == "__main__":
    answer_request(sys.argv[1], sys.argv[2], answer)
