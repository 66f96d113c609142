"""Joined engines: which of the two runs a sample, what joins, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from s2p_deploy.engines import BoundRunner, Runner, build_engine, load_engine
from s2p_deploy.engines.joined import JoinedRunner, JoinedTensorRunner, join_engines, joined_runner
from s2p_deploy.engines.runner import BoundTensorRunner, ClosingRunner, TensorRunner
from s2p_deploy.engines.spare_timesteps import SpareTimesteps
from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.records import Engine, ShapeProfile, TensorSpec, TimestepTable, copy_artifact
from s2p_deploy.records.artifacts import bytes_of_artifact, verify_chain, verify_whole
from s2p_deploy.records.engine import EngineOptions
from s2p_deploy.records.exported_graph import CONTROL_FILE
from s2p_deploy.records.optional_inputs import IMAGE_REACH, ImageSlot, ImageSlots, LoraSlots
from s2p_deploy.records.scale_table import write_timestep_table
from s2p_deploy.serve.batching import batch_key
from s2p_deploy.serve.generation_task import EngineCall
from tests.engines.small_graph import build_options, small_inputs
from tests.mutations.sealing import seal_anew
from tests.mutations.targets import manifest_data

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.engines.conftest import EngineOf, GraphOf

RATIO = 0.6  # of 1000 training timesteps: 1 and 501 of the schedule lie below, 700 and 981 do not


@pytest.fixture
def pair(engine_of: EngineOf) -> tuple[Engine, Engine]:
    """Two engines of one pipeline that predict different things."""
    return engine_of("onnxruntime", "reference", "int4"), engine_of("onnxruntime", "reference", "int8")


@pytest.fixture
def joined(pair: tuple[Engine, Engine], tmp_path: Path) -> Engine:
    return join_engines(*pair, tmp_path / "joined", boundary_ratio=RATIO)


def test_every_sample_is_run_by_the_engine_of_its_timestep(pair: tuple[Engine, Engine], joined: Engine) -> None:
    inputs = small_inputs(batch=4)
    below = inputs["timestep_index"] < 600
    assert below.tolist() == [True, True, False, False]
    rows = {mine: {name: value[below == mine] for name, value in inputs.items()} for mine in (True, False)}
    with load_engine(joined) as runner, load_engine(pair[0]) as high, load_engine(pair[1]) as low:
        alone = {True: low.infer(rows[True])["noise_pred"], False: high.infer(rows[False])["noise_pred"]}
        for mine, expected in alone.items():
            np.testing.assert_array_equal(runner.infer(rows[mine])["noise_pred"], expected)
        mixed = runner.infer(inputs)["noise_pred"]
        assert not np.array_equal(high.infer(rows[True])["noise_pred"], alone[True]), "the engines differ"
        assert [runner.stage(int(index)) for index in inputs["timestep_index"]] == [1, 1, 0, 0]
        assert high.stage(1) == 0
    np.testing.assert_array_equal(mixed, np.concatenate([alone[True], alone[False]]))


def test_what_is_joined_is_an_engine(pair: tuple[Engine, Engine], joined: Engine, tmp_path: Path) -> None:
    """It stays one where it is copied, and names all that it was made from."""
    copy_artifact(joined, tmp_path / "copy")
    copied = Engine.open(tmp_path / "copy")
    for one in (joined, copied):
        assert one.boundary == 600
        assert one.low_noise is not None
        assert one.low_noise.manifest.digest == pair[1].manifest.digest
        assert one.manifest.parents["graph"].digest == pair[0].manifest.parents["graph"].digest
    assert copied.manifest.digest == joined.manifest.digest != pair[0].manifest.digest
    assert "below 600 run on the engine in `low_noise`" in (copied.folder / "README.md").read_text()
    states = {link.name: link.state for link in verify_chain(joined.folder)}
    assert states[""] == states["graph"] == states["low_noise"] == "verified"
    assert pair[0].boundary == 0
    assert pair[0].low_noise is None


def test_it_is_joined_again_in_place(pair: tuple[Engine, Engine], joined: Engine) -> None:
    with pytest.raises(InputError, match="exists: choose another --out, or pass --force"):
        join_engines(*pair, joined.folder, boundary_ratio=0.2)
    assert join_engines(*pair, joined.folder, boundary_ratio=0.2, replace=True).boundary == 200
    assert not list(joined.folder.parent.glob(".*"))


def test_a_changed_engine_inside_is_refused(joined: Engine, pair: tuple[Engine, Engine]) -> None:
    assert joined.low_noise is not None
    file = joined.low_noise.folder / joined.low_noise.engine_files[0]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(IntegrityError, match=file.name):
        load_engine(Engine.open(joined.folder))
    shutil.rmtree(joined.low_noise.folder)
    shutil.copytree(pair[0].folder, joined.low_noise.folder)
    with pytest.raises(IntegrityError, match=r"is not the engine that .* was joined with: join them again"):
        Engine.open(joined.folder)
    shutil.rmtree(joined.low_noise.folder)
    with pytest.raises(IntegrityError, match="lacks the engine that it was joined with: join them again"):
        Engine.open(joined.folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"parents": {"low_noise": {"path": "../elsewhere"}}}, "lacks the engine that it was joined with"),
        ({"content": {"boundary_ratio": 1.5}}, "boundary_ratio"),
        ({"content": {"profile": {"minimum": 1, "optimum": 2, "maximum": 5}}}, "has other batch or picture sizes"),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(joined: Engine, change: dict[str, Any], reason: str) -> None:
    manifest = manifest_data(joined.folder)
    _change(manifest, change)
    seal_anew(joined.folder, manifest)
    with pytest.raises(IntegrityError, match=reason):
        Engine.open(joined.folder)


def _change(value: dict[str, Any], change: dict[str, Any]) -> None:
    for name, new in change.items():
        if isinstance(new, dict) and name != "profile":
            _change(value[name], new)
        else:
            value[name] = new


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pipeline": ({}, "are of two pipelines: join engines of one"),
    "no weights": (
        {"options": EngineOptions(stripped=True)},
        "stores no weights, and its graph is not found from",
    ),
    "twice": ({"boundary_ratio": 0.5}, "is joined already: give the engine that it was joined with"),
    "sizes": ({"profile": ShapeProfile(1, 2, 5)}, "has other batch or picture sizes than .*: export and build both"),
    "device": ({"environment": {"device": "CUDA GPU"}}, "has other devices than"),
    "LoRAs": ({"lora": LoraSlots(8, ())}, "has other branches for LoRAs than"),
    "images": (
        {"images": ImageSlots(4, 1, (ImageSlot("attn2", 0, 64, 0.25),))},
        "has other inputs for ControlNets or image prompts than",
    ),
    "text": (
        {"inputs": (TensorSpec("encoder_hidden_states", "float32", ("batch", 7, 32)),)},
        "has other numbers of text tokens than",
    ),
    "time table": (
        {
            "inputs": (
                TensorSpec("encoder_hidden_states", "float32", ("batch", 6, 32)),
                TensorSpec("time_projections", "float32", ("batch", 3)),
            )
        },
        "has other forms of the time table than",
    ),
    "timesteps": (
        {"timesteps": TimestepTable("DDIMScheduler", {}, 1, (301.0,), np.linspace(0.03, 1.5, 1000))},
        "runs the timesteps 241 to 361, not all from 0 to 600: calibrate it for them",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_engines_that_do_not_go_together_are_refused(case: str, pair: tuple[Engine, Engine], tmp_path: Path) -> None:
    change, reason = REFUSED[case]
    if case == "pipeline":
        manifest = pair[1].manifest
        change = {"manifest": replace(manifest, base=replace(manifest.base, digest="1" * 64))}
    with pytest.raises(InputError, match=reason):
        join_engines(pair[0], replace(pair[1], **change), tmp_path / "joined", boundary_ratio=RATIO)
    assert not list(tmp_path.iterdir())


def test_an_engine_of_a_controlnet_is_refused(pair: tuple[Engine, Engine], tmp_path: Path) -> None:
    manifest = pair[0].manifest
    controlled = replace(pair[0], manifest=replace(manifest, files={**manifest.files, CONTROL_FILE: "0" * 64}))
    for engines in ((controlled, pair[1]), (pair[1], controlled)):
        with pytest.raises(InputError, match="is an engine of a ControlNet: join engines of denoisers"):
            join_engines(*engines, tmp_path / "joined", boundary_ratio=RATIO)


def test_a_later_engine_needs_no_timesteps_of_the_first(pair: tuple[Engine, Engine], tmp_path: Path) -> None:
    """It is bound to those of a schedule that it runs."""
    table = TimestepTable("DDIMScheduler", {}, 2, (1.0, 501.0), np.linspace(0.03, 1.5, 1000))
    shorter = shutil.copytree(pair[1].folder, tmp_path / "shorter")
    write_timestep_table(table, shorter / "timesteps.json")
    seal_anew(shorter)
    joined = join_engines(pair[0], Engine.open(shorter), tmp_path / "joined", boundary_ratio=0.3)
    with load_engine(joined, schedules=[[981, 501, 1]]) as runner:
        assert [runner.stage(index) for index in runner.indices([981, 501, 1]).tolist()] == [0, 0, 1]


def test_the_first_one_quantizes_something(pair: tuple[Engine, Engine], tmp_path: Path) -> None:
    layers = tuple(replace(layer, weight_storage_bits=32, activation_bits=16) for layer in pair[0].layers)
    floating = replace(pair[0], layers=layers)
    with pytest.raises(InputError, match="quantizes nothing: give the quantized engine first"):
        join_engines(floating, pair[1], tmp_path / "joined", boundary_ratio=RATIO)


def test_what_is_inside_is_verified_too(joined: Engine, tmp_path: Path) -> None:
    assert joined.low_noise is not None
    verify_whole(joined.folder, joined.manifest)
    assert bytes_of_artifact(joined) > bytes_of_artifact(joined.low_noise) > 0
    (joined.low_noise.folder / "README.md").write_text("another card")
    with pytest.raises(IntegrityError, match=r"README\.md was changed"):
        verify_whole(joined.folder, joined.manifest)


def test_a_chain_of_a_copy_meets_no_other_artifacts(joined: Engine, pair: tuple[Engine, Engine]) -> None:
    """The engine inside says where its graph was from where it was built."""
    assert joined.low_noise is not None
    elsewhere = (joined.low_noise.folder / joined.low_noise.manifest.parents["graph"].path).resolve()
    shutil.copytree(pair[0].folder, elsewhere)
    states = {link.name: link.state for link in verify_chain(joined.folder)}
    assert states["low_noise.graph"] == "not at hand"
    assert states["graph"] == "verified"


@pytest.mark.parametrize("ratio", [0.0, 0.001, 0.99, 1.0, float("nan"), -1.0])
def test_a_boundary_leaves_both_some_timesteps(ratio: float, pair: tuple[Engine, Engine], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leaves one engine nothing of the schedule from 1 to 981"):
        join_engines(*pair, tmp_path / "joined", boundary_ratio=ratio)


def test_all_of_a_schedule_that_begins_at_the_last_timestep_is_no_boundary(
    pair: tuple[Engine, Engine], tmp_path: Path
) -> None:
    """That of flow matching begins at 1000 of 1000."""
    levels, own = np.arange(1001) / 1000, np.asarray([9.0, 600.5, 1000.0])
    flow = TimestepTable("FlowMatchEulerDiscreteScheduler", {}, 3, tuple(own.tolist()), levels, True, own)
    engines = [replace(engine, timesteps=flow) for engine in pair]
    assert flow.training_timesteps == 1000
    with pytest.raises(InputError, match="leaves one engine nothing of the schedule from 9 to 1000"):
        join_engines(*engines, tmp_path / "joined", boundary_ratio=1.0)


def test_the_first_engine_is_not_joined_already(joined: Engine, pair: tuple[Engine, Engine], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is joined already: give the engine that it was made of"):
        join_engines(joined, pair[1], tmp_path / "again", boundary_ratio=RATIO)
    with pytest.raises(InputError, match="is the engine that is read"):
        join_engines(*pair, pair[0].folder, boundary_ratio=RATIO, replace=True)


def test_sizes_of_the_build_are_compared(pair: tuple[Engine, Engine], graph_of: GraphOf, tmp_path: Path) -> None:
    options = build_options("reference", ShapeProfile(1, 3, 3))
    other = build_engine(graph_of("fp32", "int8"), tmp_path / "other", backend="onnxruntime", options=options)
    with pytest.raises(InputError, match="has other batch or picture sizes than"):
        join_engines(pair[0], other, tmp_path / "joined", boundary_ratio=RATIO)


def test_an_engine_without_grids_may_leave_the_reach_of_images_out(pair: tuple[Engine, Engine]) -> None:
    """The other way round, grids would not be enlarged."""
    reach = TensorSpec(IMAGE_REACH, "float32", ("batch", 1))
    slots = [ImageSlots(4, 1, (ImageSlot("attn2", 0, 64, 0.25, quantizer),)) for quantizer in ("to_out", None)]
    quantized = replace(pair[0], inputs=(*pair[0].inputs, reach), images=slots[0])
    floating = replace(pair[1], images=slots[1])
    floating.check_follows(quantized, 600)
    with pytest.raises(InputError, match="other inputs for ControlNets or image prompts"):
        quantized.check_follows(floating, 600)


# Timestep indices, with runners that give back what they are called with

INPUTS = (TensorSpec("sample", "float32", ("batch", 1)), TensorSpec("timestep_index", "int64", ("batch",)))
REACH = TensorSpec(IMAGE_REACH, "float32", ("batch", 1))


class Told(ClosingRunner):
    """Remembers its calls; predicts ``value``."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.calls: list[dict[str, Any]] = []
        self.open = True

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self.calls.append(dict(inputs))
        return {"noise_pred": np.full_like(inputs["sample"], self.value)}

    def infer_tensors(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.calls.append(dict(inputs))
        return {"noise_pred": torch.full_like(inputs["sample"], self.value)}

    def close(self) -> None:
        self.open = False


def table_of(*fractional: float) -> TimestepTable:
    angle = np.linspace(0.03, 1.5, 1000)
    return TimestepTable("DDIMScheduler", {}, 3, (1, 501, 981), angle, fractional=np.asarray(fractional))


def bound(runner: Runner, table: TimestepTable, spares: int, *, reach: bool = False) -> BoundRunner:
    def assign(indices: Sequence[int], timesteps: NDArray[np.float64]) -> None: ...

    kind = BoundTensorRunner if isinstance(runner, TensorRunner) else BoundRunner
    inputs = (*INPUTS, REACH) if reach else INPUTS
    return kind(runner, inputs, table, spare=SpareTimesteps(table, spares, assign))


def test_each_engine_has_its_own_indices() -> None:
    """Of bound timesteps, of spare ones, and of a spare index that stands for another timestep later."""
    first, last = Told(1.0), Told(2.0)
    runner = joined_runner(bound(first, table_of(50.5, 700.5), 1), bound(last, table_of(50.5), 8), 100.0)
    runner.check_timesteps([3, 20.25, 700])
    with pytest.raises(InputError, match="outside the calibrated table"):
        runner.check_timesteps([5000])
    assert runner.indices([20.25]).tolist() == [1002]
    wanted = runner.indices([981, 3, 700.5, 50.5, 20.25])
    assert wanted.tolist() == [981, 3, 1001, 1000, 1002]
    inputs = {"sample": np.zeros((5, 1), np.float32), "timestep_index": wanted}
    assert runner.infer(inputs)["noise_pred"][:, 0].tolist() == [1, 2, 1, 2, 2]
    assert first.calls[0]["timestep_index"].tolist() == [981, 1001]
    assert last.calls[0]["timestep_index"].tolist() == [3, 1000, 1001]
    assert runner.indices([640.125]).tolist() == [1002], "the only spare one, above the boundary now"
    one = {"sample": np.zeros((1, 1), np.float32), "timestep_index": np.asarray([1002])}
    assert runner.infer(one)["noise_pred"].tolist() == [[1]]
    runner.close()
    assert not first.open
    assert not last.open


def test_an_index_stays_with_the_engine_of_its_own_timestep() -> None:
    """Not with that of a timestep that is within the tolerance of the look-up."""
    runner = joined_runner(bound(Told(1.0), table_of(), 1), bound(Told(2.0), table_of(), 1), 100.0)
    assert runner.indices([99.9999, 100.0001, 98.9999]).tolist() == [100, 100, 99]
    assert [runner.stage(index) for index in (99, 100)] == [1, 0]
    runner.indices([100.0])
    assert [runner.stage(index) for index in (99, 100)] == [1, 0]


def test_tensors_are_divided_and_joined_as_arrays_are() -> None:
    first, last = Told(1.0), Told(2.0)
    reach = torch.tensor([[7.0], [8.0], [9.0]])
    runner = joined_runner(bound(first, table_of(), 1, reach=True), bound(last, table_of(), 1), 100.0)
    assert isinstance(runner, JoinedTensorRunner)
    assert isinstance(runner, TensorRunner)
    inputs = {"sample": torch.zeros(3, 1), "timestep_index": torch.tensor([981, 1, 501]), IMAGE_REACH: reach}
    assert runner.infer_tensors(inputs)["noise_pred"][:, 0].tolist() == [1, 2, 1]
    assert first.calls[0][IMAGE_REACH].tolist() == [[7], [9]]
    assert IMAGE_REACH not in last.calls[0], "it has no grids"
    for index, expected in ((1, 2.0), (501, 1.0)):
        alone = {"sample": torch.zeros(1, 1), "timestep_index": torch.tensor([index])}
        assert runner.infer_tensors(alone)["noise_pred"].tolist() == [[expected]]


@pytest.mark.parametrize("made", [np.asarray, torch.tensor])
def test_a_batch_of_a_server_is_of_one_engine(made: Callable[[list[int]], Any]) -> None:
    """Padded to a profiled size it then runs at that size, whatever runs beside."""
    runner = joined_runner(bound(Told(1.0), table_of(), 1), bound(Told(2.0), table_of(), 1), 100.0)
    calls = [EngineCall({"timestep_index": made([index, index])}) for index in (1, 41, 101, 981)]
    keys = [batch_key(call, mixed_timesteps=True, runner=runner) for call in calls]
    assert keys[0] == keys[1] != keys[2] == keys[3]
    assert len({batch_key(call, mixed_timesteps=True, runner=runner.high) for call in calls}) == 1


def test_a_call_that_lacks_something_is_refused_as_ever() -> None:
    runner = joined_runner(bound(Told(1.0), table_of(), 1), bound(Told(2.0), table_of(), 1), 100.0)
    assert isinstance(runner, JoinedRunner)
    with pytest.raises(InputError, match="input sample has shape"):
        runner.infer({"sample": np.zeros((1, 1), np.float32)})
    with pytest.raises(InputError, match="input sample has shape \\[1, 1\\], the engine takes \\[2, 1\\]"):
        runner.infer({"sample": np.zeros((1, 1), np.float32), "timestep_index": np.asarray([981, 1])})
    for index in (981, 1):
        given = {"timestep_index": np.asarray([index]), "mid_residual": np.zeros((1, 1), np.float32)}
        with pytest.raises(InputError, match="has no input 'mid_residual'"):
            runner.infer({"sample": np.zeros((1, 1), np.float32), **given})
    with pytest.raises(InputError, match="outside the scale table"):
        runner.infer({"sample": np.zeros((1, 1), np.float32), "timestep_index": np.asarray([5000])})
