"""Graphs beside the denoiser's: small, rarely run, and by ONNX Runtime on the CPU whatever the engine's backend is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.engines.onnx_files import check_external_bytes
from s2p_deploy.engines.verified_bytes import verified_file
from s2p_deploy.errors import IntegrityError
from s2p_deploy.records import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnxruntime
    from numpy.typing import NDArray

    from s2p_deploy.records import Engine

_ERRORS_ONLY = 3
_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}
_SAME_BITS_EVERYWHERE = "reference"  # the hint whose results do not depend on the number of cores


class SideGraph:
    """One of an engine's ``name`` ONNX files with its data, loaded from verified bytes; it runs as it is written.

    ``option`` is what an export is asked with to write the file.

    Raises:
        IntegrityError: the file is missing, was changed, or cannot be loaded.
    """

    def __init__(self, engine: Engine, name: str, option: str) -> None:
        self.path = engine.folder / name
        if name not in engine.manifest.files:
            raise IntegrityError(f"{self.path} is missing: export the graph again with {option}, and build again")
        names = [file for file in engine.manifest.files if file.startswith(name)]
        files = {file: verified_file(engine, file) for file in names}
        model = bytes(files.pop(name))
        check_external_bytes(model, {file: len(content) for file, content in files.items()})
        try:
            self._session = _session(model, files, threads=int(engine.hint == _SAME_BITS_EVERYWHERE))
        except Exception as error:  # ONNX Runtime's errors have no class of their own in common
            raise self._unusable(error) from error

    def inputs(self) -> tuple[TensorSpec, ...]:
        """What it takes."""
        taken = self._session.get_inputs()
        return tuple(TensorSpec(item.name, _TYPES.get(item.type, item.type), tuple(item.shape)) for item in taken)

    def run(self, output: str, given: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """One of its outputs. Raises IntegrityError where it cannot compute that."""
        try:
            found: NDArray[Any] = self._session.run([output], dict(given))[0]
        except Exception as error:  # as above
            raise self._unusable(error) from error
        return np.ascontiguousarray(found)

    def _unusable(self, error: Exception) -> IntegrityError:
        return IntegrityError(f"{self.path} cannot be used ({type(error).__name__}): export it again")


def _session(model: bytes, data: dict[str, bytearray], threads: int) -> onnxruntime.InferenceSession:
    """``threads`` 0 are as many as there are cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = _ERRORS_ONLY
    if data:
        sizes = [len(content) for content in data.values()]
        options.add_external_initializers_from_files_in_memory(list(data), list(data.values()), sizes)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
