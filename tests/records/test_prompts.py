from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2p_deploy.errors import InputError
from s2p_deploy.records import Prompt, read_prompts

LINES = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1).filter(
    lambda s: s.strip()
)


def test_text_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a red circle\n\n  a blue square  \na red circle\n", encoding="utf-8")
    prompts = read_prompts(path).prompts
    assert [p.text for p in prompts] == ["a red circle", "a blue square"], "blank lines and repetitions add nothing"
    assert prompts[0].id == hashlib.sha256(b"a red circle").hexdigest()[:16]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "a", "text": "x"}\n{"id": "b", "text": "x", "negative": "y"}\n', encoding="utf-8")
    assert read_prompts(path).prompts == (Prompt("a", "x"), Prompt("b", "x", "y"))
    assert read_prompts(path).first(1).prompts == (Prompt("a", "x"),)


@given(texts=st.lists(LINES, min_size=1, max_size=5, unique=True))
@settings(max_examples=50)
def test_any_json_lines_come_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    lines = [json.dumps({"id": str(n), "text": text}, ensure_ascii=False) for n, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert [p.text for p in read_prompts(path).prompts] == texts


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_windows_files_read_the_same(tmp_path: Path, mark: bytes, end: bytes) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(mark + b"one" + end + b"two" + end)
    assert [p.text for p in read_prompts(path).prompts] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.txt", b"", "empty"),
        ("p.txt", b" \n\t\n", "empty"),
        ("p.txt", b"\xff\xfe", "UTF-8"),
        ("p.jsonl", b"{", "p.jsonl:1 is not JSON"),
        ("p.jsonl", b'{"id": "a", "text": "x"}\n[1]', "p.jsonl:2 must be an object"),
        ("p.jsonl", b'{"id": "a", "text": "x", "seed": 1}', "must be an object"),
        ("p.jsonl", b'{"id": "a"}', "must be an object"),
        ("p.jsonl", b'{"id": 1, "text": "x"}', "must be strings"),
        ("p.jsonl", b'{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}', "repeats an id"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_prompts(tmp_path / name)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_prompts(tmp_path / "none.txt")


def test_noise_depends_on_the_id_alone() -> None:
    # sha-256 of b"abc" starts with ba7816bf8f01cfea
    assert Prompt("abc", "x").noise_seed == 0xBA7816BF8F01CFEA >> 1
    assert Prompt("abc", "x").noise_seed == Prompt("abc", "y", "z").noise_seed


@given(st.text())
def test_seeds_fit_a_torch_generator(identity: str) -> None:
    assert 0 <= Prompt(identity, "").noise_seed < 2**63


def test_the_digest_follows_every_field(tmp_path: Path) -> None:
    seen = set()
    for line in (
        {"id": "a", "text": "x"},
        {"id": "b", "text": "x"},
        {"id": "a", "text": "y"},
        {"id": "a", "text": "x", "negative": "n"},
    ):
        path = tmp_path / "p.jsonl"
        path.write_text(json.dumps(line))
        seen.add(read_prompts(path).digest)
    assert len(seen) == 4
