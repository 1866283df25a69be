"""The host's cost of one call of the operator on a GPU, measured without one.

    python benchmarks/launch_cost.py [--json FILE]

Everything that Python does for a call is done for real: torch's dispatcher, the checks of the arguments, the output's
allocation (of CPU memory), the choice of the grid, the packing of the parameters, the call through cuda-bindings. The
driver at the end of it is a stand-in in C, which takes every launch and does nothing. What a real driver takes for a
launch comes on top, and benchmarks/gpu_check.py measures that on a GPU.

Needs a C compiler (cc), numba-cuda and Linux.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.results import script_parser

_INSIDE = "DDF_CONVERT_STAND_IN_DRIVER"
_DRIVER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
static int nothing(void) { return 0; }
int cuInit(unsigned flags) { return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)1; return 0; }
int cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra) { return 0; }
int cuGetProcAddress_v2(const char *symbol, void **address, int version, unsigned long long flags, int *status) {
    void *self = dlopen("libcuda.so.1", RTLD_NOLOAD | RTLD_NOW), *found = self ? dlsym(self, symbol) : 0;
    *address = found ? found : (void *)nothing;
    if (status) *status = 0;
    return 0;
}
"""


def run_with_stand_in() -> int:
    """Compiles the stand-in and starts this script again, so that it is loaded instead of the driver."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "driver.c"
        source.write_text(_DRIVER)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", f"{folder}/libcuda.so.1", str(source), "-ldl"], check=True)
        environment = {**os.environ, "LD_LIBRARY_PATH": folder, _INSIDE: "1"}
        return subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode


def measure() -> dict[str, float]:
    """Returns microseconds, the least of several runs of thousands of calls."""
    import torch

    from ddf_convert.cuda import dispatch
    from ddf_convert.cuda.codegen import driver as launch
    from ddf_convert.reference.checks import Geometry, check_arguments

    driver = launch.driver()
    _, module = driver.cuModuleLoadData(b"\0")
    _, function = driver.cuModuleGetFunction(module, b"kernel")
    formats: dict[Any, Any] = {}
    launched: list[tuple[Any, ...]] = []

    def run(variant: Any, device: int, blocks: int, arguments: tuple[Any, ...]) -> None:
        """Does what ``launch.run`` does, without torch.cuda."""
        format = formats.get(variant)
        if format is None:
            format = formats[variant] = launch.parameter_format(variant)
        values = [each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments]
        if not launched:
            launched.append((function, format, blocks, variant.threads, 0, values))
        launch.launch(function, format, blocks, variant.threads, 0, values)

    dispatch._run = run

    def operator(input: Any, channel_filter: Any, spatial_filter: Any, *options: Any) -> Any:
        geometry = Geometry(*options)
        check_arguments(input, channel_filter, spatial_filter, geometry)
        return dispatch.forward(input, channel_filter, spatial_filter, geometry)

    library = torch.library.Library("launch_cost", "DEF")
    signature = "(Tensor a, Tensor b, Tensor c, int stride, int padding, int dilation, str combine) -> Tensor"
    for name, body in (("empty", lambda first, *rest: torch.empty_like(first)), ("forward", operator)):
        library.define(name + signature)
        library.impl(name, body, "CPU")

    def microseconds(call: Callable[[], object]) -> float:
        calls = 5000
        return min(timeit.repeat(call, number=calls, repeat=9)) / calls * 1e6

    tensors = torch.zeros(2, 64, 14, 14), torch.zeros(2, 64, 3, 3), torch.zeros(2, 9, 14, 14)
    options = (1, 1, 1, "mul")
    needs = (True, True, True)
    return {
        "empty operator": microseconds(lambda: torch.ops.launch_cost.empty(*tensors, *options)),
        "forward": microseconds(lambda: torch.ops.launch_cost.forward(*tensors, *options)),
        "of that, the launch": microseconds(lambda: launch.launch(*launched[0])),
        "all gradients (two launches)": microseconds(
            lambda: dispatch.backward(tensors[0], *tensors, Geometry(*options), needs)
        ),
    }


def main() -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    if _INSIDE not in os.environ:
        return run_with_stand_in()
    figures = measure()
    for name, value in figures.items():
        print(f"{name:30s} {value:6.1f} us")
    print(f"{'forward beyond the empty one':30s} {figures['forward'] - figures['empty operator']:6.1f} us")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
