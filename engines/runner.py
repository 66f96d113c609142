"""Runners: one call for PyTorch, ONNX Runtime, OpenVINO and TensorRT, so that every comparison is one function."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

import numpy as np

from s2p_deploy.engines.options import shape_at
from s2p_deploy.errors import InputError
from s2p_deploy.records import ShapeProfile, TensorSpec
from s2p_deploy.records.optional_inputs import LORA_STRENGTHS, is_optional, open_size
from s2p_deploy.timesteps import known_indices, timestep_indices

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    import torch
    from numpy.typing import NDArray

    from s2p_deploy.engines.conditioning import Acting, TextProjections, TimeFeatures
    from s2p_deploy.engines.lora_bank import LoraBank
    from s2p_deploy.engines.spare_timesteps import SpareTimesteps
    from s2p_deploy.records import TimestepTable
    from s2p_deploy.records.optional_inputs import ImageSlots
    from s2p_deploy.timesteps import Timesteps

OUTPUT = "noise_pred"
BOUND = "act_scales"
PROJECTIONS = "time_projections"
ADDED_COND = "added_cond"
TEXT, TEXT_PROJECTIONS = "encoder_hidden_states", "text_projections"


class Runner(Protocol):
    """Something that computes outputs from inputs. A context manager; closed, it holds no memory."""

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Returns outputs by name; the arrays belong to the caller."""

    def close(self) -> None:
        """Frees what the runner holds. May be called twice."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class ClosingRunner:
    """Base of runners: a context manager that closes on leaving."""

    def close(self) -> None:
        """Frees what the runner holds."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@runtime_checkable
class ShapedRunner(Runner, Protocol):
    """Runner that compiles for input shapes given in advance."""

    def tune(self, shapes: Sequence[Mapping[str, tuple[int, ...]]]) -> None:
        """Runs inputs of any of these shapes in a form compiled for them, from now on."""


@runtime_checkable
class RebindingRunner(Runner, Protocol):
    """Runner whose bound inputs can be replaced while it runs."""

    def rebind(self, name: str, value: NDArray[Any]) -> None:
        """Gives a bound input other values, of the shape and type that it has."""


