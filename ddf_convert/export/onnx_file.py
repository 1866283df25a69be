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

from ddf_convert.artifacts.path_checks import check_file
from ddf_convert.errors import DDFError, UsageError
from ddf_convert.export.checking import Exported, Runner, check_and_write
from ddf_convert.export.onnx_operators import translations
from ddf_convert.export.program import TracedProgram, quiet, short_reason, tensors_in, trace
from ddf_convert.export.sizes import rename
from ddf_convert.utils.example_input import ExampleInput
from ddf_convert.version import __version__

if TYPE_CHECKING:
    import onnx

OPSET = 18  # the oldest that torch's exporter writes, so that most programs can read it
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_STANDARD_DOMAINS = ("", "ai.onnx")
_DTYPES = (torch.float32, torch.float16)  # onnxruntime has no convolutions of other dtypes on a CPU
_MAX_BYTES = 2**31 - 1  # of a protobuf file


def check_packages() -> None:
    """Raises a UsageError unless the packages that make and check ONNX files are installed."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
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
    """Writes a model, in evaluation mode, as an ONNX file of ONNX's standard operators only.

    What the model returns beside tensors is left out, and a warning names it; dataclasses and the like are taken
    apart. Nothing in the file depends on ``ddf_convert``.

    Args:
        model: Any module, converted or not, of float32 or float16; it is not changed.
        example_input: Its input, as for :func:`ddf_convert.plan`.
        path: The file. It is replaced if it exists, once the export has succeeded.
        dynamic: Keep the sizes of the batch and of images free where the model's forward allows.
        opset: ONNX's version of the operators, 18 or more; None is 18.
        check: Compare onnxruntime's outputs with those of the model, at the example's sizes and at others.

    Returns:
        What was written, with the allowed sizes and the differences.

    Raises:
        UsageError: onnx, onnxscript or onnxruntime is missing; the model does not run on the example, or has other
            dtypes; the file cannot be written.
        DDFError: The model cannot be exported, or its outputs differ. An old file stays as it was.
    """
    check_packages()
    file = Path(path)
    check_file("path", file)
    opset = OPSET if opset is None else opset
    if opset < OPSET:
        raise UsageError(f"opset {opset} is too old: torch writes {OPSET} or later")
    _check_dtypes(model)
    traced = trace(model, example_input, dynamic)
    if _has_dynamic_groups(traced):
        fixed = {"batch": "a convolution has groups for every image, and ONNX wants a number"}
        traced = trace(model, example_input, dynamic, fixed)
    proto = _to_proto(traced, type(model).__name__, opset)
    _clean_metadata(proto, traced)
    operators = _check_operators(proto)
    if proto.ByteSize() > _MAX_BYTES:
        raise DDFError(f"{type(model).__name__} has {proto.ByteSize() / 2**30:.1f} GiB, and an ONNX file holds up to 2")
    return check_and_write(
        traced,
        proto.SerializeToString(),
        file,
        format="onnx",
        operators=operators,
        runner_name="onnxruntime",
        make_runner=_make_runner if check else None,
        opset=_opset(proto),
        inputs=_shapes(proto.graph.input),
        outputs=_shapes(proto.graph.output),
    )


def _check_dtypes(model: nn.Module) -> None:
    tensors = (tensor for tensors in (model.parameters(), model.buffers()) for tensor in tensors)
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()} - set(_DTYPES)
    if dtypes:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise UsageError(
            f"ONNX files are for models of float32 or float16, and this one has {names}: give model.float()"
        )


def _has_dynamic_groups(traced: TracedProgram) -> bool:
    """Whether the groups of a convolution depend on the batch, as where each image has its own filter (CondConv)."""
    convolutions = (node for node in traced.program.graph.nodes if str(node.target).startswith("aten.conv2d"))
    groups = (node.args[6] if len(node.args) > 6 else node.kwargs.get("groups") for node in convolutions)
    return any(isinstance(number, torch.fx.Node) for number in groups)


def _to_proto(traced: TracedProgram, name: str, opset: int) -> onnx.ModelProto:
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
            raise DDFError(f"torch.onnx cannot translate {name}: {short_reason(_root_cause(error))}") from error
    if _opset(proto) != opset:
        raise UsageError(f"opset {opset} cannot be written; the nearest is {_opset(proto)}")
    return proto


def _root_cause(error: BaseException) -> BaseException:
    """Returns the first error of a chain; torch.onnx's own say at length how to report a bug."""
    return error if error.__cause__ is None else _root_cause(error.__cause__)


def _opset(proto: onnx.ModelProto) -> int:
    return next(int(entry.version) for entry in proto.opset_import if entry.domain in _STANDARD_DOMAINS)


def _clean_metadata(proto: onnx.ModelProto, traced: TracedProgram) -> None:
    """Sets our names for sizes, and removes the stack traces and paths that torch notes for every node."""
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
    """Yields a graph, and those of the branches and loops in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner)


def _check_operators(proto: onnx.ModelProto) -> dict[str, int]:
    """Counts the operators; raises a DDFError if one is not ONNX's own."""
    import onnx

    nodes = [node for graph in _graphs(proto.graph) for node in graph.node]
    foreign = {f"{node.domain}::{node.op_type}" for node in nodes if node.domain not in _STANDARD_DOMAINS}
    foreign |= {function.name for function in proto.functions}
    foreign |= {node.op_type for node in nodes if not onnx.defs.has(node.op_type)}
    if foreign:
        raise DDFError(f"the graph uses what ONNX itself does not have: {', '.join(sorted(foreign))}")
    for index in reversed(range(len(proto.opset_import))):  # those of torch's own functions, which are inlined by now
        if proto.opset_import[index].domain not in _STANDARD_DOMAINS:
            del proto.opset_import[index]
    onnx.checker.check_model(proto)
    return dict(sorted(Counter(node.op_type for node in nodes).items()))


def _shapes(values: Sequence[onnx.ValueInfoProto]) -> dict[str, tuple[int | str, ...]]:
    return {
        value.name: tuple(size.dim_param or int(size.dim_value) for size in value.type.tensor_type.shape.dim)
        for value in values
    }


def _make_runner(content: bytes) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise DDFError(
            f"onnxruntime cannot open what was exported ({short_reason(error)}); nothing was written"
        ) from error
    names = [value.name for value in session.get_inputs()]

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Tensor]:
        given = {name: tensor.numpy() for name, tensor in zip(names, tensors_in((args, kwargs)), strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, given)]

    return run
