"""The model card beside an engine: ``README.md`` with the metadata that model hubs read.

What came from outside stands in code spans, where Markdown and HTML mean nothing; metadata holds only checked values.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jinja2 import Environment

    from s2p_deploy.records import Base, ExportedGraph

CARD = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,40}")
_MOST_METADATA = 2**16  # bytes of a pipeline's card that are looked at
_HALF = 16  # bits


def engine_card(graph: ExportedGraph, content: Mapping[str, Any]) -> str:
    """Writes the card of an engine.

    Args:
        graph: what it was built from.
        content: what its manifest will say: backend, precision, layers, environment, sizes.
    """
    base, recipe = graph.manifest.base, str(graph.manifest.recipe["name"])
    kinds = Counter(
        (s["op"], s["weight_storage_bits"], s["activation_bits"], s["lowering"], s["compute"])
        for s in content["layers"]
    )
    metadata = ModelCardData(**card_metadata(base, license_of(Path(base.source)), content))
    return (
        card_environment("s2p_deploy.engines")
        .get_template("model_card.md.j2")
        .render(
            metadata=f"---\n{metadata.to_yaml()}\n---",
            base=base,
            source=shown_source(base),
            recipe=recipe,
            quantized=_is_quantized(content),
            engine=content,
            size=sum(content["sizes"].values()),
            kinds=kinds.most_common(),
            timesteps=graph.timesteps,
        )
    )


def card_metadata(base: Base, license_name: str | None, engine: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what model hubs read: names of ours, and of others only what can be nothing but an id.

    ``engine`` has at least ``backend`` and ``layers``.
    """
    quantized = ["quantized"] if _is_quantized(engine) else []
    metadata: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["stable-diffusion", "s2p-deploy", engine["backend"], *quantized],
    }
    if _is_of_hub(base):
        metadata |= {"base_model": base.source} | ({"base_model_relation": "quantized"} if quantized else {})
    return metadata | ({"license": license_name} if license_name else {})


def _is_quantized(engine: Mapping[str, Any]) -> bool:
    return any(layer["weight_storage_bits"] < _HALF or layer["activation_bits"] < _HALF for layer in engine["layers"])


def license_of(folder: Path) -> str | None:
    """Returns the licence that a pipeline's own card names, or None."""
    try:
        with (folder / CARD).open("rb") as opened:
            card = ModelCard(opened.read(_MOST_METADATA).decode("utf-8", "replace"))
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError):
        return None
    name = card.data.get("license")
    return name if isinstance(name, str) and _LICENSE.fullmatch(name) else None


def _is_of_hub(base: Base) -> bool:
    """Tells whether a pipeline was named by ``owner/name``, not by where it lies."""
    return base.file is None and bool(_HUB_ID.fullmatch(base.source)) and not Path(base.source).exists()


def shown_source(base: Base) -> str:
    """Returns a pipeline's name for others: its hub id or its folder's name, never a path of the builder's machine."""
    return base.source if _is_of_hub(base) else Path(base.source).name or base.source


def code(value: Any) -> str:  # noqa: ANN401 - shown as text
    """Formats any text as one Markdown code span, in which nothing means anything."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split()) or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def cell(value: Any) -> str:  # noqa: ANN401 - as above
    """Formats the same inside a table, where a bar would end the cell: it is shown broken."""
    return code(value).replace("|", "\u00a6")


@cache
def card_environment(package: str) -> Environment:
    """Opens the templates of cards in a package, with the filters ``code`` and ``cell``."""
    from jinja2 import Environment, PackageLoader

    # Markdown, not HTML: the filters do what escaping would
    environment = Environment(
        loader=PackageLoader(package),
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": code, "cell": cell}
    return environment
