"""Signatures of artifacts: ``manifest.sig`` beside ``manifest.json``, made with an elliptic-curve key.

A manifest names the SHA-256 of every file and of every parent's manifest, so a signature of its bytes covers the whole
artifact and its whole chain. It is a Sigstore bundle, made and checked by OpenSSF's model-signing library, offline.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2p_deploy.errors import InputError, IntegrityError, MissingEnvironmentError
from s2p_deploy.records import Engine, Manifest, read_manifest, verify_files
from s2p_deploy.records.artifacts import MANIFEST, MOST_MANIFEST, MOST_SIGNATURE, SIGNATURE, manifest_from_bytes
from s2p_deploy.records.files import read_plain

if TYPE_CHECKING:
    from types import ModuleType


def sign_artifact(folder: Path, private_key: Path, password: str | None = None) -> Path:
    """Verifies an artifact, signs its manifest and writes the signature into the artifact; the path of that file.

    Args:
        folder: the artifact.
        private_key: a PEM file with an EC key on P-256, P-384 or P-521.
        password: of the key, where it is encrypted.

    Raises:
        InputError: there is no artifact, or the key cannot be read.
        IntegrityError: the artifact was changed.
        MissingEnvironmentError: model-signing is not installed.
    """
    library = _library()
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    text = read_plain(folder, MANIFEST, MOST_MANIFEST)
    if manifest_from_bytes(text, folder) != manifest:
        raise IntegrityError(f"{folder / MANIFEST} was changed while it was read")
    try:
        # cryptography wants bytes, whatever model-signing's annotation says
        secret: Any = None if password is None else password.encode()
        signer = library.signing.Config().use_elliptic_key_signer(private_key=private_key, password=secret)
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"{private_key} is no private EC key that can be read here ({_words(error)})") from error
    with tempfile.TemporaryDirectory(prefix=".signing-", dir=folder.parent) as private:
        (Path(private) / MANIFEST).write_bytes(text)
        signer.sign(Path(private) / MANIFEST, Path(private) / SIGNATURE)
        (Path(private) / SIGNATURE).replace(folder / SIGNATURE)
    return folder / SIGNATURE


def check_signature(folder: Path, public_key: Path) -> Manifest:
    """Verifies and returns the manifest of an artifact that was signed with the private half of ``public_key``.

    Raises:
        InputError: there is no artifact, or the key cannot be read.
        IntegrityError: the artifact is not signed, signed with another key, or its manifest was changed since.
        MissingEnvironmentError: model-signing is not installed.
    """
    library = _library()
    manifest = read_manifest(folder)
    if not os.path.lexists(folder / SIGNATURE):
        raise IntegrityError(f"{folder} is not signed: sign it with s2p-deploy sign, or do without --public-key")
    text = read_plain(folder, MANIFEST, MOST_MANIFEST)
    signature = read_plain(folder, SIGNATURE, MOST_SIGNATURE)
    verifier = _verifier(library, public_key)
    # copies, so that the bytes that are checked are those that were read here
    with tempfile.TemporaryDirectory() as private:
        for name, data in ((MANIFEST, text), (SIGNATURE, signature)):
            (Path(private) / name).write_bytes(data)
        try:
            verifier.verify(Path(private) / MANIFEST, Path(private) / SIGNATURE)
        except Exception as error:  # a hostile bundle fails in protobuf, JSON, base64, cryptography or pydantic
            raise IntegrityError(f"{folder} is not signed with the key of {public_key} ({_words(error)})") from error
    if manifest_from_bytes(text, folder) != manifest:
        raise IntegrityError(f"{folder / MANIFEST} was changed while it was read")
    return manifest


def open_engine(folder: Path, public_key: Path | None = None) -> Engine:
    """Opens an engine; with ``public_key``, only one that was signed with its private half.

    Raises:
        InputError: as :func:`check_signature` and ``Engine.open``. IntegrityError: likewise.
        MissingEnvironmentError: likewise.
    """
    signed = None if public_key is None else check_signature(folder, public_key)
    engine = Engine.open(folder)
    if signed is not None and engine.manifest != signed:
        raise IntegrityError(f"{folder} was changed while it was opened")
    return engine


def _verifier(library: ModuleType, public_key: Path) -> Any:  # noqa: ANN401 - of an optional library
    try:
        return library.verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"{public_key} is no public EC key that can be read here ({_words(error)})") from error


def _library() -> ModuleType:
    try:
        import model_signing
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise MissingEnvironmentError("signatures need model-signing: pip install 's2p-deploy[sign]'") from error
    return model_signing


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
