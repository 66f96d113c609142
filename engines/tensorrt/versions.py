"""What differs between TensorRT 10, TensorRT 11 and TensorRT-RTX, decided in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from s2p_deploy.errors import MissingEnvironmentError

if TYPE_CHECKING:
    from types import ModuleType


@dataclass(frozen=True)
class BuildFlags:
    """Names of the builder flags to set, and whether a strongly typed network must be asked for (11 has no others)."""

    ask_strongly_typed: bool
    builder: tuple[str, ...]


def build_flags(library: ModuleType, *, refit: bool, stripped: bool) -> BuildFlags:
    """The flags of a build with ``library``, the imported module.

    Refittable plans are always ``REFIT_IDENTICAL``: with plain ``REFIT``, TensorRT 11.3 may drop the bias of a matrix
    product even where nothing is refitted.

    Raises:
        MissingEnvironmentError: this version has no such flag.
    """
    asked = {"REFIT_IDENTICAL": refit or stripped, "STRIP_PLAN": stripped}
    wanted = tuple(name for name, is_asked in asked.items() if is_asked)
    for name in wanted:
        if not hasattr(library.BuilderFlag, name):
            raise MissingEnvironmentError(
                f"{library.__name__} {library.__version__} has no {name}: install a newer one, or build without"
            )
    networks = getattr(library, "NetworkDefinitionCreationFlag", None)
    return BuildFlags(hasattr(networks, "STRONGLY_TYPED"), wanted)