@runtime_checkable
class TensorRunner(Runner, Protocol):
    """A runner that also takes and gives tensors on the GPU: a sampling loop there moves no data through the host."""

    def infer_tensors(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns outputs by name on the GPU, ordered on PyTorch's current stream; valid until the next call.

        ``inputs`` may lie on any device and in any floating-point type.
        """


class TorchRunner(ClosingRunner):
    """A PyTorch denoiser, floating point or fake-quant, which computes where its weights are (a function: on the CPU).

    It is called with ``sample`` [batch, C, H, W], ``timestep_index`` int64 [batch], ``encoder_hidden_states`` [batch,
    tokens, D] and, where it is given, ``added_cond`` [batch, A]; inputs of adapters are a mapping ``optional`` by their
    names. Floating-point inputs are cast to ``dtype`` (None: float32).
    """

    def __init__(self, module: Callable[..., torch.Tensor], dtype: torch.dtype | None = None) -> None:
        import torch

        self._module = module
        self._dtype = dtype or torch.float32

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Predicts ``noise_pred`` as NumPy (float32 for types that NumPy lacks)."""
        import torch

        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}
        output = self.infer_tensors(tensors)[OUTPUT]
        if output.dtype == torch.bfloat16:
            output = output.float()
        return {OUTPUT: output.cpu().numpy()}

    def infer_tensors(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Predicts ``noise_pred`` on the denoiser's device, from tensors on any; nothing waits for a GPU."""
        import torch

        device = self._device

        def placed(name: str, dtype: torch.dtype) -> torch.Tensor:
            return inputs[name].to(device, dtype, non_blocking=True)

        texts = [placed(name, self._dtype) for name in (TEXT, ADDED_COND) if name in inputs]
        optional = {name: placed(name, self._dtype) for name in inputs if is_optional(name)}
        named = {"optional": optional} if optional else {}
        first = placed("sample", self._dtype), placed("timestep_index", torch.int64)
        with torch.no_grad():
            return {OUTPUT: self._module(*first, *texts, **named)}

    @property
    def _device(self) -> torch.device:
        """Looked up in every call: a network may move between two."""
        import torch

        weights = self._module.parameters() if isinstance(self._module, torch.nn.Module) else iter(())
        return next((weight.device for weight in weights), torch.device("cpu"))

    def close(self) -> None:
        """Does nothing: the module belongs to the caller."""


class BoundRunner(ClosingRunner):
    """An engine with its scales bound: called by pipelines and comparisons with the same inputs as PyTorch.

    Values are cast to the types of the engine's inputs. ``timesteps`` says which timestep every index is, and ``spare``
    gives indices to further ones (None: they are refused); ``features`` gives their projected time features, and
    ``texts`` the products of the text, where the engine takes those as an input. ``profile`` says which latents and
    texts the engine takes (None: those of the sizes that its inputs have). Inputs of adapters (``optional``) are zeros
    where a call leaves them out; ``loras`` makes those of LoRAs (None: the engine has no branches for them),
    ``images`` says what those of image prompts are (None: it takes none).

    Example:
        >>> with load_engine("build/engine") as runner:
        ...     latents, text = np.zeros((2, 4, 8, 8), np.float32), np.zeros((2, 24, 128), np.float32)
        ...     runner(latents, np.asarray([1, 981]), text).shape
        (2, 4, 8, 8)
    """

    def __init__(  # noqa: PLR0913 - what an engine is bound to
        self,
        runner: Runner,
        inputs: tuple[TensorSpec, ...],
        timesteps: TimestepTable,
        features: TimeFeatures | None = None,
        texts: TextProjections | None = None,
        *,
        profile: ShapeProfile | None = None,
        spare: SpareTimesteps | None = None,
        loras: LoraBank | None = None,
        images: ImageSlots | None = None,
    ) -> None:
        self.timesteps, self.features, self.texts = timesteps, features, texts
        self.loras, self.images = loras, images
        self._spare = spare
        self.profile = profile or ShapeProfile()
        self._runner = runner
        self._taken = inputs
        stands_for = {} if texts is None else {TEXT_PROJECTIONS: texts.spec}
        needed = [spec for spec in inputs if spec.name != PROJECTIONS and not is_optional(spec.name)]
        own = tuple(stands_for.get(spec.name, spec) for spec in needed)
        self.optional = tuple(spec for spec in inputs if is_optional(spec.name))
        width = 0 if features is None else features.added_width
        added = (TensorSpec(ADDED_COND, "float32", ("batch", width)),) if width else ()
        self._inputs, self._added = own, added

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Lists the inputs that a call needs; the batch is a name, another open size is the one tuned for."""
        tuned = {name: size for name, size in self.profile.sizes("optimum").items() if name != "batch"}
        return tuple(
            replace(spec, shape=tuple(tuned.get(str(size), size) for size in spec.shape))
            for spec in (*self._inputs, *self._added)
        )

    def check_timesteps(self, timesteps: Timesteps) -> None:
        """Checks that :meth:`indices` has indices for timesteps; from any thread.

        Raises:
            InputError: one is outside the covered range, or fractional where the engine takes none.
        """
        if self._spare is None:
            timestep_indices(timesteps, self.timesteps)
        else:
            known_indices(timesteps, self.timesteps)

    def indices(self, timesteps: Timesteps) -> NDArray[np.int64]:
        """Looks up the timestep indices, int64 [n], of timesteps by their values.

        Those that no schedule named when the engine was loaded get their scales and time features now, computed
        together; their indices are good until a thousand others were asked for.

        Raises:
            InputError: a timestep is outside the covered range, or fractional where the engine takes none.
        """
        return timestep_indices(timesteps, self.timesteps) if self._spare is None else self._spare.indices(timesteps)

    def stage(self, _index: int) -> int:
        """Returns which of joined engines runs a timestep index: 1 for the one inside, else 0."""
        return 0

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Predicts ``noise_pred`` [batch, C, H, W].

        Raises:
            InputError: an input is missing, has another shape than the engine's, or an index is outside the table.
        """
        sizes = self._check(inputs)
        given = {spec.name: np.ascontiguousarray(inputs[spec.name], dtype=spec.dtype) for spec in self._inputs}
        for spec in self.optional:
            value = inputs[spec.name] if spec.name in inputs else np.zeros(shape_at(spec, sizes), spec.dtype)
            given[spec.name] = np.ascontiguousarray(value, dtype=spec.dtype)
        if self.features is not None:
            added = np.asarray(inputs[ADDED_COND], dtype=np.float32) if self._added else None
            given[PROJECTIONS] = self.features.of(given["timestep_index"], added)
        if self.texts is not None:
            given[TEXT_PROJECTIONS] = self.texts.of(given.pop(TEXT), given.get(LORA_STRENGTHS))
        return self._runner.infer(given)

    def __call__(
        self,
        sample: NDArray[Any],
        timestep_index: NDArray[np.int64],
        encoder_hidden_states: NDArray[Any],
        added_cond: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        """Predicts one step: ``sample`` [batch, C, H, W], indices [batch], text [batch, tokens, D] -> ``noise_pred``.

        ``added_cond`` [batch, A] where the time features depend on the prompt too.
        """
        inputs = {"sample": sample, "timestep_index": timestep_index, TEXT: encoder_hidden_states}
        return self.infer(inputs if added_cond is None else inputs | {ADDED_COND: added_cond})[OUTPUT]

    def tune(self, *batches: int) -> None:
        """Makes batches of these sizes, at the other sizes that the engine is tuned for, as fast as they can be."""
        if isinstance(self._runner, ShapedRunner):
            sizes = [self.profile.sizes("optimum") | {"batch": batch} for batch in batches]
            self._runner.tune([{spec.name: shape_at(spec, one) for spec in self._taken} for one in sizes])

    def close(self) -> None:
        """Closes the engine."""
        self._runner.close()
        if self.texts is not None:
            self.texts.close()

    def _check(self, inputs: Mapping[str, NDArray[Any]] | Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Checks a call's inputs, and returns the sizes that they leave open."""
        unknown = set(inputs) - {spec.name for spec in (*self.inputs, *self.optional)}
        if unknown:
            raise InputError(f"the engine has no input {sorted(unknown)[0]!r} to give per step")
        sizes = self._sizes(inputs)
        for spec in (*self._inputs, *self._added, *(spec for spec in self.optional if spec.name in inputs)):
            if spec.name not in inputs:
                raise InputError(f"the engine needs an input {spec.name!r}")
            shape = np.shape(inputs[spec.name])  # a tensor has one too
            wanted = tuple((open_size(size, sizes) or size) if isinstance(size, str) else size for size in spec.shape)
            if shape != wanted:
                longer = shape[:1] + shape[2:] == wanted[:1] + wanted[2:] and spec.name == TEXT
                advice = ": for texts of several chunks, export and build with --chunks" if longer else ""
                raise InputError(f"input {spec.name} has shape {list(shape)}, the engine takes {list(wanted)}{advice}")
        count = len(self.timesteps) + (0 if self._spare is None else len(self._spare))
        index = np.asarray(inputs["timestep_index"])
        if ((index < 0) | (index >= count)).any():
            raise InputError(f"a timestep_index is outside the scale table, whose indices are 0 to {count - 1}")
        return sizes

    def _sizes(self, inputs: Mapping[str, NDArray[Any]] | Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Returns the open sizes by name: the batch, and those of latents and text, which the profile must span."""
        sizes = {"batch": len(inputs["timestep_index"]) if "timestep_index" in inputs else 0}
        shape = np.shape(inputs["sample"]) if "sample" in inputs else ()
        if len(shape) == 4:
            sizes |= {"height": shape[2], "width": shape[3]}
            self.profile.check_latents(shape[2], shape[3])
        text = np.shape(inputs[TEXT]) if TEXT in inputs else ()
        if len(text) == 3:
            sizes["tokens"] = text[1]
            self.profile.check_tokens(text[1])
        return sizes


@dataclass(frozen=True)
class _SeenText:
    """Text states, at a version that PyTorch counts, the LoRAs that acted, and the products of both on the GPU.

    A reference to the states is kept, so that their memory is not given to other tensors.
    """

    states: torch.Tensor
    version: int
    acting: Acting
    projections: torch.Tensor

    def is_of(self, states: torch.Tensor, acting: Acting) -> bool:
        """Tells whether ``states`` are the very same memory, nothing was written there since, and LoRAs act alike."""
        if states.is_inference():  # PyTorch counts no writes to these
            return False
        ours, theirs = ((t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in (self.states, states))
        return ours == theirs and self.version == states._version and self.acting == acting


class BoundTensorRunner(BoundRunner):
    """A bound engine whose runner takes tensors: what is bound is on the GPU, ``infer`` is as ever."""

    _seen: _SeenText | None = None
    _zeros: dict[str, torch.Tensor] | None = None  # of optional inputs that the last calls left out
    _table: torch.Tensor | None = None  # the stored time projections of all timesteps, where the samples are
    _version = 0  # of the features in it

    def infer_tensors(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """``noise_pred`` [batch, C, H, W] on the GPU, valid until the next call.

        Args:
            inputs: ``sample`` and ``encoder_hidden_states`` on the GPU, ``timestep_index`` int64 [batch] and
                ``lora_strengths`` on the host: they are looked at there, so that nothing waits for the GPU.

        Raises:
            InputError: an input is missing, has another shape than the engine's, or an index is outside the table.
        """
        runner = self._runner
        if not isinstance(runner, TensorRunner):
            raise InputError("this engine's runner takes no tensors: call infer")
        sizes = self._check(inputs)
        given = {name: tensor for name, tensor in inputs.items() if name != ADDED_COND}
        for spec in self.optional:
            if spec.name not in given:
                given[spec.name] = self._zero(spec.name, shape_at(spec, sizes), inputs["sample"])
        if self.features is not None:
            given[PROJECTIONS] = self._projections(inputs)
        if self.texts is not None:
            given[TEXT_PROJECTIONS] = self._text_projections(given.pop(TEXT), inputs.get(LORA_STRENGTHS))
        return runner.infer_tensors(given)

    def _zero(self, name: str, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """Returns zeros beside ``like``, the same memory in every step."""
        self._zeros = self._zeros or {}
        kept = self._zeros.get(name)
        if kept is None or kept.shape != shape or kept.device != like.device or kept.dtype != like.dtype:
            self._zeros[name] = kept = like.new_zeros(shape)
        return kept

    def _projections(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns projections: of a stored table without a way through the host, of a prompt from there."""
        import torch

        assert self.features is not None, "the caller looked"
        indices, device = inputs["timestep_index"], inputs["sample"].device
        if self.features.table is not None:
            if self._table is None or self._table.device != device or self._version != self.features.version:
                self._table = torch.from_numpy(self.features.table).to(device)
                self._version = self.features.version
            return self._table[indices.to(device, non_blocking=True)]
        return torch.from_numpy(self.features.of(indices.numpy(), inputs[ADDED_COND].float().cpu().numpy()))

    def _text_projections(self, states: torch.Tensor, strengths: torch.Tensor | None) -> torch.Tensor:
        """On the GPU; nothing waits for it where the states are those of the call before, as in a sampling loop."""
        import torch

        assert self.texts is not None, "the caller looked"
        dtype = self.texts.spec.dtype
        weights = None if strengths is None else strengths.detach().cpu().float().numpy().astype(dtype)
        acting = self.texts.acting(weights)
        if self._seen is None or not self._seen.is_of(states, acting):
            given = states.detach().cpu().float().numpy().astype(dtype)
            projections = torch.from_numpy(self.texts.of(given, weights)).to(states.device)
            if states.is_inference():
                return projections
            self._seen = _SeenText(states, states._version, acting, projections)
        return self._seen.projections

    def close(self) -> None:
        """Closes the engine."""
        self._seen = self._table = self._zeros = None
        super().close()


class UniformTimestepRunner(ClosingRunner):
    """A runner of an engine that has one scale per batch (lowering ``runtime_q``): refuses mixed timesteps."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Returns the runner's outputs. Raises InputError where ``timestep_index`` names more than one timestep."""
        self._check(inputs["timestep_index"])
        return self._runner.infer(inputs)

    def tune(self, shapes: Sequence[Mapping[str, tuple[int, ...]]]) -> None:
        """Tells the runner, if it wants to know."""
        if isinstance(self._runner, ShapedRunner):
            self._runner.tune(shapes)

    def close(self) -> None:
        """Closes the runner."""
        self._runner.close()

    def _check(self, indices: NDArray[Any] | torch.Tensor) -> None:
        if len(set(indices.tolist())) > 1:
            raise InputError(
                "this engine takes batches of one timestep (lowering runtime_q): give samples of one timestep at a "
                "time, or build with the lowering rescale"
            )


class UniformTimestepTensorRunner(UniformTimestepRunner):
    """Uniform-timestep runner around one that takes tensors."""

    _runner: TensorRunner

    def infer_tensors(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the runner's outputs; raises as ``infer``."""
        self._check(inputs["timestep_index"])
        return self._runner.infer_tensors(inputs)
