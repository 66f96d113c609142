"""Inputs that graphs beside the denoiser's compute: projected time features, and products of the text.

They are small and rarely run: by ONNX Runtime on the CPU, whatever the engine's backend is, and their results are kept.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from s2p_deploy.engines.onnx_files import check_external_bytes
from s2p_deploy.engines.runner import PROJECTIONS, TEXT, TEXT_PROJECTIONS
from s2p_deploy.errors import IntegrityError
from s2p_deploy.records import TensorSpec
from s2p_deploy.records.artifacts import read_verified
from s2p_deploy.records.exported_graph import CONDITIONING_FILE, TEXT_FILE
from s2p_deploy.records.optional_inputs import LORA_INPUTS, LORA_STRENGTHS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import onnxruntime
    from numpy.typing import NDArray

    from s2p_deploy.engines.lora_bank import LoraBank
    from s2p_deploy.records import Engine

    # timesteps float32 [n] and added_cond float32 [n, A] -> features [n, P] in the engine's dtype
    Condition = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.floating[Any]]]
    Floats = NDArray[np.floating[Any]]
    # text states [1, tokens, D], and the inputs of LoRAs by name -> products [1, tokens, sum of widths]; all of the
    # engine's dtype
    Project = Callable[[Floats, Mapping[str, Floats]], Floats]

# The version of the matrices and a sample's strengths; None where no LoRA acts.
Acting = tuple[int, bytes] | None

_MOST_BYTES = 2**29  # of features and of products that are kept for prompts seen before
_ERRORS_ONLY = 3
_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}
_SAME_BITS_EVERYWHERE = "reference"  # the optimization whose results do not depend on the number of cores


class TimeFeatures(Protocol):
    """Projected time features by timestep index.

    ``added_width`` is A, the width of what else they depend on; ``version`` counts the changes of ``table``.
    """

    added_width: int
    version: int

    @property
    def table(self) -> NDArray[np.floating[Any]] | None:
        """Features [timesteps, P], where they depend on the timestep alone."""

    def of(self, indices: NDArray[np.int64], added_cond: NDArray[np.float32] | None) -> NDArray[np.floating[Any]]:
        """Returns features [batch, P] of timestep indices [batch], for ``added_cond`` [batch, A] where A is not 0."""

    def assign(self, indices: Sequence[int], timesteps: NDArray[np.float64]) -> None:
        """Gives indices, which may lie one behind the last, other timesteps."""


class StoredFeatures:
    """Features [timesteps, P], as ``condition`` computes them, where they depend on the timestep alone."""

    added_width = 0

    def __init__(self, table: NDArray[np.floating[Any]], condition: Condition | None = None) -> None:
        self.table = table
        self.version = 0
        self._condition = condition

    def of(
        self, indices: NDArray[np.int64], _added_cond: NDArray[np.float32] | None = None
    ) -> NDArray[np.floating[Any]]:
        """Returns indices of the table."""
        features: NDArray[np.floating[Any]] = self.table[indices]
        return features

    def assign(self, indices: Sequence[int], timesteps: NDArray[np.float64]) -> None:
        """See :class:`TimeFeatures`."""
        assert self._condition is not None, "that of an engine"
        features = self._condition(timesteps.astype(np.float32), np.zeros((len(timesteps), 0), np.float32))
        self.table = _with_room(self.table, indices)
        self.table[list(indices)] = features
        self.version += 1


class PromptFeatures:
    """Features that depend on the prompt too: computed once per prompt for all indices ``ahead``, and kept.

    Other indices are computed when they are needed. Those of the prompts used last are kept, in ``most_bytes`` or one
    prompt.
    """

    def __init__(
        self,
        condition: Condition,
        timesteps: NDArray[np.float64],
        ahead: Sequence[int],
        added_width: int,
        most_bytes: int = _MOST_BYTES,
    ) -> None:
        self.added_width, self._most_bytes = added_width, most_bytes
        self.table, self.version = None, 0
        self._condition, self._timesteps, self._ahead = condition, timesteps.astype(np.float32), tuple(ahead)
        self._kept: OrderedDict[bytes, dict[int, NDArray[np.floating[Any]]]] = OrderedDict()
        self._together: dict[int, tuple[int, ...]] = {}

    def of(self, indices: NDArray[np.int64], added_cond: NDArray[np.float32] | None) -> NDArray[np.floating[Any]]:
        """See :class:`TimeFeatures`."""
        assert added_cond is not None, "the inputs were checked"
        return np.stack([self._one(int(index), added) for index, added in zip(indices, added_cond, strict=True)])

    def assign(self, indices: Sequence[int], timesteps: NDArray[np.float64]) -> None:
        """See :class:`TimeFeatures`; a prompt's are computed for all indices that were assigned together."""
        self._timesteps = _with_room(self._timesteps, indices)
        self._timesteps[list(indices)] = timesteps
        for known in self._kept.values():
            for index in indices:
                known.pop(index, None)
        self._together |= dict.fromkeys(indices, tuple(indices))

    def _one(self, index: int, added: NDArray[np.float32]) -> NDArray[np.floating[Any]]:
        known = self._kept.setdefault(added.tobytes(), {})
        self._kept.move_to_end(added.tobytes())
        if index not in known:
            wanted = (index, *self._together.get(index, () if known else self._ahead))
            missing = [one for one in dict.fromkeys(wanted) if one not in known]
            features = self._condition(self._timesteps[missing], np.repeat(added[None], len(missing), 0))
            known.update(zip(missing, features, strict=True))
            self._forget(known[index].nbytes)
        return known[index]

    def _forget(self, each: int) -> None:
        """Drops prompts from the oldest on, never the last."""
        while len(self._kept) > 1 and each * sum(map(len, self._kept.values())) > self._most_bytes:
            self._kept.popitem(last=False)


