"""Models as ONNX files, in ONNX's own operators."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ddf_convert.artifacts.atomic import write_file
from ddf_convert.artifacts.path_checks import check_file
from ddf_convert.errors import DDFError, UsageError
from ddf_convert.export.checking import Run, tolerance
from ddf_convert.export.checking import check as check_against
from ddf_convert.export.onnx_operators import translations
from ddf_convert.export.program import Traced, quiet, reason, tensors_in, trace
from ddf_convert.export.result import Exported
from ddf_convert.export.sizes import rename
from ddf_convert.utils.example_input import ExampleInput
from ddf_convert.version import __version__

if TYPE_CHECKING:
    import onnx

OPSET = 18  # the oldest that torch's exporter writes: the more programs can read it
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_OWN = ("", "ai.onnx")  # the names of ONNX's own domain
_DTYPES = (torch.float32, torch.float16)  # with others onnxruntime has no convolutions on a CPU
_OPEN_GROUPS = "a convolution has groups for every image, and ONNX wants a number"
_LARGEST = 2**31 - 1  # bytes of a file of protobuf


def check_packages() -> None:
    """Raises UsageError unless what ONNX files are made and checked with is installed."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"export to ONNX needs {' and '.join(missing)}: pip install 'ddf-convert[export]'")


def to_onnx(
    model: nn.Module,
    example_input: ExampleInput,
    path: str | Path,
    *,
    dynamic: bool = True,
    opset: int | None = None,
    check: bool = True,
) -> Exported:
    """Writes a model as an ONNX file, in ONNX's standard operators alone.

    It is the model in evaluation mode. What it returns beside tensors is left out, and a warning names it; dataclasses
    and the like are taken apart. Nothing in the file depends on ``ddf_convert``.

    Args:
        model: Any module, converted or not, of float32 or float16; it stays as it is.
        example_input: What to call it with: as for :func:`ddf_convert.plan`.
        path: The file; replaced if it exists, once all is well.
        dynamic: Leave the size of the batch, and those of images, free where the model's forward does.
        opset: ONNX's version of the operators, 18 or more; 18 if None.
        check: Compare onnxruntime's outputs with those of the model, at the example's sizes and at others.

    Returns:
        What was written, with the sizes that it is for, and the differences.

    Raises:
        UsageError: onnx, onnxscript or onnxruntime is missing; the model does not run on the example, or has other
            dtypes; the file cannot be written.
        DDFError: The model cannot be exported, or its outputs differ. The file is then as it was.
    """
    check_packages()
    file = Path(path)
    check_file("path", file)
    wanted = OPSET if opset is None else opset
    if wanted < OPSET:
        raise UsageError(f"opset {wanted} is too old: torch writes {OPSET} or later")
    _check_dtypes(model)
    traced = trace(model, example_input, dynamic)
    if _has_open_groups(traced):
        traced = trace(model, example_input, dynamic, {"batch": _OPEN_GROUPS})
    proto = _translated(traced, type(model).__name__, wanted)
    _cleaned(proto, traced)
    operators = _operators(proto)
    if proto.ByteSize() > _LARGEST:
        raise DDFError(f"{type(model).__name__} has {proto.ByteSize() / 2**30:.1f} GiB, and an ONNX file holds up to 2")
    content = proto.SerializeToString()
    checks = check_against(traced, _runner(content), "onnxruntime") if check else ()
    write_file(file, content)
    traced.tell_what_is_left_out(file)
    return Exported(
        file=file,
        format="onnx",
        bytes=len(content),
        opset=_opset(proto),
        operators=operators,
        inputs=_shapes(proto.graph.input),
        outputs=_shapes(proto.graph.output),
        sizes=traced.shapes.sizes,
        tolerance=tolerance(traced.model),
        checks=checks,
        left_out=traced.left_out,
    )


def _check_dtypes(model: nn.Module) -> None:
    tensors = (tensor for found in (model.parameters(), model.buffers()) for tensor in found)
    found = {tensor.dtype for tensor in tensors if tensor.is_floating_point()} - set(_DTYPES)
    if found:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise UsageError(
            f"ONNX files are for models of float32 or float16, and this one has {names}: give model.float()"
        )


