"""Compiles the kernels of the correctness part beforehand, on all processors: one after another would take minutes."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import multiprocessing
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any
from unittest import mock

import torch
from kernels import recorded

from ddf_convert.cuda import dispatch
from ddf_convert.cuda.codegen import ptx as compiler
from ddf_convert.cuda.kernel_spec import KernelSpec
from ddf_convert.reference import Geometry
from gpu_parts.cases import Case
from gpu_parts.correctness import large_cases, small_cases
from gpu_parts.run import Run, fail, skip

DRY_KERNELS = 2
DRY_CAPABILITY = (9, 0)
MULTIPROCESSORS = 132  # of the rehearsal


def compilation(run: Run, record: dict[str, Any]) -> None:
    """Fills the cache of compiled kernels; the record gets their number and the time."""
    if run.dry and importlib.util.find_spec("numba_cuda") is None:
        skip(record, "compilation", "needs numba-cuda")
        return
    capability = DRY_CAPABILITY if run.dry else torch.cuda.get_device_capability(run.device)
    count = MULTIPROCESSORS if run.dry else dispatch.multiprocessors(run.device)
    wanted = variants(itertools.chain(small_cases(run), large_cases(run)), count)
    record["kernels"] = len(wanted)
    if run.dry:
        wanted = wanted[:DRY_KERNELS]
    workers = min(os.cpu_count() or 1, len(wanted))
    start = time.monotonic()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_quiet)
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


def _quiet() -> None:
    """Hundreds of kernels are not announced one by one."""
    logging.disable(logging.WARNING)


def variants(cases: Iterable[Case], multiprocessors: int) -> list[KernelSpec]:
    """The kernels that these cases take, found by dispatching them without running anything."""
    host = torch.device("cpu")
    with recorded() as found, mock.patch.object(dispatch, "multiprocessors", return_value=multiprocessors):
        for case in cases:
            input, channel, spatial, grad = case.tensors(host)
            geometry = Geometry(*case.options())
            dispatch.forward(input, channel, spatial, geometry)
            dispatch.backward(grad, input, channel, spatial, geometry, (True, True, True))
    return list(found)
