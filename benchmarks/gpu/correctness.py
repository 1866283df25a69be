"""Compares every kernel with the reference in float64, on the same device; compiles the kernels in advance.

The error of an element is its distance from the reference, over the sum of the absolute values of its terms, to which
rounding errors are proportional. That sum counts as at least a thousandth of the tensor's largest. Kernels accumulate
half types in float32 and round once, at the end: without that rounding, their error must be within float32's
tolerance, which shows a pixel that is missing from a long sum.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import logging
import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from torch import Tensor

from ddf_convert import ops, reference
from ddf_convert.bench.measure import DTYPES, LAYOUTS, convolution_settings
from ddf_convert.cuda import dispatch
from ddf_convert.cuda.codegen import ptx as compiler
from ddf_convert.layers import DDF2d
from gpu.cases import GEOMETRIES, LARGER, Case, MapGeometry, cases, kernels_of
from gpu.run import Run, fail, skip

TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
# Of a whole layer, over the largest value of the tensor: its 1x1 convolutions round too, and FilterNorm divides by
# the deviation of what they rounded.
LAYER_TOLERANCES = {"float64": 1e-11, "float32": 3e-5, "float16": 1e-2, "bfloat16": 8e-2}
GRADIENTS = ("grad_input", "grad_channel_filter", "grad_spatial_filter")
DRY_DTYPES = ("float32", "bfloat16")
SCALE = 0.47  # of FilterNorm
DRY_KERNELS = 2
DRY_CAPABILITY = (9, 0)
MULTIPROCESSORS = 132  # of the dry run


def correctness(run: Run, record: dict[str, Any]) -> None:
    """Compares everything; records the worst error of each (kernel, dtype, layout)."""
    record["tolerances"] = {"operator": TOLERANCES, "layer": LAYER_TOLERANCES}
    record["worst"] = {}
    dtypes = DRY_DTYPES if run.dry else tuple(TOLERANCES)
    geometries = GEOMETRIES[2:5] if run.dry else GEOMETRIES
    torch.manual_seed(0)
    for case in small_cases(run):
        run.need(2, f"the operator, from this case on: {case}")
        _operator(run, record, case)
    run.save()
    for dtype, layout in itertools.product(dtypes, LAYOUTS):
        run.need(2, f"subsets of gradients, FilterNorm and DDF2d from {dtype}, {layout} on")
        for combine in ("mul",) if run.dry else ("mul", "add"):
            _subsets(run, record, Case(3, dtype, layout, geometries[0], 8, 2, combine))
        for kernel, heads, geometry in itertools.product((3,) if run.dry else (3, 5, 7), (1, 2), geometries[:2]):
            combine = "mul" if heads == 1 else "add"
            _normalized(run, record, Case(kernel, dtype, layout, geometry, 48, heads, combine))
        for geometry, upscale in ((geometries[0], 2),) if run.dry else ((geometries[0], 2), (geometries[2], 3)):
            for kernel in (3,) if run.dry else (3, 5, 9):
                _operator(run, record, Case(kernel, dtype, layout, geometry, 48, 2, "mul", upscale))
        _layer(run, record, dtype, layout)
    run.save()
    for case in large_cases(run):
        run.need(2, f"the operator, from this case on: {case}")
        _operator(run, record, case)


def small_cases(run: Run) -> Iterator[Case]:
    """Yields cases of 3x3 kernels."""
    return cases(DRY_DTYPES, (3,), GEOMETRIES[2:5]) if run.dry else cases(tuple(TOLERANCES), (3,), GEOMETRIES)


def large_cases(run: Run) -> Iterator[Case]:
    """Yields cases of larger kernels: the unrolled sizes, and one that is not."""
    return cases(DRY_DTYPES, (5,), GEOMETRIES[2:3]) if run.dry else cases(tuple(TOLERANCES), (5, 7, 9), LARGER)


def error(found: Tensor, expected: Tensor, terms: Tensor) -> float:
    """Returns the largest distance, each over its terms."""
    if found.shape != expected.shape:
        return math.inf
    if found.numel() == 0:
        return 0.0
    floor = max(terms.max().item() * 1e-3, torch.finfo(torch.float64).tiny)
    worst = ((found.double() - expected).abs() / terms.clamp_min(floor)).max().item()
    return worst if math.isfinite(worst) else math.inf


def _judge(
    record: dict[str, Any],
    what: str,
    case: Case,
    found: Tensor,
    expected: Tensor,
    terms: Tensor,
    rounded_once: bool = False,
) -> None:
    kind = f"{case.dtype}, {case.layout}"
    _note(record, f"{what}: {kind}", error(found, expected, terms), TOLERANCES[case.dtype], str(case))
    if rounded_once and case.dtype in ("float16", "bfloat16"):
        worst = error(_before_rounding(found, expected), expected, terms)
        _note(record, f"{what}, before rounding: {kind}", worst, TOLERANCES["float32"], str(case))


def _before_rounding(found: Tensor, expected: Tensor) -> Tensor:
    """Returns the number nearest to what is expected that can round to what was found."""
    if found.shape != expected.shape:
        return found
    info = torch.finfo(found.dtype)
    reach = 0.501 * (info.eps * expected.abs() + info.smallest_normal * info.eps)
    distance = found.double() - expected
    return expected + distance.sign() * (distance.abs() - reach).clamp_min(0)


def _note(record: dict[str, Any], what: str, worst: float, tolerance: float, case: str) -> None:
    entry = record["worst"].setdefault(what, {"error": -1.0, "cases": 0})
    entry["cases"] += 1
    if worst > entry["error"]:
        entry |= {"error": worst, "tolerance": tolerance, "case": case}
    if not worst <= tolerance:
        fail(record, f"{what}: error {worst:.2e}, tolerated {tolerance:.2e} ({case})")


def _operator(run: Run, record: dict[str, Any], case: Case) -> None:
    input, channel, spatial, grad = tensors = case.tensors(run.device)
    options = case.options()
    exact = [tensor.double() for tensor in tensors]
    terms = [tensor.abs() for tensor in exact]

    named = dict(zip(("stride", "padding", "dilation", "combine"), options, strict=True))
    output = ops.ddf(input, channel, spatial, **named, upscale_factor=case.upscale)
    if not output.is_contiguous(memory_format=ops.memory_format(input)):
        fail(record, f"forward: the layout is not kept ({case})")
    kind = f"K {case.kernel}{' upscaled' if case.upscale > 1 else ''}"
    geometry = reference.Geometry(*options, case.upscale)
    expected = reference.forward(*exact[:3], geometry)
    bound = reference.forward(*terms[:3], geometry)
    _judge(record, f"forward {kind}", case, output, expected, bound, rounded_once=True)

    needs = (True, True, True)
    gradients = torch.ops.ddf_convert.ddf_backward(grad, input, channel, spatial, list(needs), *geometry)
    expected = reference.backward(exact[3], *exact[:3], geometry, needs)
    bounds = reference.backward(terms[3], *terms[:3], geometry, needs)
    for name, found, right, bound in zip(GRADIENTS, gradients, expected, bounds, strict=True):
        assert right is not None
        assert bound is not None
        once = case.upscale == 1 or name != "grad_input"  # the input's is a sum of what the filters of a pixel give
        _judge(record, f"{name} {kind}", case, found, right, bound, rounded_once=once)


def _subsets(run: Run, record: dict[str, Any], case: Case) -> None:
    """Checks that gradients that are not wanted are empty, and the others as with all."""
    input, channel, spatial, grad = case.tensors(run.device)
    tensors, geometry = (grad, input, channel, spatial), reference.Geometry(*case.options())
    exact = [tensor.double() for tensor in (grad, input, channel, spatial)]
    needs = (True, True, True)
    expected = reference.backward(*exact, geometry, needs)
    bounds = reference.backward(*[tensor.abs() for tensor in exact], geometry, needs)
    for wanted in itertools.product((False, True), repeat=3):
        gradients = torch.ops.ddf_convert.ddf_backward(*tensors, list(wanted), *geometry)
        for name, want, found, right, bound in zip(GRADIENTS, wanted, gradients, expected, bounds, strict=True):
            if want:
                assert right is not None
                assert bound is not None
                _judge(record, f"{name}, some wanted", case, found, right, bound, rounded_once=True)
            elif found.numel():
                fail(record, f"{name}: not wanted, and not empty ({case})")


def _normalized(run: Run, record: dict[str, Any], case: Case) -> None:
    """Compares FilterNorm, and the operator with FilterNorm on the spatial filter, with the gradients of both."""
    input, channel, spatial, grad = case.tensors(run.device)
    geometry = reference.Geometry(*case.options())
    taps = case.kernel**2
    leaves = [tensor.requires_grad_() for tensor in (input, channel, spatial)]
    output = ops.ddf(input, channel, spatial, **geometry._asdict(), norm_scale=SCALE)
    found = [output, *torch.autograd.grad(output, leaves, grad)]

    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    filters = reference.filter_norm(exact[2], taps, SCALE)
    right = reference.forward(exact[0], exact[1], filters, geometry)
    expected = [right, *torch.autograd.grad(right, exact, grad.double())]

    raw = exact[2].detach()
    by_tap = raw.unflatten(1, (-1, taps))
    spread = SCALE / by_tap.std(2, keepdim=True)
    # The terms of a normalized tap: itself and those of the mean, over the deviation. Its own value can be near 0.
    norm_terms = ((by_tap.abs() + by_tap.abs().mean(2, keepdim=True)) * spread).flatten(1, 2)

    def mixed(terms: Tensor) -> Tensor:
        """Terms of FilterNorm's gradient, which mixes the taps and divides by the deviation."""
        return (terms.unflatten(1, (-1, taps)).amax(2, keepdim=True) * spread).expand_as(by_tap).flatten(1, 2)

    absolute = [exact[0].detach().abs(), exact[1].detach().abs(), norm_terms]
    *bounds, by_filters = reference.backward(grad.double().abs(), *absolute, geometry, (True, True, True))
    assert by_filters is not None
    bounds = [reference.forward(*absolute, geometry), *bounds, mixed(by_filters)]
    for name, one, other, bound in zip(("forward", *GRADIENTS), found, expected, bounds, strict=True):
        assert bound is not None
        _judge(record, f"{name}, normalized", case, one, other, bound)

    cotangent = torch.randn_like(spatial)
    alone = ops.filter_norm(spatial, taps, SCALE)
    (gradient,) = torch.autograd.grad(alone, spatial, cotangent)
    (right,) = torch.autograd.grad(reference.filter_norm(exact[2], taps, SCALE), exact[2], cotangent.double())
    _judge(record, "filter_norm", case, alone, filters, norm_terms)
    _judge(record, "filter_norm_backward", case, gradient, right, mixed(cotangent.double().abs()))


