from __future__ import annotations

from xml.etree import ElementTree as ET

from s2p_deploy.records import GateResult
from s2p_deploy.validation import junit_xml

GATES = (
    GateResult("good", "dB at least", 51.5, 50.0, 64, "passed"),
    GateResult("bad", "dB at least", 12.0, 50.0, 64, "failed"),
    GateResult("nothing", "dB at least", None, 50.0, 0, "not measured", "needs a GPU"),
    GateResult("off", "dB at least", None, None, 0, "not applicable", "switched off in the recipe"),
)


def test_every_gate_is_a_case_with_its_outcome() -> None:
    suite = ET.fromstring(junit_xml(GATES, "engine")).find("testsuite")
    assert suite is not None
    assert {"tests": "4", "failures": "1", "errors": "1", "skipped": "1"}.items() <= suite.attrib.items()
    assert [case.get("name") for case in suite] == ["good", "bad", "nothing", "off"]
    assert [case[0].tag for case in suite] == ["system-out", "failure", "error", "skipped"]
    assert suite[0][0].text == "found 51.5 (n = 64), asks dB at least 50"
    assert suite[1][0].get("message") == "found 12 (n = 64), asks dB at least 50"
    assert suite[2][0].get("message") == "found nothing, asks dB at least 50: needs a GPU"


def test_hostile_text_stays_text() -> None:
    name = "]]></testcase><failure/>&lt;\x00\x1b[31m\ud800\uffff\"'ü"
    suite = ET.fromstring(junit_xml((GateResult(name, "x", None, None, 0, "failed", name),), name)).find("testsuite")
    assert suite is not None
    clean = "]]></testcase><failure/>&lt;\ufffd\ufffd[31m\ufffd\ufffd\"'ü"
    assert suite.get("name") == clean
    assert suite[0].get("name") == clean
    assert len(suite) == len(suite[0]) == 1
    junit_xml((GateResult(name, "x", None, None, 0, "failed", name),), name).encode("utf-8")
