from __future__ import annotations

import re
from dataclasses import replace

import yaml

from s2p_deploy.records import Skipped
from s2p_deploy.validation import Chain
from s2p_deploy.validation.model_card import report_card
from s2p_deploy.validation.report import PictureNumbers
from tests.report_pages import data_of, measurements


def test_the_card_has_figures_gates_and_pictures(chain: Chain) -> None:
    data = data_of(measurements(), chain)
    card = report_card(data, "openrail")
    metadata = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    assert metadata["license"] == "openrail"
    assert isinstance(data.pictures, PictureNumbers)
    metrics = {metric["name"]: metric["value"] for metric in metadata["model-index"][0]["results"][0]["metrics"]}
    assert metrics["median, psnr, to FP"] == data.pictures.median["psnr"].value
    for gate in data.gates:
        assert f"| {gate.status} | `{gate.name}`" in card
    assert set(re.findall(r"\(pictures/(\d+-\w+)\.png\)", card)) == {"000-fp", "000-engine", "001-fp", "001-engine"}


def test_hostile_text_is_only_in_code_spans(chain: Chain) -> None:
    card = report_card(data_of(measurements(), chain), None)
    assert "<script>" in card
    assert "<script>" not in re.sub(r"`[^`]+`", "", card)


def test_a_card_without_pictures_says_why(chain: Chain) -> None:
    data = data_of(replace(measurements(), pictures=Skipped("it needs a GPU")), chain)
    card = report_card(data, None)
    assert "No pictures: `it needs a GPU`" in card
    assert "model-index" not in card
