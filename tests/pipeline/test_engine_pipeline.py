"""Pipelines of an engine: opened, saved and loaded."""

from __future__ import annotations

import json
import logging
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from s2p_deploy.context import Context
from s2p_deploy.engines import BoundRunner, load_engine
from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.families import BasePipeline, load_pipeline, resolve_base, with_denoiser
from s2p_deploy.pipeline import (
    EngineDenoiser,
    EnginePipeline,
    EngineUNet,
    Schedule,
    generate,
    load_engine_pipeline,
    open_pipeline,
    pipeline_with_engine,
    save_engine_pipeline,
)
from s2p_deploy.records import Engine, Prompt, open_artifact, verify_chain, write_artifact
from tests.open_runners import watch_runners
from tests.small_pipelines import shared_small_components

if TYPE_CHECKING:
    from pathlib import Path

    from tests.shared_folder import SharedFolder

PROMPT = Prompt("id", "a small red circle at the top left, white background")
KARRAS = Schedule(3, "euler-karras")


def drawn(opened: EnginePipeline, schedule: Schedule) -> np.ndarray:
    return np.asarray(generate(opened.pipe, PROMPT, schedule=schedule, guidance_scale=2.0))


def test_an_engine_opens_as_a_pipeline_in_one_call(engine: Engine, origin: BasePipeline) -> None:
    """Where its own pipeline was; what is drawn is what that pipeline draws."""
    floating = load_pipeline(origin)
    with open_pipeline(engine, schedules=[KARRAS]) as opened:
        assert type(opened.pipe) is type(floating)
        for schedule in (KARRAS, Schedule(3, "ddim")):
            expected = np.asarray(generate(floating, PROMPT, schedule=schedule, guidance_scale=2.0))
            assert np.abs(drawn(opened, schedule).astype(int) - expected).max() <= 1
    with pytest.raises(ValueError, match="closed"):
        drawn(opened, KARRAS)


@pytest.mark.parametrize("schedule", [KARRAS, Schedule(7, "euler-karras"), Schedule(5, "euler-linspace")], ids=str)
def test_a_schedule_that_was_not_named_is_computed_when_it_is_asked_for(
    engine: Engine, origin: BasePipeline, schedule: Schedule
) -> None:
    expected = np.asarray(generate(load_pipeline(origin), PROMPT, schedule=schedule, guidance_scale=2.0))
    with open_pipeline(engine) as opened, open_pipeline(engine, schedules=[schedule]) as named:
        found = drawn(opened, schedule)
        assert np.abs(found.astype(int) - expected).max() <= 1
        assert np.abs(found.astype(int) - drawn(named, schedule)).max() <= 1


class LoadedOnError(Exception):
    """Ends loading with the device that it was asked for."""


def test_the_engine_is_loaded_on_the_device_that_was_asked_for(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_engine: Engine, **options: object) -> BoundRunner:
        raise LoadedOnError(options["device"])

    with open_pipeline(engine) as opened:
        save_engine_pipeline(opened.pipe, tmp_path / "saved")
    for module in ("engine_pipeline", "components"):
        monkeypatch.setattr(f"s2p_deploy.pipeline.{module}.load_engine", load)
    context = Context(device="cuda:1")
    with pytest.raises(LoadedOnError, match="cuda:1"):
        open_pipeline(engine, context=context)
    with pytest.raises(LoadedOnError, match="cuda:1"):
        load_engine_pipeline(tmp_path / "saved", context=context)
    with pytest.raises(LoadedOnError, match="cuda:1"):
        EngineUNet.load(engine.folder, device="cuda:1")


