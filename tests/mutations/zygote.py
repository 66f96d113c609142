"""``python -m tests.mutations.zygote request.json``: runs cases, each in a fork of a process that has all libraries.

It writes one JSON object per case, a line each. The libraries are imported here and used only in forks.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from s2p_deploy.errors import S2PError
from s2p_deploy.signing import check_signature, sign_artifact
from tests.mutations.cases import Case, make_case
from tests.mutations.sandbox import run_forked, use_temporary, watch_opens, watched_by_kernel, where_raised
from tests.mutations.targets import OUTSIDE, same, use, use_isolated

_NATIVE = ("/engines/onnxruntime/", "/engines/openvino/", "/engines/tensorrt/", "/engines/conditioning.py")
BACKENDS = ("build", "onnxruntime.backend", "openvino.backend", "tensorrt.backend")
_ISOLATED_OF = 300  # cases; of so many, one refusal of a native library is tried in full, and every crash


def main(request_file: str) -> None:
    """Runs the cases of the request."""
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    root, targets = Path(request["folder"]), tuple(request["targets"])
    import_all(targets)
    onnxruntime.set_default_logger_severity(4)
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    os.environ["HOME"] = str(root / "home")  # openvino keeps usage statistics in ~/intel
    (root / "home").mkdir(exist_ok=True)
    for target in targets:
        sign_artifact(root / target, root / "key.pem")
        prepare_original(root, target)
    isolated = 0
    with Path(request["results"]).open("w", encoding="utf-8") as results:
        for number in range(request["first"], request["first"] + request["count"]):
            result = run_case(make_case(number, targets), root)
            sampled = result["outcome"].startswith("native") and isolated <= request["count"] // _ISOLATED_OF
            if sampled or "crash" in result:
                isolated += 1
                result["isolated"] = run_isolated(make_case(number, targets), root)
            results.write(json.dumps(result) + "\n")
            results.flush()


def import_all(targets: tuple[str, ...]) -> None:
    """What a fork would otherwise import again for every case."""
    lazy = ["model_signing.signing", "model_signing.verifying", *map("s2p_deploy.engines.{}".format, BACKENDS)]
    for name in [*lazy, *(["openvino"] if "openvino" in targets else [])]:
        importlib.import_module(name)


def prepare_original(root: Path, target: str) -> None:
    """What the unchanged artifact computes, in ``target.npz``; nothing where it is refused (no GPU)."""

    def work() -> dict[str, Any]:
        try:
            np.savez(root / f"{target}.npz", **use(target, root / target))
        except S2PError as error:
            return {"refused": str(error)}
        return {}

    run_forked(work, root / f"{target}.original.json")


def run_case(case: Case, root: Path) -> dict[str, Any]:
    """The outcome of a case, as a dictionary."""
    folder = _mutated(case, root)
    home = folder.parent
    with watched_by_kernel(home) as touched:
        found = run_forked(lambda: _judge(case, folder, root), root / "answer.json")
    known = {"number": case.number, "target": case.target, "mutation": case.mutation, "outcome": "crash"}
    flags = {"sealed": case.sealed, "strict": case.strict, "touched": touched, "opened": []}
    shutil.rmtree(home)
    return known | flags | found


def run_isolated(case: Case, root: Path) -> str:
    """The same case as the command line meets it: the class of the error."""
    folder = _mutated(case, root)

    def work() -> dict[str, Any]:
        use_temporary(folder.parent / "scratch")
        try:
            use_isolated(case.target, folder)
        except S2PError as error:
            return {"error": type(error).__name__}
        return {"error": "none"}

    found = run_forked(work, root / "answer.json")
    shutil.rmtree(folder.parent)
    return str(found.get("error", found))


def _mutated(case: Case, root: Path) -> Path:
    home = root / f"case-{case.number}"
    shutil.rmtree(home, ignore_errors=True)
    folder = home / "artifact"
    shutil.copytree(root / case.target, folder)
    for name in OUTSIDE:  # what an escape would find: enough bytes for any tensor
        (home / name).write_bytes(bytes(2**16))
    (root / "answer.json").unlink(missing_ok=True)
    case.mutate(folder)
    return folder


def _judge(case: Case, folder: Path, root: Path) -> dict[str, Any]:
    use_temporary(folder.parent / "scratch")
    seen: list[str] = []
    own = ("cache", "home", "answer.json", f"{case.target}.npz", "key.pub")
    watch_opens((folder, folder.parent / "scratch", *(root / name for name in own)), seen)
    signed = _attempt(lambda: check_signature(folder, root / "key.pub"))
    outcome = _attempt(lambda: _compared(case, folder, root))
    return {"outcome": outcome, "signed": signed, "opened": seen}


def _compared(case: Case, folder: Path, root: Path) -> str:
    found = use(case.target, folder)
    with np.load(root / f"{case.target}.npz") as expected:
        return "right" if same(found, dict(expected)) else "other"


def _attempt(work: Any) -> str:  # noqa: ANN401 - any callable
    """Its answer, the class of an expected error, ``native`` for a library's refusal, or the unexpected error."""
    try:
        answer = work()
    except S2PError as error:
        return type(error).__name__
    except Exception as error:
        inside = any(part in file for file in where_raised(error) for part in _NATIVE)
        kind = "native" if inside else "unexpected"
        return f"{kind}: {type(error).__name__}: {str(error)[:300]} at {where_raised(error)[-2:]}"
    return answer if isinstance(answer, str) else "passed"


if __name__ == "__main__":
    main(*sys.argv[1:])
