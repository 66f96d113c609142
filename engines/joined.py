"""Joined engines: one runs the last timesteps of the other, where what is rounded is seen in the picture.

What an engine rounds early is mended by its later calls; what it rounds in the last ones stays. So floating point in a
tenth of the timesteps brings pictures as near as many layers of higher precision would in all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.engines.lowerings import MIXED_TIMESTEPS
from s2p_deploy.engines.model_card import CARD
from s2p_deploy.engines.runner import OUTPUT, BoundRunner, BoundTensorRunner
from s2p_deploy.errors import InputError
from s2p_deploy.records import Engine, check_vacant, copy_artifact, write_artifact
from s2p_deploy.records.artifacts import bytes_of_artifact, copy_verified
from s2p_deploy.records.engine import LOW_NOISE
from s2p_deploy.records.files import check_room
from s2p_deploy.records.optional_inputs import IMAGE_REACH

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from s2p_deploy.timesteps import Timesteps


def join_engines(
    engine: Engine, low_noise: Engine, out: Path, *, boundary_ratio: float, replace: bool = False
) -> Engine:
    """Writes an engine that is ``engine`` with ``low_noise`` inside, which runs the timesteps of little noise.

    Args:
        engine: runs the timesteps from the boundary on.
        low_noise: runs those below it; it takes what ``engine`` takes.
        out: folder of the new artifact, which holds copies of both.
        boundary_ratio: the boundary, as a share of the training timesteps.
        replace: replaces an artifact at ``out``.

    Raises:
        InputError: the engines do not go together, or leave no timestep to one of them; ``out`` may not be written, or
            its disk has no room.
        IntegrityError: a file was changed.
    """
    check_vacant(out, "Engine", replace=replace, inputs={"engine": engine.folder, "low-noise engine": low_noise.folder})
    if engine.boundary_ratio is not None:
        raise InputError(f"{engine.folder} is joined already: give the engine that it was made of")
    if not engine.is_quantized:
        raise InputError(f"{engine.folder} quantizes nothing: give the quantized engine first, this one to --low-noise")
    if low_noise.options.stripped:
        raise InputError(
            f"{low_noise.folder} stores no weights, and its graph is not found from {out}: build it with them"
        )
    boundary = boundary_ratio * engine.timesteps.training_timesteps
    first, *_, last = engine.timesteps.calibrated * 2  # a schedule may have one
    if not (first < boundary <= last and 0 < boundary_ratio < 1):
        raise InputError(
            f"a boundary ratio of {boundary_ratio:g} is timestep {boundary:g}, which leaves one engine nothing of the"
            f" schedule from {first:g} to {last:g}: give another --boundary-ratio"
        )
    low_noise.check_follows(engine, boundary)
    check_room(out, bytes_of_artifact(engine) + bytes_of_artifact(low_noise), "choose another --out")

    def fill(folder: Path) -> dict[str, Any]:
        for name in engine.manifest.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            copy_verified(engine, name, folder / name)
        copy_artifact(low_noise, folder / LOW_NOISE)
        with (folder / CARD).open("a", encoding="utf-8") as card:
            card.write(f"\nTimesteps below {boundary:g} run on the engine in `{LOW_NOISE}`, which has its own card.\n")
        mixed = engine.mixed_timesteps and low_noise.mixed_timesteps
        return engine.manifest.content | {"boundary_ratio": boundary_ratio, MIXED_TIMESTEPS: mixed}

    parents = {name: (engine.folder / parent.path, parent) for name, parent in engine.manifest.parents.items()}
    write_artifact(
        out,
        kind="Engine",
        base=engine.manifest.base,
        recipe=engine.manifest.recipe,
        fill=fill,
        parents={**parents, LOW_NOISE: (out / LOW_NOISE, low_noise.manifest)},
        replace=replace,
    )
    return Engine.open(out)


class JoinedRunner(BoundRunner):
    """Two bound engines that take the same calls: ``low`` runs the samples at timesteps below ``boundary``.

    To the outside it is ``high``, whose timestep indices calls have. Samples of both in one batch run in two.
    """

    def __init__(self, high: BoundRunner, low: BoundRunner, boundary: float) -> None:
        super().__init__(
            high._runner,
            high._taken,
            high.timesteps,
            high.features,
            high.texts,
            profile=high.profile,
            spare=high._spare,
            loras=high.loras,
            images=high.images,
        )
        self.high, self.low, self._boundary = high, low, boundary
        own = high.timesteps.timesteps
        below = np.flatnonzero((own < boundary) & (own >= high.timesteps.covered[0]))
        # the other engine's timestep index of every index that it runs
        self._low_indices = dict(zip(below.tolist(), low.indices(own[below]).tolist(), strict=True))

    def stage(self, index: int) -> int:
        """See :class:`BoundRunner`."""
        return int(index in self._low_indices)

    def check_timesteps(self, timesteps: Timesteps) -> None:
        """Checks that both engines run their part of some timesteps; from any thread. Raises as the engines'."""
        self.high.check_timesteps(timesteps)
        values = np.asarray(timesteps, np.float64).reshape(-1)
        self.low.check_timesteps(values[values < self._boundary])

    def indices(self, timesteps: Timesteps) -> NDArray[np.int64]:
        """Looks up timestep indices as each engine does; raises as they do."""
        values = np.asarray(timesteps, np.float64).reshape(-1)
        found = self.high.indices(values)
        spare = found >= len(self.timesteps)  # what the others stand for does not change
        for index in found[spare].tolist():
            self._low_indices.pop(index, None)
        below = spare & (values < self._boundary)
        self._low_indices.update(zip(found[below].tolist(), self.low.indices(values[below]).tolist(), strict=True))
        return found

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Predicts ``noise_pred`` [batch, C, H, W]; raises as the engines do."""
        self._check(inputs)
        low = self._low_rows(inputs)
        if not low.any():
            return self.high.infer(inputs)
        if low.all():
            return self.low.infer(self._low_inputs(inputs))
        high, rest = ({name: value[rows] for name, value in inputs.items()} for rows in (~low, low))
        predicted = self.high.infer(high)[OUTPUT]
        joined = np.empty((len(low), *predicted.shape[1:]), predicted.dtype)
        joined[~low], joined[low] = predicted, self.low.infer(self._low_inputs(rest))[OUTPUT]
        return {OUTPUT: joined}

    def tune(self, *batches: int) -> None:
        """Makes batches of these sizes as fast as they can be, in both engines."""
        self.high.tune(*batches)
        self.low.tune(*batches)

    def close(self) -> None:
        """Closes both engines."""
        self.high.close()
        self.low.close()

    def _low_rows(self, inputs: Mapping[str, Any]) -> NDArray[np.bool_]:
        """Marks the samples that the low-noise engine runs."""
        return np.asarray([index in self._low_indices for index in inputs["timestep_index"].tolist()], bool)

    def _low_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the low-noise engine's call: it has timestep indices of its own."""
        own = np.asarray([self._low_indices[index] for index in inputs["timestep_index"].tolist()], np.int64)
        given = {**inputs, "timestep_index": own}
        if not any(spec.name == IMAGE_REACH for spec in self.low.optional):
            given.pop(IMAGE_REACH, None)  # in floating point there are no grids to enlarge
        return given