def time_features(engine: Engine, timesteps: NDArray[np.float64], ahead: Sequence[int]) -> TimeFeatures:
    """Opens the features of an engine's ``timesteps``, float64 [timesteps], computed by its ``conditioning.onnx``.

    ONNX Runtime runs it, on the CPU, whatever the engine's backend is. ``ahead`` are the indices that a prompt
    will need.

    Raises:
        IntegrityError: the file is missing or was changed, or is no graph of that kind.
    """
    width = engine.added_width
    condition = _conditioning(engine)
    if width:
        condition(timesteps[list(ahead[:1])].astype(np.float32), np.zeros((1, width), np.float32))  # is it one?
        return PromptFeatures(condition, timesteps, ahead, width)
    stored = condition(timesteps.astype(np.float32), np.zeros((len(timesteps), 0), np.float32))
    return StoredFeatures(stored, condition)


def _with_room(values: NDArray[Any], indices: Sequence[int]) -> NDArray[Any]:
    """Returns ``values`` with room for indices behind the last."""
    missing = max(indices) + 1 - len(values)
    return values if missing <= 0 else np.concatenate([values, np.zeros((missing, *values.shape[1:]), values.dtype)])


def _conditioning(engine: Engine) -> Condition:
    graph = SideGraph(engine, CONDITIONING_FILE, "--time-table input")
    spec = next(spec for spec in engine.inputs if spec.name == PROJECTIONS)

    def condition(timesteps: NDArray[np.float32], added_cond: NDArray[np.float32]) -> NDArray[np.floating[Any]]:
        given = {"timesteps": timesteps} | ({"added_cond": added_cond} if added_cond.shape[1] else {})
        wanted = (len(timesteps), spec.shape[1])
        with np.errstate(over="ignore"):
            features: NDArray[np.floating[Any]] = graph.run(PROJECTIONS, given).astype(spec.dtype, copy=False)
        if features.shape != wanted or not np.isfinite(features).all():
            raise IntegrityError(
                f"{graph.path} gives no {list(wanted)} features, finite in {spec.dtype}: export the graph again"
            )
        return features

    return condition


