from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from s2p_deploy.engines import build_engine
from s2p_deploy.engines.model_card import CARD, card_metadata, cell, code, engine_card, license_of
from s2p_deploy.records import Base, verify_files
from tests.engines.conftest import GraphOf

HOSTILE = "`` ` <img src=x onerror=alert(1)> | [x](javascript:y)\n---\nlicense: mit\n# no\u2028|"


def metadata_of(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    found: dict[str, Any] = yaml.safe_load(card.split("\n---\n", 1)[0].removeprefix("---\n"))
    return found


def test_an_engine_has_a_card_that_its_manifest_covers(graph_of: GraphOf, tmp_path: Path) -> None:
    graph = graph_of("fp32", "int8")
    engine = build_engine(graph, tmp_path / "engine", backend="onnxruntime")
    card = (engine.folder / CARD).read_text(encoding="utf-8")
    assert CARD in engine.manifest.files
    verify_files(engine.folder, engine.manifest)
    assert metadata_of(card)["library_name"] == "diffusers"
    assert "`onnxruntime`" in card
    assert card == engine_card(graph, engine.manifest.content)  # the same build, the same card
    rows = [line.split("|")[1].strip() for line in card.split("## Precision")[1].splitlines() if line.startswith("| ")]
    assert sum(int(count) for count in rows[1:]) == len(engine.layers)


def test_hostile_names_mean_nothing_in_a_card(graph_of: GraphOf) -> None:
    graph = graph_of("fp32", "int8")
    manifest = replace(graph.manifest, base=Base(HOSTILE, "0" * 64), recipe=graph.manifest.recipe | {"name": HOSTILE})
    layer = {"op": "conv", "weight_storage_bits": 8, "activation_bits": 8, "lowering": HOSTILE, "compute": HOSTILE}
    shown = {
        "backend": HOSTILE,
        "precision": HOSTILE,
        "provider": HOSTILE,
        "optimization": HOSTILE,
        "dtype": "fp32",
        "environment": {HOSTILE: HOSTILE},
    }
    card = engine_card(replace(graph, manifest=manifest), shown | {"layers": [layer], "sizes": {"a": 1}})
    found = metadata_of(card)
    assert "license" not in found
    assert "base_model" not in found
    body = card.split("\n---\n")[1]
    assert [line[:2] for line in body.splitlines() if line.startswith("#")].count("# ") == 1
    assert "<img" in body
    assert "<img" not in re.sub(r"(?<!`)```(?!`).*?(?<!`)```(?!`)", "", body)  # the name's fence: longer than its runs


@pytest.mark.parametrize(
    ("text", "expected"),
    [("plain", "`plain`"), ("a`b", "``a`b``"), ("`", "`` ` ``"), ("two\nlines\x07", "`two lines`"), ("", "` `")],
)
def test_a_code_span_holds_any_text(text: str, expected: str) -> None:
    assert code(text) == expected


def test_a_bar_ends_no_cell() -> None:
    assert cell(r"a\|b") == "`a\\\u00a6b`"


def test_metadata_names_the_base_only_where_a_hub_would_know_it(tmp_path: Path) -> None:
    floating = {"backend": "openvino", "layers": [{"weight_storage_bits": 32, "activation_bits": 16}]}
    quantized = {"backend": "openvino", "layers": [{"weight_storage_bits": 8, "activation_bits": 16}]}
    found = card_metadata(Base("owner/name", "0"), "openrail", quantized)
    assert (found["base_model"], found["base_model_relation"]) == ("owner/name", "quantized")
    assert "base_model" not in card_metadata(Base(str(tmp_path), "0"), None, quantized)
    file = Base("models/of-another-machine.safetensors", "0", file="0" * 64)
    assert "base_model" not in card_metadata(file, None, quantized)
    assert "quantized" not in str(card_metadata(Base("owner/name", "0"), None, floating))


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: creativeml-openrail-m\n---\ntext\n", "creativeml-openrail-m"),
        ("---\nlicense: 'a\\n---'\n---\n", None),
        ("---\nlicense: [mit]\n---\n", None),
        ("---\n- license\n---\n", None),
        ("---\nlicense: !!python/object:os.system x\n---\n", None),
        ("no metadata", None),
        (None, None),
    ],
)
def test_the_licence_is_what_the_pipelines_own_card_says(
    card: str | None, expected: str | None, tmp_path: Path
) -> None:
    if card is not None:
        (tmp_path / CARD).write_text(card, encoding="utf-8")
    assert license_of(tmp_path) == expected
