"""Floating-point networks beside the denoiser: the time path of a graph that takes its features, text encoders, VAE."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch

from s2p_deploy.errors import InputError
from s2p_deploy.export.passes.fold_constants import FoldConstants
from s2p_deploy.export.passes.names import ReadableNames, StripMetadata
from s2p_deploy.export.passes.time_projections import TIME_PROJECTIONS
from s2p_deploy.export.passes.weights import DirectWeights, HalfStorage, StoredWeights
from s2p_deploy.export.regions import NAME_SCOPES
from s2p_deploy.export.tracing import trace
from s2p_deploy.families import indexed_skeleton

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from s2p_deploy.families import Config, TimePath
    from s2p_deploy.families.components import ComponentNetwork
    from s2p_deploy.records import CalibratedModel

TIMESTEPS, ADDED_COND = "timesteps", "added_cond"
_TOLERANCE = 1e-3  # of the largest feature; a table made on a GPU differs from one made here by about 1e-5
_PATH = "time.path."
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # torch's note where it does not know the module


def time_path_model(time_path: TimePath) -> ir.Model:
    """Traces a time path, float32: ``timesteps`` float32 [timesteps] -> ``time_projections`` [timesteps, P]."""
    state = {name: tensor.numpy() for name, tensor in time_path.state_dict().items()}
    return _time_path(time_path, (torch.arange(2, dtype=torch.float32),), (TIMESTEPS,), state.__getitem__)


def conditioning_model(calibrated: CalibratedModel, config: Config, *, half: bool) -> ir.Model:
    """Traces the time path of a model whose features depend on the prompt too; its weights are read when written.

    ``timesteps`` float32 [timesteps] and ``added_cond`` float32 [timesteps, A] -> ``time_projections`` float32
    [timesteps, P]. With ``half`` the weights are stored in float16.
    """
    denoiser = indexed_skeleton(config, calibrated.timesteps).denoiser
    path = denoiser.get_submodule(_PATH.removesuffix(".")).eval()
    examples = (torch.zeros(2, device="meta"), torch.zeros(2, denoiser.added_width, device="meta"))
    model = _time_path(path, examples, (TIMESTEPS, ADDED_COND), lambda name: calibrated.tensor(_PATH + name))
    if half:
        HalfStorage()(model)
    return model


def component_model(component: ComponentNetwork, name: str) -> ir.Model:
    """Traces a text encoder or half of an autoencoder in the types that its modules have.

    Its weights are those in memory, not copies of them.

    Args:
        component: what to trace.
        name: the graph's.
    """
    outputs, sizes = list(component.outputs), (dict(component.open_sizes),)
    model = trace(component.network, (component.example,), [component.input], outputs, sizes)
    weights = {key: value.const_value for key, value in model.graph.initializers.items()}

    def read(key: str) -> NDArray[np.float32]:
        tensor = weights[key]
        assert tensor is not None, "traced with its data"
        return tensor.numpy()  # float16 where the module is

    for node in model.graph:
        if _NO_MODULE in node.metadata_props.get(NAME_SCOPES, ""):
            del node.metadata_props[NAME_SCOPES]  # folding gives it that of its first reader
    FoldConstants()(model)
    _store(model, read, None)
    ReadableNames()(model)
    StripMetadata()(model)
    model.graph.name = name
    return model


@torch.no_grad()
def check_time_path(time_path: TimePath | None, calibrated: CalibratedModel) -> None:
    """Checks that the path computes the model's own time table at the calibrated timesteps.

    Raises:
        InputError: it does not, or there is none.
    """
    if time_path is None:
        raise InputError("--time-table input needs the time path of the pipeline that the model was calibrated from")
    table, indices = calibrated.time_table(), list(calibrated.timesteps.calibrated_indices)
    if time_path.slices != table.slices:
        raise InputError(f"{calibrated.folder} has time features of other layers than the pipeline: pass --model")
    computed = time_path(torch.tensor(indices, dtype=torch.float32)).numpy()
    expected = table.projections[indices]
    error = float(np.abs(computed - expected).max() / np.abs(expected).max())
    if not error <= _TOLERANCE:
        raise InputError(
            f"{calibrated.folder} has another time table than the pipeline's layers compute (they differ by "
            f"{100 * error:.2g} %, as with transforms.time_layers=quantized): export with --time-table constant"
        )


def _time_path(
    path: torch.nn.Module,
    examples: tuple[torch.Tensor, ...],
    names: tuple[str, ...],
    read: Callable[[str], NDArray[np.float32]],
) -> ir.Model:
    on_meta = tuple(example.to("meta") for example in examples)
    model = trace(path.to("meta"), on_meta, names, [TIME_PROJECTIONS], ({0: "timesteps"},) * len(names))
    FoldConstants()(model)
    _store(model, read, ir.DataType.FLOAT)
    StripMetadata()(model)
    return model


def _store(model: ir.Model, read: Callable[[str], NDArray[np.float32]], dtype: ir.DataType | None) -> None:
    direct = DirectWeights()
    direct(model)
    StoredWeights(direct.keys, read, dtype)(model)
