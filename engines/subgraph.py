"""A block's subgraph through the same prepare and compile as the whole graph, for teacher-forced comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING

from s2p_deploy.engines.backend import check_hint, usable_backend

if TYPE_CHECKING:
    import onnx

    from s2p_deploy.engines.runner import Runner


def runner_for_subgraph(model: onnx.ModelProto, backend: str, hint: str | None = None) -> Runner:
    """A runner of a small model cut from the canonical graph. All its inputs go to ``infer``; ``model`` is not changed.

    Raises:
        InputError: unknown backend or hint.
        MissingEnvironmentError: the backend's library is missing, or it cannot execute here.
    """
    import onnx_ir as ir

    chosen = usable_backend(backend)
    chosen_hint = check_hint(chosen, hint)
    prepared = ir.from_proto(model)
    chosen.prepare_model(prepared)
    return chosen.runner_from_model(ir.to_proto(prepared), chosen_hint)