def _has_open_groups(traced: Traced) -> bool:
    """Whether a convolution has as many groups as images, or a multiple: each has a filter of its own (CondConv)."""
    convolutions = (node for node in traced.program.graph.nodes if str(node.target).startswith("aten.conv2d"))
    groups = (node.args[6] if len(node.args) > 6 else node.kwargs.get("groups") for node in convolutions)
    return any(isinstance(number, torch.fx.Node) for number in groups)


def _translated(traced: Traced, name: str, opset: int) -> onnx.ModelProto:
    with torch.no_grad(), quiet():
        try:
            program = torch.onnx.export(
                traced.program,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                custom_translation_table=translations(),
                output_names=list(traced.outputs()),
            )
            assert program is not None
            proto = program.model_proto
        except Exception as error:
            raise DDFError(f"torch.onnx cannot translate {name}: {reason(_root(error))}") from error
    if _opset(proto) != opset:
        raise UsageError(f"opset {opset} cannot be written; the nearest is {_opset(proto)}")
    return proto


def _root(error: BaseException) -> BaseException:
    """What an error came from: torch.onnx's own tell how to report a bug, at length."""
    return error if error.__cause__ is None else _root(error.__cause__)


def _opset(proto: onnx.ModelProto) -> int:
    return next(int(entry.version) for entry in proto.opset_import if entry.domain in _OWN)


def _cleaned(proto: onnx.ModelProto, traced: Traced) -> None:
    """Our names for sizes; and nothing of the stack traces and paths that torch notes for every node."""
    proto.producer_name, proto.producer_version = "ddf_convert", __version__
    del proto.metadata_props[:]
    sizes = {size.name: str(size) for size in traced.shapes.sizes}
    proto.metadata_props.add(key="ddf_convert.sizes", value=json.dumps(sizes))
    names = {str(symbol): name for name, symbol in traced.shapes.symbols.items()}
    for graph in _graphs(proto.graph):
        del graph.metadata_props[:]
        for node in graph.node:
            del node.metadata_props[:]
            node.doc_string = ""
        for tensor in graph.initializer:
            del tensor.metadata_props[:]
        for value in (*graph.input, *graph.output, *graph.value_info):
            del value.metadata_props[:]
            value.doc_string = ""
            for size in value.type.tensor_type.shape.dim:
                if size.dim_param:
                    size.dim_param = rename(size.dim_param, names)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph, and those of the branches and loops in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner)


def _operators(proto: onnx.ModelProto) -> dict[str, int]:
    """How often each is used.

    Raises:
        DDFError: The graph is not one of ONNX's own operators.
    """
    import onnx

    nodes = [node for graph in _graphs(proto.graph) for node in graph.node]
    foreign = {f"{node.domain}::{node.op_type}" for node in nodes if node.domain not in _OWN}
    foreign |= {function.name for function in proto.functions}
    foreign |= {node.op_type for node in nodes if not onnx.defs.has(node.op_type)}
    if foreign:
        raise DDFError(f"the graph uses what ONNX itself does not have: {', '.join(sorted(foreign))}")
    for place in reversed(range(len(proto.opset_import))):  # those of torch's own functions, which are inlined by now
        if proto.opset_import[place].domain not in _OWN:
            del proto.opset_import[place]
    onnx.checker.check_model(proto)
    return dict(sorted(Counter(node.op_type for node in nodes).items()))


def _shapes(values: Sequence[onnx.ValueInfoProto]) -> dict[str, tuple[int | str, ...]]:
    return {
        value.name: tuple(size.dim_param or int(size.dim_value) for size in value.type.tensor_type.shape.dim)
        for value in values
    }


def _runner(content: bytes) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise DDFError(f"onnxruntime cannot open what was exported ({reason(error)}); nothing was written") from error
    names = [value.name for value in session.get_inputs()]

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Tensor]:
        given = {name: tensor.numpy() for name, tensor in zip(names, tensors_in((args, kwargs)), strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, given)]

    return run
