"""Exported models: what is in the files, that they calculate what the model does, and what is refused.

Networks are tiny: torch.export and torch.onnx take a second or two for every DDF layer. benchmarks/export_check.py does
the same for whole families.
"""

import ast
import collections
import dataclasses
import itertools
import json
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from support import networks
from support.paths import TESTS
from support.tolerances import far
from torch import nn

import ddf_convert as ddf
from ddf_convert import cli, export, reference
from ddf_convert.errors import DDFError, UsageError
from ddf_convert.export import checking, onnx_file, onnx_operators, torch_file
from ddf_convert.export.sizes import rename
from ddf_convert.layers import DDF2d, DDFUp2d

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Everything(nn.Module):
    """SAME padding with a stride, odd sizes on the way down, and a map doubled to a skip's size."""

    def __init__(self, up=True):
        super().__init__()
        self.stem = timm.layers.Conv2dSame(3, 8, 3, stride=2)
        self.down = DDF2d(8, stride=2, padding="same", affine=True, bias=True)
        self.up = DDFUp2d(8, affine=True, padding_mode="replicate", bias=True) if up else None
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, image):
        skip = self.stem(image)
        x = self.down(skip).relu()
        double = self.up or (lambda x, output_size: F.interpolate(x, output_size))
        x = double(x, output_size=skip.shape[-2:])
        return {"map": self.head(torch.cat([skip, x], 1)), "pooled": x.mean((2, 3))}


def image(size=20, batch=1, channels=3):
    return torch.randn(batch, channels, size, size + 4)


def ran(file, *inputs):
    session = onnxruntime.InferenceSession(file)
    names = [value.name for value in session.get_inputs()]
    given = dict(zip(names, (tensor.numpy() for tensor in inputs), strict=True))
    return [torch.from_numpy(array) for array in session.run(None, given)]


assert_equal = partial(torch.testing.assert_close, atol=0, rtol=0)


def assert_near(ours, theirs):
    torch.testing.assert_close(ours, theirs, **far(torch.float32, theirs))


def loaded(file):
    return torch.export.load(file).module()


# --- the files ---


@pytest.mark.slow
def test_onnx_has_standard_operators_and_runs_at_any_size(tmp_path):
    model, file = Everything().train(), tmp_path / "model.onnx"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = export.to_onnx(model, image(), file)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    proto = onnx.load(file)
    assert {node.domain for node in proto.graph.node} == {""}
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", done.opset)] == [("", 18)]
    assert not proto.functions
    assert str(Path.home()).encode() not in file.read_bytes()  # torch notes source files of this machine
    assert b"test_export" not in file.read_bytes()
    assert sum(done.operators.values()) == len(proto.graph.node)
    assert done.inputs == {"image": ("batch", 3, "height", "width")}
    assert list(done.outputs) == ["map", "pooled"]
    assert done.outputs["pooled"] == ("batch", 8)
    assert {size.name: size.fixed for size in done.sizes} == dict.fromkeys(("batch", "height", "width"))
    assert [next(iter(check.inputs.values()))[0] for check in done.checks] == [1, 3]
    assert done.difference <= 1e-5
    model.eval()
    for size, batch in ((20, 2), (21, 1), (31, 3), (50, 1)):  # others than the export itself has checked
        inputs = image(size, batch)
        assert_near(ran(file, inputs), list(model(inputs).values()))


@pytest.mark.slow
def test_torch_export_needs_only_torch_unless_operators_are_kept(tmp_path):
    """In a process that has no ddf_convert, at sizes that the export did not check."""
    model, inputs = Everything(up=False).eval(), image(31, 3)
    done = export.to_torch_export(model, image(), tmp_path / "model.pt2")
    assert all(name.startswith("aten.") for name in done.operators)
    assert done.inputs == {"image": ("batch", 3, "height", "width")}
    kept = export.to_torch_export(model, image(), tmp_path / "kept.pt2", keep_operator=True)
    assert {name for name in kept.operators if not name.startswith("aten.")} == {
        "ddf_convert.ddf.default",
        "ddf_convert.filter_norm.default",
    }
    assert_equal(loaded(tmp_path / "kept.pt2")(inputs), model(inputs))  # the same kernels
    torch.save(inputs, tmp_path / "inputs.pt")
    script = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ddf_convert", "timm", "numba"):
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import torch
torch.save(torch.export.load("model.pt2").module()(torch.load("inputs.pt")), "outputs.pt")
try:
    torch.export.load("kept.pt2")
