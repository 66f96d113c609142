"""The part of loading an engine that stays outside it where Triton's own backend runs its file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from s2p_deploy.engines import BoundRunner, ShapeProfile
from s2p_deploy.engines.bound_scales import BOUND
from s2p_deploy.engines.load import bound_features, bound_timesteps
from s2p_deploy.engines.text_projections import text_projections
from s2p_deploy.serve.triton.bls import TableRunner
from s2p_deploy.serve.triton.model_config import takes_table
from s2p_deploy.timesteps import scales_of_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from s2p_deploy.engines import Runner
    from s2p_deploy.records import Engine
    from s2p_deploy.timesteps import Timesteps

    Bind = Callable[[Runner], Runner]


def native_binding(engine: Engine, schedules: Sequence[Timesteps]) -> Bind:
    """Binds scales, time features and products of the text to a runner of the bare engine, as ``load_engine`` does.

    Raises:
        InputError: the engine does not run one of ``schedules``. IntegrityError: a side graph was changed.
    """
    timesteps = bound_timesteps(engine, schedules)
    table = scales_of_rows(engine.scales, engine.timesteps, timesteps).scales
    features = bound_features(engine, timesteps, schedules)
    texts = text_projections(engine) if engine.takes_text_projections else None
    per_step = tuple(spec for spec in engine.inputs if spec.name != BOUND)
    fixed = any(spec.name == BOUND and isinstance(spec.shape[0], int) for spec in engine.inputs)
    profile = ShapeProfile.from_json(engine.manifest.content["profile"])

    def bind(runner: Runner) -> Runner:
        inner = TableRunner(runner, table, fixed=fixed) if takes_table(engine) else runner
        return BoundRunner(inner, per_step, timesteps, features, texts, profile=profile)

    return bind
