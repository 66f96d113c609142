"""Signatures: made by model-signing itself, with real keys."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from s2p_deploy.cli import main
from s2p_deploy.errors import InputError, IntegrityError, MissingEnvironmentError
from s2p_deploy.records import Base, open_artifact, verify_chain, write_artifact
from s2p_deploy.records.artifacts import _sealed_text
from s2p_deploy.signing import check_signature, sign_artifact

serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization", reason="needs the extra sign")


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    out = tmp_path / "child"
    parent = write_artifact(
        tmp_path / "parent", kind="Thing", base=Base("x", "0" * 64), recipe={}, fill=lambda folder: _fill(folder, b"p")
    )
    write_artifact(
        out,
        kind="Thing",
        base=Base("x", "0" * 64),
        recipe={},
        fill=lambda folder: _fill(folder, b"c"),
        parents={"graph": (tmp_path / "parent", parent)},
    )
    return out


def _fill(folder: Path, data: bytes) -> dict[str, int]:
    (folder / "a.bin").write_bytes(data)
    return {"answer": 42}


def write_key(folder: Path, name: str, password: bytes | None = None) -> tuple[Path, Path]:
    """A key pair in two PEM files."""
    from cryptography.hazmat.primitives.asymmetric import ec

    key, pem = ec.generate_private_key(ec.SECP256R1()), serialization.Encoding.PEM
    sealed = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, sealed))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def seal_anew(folder: Path) -> None:
    """Another content under a seal that fits, as one who may write to the folder can make it."""
    data = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    del data["seal"]
    (folder / "manifest.json").write_text(_sealed_text(data | {"content": {"answer": 43}}), encoding="utf-8")


def test_a_signed_artifact_is_still_whole_and_passes(artifact: Path, tmp_path: Path) -> None:
    private, public = write_key(tmp_path, "key")
    assert sign_artifact(artifact, private) == artifact / "manifest.sig"
    assert check_signature(artifact, public) == open_artifact(artifact, "Thing")
    assert [link.name for link in verify_chain(artifact)] == ["", "graph"]


def test_unsigned_and_wrongly_signed_artifacts_are_refused(artifact: Path, tmp_path: Path) -> None:
    private, public = write_key(tmp_path, "key")
    with pytest.raises(IntegrityError, match="is not signed: "):
        check_signature(artifact, public)
    sign_artifact(artifact, private)
    _, other = write_key(tmp_path, "other")
    with pytest.raises(IntegrityError, match="not signed with the key of"):
        check_signature(artifact, other)


def test_a_manifest_that_was_sealed_anew_is_refused_only_by_the_signature(artifact: Path, tmp_path: Path) -> None:
    private, public = write_key(tmp_path, "key")
    sign_artifact(artifact, private)
    seal_anew(artifact)
    assert open_artifact(artifact, "Thing").content == {"answer": 43}
    with pytest.raises(IntegrityError, match="not signed with"):
        check_signature(artifact, public)


@pytest.mark.parametrize("text", ["", "{}", "null", '{"dsseEnvelope": 3}', "x" * 100, "[" * 100_000, "9" * 2_000_000])
def test_a_signature_that_is_none_is_refused(artifact: Path, tmp_path: Path, text: str) -> None:
    _, public = write_key(tmp_path, "key")
    (artifact / "manifest.sig").write_text(text)
    with pytest.raises(IntegrityError):
        check_signature(artifact, public)


def test_a_signature_of_another_artifact_is_refused(artifact: Path, tmp_path: Path) -> None:
    private, public = write_key(tmp_path, "key")
    signature = sign_artifact(tmp_path / "parent", private)
    (artifact / "manifest.sig").write_bytes(signature.read_bytes())
    with pytest.raises(IntegrityError, match="not signed with"):
        check_signature(artifact, public)


def test_a_spoiled_artifact_is_not_signed(artifact: Path, tmp_path: Path) -> None:
    private, _ = write_key(tmp_path, "key")
    (artifact / "a.bin").write_bytes(b"x")
    with pytest.raises(IntegrityError, match="was changed"):
        sign_artifact(artifact, private)
    assert not (artifact / "manifest.sig").exists()


def test_keys_that_are_none_are_named(artifact: Path, tmp_path: Path) -> None:
    private, public = write_key(tmp_path, "key")
    encrypted, _ = write_key(tmp_path, "encrypted", b"secret")
    for key, password in ((public, None), (tmp_path / "missing", None), (encrypted, None), (encrypted, "wrong")):
        with pytest.raises(InputError, match="no private EC key"):
            sign_artifact(artifact, key, password)
    sign_artifact(artifact, encrypted, "secret")
    for key in (private, tmp_path / "missing"):
        with pytest.raises(InputError, match="no public EC key"):
            check_signature(artifact, key)


def test_a_missing_library_is_named(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(MissingEnvironmentError, match=r"s2p-deploy\[sign\]"):
        check_signature(artifact, tmp_path / "key.pub")


def test_the_commands(artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    private, public = write_key(tmp_path, "key")
    assert main(["verify", str(artifact), "--public-key", str(public)]) == 5
    assert main(["sign", str(artifact), "--private-key", str(private)]) == 0
    capfd.readouterr()
    assert main(["verify", str(artifact), "--public-key", str(public), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert [(part["name"], part["state"]) for part in told["artifacts"]] == [("", "verified"), ("graph", "verified")]
    (tmp_path / "parent" / "a.bin").write_bytes(b"x")
    assert main(["verify", str(artifact)]) == 5
    (tmp_path / "parent").rename(tmp_path / "away")
    capfd.readouterr()
    assert main(["verify", str(artifact)]) == 0
    assert "not at hand" in capfd.readouterr().out
    assert main(["generate", str(artifact), "--prompt", "x", "--out", "x.png", "--public-key", "none.pub"]) == 2
