"""TensorRT 10, 11 and RTX differ in names. Only one of them can be installed here: the others stand as namespaces."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest

from s2p_deploy.engines.tensorrt.builder import BuildFlags, build_flags
from s2p_deploy.errors import MissingEnvironmentError


def library(version: str, flags: tuple[str, ...], networks: tuple[str, ...] | None) -> ModuleType:
    made = ModuleType("tensorrt")
    made.__dict__["__version__"] = version
    made.__dict__["BuilderFlag"] = SimpleNamespace(**dict.fromkeys(flags, 1))
    if networks is not None:
        made.__dict__["NetworkDefinitionCreationFlag"] = SimpleNamespace(**dict.fromkeys(networks, 1))
    return made


TEN = library("10.13", ("FP16", "INT8", "REFIT", "REFIT_IDENTICAL", "STRIP_PLAN"), ("EXPLICIT_BATCH", "STRONGLY_TYPED"))
ELEVEN = library("11.4", ("REFIT", "REFIT_IDENTICAL", "STRIP_PLAN"), ())
WITHOUT_NETWORK_FLAGS = library("12.0", ("REFIT_IDENTICAL",), None)


def test_strong_typing_is_asked_for_where_there_is_a_choice() -> None:
    assert build_flags(TEN, refit=False, stripped=False) == BuildFlags(request_strongly_typed=True, builder=())
    for later in (ELEVEN, WITHOUT_NETWORK_FLAGS):
        assert build_flags(later, refit=False, stripped=False) == BuildFlags(request_strongly_typed=False, builder=())


def test_refitting_is_always_identical() -> None:
    for version in (TEN, ELEVEN):
        assert build_flags(version, refit=True, stripped=False).builder == ("REFIT_IDENTICAL",)
        assert build_flags(version, refit=False, stripped=True).builder == ("REFIT_IDENTICAL", "STRIP_PLAN")


def test_a_flag_that_is_not_there_is_a_missing_environment() -> None:
    with pytest.raises(MissingEnvironmentError, match=r"tensorrt 12\.0 has no STRIP_PLAN"):
        build_flags(WITHOUT_NETWORK_FLAGS, refit=False, stripped=True)


@pytest.mark.trt
def test_the_installed_library_has_the_flags() -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    flags = build_flags(rtx, refit=True, stripped=True)
    assert flags.builder == ("REFIT_IDENTICAL", "STRIP_PLAN")