class JoinedTensorRunner(JoinedRunner):
    """Joined engines whose runners take tensors."""

    high: BoundTensorRunner
    low: BoundTensorRunner

    def infer_tensors(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """``noise_pred`` [batch, C, H, W] on the GPU, valid until the next call; inputs as the engines take them."""
        import torch

        self._check(inputs)
        low = self._low_rows(inputs)
        if not low.any():
            return self.high.infer_tensors(inputs)
        if low.all():
            return self.low.infer_tensors(self._low_tensors(inputs))
        rows = [torch.from_numpy(np.flatnonzero(some)) for some in (~low, low)]
        high, rest = ({name: value[some.to(value.device)] for name, value in inputs.items()} for some in rows)
        predicted = self.high.infer_tensors(high)[OUTPUT]
        joined = predicted.new_empty((len(low), *predicted.shape[1:]))
        joined[rows[0].to(joined.device)] = predicted
        joined[rows[1].to(joined.device)] = self.low.infer_tensors(self._low_tensors(rest))[OUTPUT].to(joined.dtype)
        return {OUTPUT: joined}

    def _low_tensors(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        given = self._low_inputs(inputs)
        return given | {"timestep_index": torch.from_numpy(given["timestep_index"])}


def joined_runner(high: BoundRunner, low: BoundRunner, boundary: float) -> JoinedRunner:
    """Joins two bound engines, of arrays or of tensors as both are."""
    tensors = isinstance(high, BoundTensorRunner) and isinstance(low, BoundTensorRunner)
    return (JoinedTensorRunner if tensors else JoinedRunner)(high, low, boundary)
