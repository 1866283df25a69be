"""Which kernel a call of the operator on a GPU takes, with which tile and how many blocks; and on a GPU, its results.

The tests marked ``gpu`` need one, all others do not: kernels are chosen for tensors on the CPU, and none runs.
"""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from ddf_convert import cuda, ops, reference
from ddf_convert.cuda import dispatch, tiling
from ddf_convert.cuda.kernel_spec import (
    CHUNK,
    FilterNormSpec,
    GenericSpec,
    GradFiltersSpec,
    KernelSpec,
    Q,
    WindowSpec,
    lanes_dividing,
)
from ddf_convert.cuda.tiling import Problem
from ddf_convert.reference import Geometry

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SAME = Geometry(padding=1)
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}


# --- which kernel, which tile, how many blocks ------------------------------------------------------------------------


class Launched(list[tuple[KernelSpec, int, tuple[Any, ...]]]):
    """The kernels of a call, with their blocks and arguments; none has run."""

    def variant(self, kind: type[KernelSpec]) -> Any:
        (found,) = (variant for variant, *_ in self if isinstance(variant, kind))
        return found


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    calls = Launched()
    monkeypatch.setattr(
        dispatch, "_run", lambda variant, device, blocks, arguments: calls.append((variant, blocks, arguments))
    )
    return calls


def tensors(
    shape: tuple[int, int, int, int] = (2, 8, 8, 8),
    size: int = 3,
    stride: int = 1,
    padding: int = 1,
    dilation: int = 1,
    heads: int = 1,
    dtype: str = "float32",
    layout: str = "contiguous",
) -> list[Tensor]:
    """Input, both filters, gradient of the output."""
    batch, channels, *sides = shape
    rows, columns = (ops.output_size(side, size, stride, padding, dilation) for side in sides)
    maps = [
        torch.randn(batch, count, *across).to(DTYPES[dtype], memory_format=LAYOUTS[layout])
        for count, across in ((channels, sides), (heads * size**2, (rows, columns)), (channels, (rows, columns)))
    ]
    return [maps[0], torch.randn(batch, channels, size, size).to(DTYPES[dtype]), maps[1], maps[2]]


def call(
    made: list[Tensor],
    geometry: Geometry = SAME,
    scale: float | None = None,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, ...]:
    """Forward and backward, all three gradients."""
    output = dispatch.forward(*made[:3], geometry, scale)
    return output, *dispatch.backward(made[3], *made[:3], geometry, needs)


@pytest.mark.parametrize(
    ("width", "stride", "forward", "backward", "filters"),
    # Of forward and the gradient of the input: columns of a tile, elements of a load, of a store. Of the gradients of
    # the filters: pixels of a thread, elements of a load.
    [
        (16, 1, (4, 4, 4), (4, 4, 4), (4, 4)),
        (14, 1, (2, 2, 2), (2, 2, 2), (2, 2)),
        (7, 1, (1, 1, 1), (1, 1, 1), (1, 1)),
        (16, 2, (4, 4, 4), (2, 4, 4), (4, 4)),
        (14, 2, (1, 2, 1), (1, 1, 2), (1, 2)),
        (15, 2, (4, 1, 4), (1, 4, 1), (4, 1)),
    ],
)
def test_lanes_follow_the_length_of_a_row(
    width: int, stride: int, forward: object, backward: object, filters: object, launched: Launched
) -> None:
    call(tensors((1, 8, 6, width), stride=stride), Geometry(stride, 1))
    first, second = (variant for variant, *_ in launched if isinstance(variant, WindowSpec))
    assert (first.columns, first.source_lanes, first.target_lanes) == forward
    assert (second.columns, second.source_lanes, second.target_lanes) == backward
    third = launched.variant(GradFiltersSpec)
    assert (third.lanes, third.source_lanes) == filters


