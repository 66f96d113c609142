"""``s2p-deploy sign`` and ``verify``: who made an artifact, and that nothing in it was changed since."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from s2p_deploy.cli.options import ArtifactArgument, JsonOption, PublicKeyOption
from s2p_deploy.cli.output import Outcome, show, table

if TYPE_CHECKING:
    from s2p_deploy.records import Link


def sign(
    artifact: ArtifactArgument,
    *,
    private_key: Annotated[
        Path, typer.Option(metavar="FILE.pem", help="An EC key (P-256, P-384 or P-521), e.g. from openssl ecparam.")
    ],
    password: Annotated[
        str | None,
        typer.Option(envvar="S2P_PRIVATE_KEY_PASSWORD", help="Of an encrypted key; better in the environment."),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Sign an artifact with a private key.

    The artifact is verified first. The signature, manifest.sig, covers every file and, through their digests, every
    artifact that it was made from.
    """
    from s2p_deploy.records import read_manifest
    from s2p_deploy.signing import sign_artifact

    signature = sign_artifact(artifact, private_key, password)
    manifest = read_manifest(artifact)
    data = {"kind": manifest.kind, "path": str(artifact), "digest": manifest.digest, "signature": str(signature)}
    return show(Outcome(data, (f"{manifest.kind} {manifest.digest[:16]} signed: {signature}",)), as_json=as_json)


def verify(
    artifact: ArtifactArgument,
    *,
    public_key: PublicKeyOption = None,
    as_json: JsonOption = False,
) -> int:
    """Check every file of an artifact and of the artifacts that it was made from.

    Parents that are not where they were are named. Exits 5 on any difference. With a key, the artifact must be signed
    with its private half.
    """
    from s2p_deploy.records import verify_chain

    if public_key is not None:
        from s2p_deploy.signing import check_signature

        check_signature(artifact, public_key)
    links = verify_chain(artifact)
    signature = "not checked" if public_key is None else f"made with the key of {public_key}"
    data = {"verified": True, "signature": signature, "artifacts": [_data(link) for link in links]}
    rows = [(link.name, link.kind, link.digest[:16], link.files, link.state, link.folder) for link in links]
    head = table("Verified", ("", "kind", "digest", "files", "state", "place"), rows)
    return show(Outcome(data, (head, f"signature: {signature}")), as_json=as_json)


def _data(link: Link) -> dict[str, object]:
    return {
        "name": link.name,
        "kind": link.kind,
        "digest": link.digest,
        "files": link.files,
        "state": link.state,
        "path": str(link.folder),
    }
