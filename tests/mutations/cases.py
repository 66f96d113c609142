"""The cases: a numbered case is always the same mutation of the same target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.mutations.file_mutations import FILE_MUTATIONS, Mutation
from tests.mutations.onnx_mutations import EXTERNAL_MUTATIONS, NODE_MUTATIONS
from tests.mutations.scale_mutations import OTHER_TABLES, WRONG_TABLES
from tests.mutations.sealing import seal_anew
from tests.mutations.targets import GRAPH, MODEL, PLAN
from tests.mutations.text_mutations import (
    XML_MUTATIONS,
    json_field,
    json_text,
    manifest_bits,
    manifest_field,
    manifest_text,
    plan_text,
)

_TIMESTEPS = (json_field("timesteps.json"), json_text("timesteps.json"))
_GRAPH = (json_field("graph.json"), json_field("graph.json"), json_text("graph.json"))
_MANIFEST = "manifest"
_SHARES = {"onnxruntime": 36, "openvino": 20, GRAPH: 30, MODEL: 10, PLAN: 4}


@dataclass(frozen=True)
class Case:
    """``sealed``: digests and seal are made anew. ``strict``: even then, nothing but the original result is right."""

    number: int
    target: str
    sealed: bool
    strict: bool
    mutation: str
    mutate: Callable[[Path], None]


def make_case(number: int, targets: tuple[str, ...]) -> Case:
    """Every second case is sealed anew."""
    random, sealed = Random(number), number % 2 == 1
    target = random.choices(targets, [_SHARES[name] for name in targets])[0]
    groups = _groups(target)
    group = random.choice(sorted(groups))
    if group == _MANIFEST:
        return _manifest_case(number, target, sealed, random)
    chosen = random.choice(groups[group])
    strict = group == "external data" or (group == "wrong table" and target not in {GRAPH, MODEL})

    def mutate(folder: Path) -> None:
        chosen(folder, random)
        if sealed:
            seal_anew(folder)

    return Case(number, target, sealed, strict, f"{group}: {getattr(chosen, '__name__', 'mutate')}", mutate)


def _groups(target: str) -> dict[str, tuple[Mutation, ...]]:
    shared = {
        "file": FILE_MUTATIONS,
        "wrong table": WRONG_TABLES,
        "other table": OTHER_TABLES,
        "timesteps": _TIMESTEPS,
        _MANIFEST: (),
    }
    own: dict[str, dict[str, tuple[Mutation, ...]]] = {
        "onnxruntime": {"external data": EXTERNAL_MUTATIONS, "nodes": NODE_MUTATIONS, "nodes again": NODE_MUTATIONS},
        "openvino": {"xml": XML_MUTATIONS, "xml again": XML_MUTATIONS},
        GRAPH: {"external data": EXTERNAL_MUTATIONS, "nodes": NODE_MUTATIONS, "graph": _GRAPH, "plan": (plan_text,)},
        MODEL: {"plan": (plan_text,)},
        PLAN: {},
    }
    return shared | own[target]


def _manifest_case(number: int, target: str, sealed: bool, random: Random) -> Case:
    def mutate(folder: Path) -> None:
        if sealed:
            changed = manifest_field(folder, random)
            seal_anew(folder, changed)
        else:
            random.choice([manifest_text, manifest_bits])(folder, random)

    return Case(number, target, sealed, False, "manifest: field" if sealed else "manifest: text", mutate)