@pytest.mark.parametrize(("channels", "heads", "lanes"), [(256, 1, 4), (6, 1, 2), (12, 2, 2), (12, 3, 4), (5, 1, 1)])
def test_lanes_follow_the_channels_of_a_head(channels: int, heads: int, lanes: int, launched: Launched) -> None:
    call(tensors((1, channels, 5, 7), heads=heads, layout="channels_last"))
    for variant, *_ in launched:
        if isinstance(variant, WindowSpec):
            assert (variant.channel_lanes, variant.source_lanes, variant.target_lanes) == (lanes, 1, 1)
            assert variant.whole == (channels // heads % Q == 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", range(4))
def test_views_that_are_not_aligned_are_read_an_element_at_a_time(which: int, layout: str, launched: Launched) -> None:
    made = tensors(layout=layout)
    call(made)
    assert all(variant.channel_lanes * variant.source_lanes == 4 for variant, *_ in launched[:2])
    launched.clear()
    tensor = made[which]
    if tensor.dim() and which != 1:
        moved = torch.empty(tensor.numel() + 1)[1:].as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)
    else:
        moved = torch.empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    assert moved.data_ptr() % 16 == 4
    call([*made[:which], moved, *made[which + 1 :]])
    for variant, _, arguments in launched:
        if which != 1 and any(each is moved for each in arguments if isinstance(each, Tensor)):
            wide = [variant.source_lanes]
            wide += (
                [variant.channel_lanes, variant.target_lanes] if isinstance(variant, WindowSpec) else [variant.lanes]
            )
            assert wide == [1] * len(wide)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 3, 5, 7, 9])
