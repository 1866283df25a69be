"""The PTX of the CUDA kernels, run without a GPU by ``ptx_machine``, against float64.

The machine makes an error of what a GPU may leave unnoticed: loads and stores beyond a tensor, threads that race in
shared memory, elements that are written twice or not at all. Compiling takes nearly all the time here, so a kernel that
is compiled once runs on several shapes.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from support import ptx_machine
from support.ptx_machine import Buffer, Gpu, Kernel, PtxError, Rule
from torch import Tensor

from ddf_convert import reference

pytest.importorskip("numba_cuda", reason="needs numba-cuda, which compiles for GPUs without one")

from ddf_convert.cuda import dispatch
from ddf_convert.cuda.codegen.ptx import compile_ptx
from ddf_convert.cuda.kernel_spec import GenericSpec, KernelSpec

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# The error that the last rounding makes at most, and what sums of a few hundred terms add.
TOLERANCES = {
    torch.float64: (1e-13, 1e-12),
    torch.float32: (2e-6, 1e-5),
    torch.float16: (1.01 * 2**-11, 2e-5),
    torch.bfloat16: (1.01 * 2**-8, 2e-5),
}


class Call(NamedTuple):
    """A call of the operator."""

    input: Tensor
    channel: Tensor
    spatial: Tensor
    grad: Tensor
    geometry: reference.Geometry
    layout: torch.memory_format

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.input, self.channel, self.spatial


def example(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    layout: str,
    size: int = 3,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    heads: int = 1,
    combine: str = "mul",
    shift: int = 0,
) -> Call:
    """A call with random tensors; ``shift`` is the elements from an aligned address to the first one."""
    padding = dilation * (size // 2) if padding is None else padding
    batch, channels, *sides = shape
    height, width = ((side + 2 * padding - dilation * (size - 1) - 1) // stride + 1 for side in sides)
    draw = torch.Generator().manual_seed(sum(shape))
    format = LAYOUTS[layout]

    def make(*shape: int, format: torch.memory_format = format) -> Tensor:
        values = torch.randn(shape, generator=draw).to(dtype).contiguous(memory_format=format)
        room = torch.empty(values.numel() + shift, dtype=dtype)
        return room[shift:].as_strided(values.shape, values.stride()).copy_(values)

    return Call(
        make(*shape),
        make(batch, channels, size, size, format=torch.contiguous_format),
        make(batch, heads * size**2, height, width),
        make(batch, channels, height, width),
        reference.Geometry(stride, padding, dilation, combine),
        format,
    )


def check(made: Tensor, expected: Tensor, layout: torch.memory_format | None = None) -> None:
    relative, absolute = TOLERANCES[made.dtype]
    torch.testing.assert_close(made.double(), expected, rtol=relative, atol=absolute)
    assert layout is None or made.is_contiguous(memory_format=layout)


def check_forward(call: Call, norm_scale: float | None = None) -> None:
    input, channel, spatial = (tensor.double() for tensor in call.tensors)
    if norm_scale is not None:
        spatial = reference.filter_norm(spatial, channel.shape[-1] ** 2, norm_scale)
    made = dispatch.forward(*call.tensors, call.geometry, norm_scale)
    check(made, reference.forward(input, channel, spatial, call.geometry), call.layout)


def check_backward(call: Call, needs: tuple[bool, bool, bool] = (True, True, True)) -> None:
    made = dispatch.backward(call.grad, *call.tensors, call.geometry, needs)
    wide = [tensor.double() for tensor in (call.grad, *call.tensors)]
    expected = reference.backward(*wide, call.geometry, needs)
    for gradient, wanted, layout in zip(made, expected, (call.layout, None, call.layout), strict=True):
        assert (gradient is None) == (wanted is None)
        if gradient is not None:
            check(gradient, wanted, layout)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Kernels run in the machine, compiled for sm_90."""
    made = Gpu()
    monkeypatch.setattr(dispatch, "_run", made.run)
    return made


# --- the operator -----------------------------------------------------------------------------------------------------

