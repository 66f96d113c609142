"""Who may talk to a Ray cluster. Ray runs code by design, so nobody without the token may reach it."""

from __future__ import annotations

import os
import secrets
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from s2p_deploy.errors import InputError, MissingEnvironmentError

MODE, TOKEN, TOKEN_FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_FIRST_WITH_TOKENS = (2, 52)


def check_ray() -> None:
    """Raises MissingEnvironmentError where Ray is missing, or older than its tokens."""
    try:
        found = version("ray")
    except PackageNotFoundError as error:
        raise MissingEnvironmentError("serve --ray needs Ray: pip install 's2p-deploy[ray]'") from error
    if tuple(int(part) for part in found.split(".")[:2]) < _FIRST_WITH_TOKENS:
        wanted = ".".join(map(str, _FIRST_WITH_TOKENS))
        raise MissingEnvironmentError(f"Ray {found} knows no tokens: install {wanted} or later")


def require_token(*, own_cluster: bool) -> None:
    """Switches Ray's token mode on for this process and what it starts. Before Ray is imported.

    A cluster of this process's own gets a token of its own where there is none; joining another needs its token.

    Raises:
        InputError: the mode was switched off, or there is no token for the cluster to join.
    """
    mode = os.environ.setdefault(MODE, "token")
    if mode.lower() != "token":
        raise InputError(f"{MODE}={mode}: whoever reached the cluster could run code on it; set {MODE}=token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    given = os.environ.get(TOKEN) or os.environ.get(TOKEN_FILE) or (Path.home() / ".ray" / "auth_token").is_file()
    if given:
        return
    if not own_cluster:
        raise InputError(f"the Ray cluster wants its token: put it into {TOKEN}, or its file's path into {TOKEN_FILE}")
    os.environ[TOKEN] = secrets.token_hex(32)
