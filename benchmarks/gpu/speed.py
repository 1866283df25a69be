"""Times of the operator beside its baselines, the host's share, the compiled reference, and whole models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor

from ddf_convert import ops
from ddf_convert.bench.measure import Figures, copy_bandwidth, random_leaf
from ddf_convert.bench.model import ModelSettings, throughput
from ddf_convert.bench.op import COMPILED, OP, OpWorkload, measure_workload
from ddf_convert.bench.up import UpSettings
from ddf_convert.bench.up import run as measure_up
from ddf_convert.cost.timing import host_us
from gpu.run import Run

SECONDS = 0.08  # for each time
SIZES = (56, 112, 224, 14, 7, 28)  # the most important first
BATCH, CHANNELS = 32, 256
UP_SIZES, UP_BATCH = (56, 28, 112), 16
MODELS = ("resnet50", "ddf_mul_resnet50")
DRY_MODELS = ("resnet18", "ddf_mul_resnet18")
MODEL_BATCH = 64
# dtype, layout, whether the operator alone; in order of importance.
TABLES = (
    ("float32", "contiguous", False),
    ("bfloat16", "contiguous", False),
    ("float32", "channels_last", False),
    ("bfloat16", "channels_last", False),
    ("float16", "contiguous", True),
    ("float16", "channels_last", True),
)


def op(run: Run, record: dict[str, Any]) -> None:
    """Times table 2's sizes, as ``ddf-convert bench op`` does, after the host's time of a call."""
    record["host"] = _host(run)
    record["copy_gb_per_s"] = _copy(run) / 1e9
    record["seconds_each"] = SECONDS
    for dtype, layout, operator_only in TABLES[:2] if run.dry else TABLES:
        _table(run, record, dtype, layout, lambda name, alone=operator_only: name == OP or not alone, compiled=False)


def compiled(run: Run, record: dict[str, Any]) -> None:
    """Times the reference under torch.compile, which compiles it again for every size."""
    for dtype, layout, operator_only in TABLES[:1] if run.dry else TABLES:
        if not operator_only and not run.without_gpu(record, "the reference under torch.compile"):
            _table(run, record, dtype, layout, lambda name: name == COMPILED, compiled=True)


def up(run: Run, record: dict[str, Any]) -> None:
    """Times DDF-Up and its baselines, as ``ddf-convert bench up`` does."""
    sizes, channels, batch = ((5,), 16, 1) if run.dry else (UP_SIZES, CHANNELS, UP_BATCH)
    seconds = 0.002 if run.dry else SECONDS
    for dtype, layout, _ in TABLES[:1] if run.dry else TABLES[:4]:
        for size in sizes:
            run.need(1 if run.dry else 10, f"from DDF-Up, {dtype}, {layout}, {size}x{size} on")
            settings = UpSettings(
                resolutions=(size,),
                channels=channels,
                scale_factor=2,
                batch=batch,
                kernel_size=3,
                dtype=dtype,
                layout=layout,
                device=run.device,
                seconds=seconds,
            )
            found = measure_up(settings)["results"][layout]
            record.setdefault("tables", {}).setdefault(dtype, {}).setdefault(layout, {}).update(found)
            run.save()


def _table(
    run: Run, record: dict[str, Any], dtype: str, layout: str, only: Callable[[str], bool], compiled: bool
) -> None:
    bandwidth = record.get("copy_gb_per_s", 0.0) * 1e9
    sizes = (7, 14) if run.dry else SIZES
    rows = record.setdefault("tables", {}).setdefault(dtype, {}).setdefault(layout, {})
    for size in sizes:
        run.need(25 if compiled else 1 if run.dry else 12, f"from {dtype}, {layout}, {size}x{size} on")
        batch, channels = (2, 16) if run.dry else (BATCH, CHANNELS)
        work = OpWorkload(size, channels, batch, 3, dtype, layout, run.device)
        row: Figures = {}
        rows[str(size)] = row
        measure_workload(work, 0.002 if run.dry else SECONDS, compiled, bandwidth, row, only=only)
        if not run.dry:
            torch.cuda.empty_cache()
        run.save()


def _copy(run: Run) -> float:
    return copy_bandwidth(run.device, 0.002 if run.dry else 0.5, 2**20 if run.dry else None)


def _host(run: Run) -> dict[str, float | None]:
    """Returns the host's microseconds for a call of the operator, and of one that launches nothing."""
    empty = _empty_operators(run.device)
    shapes = ((2, 16, 7, 7), (2, 16, 3, 3), (2, 9, 7, 7))
    leaves = [random_leaf(shape, "float32", "contiguous", run.device) for shape in shapes]
    tensors = [leaf.detach() for leaf in leaves]
    calls: dict[str, Callable[[], object]] = {
        "ddf": lambda: ops.ddf(*tensors, padding=1),
        "ddf_recorded_by_autograd": lambda: ops.ddf(*leaves, padding=1),
        "empty_op": lambda: empty.nothing(*tensors, 1, 1, 1, "mul"),
        "empty_op_that_allocates": lambda: empty.allocates(*tensors, 1, 1, 1, "mul"),
    }
    for call in calls.values():
        call()
    return {name: host_us(call, run.device, 0.3, calls=100) for name, call in calls.items()}


_empty: list[torch.library.Library] = []  # keeps the library, and with it its operators


def _empty_operators(device: torch.device) -> Any:
    """Returns Python operators with the signature of ``ddf``: one does nothing, one allocates its output."""
    if not _empty:
        library = torch.library.Library("ddf_gpu_check", "DEF")
        arguments = "Tensor input, Tensor channel, Tensor spatial, int stride, int padding, int dilation, str combine"
        kept = torch.empty(0, device=device)

        def nothing(input: Tensor, *rest: Any) -> Tensor:
            return kept

        def allocates(input: Tensor, *rest: Any) -> Tensor:
            return torch.empty_like(input)

        for function in (nothing, allocates):
            library.define(f"{function.__name__}({arguments}) -> Tensor")
            library.impl(function.__name__, function, "CompositeExplicitAutograd")
        _empty.append(library)
    return torch.ops.ddf_gpu_check


def model(run: Run, record: dict[str, Any]) -> None:
    """Measures ResNet-50 and DDF-ResNet-50 in images a second."""
    record["models"] = list(DRY_MODELS if run.dry else MODELS)
    record["results"] = {}
    precisions = (("bfloat16", False), ("float32", False), ("float32", True))
    for dtype, tf32 in precisions[1:2] if run.dry else precisions:
        name = f"{dtype}, TF32" if tf32 else dtype
        row = record["results"][name] = {}
        for built in record["models"]:
            run.need(1 if run.dry else 15, f"from {built}, {name} on")
            row[built] = _throughput_of_largest_batch(run, built, dtype, tf32)
            run.save()


def _throughput_of_largest_batch(run: Run, name: str, dtype: str, tf32: bool) -> dict[str, Any]:
    """Returns a model's figures with as many images as fit."""
    batch = 2 if run.dry else MODEL_BATCH
    input_size = (3, 32, 32) if run.dry else (3, 224, 224)
    while True:
        settings = ModelSettings(
            input_size=input_size,
            batch=batch,
            dtype=dtype,
            layout="channels_last",
            device=run.device,
            seconds=0.01 if run.dry else 1.0,
            tf32=tf32,
        )
        try:
            return {**throughput(timm.create_model(name), settings), "batch": batch}
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        torch.cuda.empty_cache()
        batch //= 2