def test_which_calls_take_the_generic_kernels(size: int, dtype: str, layout: str, launched: Launched) -> None:
    for stride in (1, 2, 3):
        launched.clear()
        made = tensors((1, 4, 9, 8), size, stride, size // 2, dtype=dtype, layout=layout)
        call(made, Geometry(stride, size // 2))
        fast = stride < 3 and size in ((3, 5) if dtype == "float64" else (3, 5, 7))
        if fast:
            assert [type(variant) for variant, *_ in launched] == [WindowSpec, WindowSpec, GradFiltersSpec]
        else:
            functions = [variant.function for variant, *_ in launched]
            assert functions == ["forward", "grad_input", "grad_channel", "grad_spatial"]


def problem(**changes: Any) -> Problem:
    made = Problem("float32", False, False, True, 2, 16, 16, 1, 8, 8, 8, 8, 3, 1, 1, 1, 132)
    return made._replace(**changes)


def test_planes_that_32_bits_cannot_count_take_the_generic_kernels() -> None:
    side = 46340  # its square is just below 2^31
    assert problem(height=side, width=side, out_height=side, out_width=side).is_unrolled
    assert not problem(height=side + 1, width=side + 1).is_unrolled
    assert not problem(height=4, width=4, out_height=side + 1, out_width=side + 1).is_unrolled


def test_filter_norm_of_its_own_only_where_the_kernel_cannot(launched: Launched) -> None:
    call(tensors(), scale=0.3)
    assert [type(variant) for variant, *_ in launched] == [WindowSpec, WindowSpec, GradFiltersSpec]
    assert [variant.normalize for variant, *_ in launched[:2]] == [True, False]
    assert launched[0][2][4] == 0.3
    launched.clear()
    call(tensors(stride=3), Geometry(3, 1), scale=0.3)
    assert [type(variant) for variant, *_ in launched[:2]] == [FilterNormSpec, GenericSpec]
    assert launched[0][2][2] == 0.3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("needs", "kinds"),
    [
        ((True, False, False), [WindowSpec]),
        ((False, True, False), [GradFiltersSpec]),
        ((False, False, True), [GradFiltersSpec]),
        ((False, False, False), []),
    ],
)
def test_only_what_is_needed_is_launched(
    needs: tuple[bool, bool, bool], kinds: list[type], layout: str, launched: Launched
) -> None:
    _, *gradients = call(tensors(layout=layout), needs=needs)
    assert [type(variant) for variant, *_ in launched[1:]] == kinds
    assert [gradient is not None for gradient in gradients] == list(needs)
    launched.clear()
    call(tensors(stride=3), Geometry(3, 1), needs=needs)
    functions = [variant.function for variant, *_ in launched[1:]]
    wanted = zip(("grad_input", "grad_channel", "grad_spatial"), needs, strict=True)
    assert functions == [name for name, needed in wanted if needed]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize("multiprocessors", [1, 20, 132])
def test_blocks_cover_the_map_and_no_more(multiprocessors: int, size: int, layout: str) -> None:
    """The kernels work out by division what a block does: the number of blocks must be what they divide by."""
    for batch, channels, heads, side, stride in itertools.product((1, 32), (3, 64, 300), (1, 3), (1, 7, 56), (1, 2)):
        if channels % heads:
            continue
        out = ops.output_size(side, size, stride, size // 2, 1)
        made = problem(
            channels_last=layout == "channels_last", batch=batch, channels=channels, heads=heads, size=size,
            height=side, width=side, out_height=out, out_width=out, stride=stride, padding=size // 2,
            multiprocessors=multiprocessors,
        )  # fmt: skip
        per_head = channels // heads
        for gradient in (False, True):
            variant, blocks, numbers = tiling.window_launch(made, gradient, False)
            assert isinstance(variant, WindowSpec)
            *_, down, across, _, _, _, _, _, _, chunk = numbers
            target = side if gradient else out
            assert down == across == math.ceil(target / variant.stencil.step_out)
            tiles = math.ceil(down / variant.rows) * math.ceil(across / variant.columns)
            chunks = math.ceil(per_head / chunk)
            assert blocks == batch * heads * chunks * math.ceil(tiles / variant.tiles)
            assert chunk <= CHUNK[size]
            assert chunk % (variant.groups * Q) == 0
            assert variant.tile_lanes * variant.groups == variant.threads == 128
            shared = (size**2 * (CHUNK[size] + variant.rows * variant.tiles * variant.columns)) * 4
            assert shared <= 48 * 1024
        launch, spans, chunks = tiling.grad_filters_launch(made)
        assert isinstance(launch.spec, GradFiltersSpec)
        chunk, span = launch.numbers[-2:]
        groups = out * math.ceil(out / launch.spec.pixels)
        assert (spans, chunks) == (math.ceil(groups / span), math.ceil(per_head / chunk))
        assert launch.blocks == batch * heads * spans * chunks
        # A warp's threads are the channels of a chunk (channels_last), or the pixels of a span.
        assert chunk == 32 * launch.spec.lanes if made.channels_last else span <= 32 and chunk <= CHUNK[size]


def test_much_work_is_not_cut_finer_than_needed() -> None:
    small = problem(batch=1, channels=256, height=7, width=7, out_height=7, out_width=7)
    large = problem(batch=32, channels=256, height=112, width=112, out_height=112, out_width=112)
    for each, chunk in ((small, 4 * Q), (large, CHUNK[3])):
        assert tiling.window_launch(each, False, False).numbers[-1] == chunk
    assert tiling.grad_filters_launch(large).chunks == 2
    assert tiling.grad_filters_launch(small).chunks > 2


def test_generic_kernels_and_norms_get_a_thread_for_each_element(launched: Launched) -> None:
    made = tensors((3, 7, 11, 13), size=9, padding=4)
    call(made, Geometry(padding=4))
    counts = [made[0].numel(), made[0].numel(), made[1].numel(), made[2].numel()]
    for (variant, blocks, arguments), count in zip(launched, counts, strict=True):
        assert arguments[4] == count
        assert (blocks - 1) * variant.threads < count <= blocks * variant.threads
    launched.clear()
    dispatch.filter_norm(made[2], 81, 1.0)
    ((variant, blocks, arguments),) = launched
    assert arguments[3] == made[2].numel() // 81
    assert blocks == math.ceil(arguments[3] / variant.threads)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_arguments_are_what_the_kernel_is_compiled_for(dtype: str, layout: str, launched: Launched) -> None:
    sums = torch.float64 if dtype == "float64" else torch.float32
    for size, stride in ((3, 1), (5, 2), (7, 1), (3, 3)):
        made = tensors((2, 6, 9, 8), size, stride, size // 2, heads=2, dtype=dtype, layout=layout)
        call(made, Geometry(stride, size // 2), scale=0.5)
        dispatch.filter_norm_backward(made[2], made[2], size**2, 0.5)
    assert {type(variant) for variant, *_ in launched} >= {WindowSpec, GenericSpec, FilterNormSpec}
    for variant, blocks, arguments in launched:
        assert blocks > 0
        assert len(arguments) == len(variant.arguments)
        for letter, argument in zip(variant.arguments, arguments, strict=True):
            if letter in "sc":
                assert argument.dtype == (sums if letter == "c" else DTYPES[dtype])
                assert argument.is_contiguous() or argument.is_contiguous(memory_format=torch.channels_last)
            else:
                assert type(argument) is (float if letter == "f" else int)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_of_the_filters_gradients_are_added_up(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def run(variant: KernelSpec, device: object, blocks: int, arguments: tuple[Any, ...]) -> None:
        channel, spatial, *_ = arguments
        shapes.append((channel.shape, spatial.shape))
        for parts in (channel, spatial):
            parts.copy_(torch.arange(1.0, len(parts) + 1).view(-1, *[1] * (parts.dim() - 1)).expand(parts.shape))

    monkeypatch.setattr(dispatch, "_run", run)
    made = tensors((2, 40, 12, 20), heads=2, dtype="bfloat16", layout=layout)
    _, channel, spatial = dispatch.backward(made[3], *made[:3], Geometry(padding=1), (False, True, True))
    ((channel_parts, spatial_parts),) = shapes
    assert channel_parts[1:] == (2, 40, 3, 3)
    assert spatial_parts[1:] == ((2, 12, 20, 18) if layout == "channels_last" else (2, 18, 12, 20))
    for gradient, like, parts in ((channel, made[1], channel_parts[0]), (spatial, made[2], spatial_parts[0])):
        assert gradient.shape == like.shape
        assert gradient.dtype == torch.bfloat16
        assert (gradient == torch.tensor(parts * (parts + 1) / 2).bfloat16()).all()
    assert channel_parts[0] > 1
    assert spatial.is_contiguous(memory_format=LAYOUTS[layout])


def test_strided_and_expanded_tensors_are_made_dense(launched: Launched) -> None:
    input, channel, spatial, grad = tensors((2, 8, 8, 8))
    views = [input.transpose(2, 3), channel[:, :1].expand(2, 8, 3, 3), spatial.flip(0), grad[:, :, :1].expand_as(grad)]
    call(views)
    for _, _, arguments in launched:
        assert all(each.is_contiguous() for each in arguments if isinstance(each, Tensor))
    assert torch.equal(launched[0][2][1], views[0])


def test_the_same_geometry_gives_the_same_kernels(launched: Launched) -> None:
    for _ in range(2):
        call(tensors())
    first, second = ([variant for variant, *_ in calls] for calls in (launched[:3], launched[3:]))
    assert first == second
    assert [hash(variant) for variant in first] == [hash(variant) for variant in second]
    launched.clear()
    kinds = [
        {},
        {"dtype": "float16"},
        {"padding": 2},
        {"dilation": 2, "padding": 2},
        {"stride": 2},
        {"layout": "channels_last"},
    ]
    for kind in kinds:
        options = {name: value for name, value in kind.items() if name in Geometry._fields}
        call(tensors(**kind), Geometry(**{"padding": 1, **options}))
    call(tensors(), Geometry(padding=1, combine="add"))
    assert len({variant for variant, *_ in launched}) == 3 * (len(kinds) + 1)
    assert lanes_dividing(12) == 4
    assert lanes_dividing(12, 6) == 2
    assert lanes_dividing(3) == 1


# --- on a GPU ---------------------------------------------------------------------------------------------------------

TOLERANCES = {"float64": 1e-12, "float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}  # relative to the largest value


def assert_like_the_cpu(made: list[Tensor], geometry: Geometry, device: str) -> None:
    """Forward and backward of the operator on a device, beside float64 on the CPU."""
    there = [tensor.to(device).requires_grad_() for tensor in made[:3]]
    output = torch.ops.ddf_convert.ddf(*there, *geometry)
    gradients = torch.autograd.grad(output, there, made[3].to(device))
    exact = [tensor.double() for tensor in made]
    expected = [reference.forward(*exact[:3], geometry)]
    expected += reference.backward(exact[3], *exact[:3], geometry, (True, True, True))
    for ours, theirs in zip((output, *gradients), expected, strict=True):
        assert ours.device == torch.device(device)
        assert ours.dtype == made[0].dtype
        error = (ours.detach().cpu().double() - theirs).abs().max() / theirs.abs().max()
        assert error <= TOLERANCES[str(ours.dtype).removeprefix("torch.")], (float(error), geometry)
    assert ops.memory_format(output) == ops.memory_format(made[0])


@pytest.fixture
def gpu() -> str:
    device = torch.device("cuda", 0)
    assert cuda.unusable(device) is None
    return str(device)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_matches_the_cpu(dtype: str, layout: str, gpu: str) -> None:
    cases = [
        {"shape": (2, 64, 28, 28)},
        {"shape": (2, 20, 15, 13), "stride": 2, "heads": 2},
        {"shape": (1, 6, 14, 14), "dilation": 2, "padding": 2, "heads": 3},
        {"shape": (2, 32, 14, 14), "size": 5, "padding": 2},
        {"shape": (1, 12, 9, 10), "size": 7, "padding": 3, "stride": 2},
        {"shape": (1, 5, 9, 10), "stride": 3},
        {"shape": (1, 8, 12, 12), "size": 9, "padding": 4},
    ]
    for case, combine in itertools.product(cases, ("mul", "add")):
        made = tensors(**case, dtype=dtype, layout=layout)
        options = {name: value for name, value in case.items() if name in Geometry._fields}
        assert_like_the_cpu(made, Geometry(**{"padding": 1, **options}, combine=combine), gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_normalizes_filters(dtype: str, gpu: str) -> None:
    made = tensors(dtype=dtype)
    there = [tensor.to(gpu) for tensor in made[:3]]
    output = ops.ddf(*there, norm_scale=0.4, padding=1)
    exact = [tensor.double() for tensor in made]
    expected = reference.forward(*exact[:2], reference.filter_norm(exact[2], 9, 0.4), Geometry(padding=1))
    assert (output.cpu().double() - expected).abs().max() <= TOLERANCES[dtype] * expected.abs().max()


@pytest.mark.gpu
def test_gpu_uses_the_current_stream(gpu: str) -> None:
    """On a stream that has much to do first, the operator must wait for it, and nothing else."""
    made = [tensor.to(gpu) for tensor in tensors((2, 64, 56, 56))]
    expected = ops.ddf(*made[:3], padding=1)
    ops.ddf(made[0] * 3, *made[1:3], padding=1)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        large = torch.randn(4096, 4096, device=gpu)
        for _ in range(20):
            large = large @ large * 1e-3
        scaled = made[0] * (3 + 0 * large.isnan().sum())
        output = ops.ddf(scaled, *made[1:3], padding=1)
    stream.synchronize()
    torch.testing.assert_close(output, 3 * expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpu_is_captured_in_a_graph(layout: str, gpu: str) -> None:
    made = [tensor.to(gpu) for tensor in tensors((2, 64, 28, 28), layout=layout)]

    def step() -> list[Tensor]:
        output = ops.ddf(*made[:3], padding=1)
        return [output, *torch.ops.ddf_convert.ddf_backward(made[3], *made[:3], [True] * 3, 1, 1, 1, "mul")]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    made[0].copy_(torch.randn_like(made[0]))
    expected = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(captured, expected, strict=True))


@pytest.mark.gpu
def test_gpu_results_repeat(gpu: str) -> None:
    made = [tensor.to(gpu) for tensor in tensors((8, 128, 56, 56))]
    options = (1, 1, 1, "mul")
    first, *others = (torch.ops.ddf_convert.ddf_backward(made[3], *made[:3], [True] * 3, *options) for _ in range(5))
    for other in others:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, other, strict=True))


@pytest.mark.gpu
def test_gpu_works_in_a_new_thread(gpu: str) -> None:
    """Threads begin without a context of the driver."""
    made = tensors()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            assert_like_the_cpu(made, Geometry(padding=1), gpu)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors, errors


@pytest.mark.gpu
def test_gpu_that_is_not_the_current_one(gpu: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.cuda.device(0):
        assert_like_the_cpu(tensors(), Geometry(padding=1), "cuda:1")
        assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_gpu_under_compute_sanitizer(gpu: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer here")
    code = "import torch; from ddf_convert import ops; made = [torch.randn(s, device='cuda', requires_grad=True)"
    code += " for s in ((1, 6, 7, 9), (1, 6, 3, 3), (1, 9, 7, 9))]; ops.ddf(*made, padding=1).sum().backward()"
    ran = subprocess.run(
        [sanitizer, "--error-exitcode", "9", sys.executable, "-c", code], capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
