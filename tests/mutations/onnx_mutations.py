"""Mutations of ``denoiser.onnx``: where its external data points, and what its nodes say."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import onnx
from onnx import TensorProto, helper

from tests.mutations.file_mutations import Mutation

MODEL = "denoiser.onnx"
LOCATIONS = (
    "../canary.bin",
    "../denoiser.onnx.data",
    "/etc/passwd",
    "/dev/zero",
    "/proc/self/environ",
    "./denoiser.onnx.data",
    "x/../denoiser.onnx.data",
    "in/denoiser.onnx.data",
    "..\\canary.bin",
    "denoiser.onnx",
    "manifest.json",
    "missing.data",
    "..",
    ".",
    "",
    "denoiser.onnx.data\0",
    "*/_ORT_MEM_ADDR_/*",
)
PLACES = ("-1", "-8", "999999999", "9223372036854775807", "18446744073709551608", "1" * 30, "0x10", " 0", "1_0", "")


def on_model(change: Callable[[onnx.ModelProto, Random], None]) -> Mutation:
    """A mutation of a folder from one of its model."""

    def mutate(folder: Path, random: Random) -> None:
        path = folder / MODEL
        model = onnx.load_model(path, load_external_data=False)
        change(model, random)
        path.write_bytes(model.SerializeToString())

    mutate.__name__ = change.__name__
    return mutate


def _external(model: onnx.ModelProto, random: Random) -> TensorProto:
    return random.choice([tensor for tensor in model.graph.initializer if tensor.external_data])


def _set(tensor: TensorProto, key: str, value: str) -> None:
    for entry in tensor.external_data:
        if entry.key == key:
            entry.value = value
            return
    tensor.external_data.add(key=key, value=value)


def location(model: onnx.ModelProto, random: Random) -> None:
    _set(_external(model, random), "location", random.choice(LOCATIONS))


def place(model: onnx.ModelProto, random: Random) -> None:
    _set(_external(model, random), random.choice(["offset", "length"]), random.choice(PLACES))


def repeated_key(model: onnx.ModelProto, random: Random) -> None:
    _external(model, random).external_data.add(key="location", value="../canary.bin")


def unknown_key(model: onnx.ModelProto, random: Random) -> None:
    _external(model, random).external_data.add(key=random.choice(["basepath", "checksum", "prepacked_0"]), value="../")


def mark_without_place(model: onnx.ModelProto, random: Random) -> None:
    tensor = _external(model, random)
    if random.random() < 0.5:
        del tensor.external_data[:]
    else:
        tensor.data_location = TensorProto.DEFAULT


def hidden_in_node(model: onnx.ModelProto, random: Random) -> None:
    tensor = TensorProto()
    tensor.CopyFrom(_external(model, random))
    _set(tensor, "location", "../canary.bin")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["hidden"], name="hidden", value=tensor))


def hidden_in_subgraph(model: onnx.ModelProto, random: Random) -> None:
    tensor = TensorProto()
    tensor.CopyFrom(_external(model, random))
    _set(tensor, "location", "../canary.bin")
    result = helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
    inner = helper.make_graph([], "inner", [], [result], [tensor])
    condition = helper.make_node("Constant", [], ["yes"], value=helper.make_tensor("", TensorProto.BOOL, [], [True]))
    both = helper.make_node("If", ["yes"], ["hidden"], name="hidden", then_branch=inner, else_branch=inner)
    model.graph.node.insert(0, both)
    model.graph.node.insert(0, condition)


def sparse(model: onnx.ModelProto, random: Random) -> None:
    hidden = model.graph.sparse_initializer.add()
    hidden.values.CopyFrom(_external(model, random))
    _set(hidden.values, "location", "../canary.bin")
    hidden.dims.extend([2**40])


def function(model: onnx.ModelProto, random: Random) -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    model.functions.append(helper.make_function("own", "f", ["x"], ["y"], [node], [helper.make_opsetid("", 21)]))
    model.graph.node[random.randrange(len(model.graph.node))].domain = random.choice(["own", "com.microsoft"])


def huge_shape(model: onnx.ModelProto, random: Random) -> None:
    tensor = random.choice(model.graph.initializer)
    del tensor.dims[:]
    tensor.dims.extend(random.choice([[2**62, 2], [-1, -1], [2**31, 2**31], [-(2**63)], [10**9]]))


def nested(model: onnx.ModelProto, random: Random) -> None:
    """Graphs in graphs, as deep as protobuf lets them be."""
    inner = helper.make_graph([], "g", [], [], [])
    for depth in range(random.choice([10, 30])):
        outer = helper.make_graph([helper.make_node("If", ["c"], [f"n{depth}"], then_branch=inner)], "g", [], [], [])
        inner = outer
    model.graph.node.append(helper.make_node("If", ["c"], ["n"], name="n", then_branch=inner))


def element_type(model: onnx.ModelProto, random: Random) -> None:
    random.choice(model.graph.initializer).data_type = random.choice([0, 1, 2, 6, 7, 8, 10, 14, 22, 99, 2**31 - 1])


def operator(model: onnx.ModelProto, random: Random) -> None:
    names = ["Conv", "MatMul", "Add", "Reshape", "Gather", "Loop", "Softmax", "Cast", "Transpose", "Resize", "Nope", ""]
    random.choice(model.graph.node).op_type = random.choice(names)


def drop_input(model: onnx.ModelProto, random: Random) -> None:
    node = random.choice([node for node in model.graph.node if node.input])
    del node.input[random.randrange(len(node.input))]


def other_input(model: onnx.ModelProto, random: Random) -> None:
    node = random.choice([node for node in model.graph.node if node.input])
    names = [value.name for value in model.graph.initializer] + [n.output[0] for n in model.graph.node] + ["", "none"]
    node.input[random.randrange(len(node.input))] = random.choice(names)


def same_output(model: onnx.ModelProto, random: Random) -> None:
    random.choice(model.graph.node).output[0] = random.choice(model.graph.node).output[0]


def drop_node(model: onnx.ModelProto, random: Random) -> None:
    del model.graph.node[random.randrange(len(model.graph.node))]


def attribute(model: onnx.ModelProto, random: Random) -> None:
    """A number of an attribute: axes, pads, groups, types, permutations."""
    chosen = random.choice([a for node in model.graph.node for a in node.attribute])
    value = random.choice([-1, 0, 2, 7, 100, -100, 2**31, 2**63 - 1, -(2**63)])
    if chosen.type == onnx.AttributeProto.INTS:
        chosen.ints[random.randrange(len(chosen.ints))] = value
    else:
        chosen.i = value


def new_attribute(model: onnx.ModelProto, random: Random) -> None:
    node = random.choice(model.graph.node)
    name, value = random.choice(
        [("strides", [0, 0]), ("group", 0), ("group", -1), ("dilations", [0, 0]), ("axis", 99), ("block_size", 0),
         ("kernel_shape", [0, 0]), ("auto_pad", b"SAME"), ("pads", [2**40] * 4), ("batch_dims", -5), ("saturate", 7)]
    )  # fmt: skip
    node.attribute.append(helper.make_attribute(name, value))


def attribute_type(model: onnx.ModelProto, random: Random) -> None:
    attributes = [attribute for node in model.graph.node for attribute in node.attribute]
    random.choice(attributes).type = random.choice([0, 1, 3, 5, 6, 11])


def interface(model: onnx.ModelProto, random: Random) -> None:
    value = random.choice([*model.graph.input, *model.graph.output])
    if random.random() < 0.4:
        value.name = random.choice(["other", "", model.graph.input[0].name])
    else:
        sizes = value.type.tensor_type.shape.dim
        sizes[random.randrange(len(sizes))].dim_value = random.choice([0, 1, 3, 999, 2**31, -1])


def version(model: onnx.ModelProto, random: Random) -> None:
    if random.random() < 0.5:
        model.opset_import[0].version = random.choice([0, 1, 7, 22, 999, -1])
    else:
        model.ir_version = random.choice([0, 1, 3, 99, 2**40])


def weight_bits(folder: Path, random: Random) -> None:
    """Codes of the weights: still a valid graph, of another model."""
    path = folder / f"{MODEL}.data"
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 0x40
    path.write_bytes(data)


def data_behind_link(folder: Path, random: Random) -> None:
    path = folder / f"{MODEL}.data"
    other = folder.parent / "same.data"
    path.rename(other)
    if random.random() < 0.5:
        path.symlink_to(other)
    else:
        os.link(other, path)


EXTERNAL_MUTATIONS: tuple[Mutation, ...] = (
    *map(on_model, (location, location, location, place, place, repeated_key, unknown_key, mark_without_place)),
    *map(on_model, (hidden_in_node, hidden_in_subgraph, sparse, function, huge_shape, nested)),
    data_behind_link,
)
NODE_MUTATIONS: tuple[Mutation, ...] = (
    *map(on_model, (element_type, operator, drop_input, other_input, same_output, drop_node, attribute, attribute)),
    *map(on_model, (new_attribute, attribute_type, interface, version)),
    weight_bits,
)
