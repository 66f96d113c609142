"""Protobuf's text format, as much of it as a ``config.pbtxt`` needs. Nothing that is quoted here can end its quotes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Value: TypeAlias = "str | int | bool | Word | Mapping[str, Value] | Sequence[Value]"

_INDENT = "  "
_ESCAPES = {ord('"'): '\\"', ord("\\"): "\\\\", ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t"}


@dataclass(frozen=True)
class Word:
    """The name of an enum's value: written without quotes."""

    name: str


def text_format(message: Mapping[str, Value]) -> str:
    """A message as text, one field a line; a sequence is a repeated field, a mapping a message inside."""
    return "".join(line + "\n" for line in _lines(message, ""))


def _lines(message: Mapping[str, Value], indent: str) -> list[str]:
    lines = []
    for name, value in message.items():
        match value:
            case str() | int() | Word():
                lines.append(f"{indent}{name}: {_scalar(value)}")
            case Mapping():
                lines += [f"{indent}{name} {{", *_lines(value, indent + _INDENT), f"{indent}}}"]
            case [Mapping(), *_]:
                for item in value:
                    lines += _lines({name: item}, indent)
            case _:
                lines.append(f"{indent}{name}: [{', '.join(map(_scalar, value))}]")
    return lines


def _scalar(value: Value) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int():
            return str(value)
        case Word():
            return value.name
        case _:
            return quoted(str(value))


def quoted(text: str) -> str:
    """A string literal. Everything but printable ASCII is escaped, as the bytes of UTF-8."""
    return '"' + "".join(_escaped(character) for character in text) + '"'


def _escaped(character: str) -> str:
    if character in ' !"\\' or (character.isascii() and character.isprintable()):
        return _ESCAPES.get(ord(character), character)
    if ord(character) in _ESCAPES:
        return _ESCAPES[ord(character)]
    return "".join(f"\\{byte:03o}" for byte in character.encode("utf-8", "surrogatepass"))
