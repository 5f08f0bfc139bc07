"""Sizes in an ONNX graph, so that tools which infer shapes by symbols can follow them.

torch.onnx computes the sizes that a Reshape asks for from those of the input images, in simplified
form: (height - 1) // 4 + 1 after two convolutions, whose own sizes a tool derives as ((height - 1)
// 2) // 2 + 1. That these are equal onnxruntime's symbolic shape inference does not see, and with
it quantisation gives up.
"""

from typing import Any

__all__ = ["take_sizes_from_tensors"]

RESHAPING = ("Reshape", "Expand")


def take_sizes_from_tensors(model: Any) -> None:
    """Let every Reshape and Expand take its sizes from the first tensor that has them, in place.

    Args:
        model: An `onnx.ModelProto` whose values have shapes.
    """
    from onnx import TensorProto, helper

    graph = model.graph
    values = [*graph.input, *graph.value_info, *graph.output]
    shapes = {value.name: _sizes(value) for value in values}
    first: dict[str, tuple[str, int]] = {}  # tensor and axis, by size
    made: dict[int | str, str] = {}  # name of a tensor that holds the size, by size
    joined: dict[tuple[int | str, ...], str] = {}  # and of one that holds several
    nodes: list[Any] = []

    def note(name: str) -> None:
        for axis, size in enumerate(shapes.get(name, [])):
            if isinstance(size, str):
                first.setdefault(size, (name, axis))

    def holder(size: int | str) -> str:
        if size not in made:
            made[size] = f"size_{len(made)}"
            if isinstance(size, str):
                tensor, axis = first[size]
                node = helper.make_node("Shape", [tensor], [made[size]], start=axis, end=axis + 1)
            else:
                value = helper.make_tensor("size", TensorProto.INT64, [1], [size])
                node = helper.make_node("Constant", [], [made[size]], value=value)
            nodes.append(node)
        return made[size]

    for value in graph.input:
        note(value.name)
    for node in graph.node:
        sizes = shapes.get(node.output[0], []) if node.op_type in RESHAPING else []
        if any(isinstance(size, str) for size in sizes) and all(
            isinstance(size, int) or size in first for size in sizes
        ):
            key = tuple(sizes)
            if key not in joined:
                joined[key] = f"sizes_{len(joined)}"
                parts = [holder(size) for size in sizes]
                nodes.append(helper.make_node("Concat", parts, [joined[key]], axis=0))
            node.input[1] = joined[key]
        nodes.append(node)
        for name in node.output:
            note(name)
    _replace_nodes(graph, nodes)


def _sizes(value: Any) -> list[int | str]:
    """Numbers, and names of sizes that vary."""
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _replace_nodes(graph: Any, nodes: list[Any]) -> None:
    """Put nodes in place of a graph's, and drop what nothing needs then."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    for named in (graph.initializer, graph.value_info):
        still_there = [entry for entry in named if entry.name in needed]
        del named[:]
        named.extend(still_there)
