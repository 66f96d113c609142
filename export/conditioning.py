"""The conditioning graph: projected time features of rows, computed outside the denoiser, once for every prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch

from s2p_deploy.errors import InputError
from s2p_deploy.export.passes.fill_weights import FillWeights
from s2p_deploy.export.passes.fold_constants import FoldConstants
from s2p_deploy.export.passes.half_storage import HalfStorage
from s2p_deploy.export.passes.strip_metadata import StripMetadata
from s2p_deploy.export.passes.time_projections import TIME_PROJECTIONS
from s2p_deploy.export.tensors import stored_bytes
from s2p_deploy.export.tracing import OPSET, quiet_exporter
from s2p_deploy.families import hot_skeleton
from s2p_deploy.progress import Progress, silent
from s2p_deploy.records.disk_room import writing

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from s2p_deploy.families import TimePath
    from s2p_deploy.families.network_kind import Config
    from s2p_deploy.records import CalibratedModel

TIMESTEPS, ADDED_COND = "timesteps", "added_cond"
_TOLERANCE = 1e-3  # of the largest feature; a table made on a GPU differs from one made here by about 1e-5
_INLINE_UP_TO = 2**25  # bytes of weights that stay inside the graph file
_PATH = "time.path."


def time_path_model(time_path: TimePath) -> ir.Model:
    """A time path as ONNX, float32: ``timesteps`` float32 [rows] -> ``time_projections`` [rows, P]."""
    state = {name: tensor.numpy() for name, tensor in time_path.state_dict().items()}
    return _traced(time_path, (torch.arange(2, dtype=torch.float32),), (TIMESTEPS,), state.__getitem__)


def conditioning_model(calibrated: CalibratedModel, config: Config, *, half: bool) -> ir.Model:
    """The time path of a model whose features depend on the prompt too; its weights are read when they are written.

    ``timesteps`` float32 [rows] and ``added_cond`` float32 [rows, A] -> ``time_projections`` float32 [rows, P]. With
    ``half`` the weights are stored in float16.
    """
    hot = hot_skeleton(config, calibrated.timesteps).hot
    path = hot.get_submodule(_PATH.removesuffix(".")).eval()
    examples = (torch.zeros(2, device="meta"), torch.zeros(2, hot.added_width, device="meta"))
    model = _traced(path, examples, (TIMESTEPS, ADDED_COND), lambda name: calibrated.tensor(_PATH + name))
    if half:
        HalfStorage()(model)
    return model


def _traced(
    path: torch.nn.Module,
    examples: tuple[torch.Tensor, ...],
    names: tuple[str, ...],
    read: Callable[[str], NDArray[np.float32]],
) -> ir.Model:
    with quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            path.to("meta"),
            tuple(example.to("meta") for example in examples),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=names,
            output_names=[TIME_PROJECTIONS],
            dynamic_shapes=({0: "rows"},) * len(names),
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    for transformation in (FoldConstants(), FillWeights(read, ir.DataType.FLOAT), StripMetadata()):
        transformation(program.model)
    return program.model


def write_conditioning(model: ir.Model, file: Path, progress: Progress = silent) -> None:
    """Small graphs as one file, others with ``<file>.data`` beside them, tensor by tensor."""
    apart = f"{file.name}.data" if stored_bytes(model) > _INLINE_UP_TO else None
    with writing(file):
        ir.save(
            model,
            file,
            external_data=apart,
            callback=lambda _tensor, info: progress("write conditioning", info.index + 1, info.total),
        )


@torch.no_grad()
def check_time_path(time_path: TimePath | None, calibrated: CalibratedModel) -> None:
    """Whether the path computes the model's own time table, looked at on the calibrated rows.

    Raises:
        InputError: it does not, or there is none.
    """
    if time_path is None:
        raise InputError("--time-table input needs the time path of the pipeline that the model was calibrated from")
    table, rows = calibrated.time_table(), list(calibrated.timesteps.calibrated_rows)
    if time_path.slices != table.slices:
        raise InputError(f"{calibrated.folder} has time features of other layers than the pipeline: pass --model")
    found = time_path(torch.tensor(rows, dtype=torch.float32)).numpy()
    expected = table.projections[rows]
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not error <= _TOLERANCE:
        raise InputError(
            f"{calibrated.folder} has another time table than the pipeline's layers compute (they differ by "
            f"{100 * error:.2g} %, as with transforms.time_layers=quantized): export with --time-table constant"
        )
