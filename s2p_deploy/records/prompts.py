"""PromptSet: what to draw. One prompt per line, or JSON lines {id, text, negative}."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


@dataclass(frozen=True)
class Prompt:
    """One prompt; its noise depends on its id alone.

    Example:
        >>> Prompt("mine", "a small red circle").noise_seed == Prompt("mine", "a large blue square").noise_seed
        True
    """

    id: str
    text: str
    negative: str = ""

    @property
    def noise_seed(self) -> int:
        """First 8 bytes of SHA-256(id), as torch's generators take them (63 bits)."""
        return int.from_bytes(hashlib.sha256(self.id.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class PromptSet:
    """Prompts with distinct ids, in order.

    Example:
        >>> prompts = PromptSet.of(["a small red circle", "a large blue square"])
        >>> prompts.first(1).prompts[0].text
        'a small red circle'
    """

    prompts: tuple[Prompt, ...]

    @staticmethod
    def of(texts: Iterable[str]) -> PromptSet:
        """Collects distinct texts; the id of each is its hash, as in a text file with one prompt per line.

        Raises:
            InputError: there is no text, or one is empty or not a string.
        """
        given = list(texts)
        if not given or not all(isinstance(text, str) and text.strip() for text in given):
            raise InputError("prompts must be a list of at least one text, none of them empty")
        return PromptSet(tuple({text: _from_text(text, "") for text in map(str.strip, given)}.values()))

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all prompts."""
        text = json.dumps([[p.id, p.text, p.negative] for p in self.prompts])
        return hashlib.sha256(text.encode()).hexdigest()

    def first(self, count: int) -> PromptSet:
        """Returns the first ``count`` prompts (all, where there are fewer)."""
        return PromptSet(self.prompts[:count])


def read_prompts(path: Path) -> PromptSet:
    """Reads a prompt file: ``.jsonl`` as JSON lines, anything else as UTF-8 text with one prompt per line.

    Raises:
        InputError: the file is missing, not UTF-8, empty, repeats an id, or a line is not what its format asks for.
    """
    if path.is_dir():
        raise InputError(f"prompt file {path} is a folder: give a file with one prompt per line")
    if not path.is_file():
        raise InputError(f"prompt file {path} does not exist")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would also cut at U+2028 inside a text
    except UnicodeDecodeError as error:
        raise InputError(f"prompt file {path} is not UTF-8 text") from error
    parse = _from_json if path.suffix == ".jsonl" else _from_text
    prompts = tuple(parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip())
    if not prompts:
        raise InputError(f"prompt file {path} is empty: give at least one prompt")
    unique = {prompt.id: prompt for prompt in prompts}
    if path.suffix == ".jsonl" and len(unique) < len(prompts):
        raise InputError(f"prompt file {path} repeats an id: ids must be distinct, the noise comes from them")
    return PromptSet(tuple(unique.values()))


def _from_text(line: str, _where: str) -> Prompt:
    text = line.strip()
    return Prompt(hashlib.sha256(text.encode()).hexdigest()[:16], text)


def _from_json(line: str, where: str) -> Prompt:
    try:
        data = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON") from error
    allowed = {"id", "text", "negative"}
    if not isinstance(data, dict) or not allowed >= set(data) or not {"id", "text"} <= set(data):
        raise InputError(f"{where} must be an object with id, text and optionally negative")
    if not all(isinstance(value, str) for value in data.values()):
        raise InputError(f"{where}: id, text and negative must be strings")
    return Prompt(**data)
