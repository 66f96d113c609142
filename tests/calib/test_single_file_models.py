"""Models of single files are, but for their base, those of the folders that the files were made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from s2p_deploy import BaseOptions, Prompt, PromptSet, Recipe, calibrate
from s2p_deploy.cli.options import overrides_from_settings
from s2p_deploy.context import Context
from s2p_deploy.records import file_digest
from tests.cli.commands import QUICK
from tests.families.test_single_file import KINDS, folder_of, original


def calibrated(folder: Path, model: Path, recipe: Recipe, options: BaseOptions | None) -> dict[str, bytes]:
    """The bytes of a model's files."""
    prompts = None if recipe.name == "ptq-stream" else PromptSet((Prompt("0", "a red circle"), Prompt("1", "a square")))
    made = calibrate(
        str(model), recipe=recipe, out=folder, options=options, prompts=prompts, context=Context(device="cpu")
    )
    return {name: (folder / name).read_bytes() for name in ("manifest.json", *made.manifest.files)}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("sd1", "ptq-stream"),
        *(pytest.param(kind, "ptq-stream", marks=pytest.mark.slow) for kind in KINDS[1:]),
        *(pytest.param(kind, "w8a8", marks=pytest.mark.slow) for kind in KINDS),
    ],
)
def test_weights_scales_and_plan_are_those_of_the_folder(kind: str, name: str, tmp_path: Path) -> None:
    recipe = Recipe.load(name, overrides_from_settings(list(QUICK)) if name == "w8a8" else {})
    file = original(tmp_path / "m.safetensors", kind)
    whole = calibrated(tmp_path / "folder", folder_of(kind), recipe, None)
    single = calibrated(tmp_path / "file", file, recipe, BaseOptions(components=str(folder_of(kind))))
    manifests = [json.loads(model.pop("manifest.json")) for model in (whole, single)]
    assert single == whole
    bases = [manifest.pop("base") for manifest in manifests]
    assert bases[1]["file"] == file_digest(file)
    assert bases[0]["file"] is None
    for manifest, base in zip(manifests, bases, strict=True):  # what follows from the base
        content = manifest["content"]
        assert content["request"].pop("pipeline") == base["digest"]
        assert content.pop("dataset", None) == manifest.pop("parents").get("dataset", {}).get("digest")
        del manifest["seal"]
    assert manifests[0] == manifests[1]
