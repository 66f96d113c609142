from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.families.assembled import Assembly, assembled, is_assembled, pipeline_digest
from s2p_deploy.families.checkpoint import Checkpoint
from s2p_deploy.families.deferred_tensor import DeferredTensor
from s2p_deploy.families.single_file import ConvertedNetwork

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
MADE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("S2P_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pipelines"


def assembly(tmp_path: Path) -> Assembly:
    """One of a file, a text, and a network with its two tensors exchanged."""
    save_file(TENSORS, tmp_path / "m.safetensors")
    (tmp_path / "config.json").write_text("{}")
    stored = Checkpoint(tmp_path / "m.safetensors")
    deferred = {new: DeferredTensor.stored(old, stored.form(old), stored.read) for new, old in (("x", "b"), ("y", "a"))}
    network = ConvertedNetwork(tmp_path / "m.safetensors", deferred, "diffusion_pytorch_model")
    return Assembly({"vae/config.json": tmp_path / "config.json"}, {"model_index.json": '{"a": 1}\n'}, {MADE: network})


def test_a_folder_is_made_once_of_files_texts_and_networks(tmp_path: Path, cache: Path) -> None:
    folder, _ = assembled(assembly(tmp_path))
    assert folder.parent == cache
    assert is_assembled(folder)
    assert (folder / "vae" / "config.json").samefile(tmp_path / "config.json")
    assert (folder / "model_index.json").read_text() == '{"a": 1}\n'
    made = load_file(folder / MADE)
    assert torch.equal(made["x"], TENSORS["b"])
    assert torch.equal(made["y"], TENSORS["a"])
    before = (folder / MADE).stat().st_mtime_ns
    assert assembled(assembly(tmp_path))[0] == folder
    assert (folder / MADE).stat().st_mtime_ns == before


def test_other_content_is_another_folder(tmp_path: Path) -> None:
    first, _ = assembled(assembly(tmp_path))
    other = assembly(tmp_path)
    other.texts["model_index.json"] = "{}"
    exchanged = assembly(tmp_path)
    network = exchanged.networks[MADE]
    names = {"x": network.deferred["y"], "y": network.deferred["x"]}
    exchanged.networks[MADE] = ConvertedNetwork(network.place, names, network.weights)
    assert len({first, assembled(other)[0], assembled(exchanged)[0]}) == 3


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    made = assembly(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json is missing: give the whole pipeline"):
        assembled(made)


def test_a_folder_that_was_changed_is_refused(tmp_path: Path) -> None:
    folder, _ = assembled(assembly(tmp_path))
    (folder / "model_index.json").write_text("{}")
    with pytest.raises(IntegrityError, match="was changed since it was made: delete it, and it is made again"):
        assembled(assembly(tmp_path))
    shutil.rmtree(folder)
    assert assembled(assembly(tmp_path))[0] == folder


def test_a_tensor_that_cannot_be_read_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    made = assembly(tmp_path)
    size = (tmp_path / "m.safetensors").stat().st_size
    os.truncate(tmp_path / "m.safetensors", size - 1)
    with pytest.raises(InputError, match="ends before the data of"):
        assembled(made)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("S2P_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        InputError, match=r"cannot be made .* name another folder by the environment variable S2P_CACHE"
    ):
        assembled(assembly(tmp_path))


# argv: folder of the tests, folder of the assembly's files, at which tensor to do what ("kill" or "wait")
_SCRIPT = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from s2p_deploy.families.assembled import assembled
from s2p_deploy.families.single_file import ConvertedNetwork
from tests.families.test_assembled import assembly
plain, count = ConvertedNetwork.read, 0

def read(network, name):
    global count
    count += 1
    if count == 2 and sys.argv[3] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[3] == "wait":
        print("reading", flush=True)
        time.sleep(0.5)
    return plain(network, name)

ConvertedNetwork.read = read
print(assembled(assembly(Path(sys.argv[2])))[0], count, flush=True)
"""


def started(tmp_path: Path, what: str) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", _SCRIPT, root, str(tmp_path), what]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_kill_in_the_middle_leaves_nothing_under_the_name(tmp_path: Path, cache: Path) -> None:
    killed = started(tmp_path, "kill")
    assert killed.wait() == -signal.SIGKILL
    (left,) = [path for path in cache.iterdir() if path.is_dir()]
    assert left.name.endswith(".writing")
    folder, _ = assembled(assembly(tmp_path))
    assert torch.equal(load_file(folder / MADE)["y"], TENSORS["a"])
    assert [path for path in cache.iterdir() if path.is_dir()] == [folder]


@pytest.mark.slow
def test_processes_of_one_command_wait_for_the_first(tmp_path: Path) -> None:
    assembly(tmp_path)
    both = [started(tmp_path, "wait") for _ in range(2)]
    ends = [process.communicate()[0].split()[-2:] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert ends[0][0] == ends[1][0]
    assert sorted(int(end[1]) for end in ends) == [0, 2]  # one of them has read both tensors


def test_the_digest_is_of_names_and_content(tmp_path: Path) -> None:
    folder, before = assembled(assembly(tmp_path))
    assert pipeline_digest(folder) == before
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert pipeline_digest(copy) == before
    (copy / MADE).rename(copy / "vae" / "other.safetensors")
    assert pipeline_digest(copy) != before