def test_the_pipelines_own_denoiser_is_not_read(engine: Engine, origin: BasePipeline, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(origin.folder, moved)
    base = resolve_base(str(moved))
    (moved / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with open_pipeline(engine, base) as opened:
        assert isinstance(opened.pipe.unet, EngineUNet)


def test_networks_are_opened_in_the_dtype_of_the_context(engine: Engine) -> None:
    with open_pipeline(engine, context=Context(device="cpu", dtype="bfloat16")) as opened:
        assert {opened.pipe.vae.dtype, opened.pipe.unet.dtype, opened.pipe.dtype} == {torch.bfloat16}
        assert opened.pipe.device.type == "cpu"


def test_a_loaded_engine_is_not_loaded_again(engine: Engine) -> None:
    with load_engine(engine) as runner:
        opened = open_pipeline(engine, runner=runner)
        assert opened.runner is runner
        assert opened.pipe.unet.runner is runner


def test_an_engine_takes_the_place_and_dtype_of_the_denoiser_that_it_replaces(
    engine: Engine, origin: BasePipeline
) -> None:
    with load_engine(engine) as runner:
        pipe = pipeline_with_engine(load_pipeline(origin, torch.bfloat16), engine, runner)
        assert pipe.unet.dtype == torch.bfloat16


def test_another_pipeline_is_refused(engine: Engine) -> None:
    with pytest.raises(IntegrityError, match="is not the pipeline that this artifact was made from"):
        open_pipeline(engine, resolve_base("shapes"))


def test_a_saved_pipeline_draws_the_same_with_every_schedule_it_was_opened_for(engine: Engine, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    with open_pipeline(engine, schedules=[KARRAS]) as opened:
        manifest = save_engine_pipeline(opened.pipe, folder)
        expected = drawn(opened, KARRAS)
    assert manifest.kind == "Pipeline"
    assert Engine.open(folder / "engine").manifest == engine.manifest
    assert [link.kind for link in verify_chain(folder)][:2] == ["Pipeline", "Engine"]
    assert not list(folder.glob("unet"))
    moved = folder.rename(tmp_path / "moved")
    with load_engine_pipeline(moved) as loaded:
        np.testing.assert_array_equal(drawn(loaded, KARRAS), expected)


def test_a_denoiser_is_saved_alone_too(engine: Engine, tmp_path: Path) -> None:
    with open_pipeline(engine) as opened:
        opened.pipe.unet.save(tmp_path / "saved")
    assert open_artifact(tmp_path / "saved", "Engine") == engine.manifest
    loaded = EngineDenoiser.load(tmp_path / "saved")
    assert type(loaded) is EngineUNet
    assert loaded.config == opened.pipe.unet.config
    loaded.close()


@pytest.mark.parametrize(
    "name", ["vae/diffusion_pytorch_model.safetensors", "model_index.json", "engine/act_scales.safetensors"]
)
def test_a_changed_byte_is_found(engine: Engine, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "saved"
    with open_pipeline(engine) as opened:
        save_engine_pipeline(opened.pipe, folder)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(IntegrityError, match="was changed"):
        load_engine_pipeline(folder)


def test_components_of_other_libraries_are_refused(engine: Engine, tmp_path: Path) -> None:
    with open_pipeline(engine) as opened:
        saved = save_engine_pipeline(opened.pipe, tmp_path / "saved")
    for number, change in enumerate(({"vae": ["os", "system"]}, {"_class_name": "DiffusionPipeline"})):

        def fill(folder: Path, change: dict[str, object] = change) -> dict[str, object]:
            shutil.copytree(
                tmp_path / "saved", folder, ignore=shutil.ignore_patterns("manifest.json"), dirs_exist_ok=True
            )
            shutil.copytree(tmp_path / "saved" / "engine", folder / "engine", dirs_exist_ok=True)
            index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
            (folder / "model_index.json").write_text(json.dumps(index | change), encoding="utf-8")
            return saved.content

        out = tmp_path / f"changed-{number}"
        write_artifact(out, kind="Pipeline", base=saved.base, recipe={}, fill=fill)
        with pytest.raises(IntegrityError, match=r"components of os: refused|supported pipelines are"):
            load_engine_pipeline(out)


def test_what_has_no_engine_on_disk_is_not_saved(
    base: object, denoiser: EngineDenoiser, engine: Engine, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="is not that of an engine on disk"):
        save_engine_pipeline(with_denoiser(base, denoiser), tmp_path / "saved")
    with pytest.raises(InputError, match="is no engine"):
        save_engine_pipeline(base, tmp_path / "saved")
    with pytest.raises(InputError, match="is of kind Engine, expected Pipeline"):
        load_engine_pipeline(engine.folder)
    assert not list(tmp_path.iterdir())


def test_saving_warns_of_nothing(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusers would, that the denoiser cannot be saved."""
    records: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.Handler, "handle", lambda _, record: records.append(record))
    with open_pipeline(engine) as opened:
        save_engine_pipeline(opened.pipe, tmp_path / "saved")
    assert [record.getMessage() for record in records if record.levelno >= logging.WARNING] == []


def test_what_is_there_is_not_written_over(engine: Engine, tmp_path: Path) -> None:
    with open_pipeline(engine) as opened:
        save_engine_pipeline(opened.pipe, tmp_path / "saved")
        with pytest.raises(InputError, match="exists"):
            save_engine_pipeline(opened.pipe, tmp_path / "saved")
        save_engine_pipeline(opened.pipe, tmp_path / "saved", replace=True)


def test_a_pipeline_that_cannot_be_opened_leaves_no_engine_open(
    engine: Engine, origin: BasePipeline, shared: SharedFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = shared_small_components(shared, "onnxruntime")
    with open_pipeline(engine, origin, components=parts) as pipeline:
        save_engine_pipeline(pipeline.pipe, tmp_path / "saved")
    opened, still_open = watch_runners(monkeypatch)

    def fail(*_given: object) -> None:
        raise IntegrityError("no component can be put in")

    monkeypatch.setattr("s2p_deploy.pipeline.engine_pipeline.with_components", fail)
    for open_one in (
        lambda: open_pipeline(engine, origin, components=parts),
        lambda: load_engine_pipeline(tmp_path / "saved"),
    ):
        opened.clear()
        with pytest.raises(IntegrityError, match="no component can be put in"):
            open_one()
        assert len(opened) == 1 + len(parts.networks)
        assert not still_open


def test_only_a_saved_pipeline_is_replaced_and_not_one_that_it_runs_from(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("precious")
    with open_pipeline(engine) as opened:
        with pytest.raises(InputError, match="no artifact of kind Pipeline"):
            save_engine_pipeline(opened.pipe, tmp_path / "notes", replace=True)
        save_engine_pipeline(opened.pipe, tmp_path / "saved")
    with (
        load_engine_pipeline(tmp_path / "saved") as loaded,
        pytest.raises(InputError, match="holds the engine that is read"),
    ):
        save_engine_pipeline(loaded.pipe, tmp_path / "saved", replace=True)
    load_engine_pipeline(tmp_path / "saved").close()
    assert (tmp_path / "notes" / "notes.txt").exists()
