"""External data is checked before anything opens it."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import onnx
import onnx_ir as ir
import pytest

from s2p_deploy.engines.onnx_files import check_external_bytes, write_onnx
from s2p_deploy.errors import IntegrityError
from tests.engines.small_graph import read_back, small_model
from tests.mutations.file_mutations import Mutation
from tests.mutations.onnx_mutations import EXTERNAL_MUTATIONS


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "denoiser.onnx"
    path.parent.mkdir()
    write_onnx(ir.from_proto(small_model()), path)
    return path


def quantizer_elsewhere(path: Path, key: str, value: str) -> None:
    """Changes one entry of the first external tensor."""
    model = onnx.load_model(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(entry for entry in tensor.external_data if entry.key == key).value = value
    path.write_bytes(model.SerializeToString())


def test_a_written_model_reads_back(written: Path) -> None:
    names = read_back(written).graph.initializers
    assert "conv/weight_quantizer/codes" in names


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/b", "..", "", "missing.data", "x\\y"])
def test_data_outside_the_folder_is_refused(written: Path, location: str) -> None:
    (written.parent.parent / "secret").write_bytes(bytes(1 << 20))
    quantizer_elsewhere(written, "location", location)
    with pytest.raises(IntegrityError):
        read_back(written)


@pytest.mark.parametrize(
    ("key", "value"), [("offset", "999999999"), ("length", "999999999"), ("length", "1"), ("offset", "-8")]
)
def test_data_outside_the_file_is_refused(written: Path, key: str, value: str) -> None:
    quantizer_elsewhere(written, key, value)
    with pytest.raises(IntegrityError):
        read_back(written)


def test_links_are_refused(written: Path) -> None:
    data = Path(f"{written}.data")
    other = written.parent.parent / "elsewhere"
    data.rename(other)
    data.symlink_to(other)
    with pytest.raises(IntegrityError, match="a link"):
        read_back(written)
    data.unlink()
    os.link(other, data)
    with pytest.raises(IntegrityError, match="one link"):
        read_back(written)


def test_external_data_inside_a_node_is_refused(written: Path) -> None:
    model = onnx.load_model(written, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["hidden"], value=tensor))
    written.write_bytes(model.SerializeToString())
    with pytest.raises(IntegrityError, match="outside the main graph"):
        read_back(written)


@pytest.mark.parametrize("mutation", EXTERNAL_MUTATIONS, ids=lambda mutation: mutation.__name__)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_way_out_is_refused(written: Path, mutation: Mutation, seed: int) -> None:
    mutation(written.parent, Random(seed))
    with pytest.raises(IntegrityError):
        read_back(written)


def test_the_model_cannot_be_its_own_data(written: Path) -> None:
    quantizer_elsewhere(written, "location", written.name)
    with pytest.raises(IntegrityError, match="own file"):
        read_back(written)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"\x08\xff\xff not a protobuf")
    with pytest.raises(IntegrityError, match="no ONNX model"):
        read_back(tmp_path / "a.onnx")
    with pytest.raises(IntegrityError, match="no ONNX model"):
        check_external_bytes(b"\x08\xff\xff not a protobuf", {})


def test_a_model_in_memory_may_name_only_the_engines_files(written: Path) -> None:
    size = Path(f"{written}.data").stat().st_size
    check_external_bytes(written.read_bytes(), {"denoiser.onnx.data": size})
    with pytest.raises(IntegrityError, match="no file of the engine"):
        check_external_bytes(written.read_bytes(), {"other": size})
    with pytest.raises(IntegrityError, match="asks for bytes"):
        check_external_bytes(written.read_bytes(), {"denoiser.onnx.data": 10})
