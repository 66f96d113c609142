"""Gates as JUnit XML, as CI systems show test results: one test case per gate."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from collections.abc import Sequence

    from s2p_deploy.records import GateResult

_ELEMENTS = {"failed": "failure", "not measured": "error", "not applicable": "skipped"}
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0 has no way to write the rest


def junit_xml(gates: Sequence[GateResult], suite: str) -> str:
    """A JUnit file's text; ``suite`` names what was judged.

    A gate that failed is a failure, one that could not be measured an error, one that asks nothing is skipped.
    """
    statuses = [gate.status for gate in gates]
    counts = {
        "tests": len(gates),
        "failures": statuses.count("failed"),
        "errors": statuses.count("not measured"),
        "skipped": statuses.count("not applicable"),
    }
    root = ET.Element("testsuites")
    node = ET.SubElement(root, "testsuite", {"name": _text(suite)} | {name: str(n) for name, n in counts.items()})
    for gate in gates:
        case = ET.SubElement(node, "testcase", {"name": _text(gate.name), "classname": "s2p_deploy.gates"})
        if gate.status in _ELEMENTS:
            ET.SubElement(case, _ELEMENTS[gate.status], {"message": _text(_reason(gate))})
        else:
            ET.SubElement(case, "system-out").text = _text(_reason(gate))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def _reason(gate: GateResult) -> str:
    limit = "" if gate.limit is None else f" {gate.limit:.6g}"
    found = "nothing" if gate.value is None else f"{gate.value:.6g} (n = {gate.n})"
    where = f" at {gate.where}" if gate.where else ""
    return f"found {found}{where}, asks {gate.asks}{limit}" + (f": {gate.reason}" if gate.reason else "")


def _text(text: str) -> str:
    return _NO_XML.sub("\N{REPLACEMENT CHARACTER}", text)
