"""A signal finds a stack to run on, whichever OpenVINO runners were closed before: in a process that may crash."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("openvino")

CLOSED_IN_ORDER = """
import os, signal
import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper
from s2p_deploy.engines.backend import backend_by_name
from s2p_deploy.records import Execution

values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", "y")]
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", values[:1], values[1:])
model = ir.from_proto(helper.make_model(graph))
backend = backend_by_name("openvino")
runners = [backend.runner_from_model(model, Execution(precision="f32")) for _ in range(2)]
for runner in runners:
    runner.infer({"x": np.ones(4, np.float32)})
for runner in runners:  # the first one first, as no stack of contexts does it
    runner.close()
try:
    os.kill(os.getpid(), signal.SIGINT)
    print("nothing came")
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_after_runners_were_closed_in_the_order_in_which_they_were_made() -> None:
    run = subprocess.run([sys.executable, "-c", CLOSED_IN_ORDER], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "interrupted\n"), run.stderr