def _layer(run: Run, record: dict[str, Any], dtype: str, layout: str) -> None:
    """Compares DDF2d with a copy in float64."""
    for options in ({}, {"stride": 2, "heads": 2}, {"kernel_size": 5, "combine": "add"}):
        layer = DDF2d(32, bias=True, **options).to(run.device, DTYPES[dtype])
        exact = copy.deepcopy(layer).double()
        input = torch.randn(2, 32, 14, 12, device=run.device, dtype=DTYPES[dtype])
        input = input.to(memory_format=LAYOUTS[layout])
        results = []
        with convolution_settings(tf32=False):
            for version in (layer, exact):
                type_ = next(version.parameters()).dtype
                leaf = input.detach().to(type_).requires_grad_()
                output = version(leaf)
                torch.manual_seed(1)
                grad = torch.randn(output.shape, device=run.device).to(DTYPES[dtype]).to(type_)
                wanted = [leaf, *version.parameters()]
                results.append([output, *torch.autograd.grad(output, wanted, grad)])
        names = ["DDF2d forward", "DDF2d grad_input", *["DDF2d grad_parameters"] * (len(results[0]) - 2)]
        for name, found, right in zip(names, *results, strict=True):
            worst = error(found, right, right.abs().max().expand(right.shape))
            _note(record, f"{name}: {dtype}, {layout}", worst, LAYER_TOLERANCES[dtype], f"DDF2d(32, {options})")