except Exception as error:
    print(type(error).__name__)
"""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], check=True, cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.stdout.endswith("Error\n")
    assert_near(torch.load(tmp_path / "outputs.pt"), model(inputs))


# --- the operators, without a model around them ---

OPERATORS = {
    "mul": {},
    "add": {"combine": "add"},
    "5x5": {"size": 5},
    "stride and dilation": {"stride": 2, "dilation": 2, "padding": 2},
    "no padding": {"padding": 0},
    "heads": {"heads": 2},
    "up, heads": {"factor": 2, "heads": 2},
    "normalized": {"heads": 2},
}


class Calls(nn.Module):
    """A call of the operator for each of some cases."""

    def __init__(self, cases):
        super().__init__()
        self.cases = cases

    def forward(self, tensors):
        outputs = []
        for (name, options), each in zip(self.cases.items(), tensors, strict=True):
            outputs.append(ddf.ops.ddf(*each, **options, norm_scale=0.5 if "normalized" in name else None))
        return outputs


def arguments(size=3, heads=1, factor=1, stride=1, dilation=1, padding=None, combine="mul"):
    """Options of the operator, and tensors that fit."""
    padding = dilation * (size - 1) // 2 if padding is None else padding
    rows, columns = ((length + 2 * padding - dilation * (size - 1) - 1) // stride + 1 for length in (9, 12))
    shapes = (2, 4, 9, 12), (2, factor**2 * 4, size, size), (2, factor**2 * heads * size**2, rows, columns)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "combine": combine, "upscale_factor": factor}
    return options, [torch.randn(shape) for shape in shapes]


@pytest.mark.slow
def test_translations_compute_what_the_operators_do(tmp_path):
    made = {name: arguments(**case) for name, case in OPERATORS.items()}
    tensors = [tensors for _, tensors in made.values()]
    model = Calls({name: options for name, (options, _) in made.items()})
    export.to_onnx(model, (tensors,), tmp_path / "calls.onnx", check=False, dynamic=False)
    outputs = ran(tmp_path / "calls.onnx", *itertools.chain(*tensors))
    assert len(outputs) == len(OPERATORS)
    assert_near(outputs, model(tensors))
    plain = torch_file.decompositions()
    for name, (options, each) in made.items():
        scale = 0.5 if "normalized" in name else None
        decomposed = plain[torch.ops.ddf_convert.ddf.default](*each, *options.values(), scale)
        assert_near(decomposed, outputs[list(made).index(name)])


# --- what sizes may be ---


class Halves(nn.Module):
    """A skip connection that fits even sizes alone."""

    def forward(self, x):
        return torch.cat([x, F.interpolate(F.max_pool2d(x, 2), scale_factor=2.0)], 1)


class Pinned(nn.Module):
    """A position for every pixel."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 3, 8, 8))

    def forward(self, x):
        return x + self.positions


class Uneven(nn.Module):
    """Does something else for every fifth height."""

    def forward(self, x):
        return x * 2 if x.shape[2] % 5 < 4 else x


class Guided(nn.Module):
    """An image of three times the size, and a flag."""

    def forward(self, small, *, large, scaled=True):
        doubled = F.interpolate(small, scale_factor=3.0)
        return (doubled + large, [small]) if scaled else small


class OfOne(nn.Module):
    """Takes one image at a time."""

    def forward(self, x):
        return x.view(3, -1) * 2


