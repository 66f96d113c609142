"""An engine that was not built or run here before is loaded and run once in a child process first.

An engine is native code, or a program for a native parser: a hostile or damaged one that was sealed anew can crash the
process that loads it. The child takes that crash. What survived is remembered by its manifest's digest in the user's
cache, so it costs one more load, once. It is no sandbox: the child has the user's rights.
"""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from s2p_deploy.engines.isolation import Limits, run_child
from s2p_deploy.engines.user_cache import private_folder
from s2p_deploy.errors import EngineBuildError, IntegrityError, MissingEnvironmentError

if TYPE_CHECKING:
    from s2p_deploy.records import Engine

CHILD = "s2p_deploy.engines.trial_child"
TIMEOUT_S = 900.0


def require_trial(engine: Engine) -> None:
    """Tries an engine in a child process, unless it was built or tried here before.

    Raises:
        IntegrityError: it crashed or failed there.
        MissingEnvironmentError: as loading it would raise.
    """
    if _was_tried(engine):
        return
    with tempfile.TemporaryDirectory() as scratch:
        request = {"engine": str(engine.folder.resolve()), "digest": engine.manifest.digest}
        try:
            run_child(CHILD, request, Path(scratch), Limits(TIMEOUT_S))
        except EngineBuildError as error:
            reason = str(error).splitlines()[0].removeprefix("the build ")
            raise IntegrityError(f"{engine.folder}: a trial run in a child process {reason}: build it again") from error
    remembered(engine)


def remembered(engine: Engine) -> Engine:
    """The engine, noted as one that runs here. Without a usable cache folder, every load tries it again."""
    with suppress(MissingEnvironmentError):
        (private_folder("tried") / engine.manifest.digest).touch()
    return engine


def _was_tried(engine: Engine) -> bool:
    try:
        return (private_folder("tried") / engine.manifest.digest).is_file()
    except MissingEnvironmentError:
        return False
