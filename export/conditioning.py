"""The conditioning graph of the input form: every row's projected time features from its timestep, at load time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch

from s2p_deploy.errors import InputError
from s2p_deploy.export.passes.strip_metadata import StripMetadata
from s2p_deploy.export.passes.time_projections import TIME_PROJECTIONS
from s2p_deploy.export.tracing import OPSET, quiet_exporter

if TYPE_CHECKING:
    from pathlib import Path

    from s2p_deploy.families import TimePath
    from s2p_deploy.records import CalibratedModel

TIMESTEPS = "timesteps"
_TOLERANCE = 1e-3  # of the largest feature; a table made on a GPU differs from one made here by about 1e-5


def write_conditioning(time_path: TimePath, file: Path) -> None:
    """Writes the time path as ONNX, weights inside: ``timesteps`` float32 [rows] -> ``time_projections`` [rows, P]."""
    with quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            time_path,
            (torch.arange(2, dtype=torch.float32),),
            dynamo=True,
            optimize=True,
            verbose=False,
            opset_version=OPSET,
            input_names=[TIMESTEPS],
            output_names=[TIME_PROJECTIONS],
            dynamic_shapes=({0: "rows"},),
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    StripMetadata()(program.model)
    ir.save(program.model, file)


@torch.no_grad()
def check_time_path(time_path: TimePath | None, calibrated: CalibratedModel) -> None:
    """Whether the path computes the model's own time table, looked at on the calibrated rows.

    Raises:
        InputError: it does not, or there is none.
    """
    if time_path is None:
        raise InputError("--time-table input needs the time path of the pipeline that the model was calibrated from")
    table, rows = calibrated.time_table(), list(calibrated.timesteps.calibrated)
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
