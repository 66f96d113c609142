"""Options of a build, and the input shapes that its profile gives an engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from s2p_deploy.errors import InputError
from s2p_deploy.records import Execution, ShapeProfile, Span, TensorSpec
from s2p_deploy.records.optional_inputs import open_size
from s2p_deploy.records.typed_json import read_value

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import onnx_ir as ir

    from s2p_deploy.records import ExportedGraph

Shape = tuple[int, ...]
Shapes = dict[str, tuple[Shape, Shape, Shape]]
Lowering = Literal["auto", "rescale", "runtime_q"]


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build; they travel to the child process as JSON and are recorded in the engine.

    ``precision``, ``provider`` and ``optimization`` are those of :class:`s2p_deploy.records.Execution` (None: the
    backend's default). ``profile`` None stands for the batch sizes of :mod:`s2p_deploy.engines.profile`. ``lowering``
    says how timestep-dependent scales become operators (``auto``: what the backend takes, ``rescale`` where it takes
    several). Columns of the scale table that vary by no more than the fraction ``static_tolerance`` over the timesteps
    become constants. ``refit`` makes a TensorRT plan whose weights can be put in again, the same ones; ``stripped``
    leaves them out of the plan: they come from the graph when the engine is loaded. ``compute_capabilities``, such as
    ``7.5``, are what a TensorRT-RTX engine is for (empty: the library's default, which leaves out Turing's 7.5).

    Example:
        >>> BuildOptions(precision="bf16", profile=ShapeProfile(2, 4, 16), static_tolerance=0.02).execution
        Execution(precision='bf16', provider=None, optimization=None)
    """

    precision: str | None = None
    provider: str | None = None
    optimization: str | None = None
    profile: ShapeProfile | None = None
    lowering: Lowering = "auto"
    static_tolerance: float = 0.0
    refit: bool = False
    stripped: bool = False
    compute_capabilities: tuple[str, ...] = ()

    @property
    def execution(self) -> Execution:
        """Precision, provider and optimization in one record."""
        return Execution(self.precision, self.provider, self.optimization)

    @property
    def resolved_profile(self) -> ShapeProfile:
        """Returns the profile of options whose defaults were filled in."""
        if self.profile is None:
            raise ValueError("the options were not resolved")
        return self.profile

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> BuildOptions:
        """Reads the options that ``dataclasses.asdict`` made a mapping of."""
        profile = read_value(ShapeProfile, data["profile"], Path("options"))
        named = tuple(data.get("compute_capabilities", ()))
        return BuildOptions(**{**data, "profile": profile, "compute_capabilities": named})


MOST_TIMESTEPS = 4096  # in a scale table whose size is open: dozens of schedules bound at once


def profile_shapes(inputs: Iterable[TensorSpec], profile: ShapeProfile, timesteps: int) -> Shapes:
    """Returns the smallest, tuned-for and largest shape of every input.

    Where the graph leaves open how many timesteps its scale table has, one profile spans 1 to 4096 of them and is tuned
    for ``timesteps``.

    Raises:
        InputError: a size is dynamic that neither the profile nor ``timesteps`` gives.
    """
    low = profile.sizes("minimum") | {"timesteps": 1}
    tuned = profile.sizes("optimum") | {"timesteps": min(timesteps, MOST_TIMESTEPS)}
    high = profile.sizes("maximum") | {"timesteps": MOST_TIMESTEPS}
    return {spec.name: (shape_at(spec, low), shape_at(spec, tuned), shape_at(spec, high)) for spec in inputs}


def shape_at(spec: TensorSpec, sizes: Mapping[str, int]) -> Shape:
    """Returns the shape of a tensor whose dynamic sizes are given by name.

    Raises:
        InputError: another size is dynamic.
    """
    shape: list[int] = []
    for size in spec.shape:
        known = size if isinstance(size, int) else open_size(size, sizes)
        if known is None:
            raise InputError(
                f"input {spec.name} has the dynamic size {size!r}: only {' and '.join(sizes)} may be dynamic"
            )
        shape.append(known)
    return tuple(shape)


def profile_for(graph: ExportedGraph, profile: ShapeProfile) -> ShapeProfile:
    """Returns the profile with latents and texts of an engine of ``graph``.

    Left out, heights and widths are the trained ones; tokens all that the graph takes, tuned for the fewest.

    Raises:
        InputError: the graph has one size; a size is no multiple of what its network needs, or above its largest; the
            graph takes texts of one length, or not of those that are asked for.
    """
    tokens = _tokens_for(graph, profile.tokens)
    profile = profile if tokens == profile.tokens else replace(profile, tokens=tokens)
    trained = graph.manifest.content.get("latents")
    if trained is not None:
        height, width = (
            _span_for(requested, trained[side], trained["multiple"], trained.get("largest"))
            for side, requested in (("height", profile.height), ("width", profile.width))
        )
        return replace(profile, height=height, width=width)
    if profile.height is not None or profile.width is not None:
        raise InputError(f"{graph.folder} takes latents of one size: export it with --sizes dynamic")
    return profile


def _tokens_for(graph: ExportedGraph, requested: Span | None) -> Span | None:
    chunks = graph.chunks
    if chunks is None:
        if requested is not None:
            raise InputError(f"{graph.folder} takes texts of one length: export it with --chunks")
        return None
    least, most = chunks.fewest_tokens, chunks.most_tokens
    if requested is None:
        return Span(least, least, most)
    if not least <= requested.minimum <= requested.maximum <= most:
        raise InputError(
            f"texts of {requested} tokens: {graph.folder} takes {chunks.fewest} to {chunks.most} chunks of "
            f"{chunks.tokens} tokens, export it with other --chunks"
        )
    return requested


def _span_for(requested: Span | None, trained: int, step: int, largest: int | None) -> Span:
    if requested is not None and largest is not None and requested.maximum > largest:
        raise InputError(
            f"a latent size of {requested.maximum} is above {largest}, the most that this network has positions for"
        )
    return Span(trained, trained, trained, step) if requested is None else replace(requested, step=step)


def spec_of(value: ir.Value) -> TensorSpec:
    """Returns name and shape of a graph's input (its type is not read); a size without a name is ``?``."""
    sizes = () if value.shape is None else value.shape
    return TensorSpec(str(value.name), "", tuple(s if isinstance(s, int) else s.value or "?" for s in sizes))