def small(device: torch.device) -> None:
    """Runs a few cases of every kind, for compute-sanitizer; results are not compared."""
    for kernel, layout, dtype in itertools.product((3, 5), LAYOUTS, ("float32", "bfloat16")):
        for geometry in (MapGeometry(9, 14), MapGeometry(11, 7, stride=2)):
            case = Case(kernel, dtype, layout, geometry, 6, 2, "mul")
            input, channel, spatial, grad = case.tensors(device)
            arguments = (input, channel, spatial, *case.options())
            torch.ops.ddf_convert.ddf(*arguments)
            torch.ops.ddf_convert.ddf_backward(grad, *arguments[:3], [True, True, True], *case.options())
            leaf = spatial.requires_grad_()
            torch.ops.ddf_convert.ddf(input, channel, leaf, *case.options(), 1, SCALE).sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- compilation ---


def compilation(run: Run, record: dict[str, Any]) -> None:
    """Compiles the kernels of the correctness part on all processors: one after another would take minutes."""
    if run.dry and importlib.util.find_spec("numba_cuda") is None:
        skip(record, "compilation", "needs numba-cuda")
        return
    capability = DRY_CAPABILITY if run.dry else torch.cuda.get_device_capability(run.device)
    count = MULTIPROCESSORS if run.dry else dispatch.multiprocessors(run.device)
    wanted = list(kernels_of(itertools.chain(small_cases(run), large_cases(run)), count))
    record["kernels"] = len(wanted)
    if run.dry:
        wanted = wanted[:DRY_KERNELS]
    workers = min(os.cpu_count() or 1, len(wanted))
    start = time.monotonic()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=logging.disable)
    try:
        tasks = {pool.submit(compiler.ptx, variant, capability): variant for variant in wanted}
        for done in as_completed(tasks, timeout=max(1.0, run.left())):
            if done.exception() is not None:
                fail(record, f"{tasks[done].name}: {done.exception()}")
    except TimeoutError:
        run.need(run.left() + 1, "the kernels that are not compiled yet; they are compiled where they are needed")
    finally:
        pool.shutdown(wait=run.dry, cancel_futures=True)
        record |= {"processes": workers, "compile_seconds": round(time.monotonic() - start, 1)}