# What decides on the kernels, and the shapes that the same kernels take: those of a line are compiled once.
CASES = [
    ("float32", "contiguous", {}, [(2, 8, 6, 8)]),
    ("float32", "channels_last", {}, [(2, 132, 2, 3)]),
    ("float32", "contiguous", {"stride": 2, "heads": 2, "combine": "add"}, [(1, 14, 5, 1)]),
    ("bfloat16", "channels_last", {"stride": 2, "dilation": 3, "padding": 1}, [(1, 68, 9, 8)]),
    *(
        pytest.param(*case, marks=pytest.mark.long)  # each near to some of those above
        for case in (
            ("float16", "contiguous", {"stride": 2}, [(2, 8, 5, 16)]),
            ("bfloat16", "channels_last", {"size": 7}, [(1, 4, 3, 5)]),
            ("float32", "contiguous", {}, [(1, 132, 3, 4), (3, 4, 1, 36)]),
            ("float32", "channels_last", {}, [(1, 128, 9, 8)]),
            ("float32", "contiguous", {"stride": 2, "heads": 2, "combine": "add"}, [(2, 6, 7, 9)]),
            ("float32", "channels_last", {"stride": 2, "heads": 2, "combine": "add"}, [(2, 6, 7, 9), (1, 14, 5, 1)]),
            ("float32", "contiguous", {"size": 5, "combine": "add"}, [(1, 5, 6, 7)]),
            ("float16", "contiguous", {"stride": 2}, [(1, 8, 8, 8)]),
            ("float16", "contiguous", {"dilation": 2, "combine": "add"}, [(2, 8, 6, 8), (1, 16, 3, 4)]),
            ("float16", "channels_last", {"dilation": 2, "combine": "add"}, [(1, 24, 7, 5)]),
            ("bfloat16", "contiguous", {"heads": 2}, [(1, 8, 5, 8), (2, 8, 2, 4)]),
            ("bfloat16", "channels_last", {"heads": 3, "combine": "add"}, [(2, 18, 4, 5)]),
            ("float64", "contiguous", {"padding": 0, "dilation": 2}, [(2, 8, 7, 8)]),
            ("float64", "channels_last", {}, [(1, 6, 5, 4), (2, 6, 3, 3)]),
        )
    ),
]


def name(value: Any) -> str:
    if isinstance(value, dict):
        return "_".join(f"{key}{number}" for key, number in value.items()) or "plain3x3"
    return f"{len(value)}shapes" if isinstance(value, list) else str(value)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "layout", "options", "shapes"), CASES, ids=name)
def test_operator_and_its_gradients(
    dtype: str, layout: str, options: dict[str, Any], shapes: list[Any], gpu: Gpu
) -> None:
    only_forward = options.get("size") == 7  # its kernels take long to compile: the long 5x5 has the others
    for shape in shapes:
        call = example(shape, getattr(torch, dtype), layout, **options)
        check_forward(call)
        if not only_forward:
            check_backward(call)
    assert {variant.kernel for variant in gpu.variants} == {"window", *(["grad_filters"] * (not only_forward))}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float32, "contiguous"), pytest.param(torch.bfloat16, "channels_last", marks=pytest.mark.long)],
)
def test_tensors_that_are_not_aligned_are_read_in_single_elements(dtype: torch.dtype, layout: str, gpu: Gpu) -> None:
    call = example((2, 8, 4, 8), dtype, layout, shift=1)
    assert call.input.data_ptr() % 16
    check_forward(call)
    loads = [instruction.opcode for instruction in gpu.executed if instruction.opcode.startswith("ld.global")]
    assert loads
    assert not any(".v2" in opcode or ".v4" in opcode for opcode in loads)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "layout"), [(torch.float32, "contiguous"), (torch.bfloat16, "channels_last")])
