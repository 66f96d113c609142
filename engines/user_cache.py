"""Folders of the user's own for what libraries compile: it is loaded and run again, so nobody else may write there."""

from __future__ import annotations

import os
import re
from pathlib import Path

from s2p_deploy.errors import MissingEnvironmentError

_PRIVATE = 0o700
_OTHERS_WRITE = 0o022


def private_folder(name: str) -> Path:
    """``$XDG_CACHE_HOME/s2p_deploy/<name>`` (``~/.cache`` where that is not set), made with mode 0700.

    Raises:
        MissingEnvironmentError: it belongs to another user, others may write to it, or it cannot be made.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    # a relative path is to be ignored, says the XDG specification
    base = Path(given) if Path(given).is_absolute() else Path.home() / ".cache"
    folder = base / "s2p_deploy" / name
    try:
        folder.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise MissingEnvironmentError(f"the cache folder {folder} cannot be made ({error.strerror})") from error
    if status.st_uid != os.geteuid() or status.st_mode & _OTHERS_WRITE:
        raise MissingEnvironmentError(
            f"{folder} is not this user's alone, and compiled code would be loaded from it: chmod 700 it, or set "
            "XDG_CACHE_HOME to another place"
        )
    return folder


def plain_name(*parts: str) -> str:
    """A file name made of ``parts``: every character but letters, digits, ``.``, ``_`` and ``-`` becomes ``_``."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", "-".join(parts))
