"""Times the DDF operator beside its peers at the sizes of the paper's Table 2, on a CPU.

    python benchmarks/op.py                              one table a layout, forward and forward + backward
    python benchmarks/op.py --resolution 56 --json FILE

All columns are measured in the same run, with the same inputs and layout: the dense 3x3 convolution, the depthwise one,
the DDF operator, the DDF module (its branches and the operator), and the operator in plain PyTorch, written as unfolded
windows and as shifted slices (the package's reference). Times are medians in milliseconds; memory is the peak of one
forward + backward pass beyond what was there before (Linux only).

glibc gives large tensors back to the system when they are freed, and with the next output comes a page fault for every
4 KiB: most of a column's time at 112x112, or none of it, as chance has it. So the script runs itself with
glibc told to keep what is freed, which is also what training under jemalloc or tcmalloc sees.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import numba
import rich
import rich.box
import torch
import torch.nn.functional as F
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from ddf_convert import ops, reference
from ddf_convert.layers import DDF2d

RESOLUTIONS = (7, 14, 28, 56, 112, 224)  # Table 2
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LARGEST = 4 * 256 * 112**2  # elements of a map: at 224x224 and 256 channels one image is enough to wait for
COLUMNS = ("Conv", "DwConv", "DDF op", "DDF module", "unfold", "slices")


def unfolded(input: Tensor, channel: Tensor, spatial: Tensor) -> Tensor:
    batch, channels, height, width = input.shape
    windows = F.unfold(input, 3, padding=1).view(batch, channels, 9, height, width)
    filters = channel.view(batch, channels, 9, 1, 1) * spatial.view(batch, 1, 9, height, width)
    return (windows * filters).sum(2)


def peers(channels: int, side: int, batch: int, layout: str) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Each column's function and its inputs; the inputs and the layers' parameters want gradients."""
    torch.manual_seed(0)
    kind = LAYOUTS[layout]
    input = torch.randn(batch, channels, side, side).to(memory_format=kind).requires_grad_()
    channel = torch.randn(batch, channels, 3, 3, requires_grad=True)
    spatial = torch.randn(batch, 9, side, side).to(memory_format=kind).requires_grad_()
    dense = nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(memory_format=kind)
    depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False).to(memory_format=kind)
    module = DDF2d(channels).to(memory_format=kind)
    filters = [input, channel, spatial]
    return {
        "Conv": (dense, [input]),
        "DwConv": (depthwise, [input]),
        "DDF op": (lambda *made: ops.ddf(*made, padding=1), filters),
        "DDF module": (module, [input]),
        "unfold": (unfolded, filters),
        "slices": (lambda *made: reference.forward(*made, 1, 1, 1, "mul"), filters),
    }


def images(channels: int, side: int, batch: int) -> int:
    """The batch, or what of it fits LARGEST."""
    return max(1, min(batch, LARGEST // (channels * side**2)))


def leaves(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    return inputs + (list(function.parameters()) if isinstance(function, nn.Module) else [])


def median_ms(call: Callable[[], object], seconds: float) -> float:
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).median * 1e3


def peak_mib(call: Callable[[], object]) -> float | None:
    """Memory that a call adds at its peak."""
    if sys.platform != "linux":
        return None

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, or the call would take it and seem to need nothing
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    call()
    return (status("VmHWM") - before) / 1024


def measure(channels: int, side: int, batch: int, layout: str, seconds: float) -> dict[str, dict[str, float | None]]:
    row: dict[str, dict[str, float | None]] = {}
    for name, (function, inputs) in peers(channels, side, batch, layout).items():
        wanted = leaves(function, inputs)

        def forward(function: Callable[..., Tensor] = function, inputs: list[Tensor] = inputs) -> None:
            with torch.no_grad():
                function(*inputs)

        with torch.no_grad():
            grad = torch.ones_like(function(*inputs))

        def both(
            function: Callable[..., Tensor] = function,
            inputs: list[Tensor] = inputs,
            wanted: list[Tensor] = wanted,
            grad: Tensor = grad,
        ) -> None:
            torch.autograd.grad(function(*inputs), wanted, grad)

        both()
        row[name] = {
            "forward_ms": median_ms(forward, seconds),
            "forward_backward_ms": median_ms(both, seconds),
            "peak_mib": peak_mib(both),
        }
    return row


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def shown(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def table(
    title: str, rows: dict[int, dict[str, dict[str, float | None]]], figure: str, batches: dict[int, int]
) -> Table:
    made = Table("size", "batch", *COLUMNS, "op / DwConv", title=title, box=rich.box.SIMPLE_HEAD, title_justify="left")
    for column in made.columns:
        column.justify = "right"
    for side, row in rows.items():
        figures = [row[name][figure] for name in COLUMNS]
        depthwise, op = row["DwConv"][figure], row["DDF op"][figure]
        ratio = f"{op / depthwise:.2f}" if op is not None and depthwise else "-"
        made.add_row(
            str(side), str(batches[side]), *("-" if value is None else shown(value) for value in figures), ratio
        )
    return made


def keep_freed_memory() -> None:
    """Starts this script anew in an environment that glibc reads when a process starts."""
    wanted = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
    if sys.platform == "linux" and not wanted.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--resolution", type=int, nargs="+", default=RESOLUTIONS, metavar="N", help="default: Table 2's"
    )
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4, help="images at most (default 4; Table 2 has 32); fewer at 224")
    parser.add_argument("--layout", choices=list(LAYOUTS), nargs="+", default=list(LAYOUTS))
    parser.add_argument("--seconds", type=float, default=1.0, help="to spend on each figure, at least")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    keep_freed_memory()

    machine = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": numba.__version__,
    }
    rich.print(f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}")
    rich.print(f"float32, {options.channels} channels, 3x3, stride 1; medians of at least {options.seconds:g} s each")
    batches = {side: images(options.channels, side, options.batch) for side in options.resolution}
    results: dict[str, dict[int, dict[str, dict[str, float | None]]]] = {}
    for layout in options.layout:
        results[layout] = {
            side: measure(options.channels, side, batches[side], layout, options.seconds)
            for side in track(options.resolution, f"{layout} ...", transient=True)
        }
        for title, figure in (
            ("forward, ms", "forward_ms"),
            ("forward + backward, ms", "forward_backward_ms"),
            ("peak memory of forward + backward, MiB", "peak_mib"),
        ):
            rich.print(table(f"{layout}: {title}", results[layout], figure, batches))
    if options.json:
        document = {"machine": machine, "batches": batches, "channels": options.channels, "results": results}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