def test_spatial_filter_is_normalized_on_its_way_in(dtype: torch.dtype, layout: str, gpu: Gpu) -> None:
    for shape in ((2, 8, 6, 8), (1, 16, 3, 4)):
        call = example(shape, dtype, layout, heads=2)
        call.spatial[:, :9] = 3.0  # one head's taps are all equal: they become 0, whatever is lost by rounding
        check_forward(call, norm_scale=1.5)
    assert len(gpu.variants) == 2  # no kernel but that of the operator


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "options", "shape"),
    [
        (torch.float32, {"size": 9}, (1, 3, 6, 7)),
        (torch.float32, {"size": 1, "stride": 3, "heads": 2}, (2, 4, 7, 5)),
        (torch.bfloat16, {"size": 9, "combine": "add"}, (1, 2, 5, 6)),
        (torch.float16, {"size": 3, "stride": 3, "padding": 2}, (2, 3, 7, 8)),
        (torch.float64, {"size": 3, "stride": 4, "dilation": 2, "heads": 2}, (1, 4, 9, 9)),
    ],
    ids=str,
)
def test_generic_kernels(
    dtype: torch.dtype, options: dict[str, Any], shape: tuple[int, ...], layout: str, gpu: Gpu
) -> None:
    call = example(shape, dtype, layout, **options)
    check_forward(call)
    for needs in ((True, True, True), (False, True, False), (True, False, True)):
        check_backward(call, needs)
    assert {type(variant) for variant in gpu.variants} == {GenericSpec}
    if dtype == torch.float32 and options["size"] > 1:
        check_forward(call, norm_scale=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_filter_norm_and_its_gradient(dtype: torch.dtype, gpu: Gpu) -> None:
    draw = torch.Generator().manual_seed(0)
    for layout in LAYOUTS.values():
        for shape, taps in (((2, 18, 5, 7), 9), ((1, 25, 13, 11), 25)):
            filters, grad = (torch.randn(shape, generator=draw).to(dtype, memory_format=layout) for _ in range(2))
            made = dispatch.filter_norm(filters, taps, 0.7)
            check(made, reference.filter_norm(filters.double(), taps, 0.7), layout)
            made = dispatch.filter_norm_backward(grad, filters, taps, 0.7)
            check(made, reference.filter_norm_backward(grad.double(), filters.double(), taps, 0.7), layout)
    constant = torch.full((1, 9, 2, 2), 3.0, dtype=dtype)
    assert not dispatch.filter_norm(constant, 9, 1.0).any()
    assert dispatch.filter_norm_backward(constant, constant, 9, 1.0).isfinite().all()


@pytest.mark.slow
def test_machine_notices_every_barrier_that_is_missing(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    call = example((1, 132, 16, 16), torch.float32, "contiguous")
    only_filters = False, True, True
    check_backward(call, only_filters)
    (variant,) = gpu.variants
    text = compile_ptx(variant, gpu.capability)
    barriers = list(re.finditer(r"bar\.(warp\.)?sync[^;]*;", text))
    assert len(barriers) > 4
    for barrier in [*barriers[:4], barriers[-1]]:
        without = Kernel(text[: barrier.start()] + text[barrier.end() :])
        monkeypatch.setattr(ptx_machine, "compiled", lambda *_, without=without: without)
        with pytest.raises(PtxError, match="with no barrier between"):
            check_backward(call, only_filters)


# --- rounding to halves -----------------------------------------------------------------------------------------------


def products(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pairs of halves whose products, exact in float32, are all that rounding can meet."""
    inf, nan = float("inf"), float("nan")
    limit = torch.finfo(dtype)
    steps = 1 + torch.arange(64) * 2 * limit.eps  # times 1.5 and 1.25: ties, to even and to odd, and less than ties
    ends = torch.tensor([inf, -inf, nan, 0.0, -0.0, limit.max, -limit.max, limit.tiny, limit.smallest_normal / 2])
    one = torch.tensor([1.0, -1.0, 1.5, 1.25, 0.75, 1 + limit.eps, limit.smallest_normal, 2.0, 0.0])
    first, second = torch.cartesian_prod(torch.cat([steps, ends]), one).unbind(1)
    # Half of a step above the largest number, and just less than that: infinity, and the largest number.
    if dtype == torch.float16:
        edges = [(1008.0, 65.0), (1007.5, 65.0)]
    else:
        edges = [(1.75 * 2.0**100, 73 / 64 * 2.0**27), (1.9921875 * 2.0**100, 1.0 * 2.0**27)]
    a, b = torch.tensor(edges).unbind(1)
    return torch.cat([first, a, -a]).to(dtype), torch.cat([second, b, b]).to(dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "capability"), [(torch.float16, (7, 5)), (torch.bfloat16, (7, 5)), (torch.bfloat16, (8, 0))], ids=str
)
def test_halves_are_rounded_as_torch_rounds(
    dtype: torch.dtype, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_run", Gpu(capability).run)
    first, second = products(dtype)
    count = first.numel()
    input, channel = first.view(1, count, 1, 1), second.view(1, count, 1, 1)
    spatial = torch.ones(1, 1, 1, 1, dtype=dtype)
    made = dispatch.forward(input, channel, spatial, reference.Geometry()).flatten()
    expected = (first.float() * second.float() + 0).to(dtype)
    assert expected.isnan().any()
    assert (expected.isinf() & input.flatten().isfinite()).any()
    torch.testing.assert_close(made, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_for_processors_without_bfloat16(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu((7, 5))
    monkeypatch.setattr(dispatch, "_run", gpu.run)
    check_forward(example((2, 8, 4, 8), torch.bfloat16, layout))
    assert not any("bf16" in instruction.opcode for instruction in gpu.executed)


# --- tensors of more than 2^31 elements -------------------------------------------------------------------------------


class Far:
    """A GPU that runs one block of a launch on tensors too large for memory: their elements follow a rule.

    Attributes:
        block: Counted from the end; the last is -1.
    """

    def __init__(self, block: int = -1) -> None:
        self.block = block
        self.gpu = Gpu()
        self.written: list[Rule] = []

    def run(self, variant: KernelSpec, device: torch.device, blocks: int, arguments: tuple[Any, ...]) -> None:
        buffers: dict[int, Buffer] = {}
        for number, each in enumerate(arguments):
            if isinstance(each, Tensor):
                buffers[number] = Rule(ptx_machine.address(number, each), each.numel(), each.element_size(), rule(each))
        self.gpu.launch(variant, [blocks + self.block], blocks, arguments, buffers)
        self.gpu.variants.append(variant)
        self.written = [buffer for buffer in buffers.values() if isinstance(buffer, Rule) and buffer.stored]

    def last(self, number: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The places that the block wrote in an output, and the values."""
        places, values = zip(*self.written[number].stored, strict=True)
        words = torch.cat([torch.from_numpy(each.view(f"i{each.itemsize}")) for each in values])
        return torch.cat([torch.from_numpy(each) for each in places]), words.view(dtype)


def element(shape: tuple[int, ...], places: Tensor) -> Tensor:
    """Elements of a tensor of this shape, by their places in memory: small numbers that halves hold exactly."""
    return ((places * 40503 + len(shape) + shape[1]) % 61 - 30).double() / 8


def rule(tensor: Tensor) -> Any:
    shape, dtype = tuple(tensor.shape), tensor.dtype
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return lambda places: element(shape, torch.from_numpy(places)).to(dtype).view(words).numpy()


def at_the_end(tensor: Tensor, channels: int) -> Tensor:
    """The places in memory of the last channels of the last image, (1, channels, H, W)."""
    batch, all_channels, height, width = tensor.shape
    image = torch.arange((batch - 1) * all_channels * height * width, tensor.numel())
    if tensor.is_contiguous():
        places = image.view(1, all_channels, height, width)
    else:
        places = image.view(1, height, width, all_channels).permute(0, 3, 1, 2)
    return places[:, all_channels - channels :]


def check_places(far: Far, number: int, places: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """An output of the block is exactly these places, with these values."""
    assert places.min() > 2**31 or places.numel() < 2**31
    found, values = far.last(number, dtype)
    order, wanted = found.argsort(), places.flatten().argsort()
    assert torch.equal(found[order], places.flatten()[wanted])
    check(values[order], expected.flatten()[wanted])


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "dtype"), [("contiguous", torch.float32), ("channels_last", torch.bfloat16)])
def test_beyond_two_billion_elements(layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    far = Far()
    monkeypatch.setattr(dispatch, "_run", far.run)
    batch, channels, side, chunk = 8193, 4096, 8, 128  # the last block of each kernel has the last 128 channels
    format = LAYOUTS[layout]

    def make(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=format)

    input, grad = make(batch, channels, side, side), make(batch, channels, side, side)
    spatial, channel = make(batch, 9, side, side), make(batch, channels, 3, 3).contiguous()
    places = at_the_end(input, chunk)
    assert places.min() > 2**31

    def values(tensor: Tensor, channels: int) -> Tensor:
        return element(tuple(tensor.shape), at_the_end(tensor, channels))

    tensors = values(input, chunk), values(channel, chunk), values(spatial, 9)
    geometry = reference.Geometry(padding=1)
    dispatch.forward(input, channel, spatial, geometry)
    check_places(far, 0, places, reference.forward(*tensors, geometry), dtype)

    grads = reference.backward(values(grad, chunk), *tensors, geometry, (True, True, True))
    assert grads[0] is not None
    assert grads[1] is not None
    assert grads[2] is not None
    dispatch.backward(grad, input, channel, spatial, geometry, (True, False, False))
    check_places(far, 0, places, grads[0], dtype)
    dispatch.backward(grad, input, channel, spatial, geometry, (False, True, True))
    # The parts of the filters' gradients are float32, and those of the last block stand last.
    in_order = grads[2] if layout == "contiguous" else grads[2].permute(0, 2, 3, 1)
    for number, expected in enumerate((grads[1], in_order)):
        count = far.written[number].count
        check_places(far, number, torch.arange(count - expected.numel(), count), expected, torch.float32)


def test_generic_kernel_beyond_two_billion_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    far = Far()
    monkeypatch.setattr(dispatch, "_run", far.run)
    input = torch.empty(2049, 4096, 16, 16, dtype=torch.float16, device="meta")
    channel = torch.empty(2049, 4096, 1, 1, dtype=torch.float16, device="meta")
    spatial = torch.empty(2049, 1, 16, 16, dtype=torch.float16, device="meta")
    dispatch.forward(input, channel, spatial, reference.Geometry(combine="add"))
    places = at_the_end(input, 1).flatten()[-128:]  # the elements of the last block
    assert places.min() > 2**31
    weight = element((2049, 4096, 1, 1), at_the_end(channel, 1)) + element((2049, 1, 16, 16), at_the_end(spatial, 1))
    expected = weight.flatten()[-128:] * element(tuple(input.shape), places)
    check_places(far, 0, places, expected, torch.float16)


# --- what a forward pass costs ----------------------------------------------------------------------------------------


def family(opcode: str) -> str:
    base, *modifiers = opcode.split(".")
    if base in ("ld", "st"):
        return f"{base}.{modifiers[0]}"
    if base in ("fma", "mul", "add", "sub", "div", "sqrt") and modifiers[-1] in ("f32", "f64"):
        return "float"
    return {"mov": "move", "setp": "predicate", "selp": "predicate"}.get(base, "integer and the rest")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("layout", "loads"), [("contiguous", 1.5), ("channels_last", 0.75)])
def test_loads_and_stores_of_inner_tiles(
    dtype: torch.dtype, layout: str, loads: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``pytest -s``: the instructions of the 3x3 forward pass, for each element of the output."""
    far = Far(block=-299)  # whose tiles are all away from the edges of the map
    monkeypatch.setattr(dispatch, "_run", far.run)
    shape, format = (4, 256, 224, 224), LAYOUTS[layout]
    input = torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=format)
    spatial = torch.empty(4, 9, 224, 224, dtype=dtype, device="meta").contiguous(memory_format=format)
    channel = torch.empty(4, 256, 3, 3, dtype=dtype, device="meta")
    dispatch.forward(input, channel, spatial, reference.Geometry(padding=1))
    places, _ = far.last(0, dtype)
    (variant,) = far.gpu.variants
    instructions = ptx_machine.compiled(variant, far.gpu.capability).instructions
    barrier = next(each.line for each in instructions if each.opcode == "bar.sync")
    for part, within in (("filters", (0, barrier)), ("tiles", (barrier + 1, 10**9))):
        counts: Counter[str] = Counter()
        for instruction, threads in far.gpu.executed.items():
            if within[0] <= instruction.line <= within[1]:
                counts[family(instruction.opcode)] += threads
        each = {name: count / places.numel() for name, count in sorted(counts.items())}
        print(f"\n{variant.name}, {part}:", ", ".join(f"{name} {count:.2f}" for name, count in each.items()))
    assert each["ld.global"] <= loads
    assert each["st.global"] == 0.25  # four elements each
