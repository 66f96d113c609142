from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from artifacts import tiny_calibrated
from safetensors.numpy import load_file

from s2p_deploy.calib.quantized_denoiser import fake_quant_denoiser
from s2p_deploy.errors import InputError
from s2p_deploy.records import CalibratedModel, PackedWeight, write_packed_weights
from s2p_deploy.records.packed_weights import packed_sites, read_packed_weight
from tests.packed_model import packed_copy

# codes -1 0 1 / 1 1 0: digits 0 1 2 2 2 | 1
PACKED = PackedWeight(np.asarray([237, 1], np.uint8), (2, 3), "levels3")


def test_round_trip_and_values(tmp_path: Path) -> None:
    file = tmp_path / "low_bit.safetensors"
    assert packed_sites(file) == ()
    write_packed_weights({"mid_block.conv": PACKED}, file)
    assert packed_sites(file) == ("mid_block.conv",)
    found = read_packed_weight(file, "mid_block.conv")
    assert (found.shape, found.format) == (PACKED.shape, PACKED.format)
    values = found.values(np.asarray([[2.0], [0.5]], np.float32))
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, [[-2.0, 0.0, 2.0], [0.5, 0.5, 0.0]])


def test_nothing_packed_is_no_file(tmp_path: Path) -> None:
    write_packed_weights({}, tmp_path / "low_bit.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> CalibratedModel:
    return tiny_calibrated(tmp_path_factory.mktemp("levels3") / "calib", "levels3")


@pytest.fixture(scope="module")
def packed(plain: CalibratedModel) -> CalibratedModel:
    return packed_copy(plain, plain.folder.parent / "packed")


def test_a_model_of_packed_weights_computes_the_same(plain: CalibratedModel, packed: CalibratedModel) -> None:
    expected, found = fake_quant_denoiser(plain).state_dict(), fake_quant_denoiser(packed).state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name].numpy(), value.numpy(), err_msg=name)


def test_packed_weights_are_codes_times_scale(plain: CalibratedModel, packed: CalibratedModel) -> None:
    name = "network.mid_block.resnets.0.conv1.weight"
    assert name not in load_file(packed.folder / "weights.safetensors")
    assert packed.weights().keys() == plain.weights().keys()
    weight, scale = plain.tensor(name), plain.weight_scales()["mid_block.resnets.0.conv1"]
    np.testing.assert_array_equal(packed.tensor(name), np.clip(np.rint(weight / scale), -1, 1) * scale)
    np.testing.assert_array_equal(packed.weights()[name], packed.tensor(name))


def test_packed_weights_take_a_twentieth(plain: CalibratedModel, packed: CalibratedModel) -> None:
    assert set(packed_sites(packed.folder / "low_bit.safetensors")) == {
        site.site for site in plain.plan.sites if site.weights == "levels3"
    }
    files = (plain.folder / "weights.safetensors", packed.folder / "weights.safetensors")
    whole, rest = (sum(array.nbytes for array in load_file(file).values()) for file in files)
    codes = sum(array.nbytes for array in load_file(packed.folder / "low_bit.safetensors").values())
    assert codes == pytest.approx((whole - rest) / 20, rel=0.01)  # 5 codes in a byte, 4 bytes a float


def test_a_missing_weight_is_named(plain: CalibratedModel) -> None:
    with pytest.raises(InputError, match=r"weights\.safetensors lacks network\.conv_inn\.weight"):
        plain.tensor("network.conv_inn.weight")
