"""Mutations of the manifest, of other JSON, of the plan, and of OpenVINO's XML."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from tests.mutations.file_mutations import Mutation
from tests.mutations.targets import manifest_data

VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**63, 10**400, -0.5, 1e308, float("nan"), float("inf"), "", "x", "../x", "/etc/passwd",
    "a" * 5000, "\0", [], {}, [[]], {"a": 1}, [1, 2, 3], "fp16", "bfloat16", "onnxruntime", "denoiser.onnx",
)  # fmt: skip
NUMBERS = ("-1", "0", "1", "2", "3", "999999999", "4294967296", "9223372036854775807", "18446744073709551615", "", "x")
_DEEP = "[" * 100_000
_LONG = "9" * 100_000


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:  # noqa: ANN401 - JSON
    """Every place in JSON, by its keys and indexes."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:40]) if isinstance(value, list) else ()
    return [at, *(place for key, part in inner for place in places(part, (*at, key)))]


def change_place(data: Any, random: Random) -> None:  # noqa: ANN401 - JSON
    """Another value at some place, a key less, or one more."""
    *way, last = random.choice([place for place in places(data) if place])
    parent = data
    for key in way:
        parent = parent[key]
    kind = random.randrange(4)
    if kind == 0:
        del parent[last]
    elif kind == 1 and isinstance(parent, dict):
        parent[random.choice(["extra", "path", "../x", ""])] = random.choice(VALUES)
    else:
        parent[last] = random.choice(VALUES)


def manifest_field(folder: Path, random: Random) -> dict[str, Any]:
    """A manifest's data with a change; the caller seals it, or writes it as it is."""
    data = manifest_data(folder)
    seal = data.pop("seal")
    for _ in range(random.choice([1, 1, 2])):
        change_place(data, random)
    return data | {"seal": seal}


def manifest_text(folder: Path, random: Random) -> None:
    """Text that is no manifest."""
    path = folder / "manifest.json"
    text = path.read_text(encoding="utf-8")
    twice = text.replace('"kind"', '"kind": "Engine", "kind"')
    broken = [_DEEP, _LONG, f'{{"seal":{_LONG}}}', f'{{"seal":{_DEEP}}}', "{}", "", "null", "\ufeff" + text]
    changed = [text[:-1], text + " ", text.replace("\n", "\r\n"), twice, text[: len(text) // 2]]
    path.write_text(random.choice(broken + changed), encoding="utf-8")


def manifest_bits(folder: Path, random: Random) -> None:
    path = folder / "manifest.json"
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def json_field(name: str) -> Mutation:
    """A change in a JSON file."""

    def mutate(folder: Path, random: Random) -> None:
        data = json.loads((folder / name).read_text(encoding="utf-8"))
        change_place(data, random)
        (folder / name).write_text(json.dumps(data), encoding="utf-8")

    return mutate


def json_text(name: str) -> Mutation:
    """Text that breaks a JSON parser."""

    def mutate(folder: Path, random: Random) -> None:
        (folder / name).write_text(random.choice([_DEEP, f'{{"a":{_LONG}}}', "", "null", "[]", "{", '{"a":1e999}']))

    return mutate


def plan_text(folder: Path, random: Random) -> None:
    """YAML that runs, explodes, or is no plan."""
    path = folder / "plan.yaml"
    text = path.read_text(encoding="utf-8")
    levels = zip("abcdefgh", "bcdefghi", strict=True)
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in levels)
    path.write_text(
        random.choice([
            bomb,
            bomb + text,
            f"layers: !!python/object/apply:os.system ['touch {folder.parent / 'ran'}']\n",
            "layers: !!python/object/new:subprocess.Popen [[ls]]\n",
            _DEEP,
            f"layers: {_LONG}\n",
            "layers: 2001-99-99\n",
            "layers: !!binary x\n",
            text.replace("int8", random.choice(["int3", "1", "~", "[]"]), 1),
            text.replace("conv", "conv_", random.choice([1, 2])),
            "",
            "\0",
        ]),
        encoding="utf-8",
    )  # fmt: skip


def on_xml(change: Callable[[str, Random], str]) -> Mutation:
    """A mutation of OpenVINO's IR."""

    def mutate(folder: Path, random: Random) -> None:
        path = folder / "denoiser.xml"
        path.write_text(change(path.read_text(encoding="utf-8"), random), encoding="utf-8")

    mutate.__name__ = change.__name__
    return mutate


def xml_number(text: str, random: Random) -> str:
    start, stop = random.choice([found.span() for found in re.finditer(r'(?<=[">,])-?\d+(?=[",<])', text)])
    return text[:start] + random.choice(NUMBERS) + text[stop:]


def xml_attribute(text: str, random: Random) -> str:
    """A name or a word changed, as by one wrong letter."""
    found = re.finditer(r'[a-z_]+(?==")|(?<=")[A-Za-z0-9_]+(?=")', text)
    start, stop = random.choice([match.span() for match in found])
    words = ["element_type", "shape", "offset", "size", "f32", "f16", "i64", "i8", "dynamic", "Loop", "If", "opset15"]
    return text[:start] + random.choice(words) + text[stop:]


def xml_line(text: str, random: Random) -> str:
    lines = text.splitlines()
    index = random.randrange(len(lines))
    lines[index : index + 1] = random.choice([[], [lines[index]] * 2, [random.choice(lines)]])
    return "\n".join(lines)


def xml_bomb(text: str, random: Random) -> str:
    head = '<!DOCTYPE net [<!ENTITY a "xxxxxxxxxx">' + "".join(
        f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    file = '<!DOCTYPE net [<!ENTITY i SYSTEM "../canary.bin">]>'
    body = text.removeprefix('<?xml version="1.0"?>')
    return random.choice([head + "]>", file]) + body.replace("conv", "&i;", 1)


def xml_layer(text: str, random: Random) -> str:
    """One layer's content in place of another's."""
    layers = re.findall(r"<layer .*?</layer>", text, re.DOTALL)
    first, second = random.choice(layers), random.choice(layers)
    inner = re.sub(r'id="\d+"', re.search(r'id="\d+"', first)[0], second, count=1)  # type: ignore[index]
    return text.replace(first, inner, 1)


XML_MUTATIONS: tuple[Mutation, ...] = tuple(
    map(on_xml, (xml_number, xml_number, xml_number, xml_attribute, xml_attribute, xml_line, xml_bomb, xml_layer))
)
