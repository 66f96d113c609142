from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from s2p_deploy.export.passes.open_sizes import OpenSizes

FLOAT = ir.TensorType(ir.DataType.FLOAT)


def value(name: str, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=FLOAT)


def model() -> ir.Model:
    """Latents in tokens and back, as torch's exporter writes it where height and width are open."""
    sample = value("sample", ["batch", 4, "2*h", "2*w"])
    sizes = ir.node("Shape", [sample])
    swapped = ir.node("Transpose", [sample], {"perm": [0, 2, 3, 1]})
    tokens = ir.node("Reshape", [swapped.outputs[0], sizes.outputs[0]], {"allowzero": 1})
    heads = ir.node("Reshape", [tokens.outputs[0], sizes.outputs[0]])
    joined = ir.node("Reshape", [heads.outputs[0], sizes.outputs[0]])
    image = ir.node("Reshape", [joined.outputs[0], sizes.outputs[0]])
    shapes: tuple[list[int | str], ...] = (
        ["batch", "2*h", "2*w", 4],
        ["batch", "4*h*w", 4],
        ["batch", "4*h*w", 2, 2],
        ["batch", "4*h*w", 4],
        ["batch", "2*h", "2*w", 4],
    )
    nodes = [sizes, swapped, tokens, heads, joined, image]
    for node, shape in zip(nodes[1:], shapes, strict=True):
        node.outputs[0].shape, node.outputs[0].type = ir.Shape(shape), FLOAT
    graph = ir.Graph([sample], [image.outputs[0]], nodes=nodes, opset_imports={"": 21})
    return ir.Model(graph, ir_version=10)


def test_sizes_that_are_known_or_kept_become_constants() -> None:
    opened = model()
    OpenSizes()(opened)
    targets = [node.inputs[1] for node in opened.graph if node.op_type == "Reshape"]
    constants = [target.const_value.numpy().tolist() for target in targets if target.const_value is not None]
    assert constants == [[0, -1, 4], [0, 0, 2, 2], [0, 0, 4]]
    assert not any("allowzero" in node.attributes for node in opened.graph)


def test_a_target_with_two_sizes_of_the_latents_is_read_at_run_time() -> None:
    opened = model()
    OpenSizes()(opened)
    last = opened.graph.node(-1)
    assert last.inputs[1].producer().op_type == "Shape"
    assert sum(node.op_type == "Shape" for node in opened.graph) == 1


def test_only_the_latents_sizes_have_names() -> None:
    opened = model()
    OpenSizes()(opened)
    assert opened.graph.inputs[0].shape == ir.Shape(["batch", 4, "height", "width"])
    inside = [node.outputs[0].shape for node in opened.graph if node.op_type in {"Transpose", "Reshape"}]
    assert [list(map(str, shape)) for shape in inside[:2]] == [["batch", "None", "None", "4"], ["batch", "None", "4"]]


def test_a_graph_without_latents_is_refused() -> None:
    other = model()
    other.graph.inputs[0].name = "text"
    with pytest.raises(ir.passes.PreconditionError, match="no input sample"):
        OpenSizes()(other)


def test_equal_targets_are_one_constant() -> None:
    opened = model()
    OpenSizes()(opened)
    assert all(np.issubdtype(item.const_value.numpy().dtype, np.int64) for item in opened.graph.initializers.values())
    assert len(opened.graph.initializers) == 3


def test_texts_of_any_length_keep_their_names_and_other_sizes_their_numbers() -> None:
    """Keys in heads, and latents joined with the text, as SD3 has them."""
    sample, text = value("sample", ["batch", 4, 8, 8]), value("encoder_hidden_states", ["batch", "tokens", 6])
    sizes = ir.node("Shape", [text])
    heads = ir.node("Reshape", [text, sizes.outputs[0]], {"allowzero": 1})
    joined = ir.node("Reshape", [text, sizes.outputs[0]])
    shapes: tuple[list[int | str], ...] = (["batch", "tokens", 2, 3], ["batch", "tokens + 16", 6])
    for node, shape in zip((heads, joined), shapes, strict=True):
        node.outputs[0].shape, node.outputs[0].type = ir.Shape(shape), FLOAT
    nodes = [sizes, heads, joined]
    out = ir.node("Identity", [sample])
    out.outputs[0].shape, out.outputs[0].type = ir.Shape(["batch", 4, 8, 8]), FLOAT
    graph = ir.Graph([sample, text], [out.outputs[0]], nodes=[*nodes, out], opset_imports={"": 21})
    joined.outputs[0].name = "joined"
    graph.outputs.extend([heads.outputs[0], joined.outputs[0]])
    OpenSizes()(ir.Model(graph, ir_version=10))
    assert heads.inputs[1].const_value.numpy().tolist() == [0, 0, 2, 3]
    assert joined.inputs[1].const_value.numpy().tolist() == [0, -1, 6]
    assert [[getattr(size, "value", size) for size in one.shape] for one in (sample, text, *graph.outputs)] == [
        ["batch", 4, 8, 8],
        ["batch", "tokens", 6],
        ["batch", 4, 8, 8],
        ["batch", "tokens", 2, 3],
        ["batch", None, 6],
    ]
