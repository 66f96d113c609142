"""Projected time features of the rows that are bound to an engine of the input form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.engines.onnx_files import check_external_bytes
from s2p_deploy.engines.runner import PROJECTIONS
from s2p_deploy.engines.verified_bytes import verified_file
from s2p_deploy.errors import IntegrityError
from s2p_deploy.records.exported_graph import CONDITIONING_FILE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from s2p_deploy.records import Engine

_ERRORS_ONLY = 3


def time_projections(engine: Engine, timesteps: NDArray[np.float64]) -> NDArray[np.floating[Any]]:
    """The features [rows, P] of timesteps [rows], in the engine's dtype, computed by its ``conditioning.onnx``.

    ONNX Runtime runs it, on the CPU, whatever the engine's backend is.

    Raises:
        IntegrityError: the file is missing or was changed, or is no graph of that kind.
    """
    path = engine.folder / CONDITIONING_FILE
    if CONDITIONING_FILE not in engine.manifest.files:
        raise IntegrityError(f"{path} is missing: export the graph again with --time-table input, and build again")
    data = bytes(verified_file(engine, CONDITIONING_FILE))
    check_external_bytes(data, {})
    try:
        found = _run(data, timesteps.astype(np.float32))
    except Exception as error:  # ONNX Runtime's errors have no class of their own in common
        raise IntegrityError(f"{path} is no conditioning graph ({type(error).__name__}): export it again") from error
    spec = next(spec for spec in engine.inputs if spec.name == PROJECTIONS)
    wanted = (len(timesteps), spec.shape[1])
    with np.errstate(over="ignore"):
        features = np.ascontiguousarray(found, dtype=spec.dtype)
    if features.shape != wanted or not np.isfinite(features).all():
        raise IntegrityError(f"{path} gives no {list(wanted)} features, finite in {spec.dtype}: export the graph again")
    return features


def _run(model: bytes, timesteps: NDArray[np.float32]) -> NDArray[np.float32]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    found: NDArray[np.float32] = session.run([PROJECTIONS], {"timesteps": timesteps})[0]
    return found