class TextProjections:
    """Products of text states: those of the texts used last are kept, in ``most_bytes`` or one batch.

    Samples are computed one at a time, so that a text's products do not depend on what else was in its batch. ``spec``
    is what the text states look like; ``loras`` has the matrices of LoRAs, where the products depend on them.
    """

    def __init__(
        self, project: Project, spec: TensorSpec, loras: LoraBank | None = None, *, most_bytes: int = _MOST_BYTES
    ) -> None:
        self.spec = spec
        self._project, self._loras, self._most_bytes = project, loras, most_bytes
        self._kept: OrderedDict[tuple[bytes, Acting], Floats] = OrderedDict()

    def of(self, states: Floats, strengths: Floats | None = None) -> Floats:
        """[batch, tokens, sum of widths] of text states [batch, tokens, D] in the dtype of ``spec``.

        ``strengths`` [batch, rank] are those of LoRAs (None: none acts).
        """
        if self._loras is None or strengths is None:
            strengths = np.zeros((len(states), 0 if self._loras is None else self._loras.slots.rank), self.spec.dtype)
        samples = zip(states[:, None], strengths[:, None], strict=True)
        products = np.concatenate([self._one(*sample) for sample in samples])
        self._forget(most=max(self._most_bytes, products.nbytes))
        return products

    def close(self) -> None:
        """Forgets everything."""
        self._kept.clear()

    def acting(self, strengths: Floats | None) -> Acting:
        """Tells which LoRAs act on the products, and how: at equal values, equal texts have equal products."""
        if self._loras is None or strengths is None or not strengths.any():
            return None
        return self._loras.version, strengths.tobytes()

    def _one(self, sample: Floats, strengths: Floats) -> Floats:
        key = (sample.tobytes(), self.acting(strengths))
        if key not in self._kept:
            loras = {} if self._loras is None else {**self._loras.packed, LORA_STRENGTHS: strengths}
            self._kept[key] = self._project(sample, loras)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _forget(self, most: int) -> None:
        """Drops texts from the one on that was used longest ago."""
        while sum(kept.nbytes for kept in self._kept.values()) > most:
            self._kept.popitem(last=False)


def text_projections(engine: Engine, loras: LoraBank | None = None) -> TextProjections:
    """Opens the text projections of an engine, computed by its ``text.onnx`` on the CPU whatever its backend is.

    ``loras`` are those of the engine's low-rank branches, whose matrices act there too.

    Raises:
        IntegrityError: the file is missing or was changed, or is no graph of that kind.
    """
    graph = SideGraph(engine, TEXT_FILE, "--text-projections input")
    own = {spec.name: spec for spec in engine.inputs}
    taken, given = own[TEXT_PROJECTIONS], {spec.name: spec for spec in graph.inputs()}
    spec = given.pop(TEXT, TensorSpec(TEXT, "", ()))
    if spec != TensorSpec(TEXT, taken.dtype, (*taken.shape[:2], *spec.shape[2:])) or len(spec.shape) != 3:
        raise IntegrityError(f"{graph.path} takes {list(spec.shape)} {spec.dtype}: export the graph again")
    if given and (loras is None or given != {name: own.get(name) for name in LORA_INPUTS}):
        raise IntegrityError(f"{graph.path} takes {', '.join(given)}, not the engine's LoRAs: export the graph again")

    def project(states: Floats, loras: Mapping[str, Floats]) -> Floats:
        products = graph.run(TEXT_PROJECTIONS, {TEXT: states, **loras})
        wanted = (*states.shape[:2], taken.shape[2])
        if products.shape != wanted or products.dtype != np.dtype(taken.dtype):
            raise IntegrityError(
                f"{graph.path} gives {list(products.shape)}, not {list(wanted)}: export the graph again"
            )
        return products

    return TextProjections(project, spec, loras if given else None)


class SideGraph:
    """Session of one of an engine's ONNX files with its data, loaded from verified bytes and run unoptimized.

    ``option`` is the option of ``export`` that writes the file.

    Raises:
        IntegrityError: the file is missing, was changed, or cannot be loaded.
    """

    def __init__(self, engine: Engine, name: str, option: str) -> None:
        self.path = engine.folder / name
        if name not in engine.manifest.files:
            raise IntegrityError(f"{self.path} is missing: export the graph again with {option}, and build again")
        names = [file for file in engine.manifest.files if file.startswith(name)]
        files = {file: read_verified(engine, file) for file in names}
        model = bytes(files.pop(name))
        check_external_bytes(model, {file: len(content) for file, content in files.items()})
        try:
            self._session = _session(model, files, threads=int(engine.optimization == _SAME_BITS_EVERYWHERE))
        except Exception as error:  # ONNX Runtime's errors have no class of their own in common
            raise self._unusable(error) from error

    def inputs(self) -> tuple[TensorSpec, ...]:
        """Lists its inputs."""
        taken = self._session.get_inputs()
        return tuple(TensorSpec(item.name, _TYPES.get(item.type, item.type), tuple(item.shape)) for item in taken)

    def run(self, output: str, given: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """Computes one of its outputs. Raises IntegrityError where it cannot compute that."""
        try:
            value: NDArray[Any] = self._session.run([output], dict(given))[0]
        except Exception as error:  # as above
            raise self._unusable(error) from error
        return np.ascontiguousarray(value)

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
