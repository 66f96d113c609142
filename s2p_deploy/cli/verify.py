"""``s2p-deploy verify``: hashes an artifact and every parent that is at hand, and checks its signature."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from s2p_deploy.cli.options import JsonOption, PublicKeyOption
from s2p_deploy.cli.outcome import Outcome, show, table

if TYPE_CHECKING:
    from s2p_deploy.records import Link


def verify(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder that another command wrote.")],
    *,
    public_key: PublicKeyOption = None,
    as_json: JsonOption = False,
) -> int:
    """Hash every file of an artifact and of what it was made from, where that is at hand; exits 5 on any difference."""
    from s2p_deploy.records import verify_chain

    if public_key is not None:
        from s2p_deploy.signing import check_signature

        check_signature(artifact, public_key)
    links = verify_chain(artifact)
    signature = "not asked for" if public_key is None else f"made with the key of {public_key}"
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
