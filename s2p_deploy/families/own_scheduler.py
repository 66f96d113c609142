"""A pipeline's own scheduler, without its networks: so that schedules are refused before anything large is read."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from diffusers.utils import logging

from s2p_deploy.errors import InputError
from s2p_deploy.families.network_files import read_index
from s2p_deploy.families.pipelines import load_pipeline
from s2p_deploy.schedulers import is_flow_matching

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffusers import SchedulerMixin

    from s2p_deploy.families.pipelines import BasePipeline


def load_scheduler(base: BasePipeline) -> SchedulerMixin:
    """Loads the scheduler of a pipeline on disk, as the whole pipeline would have it.

    Raises:
        InputError: it cannot be loaded, or the pipeline cannot draw with a scheduler of its kind.
    """
    index = read_index(base.folder)
    others = [name for name, entry in index.items() if isinstance(entry, list) and name != "scheduler"]
    try:
        with _without_warnings():
            scheduler: SchedulerMixin = load_pipeline(base, without=others).scheduler
    except InputError:
        raise
    except Exception as error:  # whatever diffusers raises on a configuration is the configuration's fault
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"the scheduler of {base.base.source} cannot be loaded by diffusers: {reason}") from error
    _check_kind(scheduler, base)
    return scheduler


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silences what diffusers says of networks that are left out, such as of a safety checker."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _check_kind(scheduler: SchedulerMixin, base: BasePipeline) -> None:
    """Raises InputError unless the pipeline's class draws with schedulers of this kind."""
    name = type(scheduler).__name__
    if base.family.flow_matching and not is_flow_matching(scheduler):
        raise InputError(
            f"{base.base.source} has {name}, but a {base.pipeline_class} takes flow matching alone: give it the"
            " FlowMatchEulerDiscreteScheduler that its network was trained with"
        )
    if not base.family.flow_matching and not hasattr(scheduler, "init_noise_sigma"):
        raise InputError(
            f"{base.base.source} has {name}, which a {base.pipeline_class} cannot run (it has no init_noise_sigma):"
            " give it the scheduler that its network was trained with"
        )
