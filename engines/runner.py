"""Runners: one call for PyTorch, ONNX Runtime, OpenVINO and TensorRT, so that every comparison is one function."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

import numpy as np

from s2p_deploy.engines.options import ShapeProfile
from s2p_deploy.engines.profile_shapes import shape_at
from s2p_deploy.errors import InputError
from s2p_deploy.records import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    import torch
    from numpy.typing import NDArray

    from s2p_deploy.engines.conditioning import TimeFeatures
    from s2p_deploy.engines.text_projections import TextProjections
    from s2p_deploy.records import TimestepTable

OUTPUT = "noise_pred"
PROJECTIONS = "time_projections"
ADDED_COND = "added_cond"
TEXT, TEXT_PROJECTIONS = "encoder_hidden_states", "text_projections"


class Runner(Protocol):
    """Something that computes outputs from inputs. A context manager; closed, it holds no memory."""

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs by name; the arrays belong to the caller."""

    def close(self) -> None:
        """Frees what the runner holds. May be called twice."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class ClosingRunner:
    """The context manager of a runner: leaving it closes."""

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
    """A runner that is faster at input shapes that it was told of."""

    def tune(self, shapes: Sequence[Mapping[str, tuple[int, ...]]]) -> None:
        """Runs inputs of any of these shapes in a form compiled for them, from now on."""


class TorchRunner(ClosingRunner):
    """A PyTorch denoiser, floating point or fake-quant.

    It is called with ``sample`` [batch, C, H, W], ``step_index`` int64 [batch], ``encoder_hidden_states`` [batch,
    tokens, D] and, where it is given, ``added_cond`` [batch, A]. Floating-point inputs are cast to ``dtype`` (None:
    float32).
    """

    def __init__(self, module: Callable[..., torch.Tensor], dtype: torch.dtype | None = None) -> None:
        import torch

        self._module = module
        self._dtype = dtype or torch.float32

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """``noise_pred`` as NumPy (float32 for types that NumPy lacks)."""
        import torch

        sample = torch.from_numpy(np.ascontiguousarray(inputs["sample"])).to(self._dtype)
        rows = torch.from_numpy(np.ascontiguousarray(inputs["step_index"], dtype=np.int64))
        names = [name for name in (TEXT, ADDED_COND) if name in inputs]
        texts = [torch.from_numpy(np.ascontiguousarray(inputs[name])).to(self._dtype) for name in names]
        with torch.no_grad():
            output = self._module(sample, rows, *texts)
        if output.dtype == torch.bfloat16:
            output = output.float()
        return {OUTPUT: output.numpy()}

    def close(self) -> None:
        """Nothing to free: the module belongs to the caller."""


class BoundRunner(ClosingRunner):
    """An engine with its scales bound: what pipelines and comparisons call, with the same inputs as PyTorch.

    Values are cast to what the engine's inputs ask for. ``timesteps`` says which timestep every row is; ``features``
    gives their projected time features, and ``texts`` the products of the text, where the engine takes those as an
    input. ``profile`` says which latents the engine takes (None: those of the size that its inputs have).
    """

    def __init__(
        self,
        runner: Runner,
        inputs: tuple[TensorSpec, ...],
        timesteps: TimestepTable,
        features: TimeFeatures | None = None,
        texts: TextProjections | None = None,
        *,
        profile: ShapeProfile | None = None,
    ) -> None:
        self.timesteps, self.features, self.texts = timesteps, features, texts
        self.profile = profile or ShapeProfile()
        self._runner = runner
        self._taken = inputs
        stands_for = {} if texts is None else {TEXT_PROJECTIONS: texts.spec}
        own = tuple(stands_for.get(spec.name, spec) for spec in inputs if spec.name != PROJECTIONS)
        width = 0 if features is None else features.added_width
        added = (TensorSpec(ADDED_COND, "float32", ("batch", width)),) if width else ()
        self._inputs, self._added = own, added

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What a call takes; sizes of the batch are names, a height and width that may vary is the one tuned for."""
        latents = {name: size for name, size in self.profile.sizes("optimum").items() if name != "batch"}
        return tuple(
            replace(spec, shape=tuple(latents.get(str(size), size) for size in spec.shape))
            for spec in (*self._inputs, *self._added)
        )

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """``noise_pred`` [batch, C, H, W].

        Raises:
            InputError: an input is missing, has another shape than the engine's, or a row is outside the scale table.
        """
        self._check(inputs)
        given = {spec.name: np.ascontiguousarray(inputs[spec.name], dtype=spec.dtype) for spec in self._inputs}
        if self.features is not None:
            added = np.asarray(inputs[ADDED_COND], dtype=np.float32) if self._added else None
            given[PROJECTIONS] = self.features.of(given["step_index"], added)
        if self.texts is not None:
            given[TEXT_PROJECTIONS] = self.texts.of(given.pop(TEXT))
        return self._runner.infer(given)

    def __call__(
        self,
        sample: NDArray[Any],
        step_index: NDArray[np.int64],
        encoder_hidden_states: NDArray[Any],
        added_cond: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        """One step: ``sample`` [batch, C, H, W], rows [batch], text [batch, tokens, D] -> ``noise_pred``.

        ``added_cond`` [batch, A] where the time features depend on the prompt too.
        """
        inputs = {"sample": sample, "step_index": step_index, TEXT: encoder_hidden_states}
        return self.infer(inputs if added_cond is None else inputs | {ADDED_COND: added_cond})[OUTPUT]

    def tune(self, *batches: int) -> None:
        """Makes batches of these sizes, at the latents' size that the engine is tuned for, as fast as they can be."""
        if isinstance(self._runner, ShapedRunner):
            sizes = [self.profile.sizes("optimum") | {"batch": batch} for batch in batches]
            self._runner.tune([{spec.name: shape_at(spec, one) for spec in self._taken} for one in sizes])

    def close(self) -> None:
        """Closes the engine."""
        self._runner.close()
        if self.texts is not None:
            self.texts.close()

    def _check(self, inputs: Mapping[str, NDArray[Any]] | Mapping[str, torch.Tensor]) -> None:
        unknown = set(inputs) - {spec.name for spec in self.inputs}
        if unknown:
            raise InputError(f"the engine has no input {sorted(unknown)[0]!r} to give per step")
        sizes = self._sizes(inputs)
        for spec in (*self._inputs, *self._added):
            if spec.name not in inputs:
                raise InputError(f"the engine needs an input {spec.name!r}")
            shape = np.shape(inputs[spec.name])  # a tensor has one too
            wanted = tuple(sizes.get(size, size) if isinstance(size, str) else size for size in spec.shape)
            if shape != wanted:
                raise InputError(f"input {spec.name} has shape {list(shape)}, the engine takes {list(wanted)}")
        rows, index = self.timesteps.rows, np.asarray(inputs["step_index"])
        if ((index < 0) | (index >= rows)).any():
            raise InputError(f"a step_index is outside the scale table's rows 0 to {rows - 1}")

    def _sizes(self, inputs: Mapping[str, NDArray[Any]] | Mapping[str, torch.Tensor]) -> dict[str, int]:
        """The open sizes by name: the batch, and the latents' height and width, which the profile must span."""
        sizes = {"batch": len(inputs["step_index"]) if "step_index" in inputs else 0}
        shape = np.shape(inputs["sample"]) if "sample" in inputs else ()
        if len(shape) == 4:
            sizes |= {"height": shape[2], "width": shape[3]}
            self.profile.check_latents(shape[2], shape[3])
        return sizes