ONE = torch.rand(1, 3, 8, 8)
SIZES = {
    "even": (Halves(), ONE, {"batch": "any", "height": "multiples of 2, 4 or more", "width": "multiples of 2, 4"}),
    "pinned": (Pinned(), ONE, {"batch": "any", "height": "fixed at 8: the model refuses 16", "width": "fixed at 8"}),
    "gaps": (
        Uneven(),
        ONE,
        {"batch": "any", "height": "fixed at 8: its forward calculates differently", "width": "any"},
    ),
    "two inputs": (
        Guided(),
        {"small": ONE, "large": torch.rand(1, 3, 24, 24)},
        {"batch": "any", "height": "2 or more", "width": "2 or more"},
    ),
    "one image": (OfOne(), ONE, {"batch": "fixed at 1: the model refuses a batch of 2", "height": "", "width": ""}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_allowed_sizes_are_reported(name, tmp_path):
    model, example, expected = SIZES[name]
    if name == "one image":  # view(3, -1) takes any batch for wider rows
        model.forward = lambda x: OfOne.forward(model, x) if len(x) == 1 else x.view(3, 64)
    done = export.to_torch_export(model, example, tmp_path / "model.pt2")
    assert [size.name for size in done.sizes] == list(expected)
    for size in done.sizes:
        assert str(size).startswith(expected[size.name])
    if name == "two inputs":
        assert done.inputs == {"small": ("batch", 3, "height", "width"), "large": ("batch", 3, "3*height", "3*width")}
        assert list(done.outputs) == ["output_0", "output_1_0"]


class PerImage(nn.Module):
    """A filter of its own for every image."""

    def forward(self, x):
        filters = x.mean((2, 3)).repeat_interleave(9, 1).view(-1, 1, 3, 3)
        return F.conv2d(x.flatten(0, 1)[None], filters, groups=filters.shape[0], padding=1).view(x.shape)


@pytest.mark.slow
def test_a_group_for_every_image_fixes_the_batch_in_onnx(tmp_path):
    done = export.to_onnx(PerImage(), ONE, tmp_path / "model.onnx")
    assert {size.name: size.fixed is None for size in done.sizes} == {"batch": False, "height": True, "width": True}
    assert done.inputs == {"x": (1, 3, "height", "width")}
    assert "a convolution has groups for every image" in str(done.sizes[0])


def test_static_export_fixes_all_sizes(tmp_path):
    done = export.to_onnx(networks.Normalized(), image(channels=4), tmp_path / "model.onnx", dynamic=False)
    assert done.inputs == {"image": (1, 4, 20, 24)}
    assert {str(size) for size in done.sizes} == {f"fixed at {size}: as asked" for size in (1, 20, 24)}
    assert len(done.checks) == 1


def test_rename_replaces_whole_symbols():
    assert rename("2*s1 + s11 + (s1 // 2)", {"s1": "height"}) == "2*height + s11 + (height // 2)"


# --- what goes wrong ---


def wrong_operator(filters, taps, scale):
    return reference.filter_norm(filters, taps, scale) * 1.01


@pytest.mark.slow
def test_a_difference_is_an_error_and_leaves_the_old_file(tmp_path, monkeypatch):
    for name in ("model.onnx", "model.pt2"):
        (tmp_path / name).write_text("old")
    monkeypatch.setattr(onnx_operators, "EPSILON", 0.5)
    with pytest.raises(DDFError, match=r"onnxruntime differs from PyTorch by .* nothing was written"):
        export.to_onnx(networks.Normalized(), image(channels=4), tmp_path / "model.onnx")
    table = torch_file.decompositions()
    monkeypatch.setattr(
        torch_file, "decompositions", lambda: {**table, torch.ops.ddf_convert.filter_norm.default: wrong_operator}
    )
    with pytest.raises(DDFError, match=r"the exported program differs from PyTorch by .* nothing was written"):
        export.to_torch_export(networks.Normalized(), image(channels=4), tmp_path / "model.pt2")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"model.onnx": "old", "model.pt2": "old"}


@pytest.mark.slow
def test_differences_from_rounding_are_accepted(tmp_path, monkeypatch):
    monkeypatch.setattr(checking, "_TOLERANCE", 0.0)
    done = export.to_onnx(networks.Normalized(), image(channels=4), tmp_path / "model.onnx")
    assert max(check.rounding or 0 for check in done.checks) > 0
    assert all(check.difference <= 4 * (check.rounding or 0) for check in done.checks)


class LooksAtValues(nn.Module):
    def forward(self, x):
        return x * 2 if x.mean() > 0 else x


REFUSED = {
    "float64": (
        partial(export.to_onnx, networks.Normalized().double()),
        UsageError,
        "float32 or float16, and this one has float64",
    ),
    "bfloat16": (
        partial(export.to_onnx, networks.Normalized().bfloat16()),
        UsageError,
        "has bfloat16: give model.float()",
    ),
    "opset": (
        partial(export.to_onnx, networks.Normalized(), opset=17),
        UsageError,
        "opset 17 is too old: torch writes 18 or later",
    ),
    "example": (partial(export.to_onnx, networks.conv()), UsageError, "does not run on an example input of 4x20x24"),
    "values": (partial(export.to_onnx, LooksAtValues()), DDFError, "torch.export cannot follow the forward of Looks"),
    "folder": (
        lambda *given: export.to_onnx(networks.Normalized(), given[0], given[1].parent),
        UsageError,
        "is a folder",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_one_line_and_write_nothing(name, tmp_path):
    write, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words) as caught:
        write(image(channels=4), tmp_path / "model.onnx")
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named_with_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "_PACKAGES", ("onnx", "no_such_runtime"))
    with pytest.raises(UsageError, match=r"needs no_such_runtime: pip install 'ddf-convert\[export\]'"):
        export.to_onnx(networks.Normalized(), image(), tmp_path / "model.onnx")


def test_onnx_packages_are_imported_lazily():
    for file in Path(export.__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_text()).body:  # not what stands in functions, or under TYPE_CHECKING
            named = [alias.name for alias in getattr(node, "names", ())] if isinstance(node, ast.Import) else []
            named += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in named} & {"onnx", "onnxscript", "onnxruntime", "onnx_ir"}


