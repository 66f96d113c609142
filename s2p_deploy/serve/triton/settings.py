"""What the models of a repository read when the server loads them: their folder, and ``config.pbtxt``'s parameters."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.errors import InputError
from s2p_deploy.signing import open_engine

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from s2p_deploy.records import Engine

ENGINE, PIPELINE = "engine", "pipeline"  # folders beside model.py


@dataclass(frozen=True)
class ModelSettings:
    """Of one instance: the folder of its version, its device (``cpu``, ``cuda:0``), the parameters as they stand."""

    folder: Path
    device: str
    parameters: Mapping[str, str]

    @staticmethod
    def of(args: Mapping[str, str]) -> ModelSettings:
        """From what Triton gives to a model's ``initialize``."""
        config: dict[str, Any] = json.loads(args["model_config"])
        on_gpu = args["model_instance_kind"] == "GPU"
        return ModelSettings(
            Path(args["model_repository"]) / args["model_version"],
            f"cuda:{int(args['model_instance_device_id'])}" if on_gpu else "cpu",
            {name: value["string_value"] for name, value in config.get("parameters", {}).items()},
        )

    @property
    def schedules(self) -> tuple[NDArray[np.float64], ...]:
        """Timesteps to bind, float64 [calls] each."""
        return tuple(np.asarray(schedule, dtype=np.float64) for schedule in self.value("schedules"))

    def value(self, name: str) -> Any:  # noqa: ANN401 - JSON
        """A parameter that is JSON. Raises InputError where it is missing or none."""
        try:
            return json.loads(self.parameters[name])
        except (KeyError, ValueError) as error:
            raise InputError(f"parameter {name} of config.pbtxt is missing or no JSON: export it again") from error

    def open_engine(self) -> Engine:
        """The engine's artifact, verified; signed too, where ``S2P_PUBLIC_KEY`` names a key.

        Raises:
            IntegrityError: it was changed, or is not signed with that key.
        """
        key = os.environ.get("S2P_PUBLIC_KEY")
        return open_engine(self.folder / ENGINE, Path(key) if key else None)
