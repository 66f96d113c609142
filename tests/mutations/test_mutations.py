"""A thousand spoiled artifacts: each is right or refused, crashes nobody, and reaches nothing outside its folder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.mutations.targets import GRAPH, MODEL, OPTIONS, PLAN, make_targets

REFUSED = {"IntegrityError", "InputError"}
ROOT = Path(__file__).resolve().parents[2]


def run_cases(folder: Path, targets: tuple[str, ...], first: int, count: int) -> list[dict[str, Any]]:
    """Makes the targets and a key, and runs the cases in a process of their own."""
    make_targets(folder, targets)
    write_keys(folder)
    request = {"folder": str(folder), "targets": targets, "first": first, "count": count}
    request["results"] = str(folder / "results.jsonl")
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    command = [sys.executable, "-m", "tests.mutations.zygote", str(folder / "request.json")]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == count
    return [json.loads(line) for line in lines]


def write_keys(folder: Path) -> None:
    """``key.pem`` and ``key.pub``."""
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "key.pub").write_bytes(public)


def fault(result: dict[str, Any]) -> str | None:
    """What is wrong with how a case came out; None where nothing is."""
    outcome = result["outcome"]
    if result["touched"] or result["opened"]:
        return "a file outside the artifact was touched"
    if result["sealed"] and result.get("signed", "IntegrityError") not in {*REFUSED, "passed"}:
        return "the check of the signature failed in a way of its own"
    if result["sealed"] and result.get("signed") == "passed" and outcome not in {"right", *REFUSED}:
        return "a changed artifact passed for signed"
    if outcome == "right" or outcome in REFUSED:
        return None
    if not result["sealed"]:
        early = outcome == "MissingEnvironmentError" and result["target"] == PLAN  # before its bytes are looked at
        return None if early else "an artifact that was not sealed anew must be refused by its digests"
    return fault_of_sealed(result)


def fault_of_sealed(result: dict[str, Any]) -> str | None:
    """The same for what neither is right nor was refused outright, with digests that fit."""
    match result["outcome"].split(":")[0]:
        case "MissingEnvironmentError":  # the manifest asks for another machine, or the plan for a GPU
            return None
        case "other":  # another artifact, as far as anyone can tell without a signature
            return "what must be refused was loaded" if result["strict"] else None
        case "native" | "crash":
            wanted = "EngineBuildError" if result["target"] == GRAPH else "IntegrityError"
            return None if result.get("isolated", wanted) in {wanted, *REFUSED} else "not refused where it is isolated"
    return "an error that is not one of ours"


def faults_of(results: list[dict[str, Any]]) -> list[tuple[str | None, dict[str, Any]]]:
    print(Counter((r["sealed"], r["outcome"].split(":")[0]) for r in results))  # noqa: T201 - for -s
    return [(fault(result), result) for result in results if fault(result) is not None]


def test_sixty_spoiled_artifacts_are_right_or_refused(tmp_path: Path) -> None:
    results = run_cases(tmp_path, ("onnxruntime", GRAPH, MODEL, PLAN), 0, 60)
    assert faults_of(results) == []
    assert sum(result["sealed"] for result in results) == 30


@pytest.mark.slow
def test_a_thousand_spoiled_artifacts_are_right_or_refused(tmp_path: Path) -> None:
    results = run_cases(tmp_path, (*OPTIONS, GRAPH, MODEL, PLAN), 0, 1000)
    assert faults_of(results) == []
    assert sum(result["sealed"] for result in results) == 500