# --- the command ---


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    (tmp_path / "net_for_export.py").write_text(
        "import torch\nfrom support.networks import Normalized\n\n\n"
        "def made():\n    return Normalized(), torch.randn(1, 4, 20, 24)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(TESTS)])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments):
        code = cli.run(["export", *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    yield call
    sys.modules.pop("net_for_export", None)


@pytest.mark.slow
def test_command_writes_both_formats(run, tmp_path):
    code, out, _ = run("net_for_export:made", "-o", "model.onnx", "--json")
    found = json.loads(out)
    assert (code, found["format"], found["opset"], found["file"]) == (0, "onnx", 18, "model.onnx")
    assert found["inputs"] == {"image": ["batch", 4, "height", "width"]}
    assert found["difference"] == max(check["difference"] for check in found["checks"]) < 1e-5
    content = (tmp_path / "model.onnx").read_bytes()
    assert found["bytes"] == len(content)
    assert run("net_for_export:made", "-o", "model.onnx") == (
        2,
        "",
        "error: --output model.onnx: exists already: --overwrite replaces it\n",
    )
    code, out, _ = run("net_for_export:made", "-o", "model.onnx", "--overwrite", "--static", "--format", "torch-export")
    assert code == 0
    assert "fixed at 20: as asked" in out
    assert "Written: model.onnx (" in out
    assert "import torch; model = torch.export.load('model.onnx').module()" in out
    assert max(map(len, out.splitlines()[:-2])) <= 80
    assert (tmp_path / "model.onnx").read_bytes() != content


COMPLAINTS = {
    ("-o", "model"): "give --format onnx or torch-export, or a name that ends in .onnx or .pt2",
    ("-o", "model.onnx", "--keep-operator"): "--keep-operator is for torch-export",
    ("-o", "model.pt2", "--opset", "18"): "--opset is for ONNX",
    ("-o", "model.onnx", "--input-size", "3", "0", "8"): "every number must be at least 1",
    ("-o", "no/such/model.onnx"): "there is no folder no/such",
    ("-o", "model.onnx", "--input-size", "9", "20", "20"): "does not run on an example input of 9x20x20",
}


@pytest.mark.parametrize("arguments", COMPLAINTS, ids=" ".join)
def test_command_refuses_what_does_not_fit(arguments, run, tmp_path):
    code, out, err = run("net_for_export:made", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert COMPLAINTS[arguments] in err
    assert len(err.splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["net_for_export.py"]


# --- families: more of the same ---


@dataclasses.dataclass
class Found:
    logits: torch.Tensor
    label: str = "cat"


Pair = collections.namedtuple("Pair", "map count")


class Returns(nn.Module):
    """A convolution whose output goes through a function."""

    def __init__(self, function):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.function = function

    def forward(self, image):
        return self.function(self.conv(image))


# What a forward returns, the names of its tensors, and what is left out.
RETURNS = {
    "a size": (lambda y: (y, y.shape[0]), ["output_0"], ["output_1 (int)"]),
    "what comes before": (lambda y: (1.5 * y.shape[2], y), ["output_1"], ["output_0 (float)"]),
    "a dict": (
        lambda y: {"y": y, "label": "cat", "score": 0.5, "none": None, "sure": True},
        ["y"],
        ["label (str)", "score (float)", "sure (bool)"],
    ),
    "nested": (lambda y: {"a": [y, {"b": (y + 1, 3)}]}, ["a_0", "a_1_b_0"], ["a_1_b_1 (int)"]),
    "a dataclass": (Found, ["logits"], ["label (str)"]),
    "a named tuple": (lambda y: Pair(y, 2), ["map"], ["count (int)"]),
    "a namespace": (lambda y: types.SimpleNamespace(y=y), ["y"], []),
    "odd objects": (
        lambda y: (y, y.shape, y.dtype, {1}),
        ["output_0"],
        ["output_1 (Size)", "output_2 (dtype)", "output_3 (set)"],
    ),
}


ALSO = {"what comes before", "a namespace"}  # each near to one that stays


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name in ALSO else []) for name in RETURNS]
)
def test_outputs_that_are_not_tensors_are_left_out_with_a_warning(name, tmp_path, caplog):
    function, names, left_out = RETURNS[name]
    model = Returns(function).eval()
    for write, file in ((export.to_onnx, "model.onnx"), (export.to_torch_export, "model.pt2")):
        caplog.clear()
        done = write(model, image(8), tmp_path / file)
        assert list(done.outputs) == names
        assert done.left_out == tuple(left_out)
        assert done.checks
        assert all(check.largest > 0 for check in done.checks)  # the tensors are compared nevertheless
        notes = [message for message in caplog.messages if "left out" in message]
        assert len(notes) == bool(left_out)
        assert all(words in notes[0] for words in left_out)
    assert type(model) is Returns  # and what it returns is as it was
    assert type(model(image(8))) is type(function(torch.zeros(1, 4, 8, 8)))


def test_a_model_that_returns_no_tensor_is_refused(tmp_path):
    for write, file in ((export.to_onnx, "model.onnx"), (export.to_torch_export, "model.pt2")):
        with pytest.raises(UsageError, match=r"Returns returns no tensor: n \(int\)"):
            write(Returns(lambda y: {"n": y.dim()}), image(8), tmp_path / file)
        assert not (tmp_path / file).exists()


def functional():
    return ddf.convert(networks.Functions(), example_input=image(), functional=True)


def half():
    return networks.Normalized().half()


FAMILIES = {
    "transposed": lambda: networks.Up(nn.ConvTranspose2d(8, 4, 4, 2, 1)),
    "pixel shuffle": networks.Shuffles,
    "F.interpolate": networks.UNet,
    "pyramid": networks.Pyramid,
}


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_upsampling_of_all_kinds(name, tmp_path):
    model = ddf.convert(FAMILIES[name](), example_input=image(24), upsample=True, allow_growth=True)
    for write, file in ((export.to_onnx, "model.onnx"), (export.to_torch_export, "model.pt2")):
        done = write(model, image(24), tmp_path / file)
        assert done.difference <= 1e-5
        assert [size.fixed for size in done.sizes] == [None] * 3
        assert len(done.checks) == 2


@pytest.mark.long
def test_a_graph_module_and_half_numbers(tmp_path):
    assert export.to_onnx(functional(), image(24), tmp_path / "model.onnx").difference < 1e-4
    done = export.to_onnx(half(), image(channels=4).half(), tmp_path / "model.onnx")
    assert (done.tolerance, len(done.checks)) == (1e-2, 2)
    assert onnx.load(tmp_path / "model.onnx").graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    done = export.to_torch_export(
        networks.Normalized().bfloat16(), image(channels=4).bfloat16(), tmp_path / "model.pt2"
    )
    assert len(done.checks) == 2


@pytest.mark.long
@pytest.mark.parametrize("opset", [20, 23])
def test_other_opsets(opset, tmp_path):
    assert export.to_onnx(networks.Normalized(), image(channels=4), tmp_path / "model.onnx", opset=opset).opset == opset
