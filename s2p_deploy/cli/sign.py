"""``s2p-deploy sign``: signs an artifact, and through its digests everything that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from s2p_deploy.cli.options import JsonOption
from s2p_deploy.cli.outcome import Outcome, show


def sign(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder that another command wrote.")],
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
    """Verify an artifact and sign its manifest with a private key: writes manifest.sig into it."""
    from s2p_deploy.records import read_manifest
    from s2p_deploy.signing import sign_artifact

    signature = sign_artifact(artifact, private_key, password)
    manifest = read_manifest(artifact)
    data = {"kind": manifest.kind, "path": str(artifact), "digest": manifest.digest, "signature": str(signature)}
    return show(Outcome(data, (f"{manifest.kind} {manifest.digest[:16]} signed: {signature}",)), as_json=as_json)
