"""``ddf-convert doctor``: what runs here, and why not what does not."""

from __future__ import annotations

import json
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from ddf_convert import ops
from ddf_convert.bench import doctor


@pytest.mark.slow
def test_doctor(run: Any) -> None:
    ran = run("doctor")
    assert ran.code == 0, ran.out
    assert max(map(len, ran.out.splitlines())) <= 80
    checks = {check["name"]: check for check in json.loads(run("doctor", "--json").out)["checks"]}
    assert checks["torch"] == {"name": "torch", "state": "ok", "detail": torch.__version__.partition("+")[0]}
    assert "agree with the reference" in checks["CPU kernels"]["detail"]
    assert checks["timm registry"]["state"] == "ok"


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_doctor_finds_broken_kernels(run: Any, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    right = ops.ddf

    def wrong(*arguments: Any, **options: Any) -> torch.Tensor:
        if fault == "raises":
            raise RuntimeError("no compiler")
        return right(*arguments, **options) * 1.001

    monkeypatch.setattr(ops, "ddf", wrong)
    ran = run("doctor", "--json")
    assert ran.code == 1
    states = {check["name"]: check["state"] for check in json.loads(ran.out)["checks"]}
    assert states["CPU kernels"] == "problem"
    assert states["torch"] == "ok"


def checked() -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.examine()}


def test_doctor_without_the_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    known = metadata.version

    def missing(name: str) -> str:
        if name in ("torchvision", "matplotlib", "numba-cuda"):
            raise metadata.PackageNotFoundError
        return known(name)

    monkeypatch.setattr(metadata, "version", missing)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    checks = checked()
    assert checks["matplotlib"].state == checks["numba-cuda"].state == "note"
    assert checks["torchvision"].state == "problem"
    assert "pip install 'ddf-convert[cuda12]'" in checks["numba-cuda"].detail
    assert not {"CUDA compiler", "CUDA kernel cache"} & set(checks)


def test_doctor_without_a_gpu_compiles_a_cuda_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba_cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    checks = checked()
    assert checks["CUDA"].state == "note"
    assert "no GPU that torch can use" in checks["CUDA"].detail
    assert checks["CUDA compiler"].state == "ok", checks["CUDA compiler"].detail
    assert "compiled for sm_90" in checks["CUDA compiler"].detail
    assert not any(name.startswith("cuda:") for name in checks)


def test_doctor_says_why_torch_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old() -> bool:
        warnings.warn("CUDA initialization: the driver is too old\nmore", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", too_old)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert doctor.check_cuda()[1].startswith(
        "CUDA initialization: the driver is too old; torch is built for CUDA 13.0, "
    )
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor.check_cuda() == (doctor.State.NOTE, "this torch is not built for NVIDIA GPUs")
    monkeypatch.setattr(doctor, "package_version", lambda name: None)
    assert doctor.check_numba_cuda()[1] == "not installed; only NVIDIA GPUs need it"


def test_doctor_goes_on_where_torch_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> bool:
        raise RuntimeError("no luck")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", fails)
    checks = checked()
    assert checks["CUDA"] == doctor.Check("CUDA", doctor.State.PROBLEM, "RuntimeError: no luck")
    assert "matplotlib" in checks  # the last one


@pytest.mark.parametrize(("gpus", "state"), [(0, "note"), (1, "problem")])
def test_doctor_where_the_cuda_compiler_fails(monkeypatch: pytest.MonkeyPatch, gpus: int, state: str) -> None:
    from ddf_convert.cuda.codegen import ptx

    def fails(*_: Any) -> str:
        raise OSError("libnvvm.so: no such file\nmore")

    monkeypatch.setattr(ptx, "compile_ptx", fails)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    pretend_gpus(monkeypatch, gpus)
    found, detail = doctor.check_cuda_compiler()
    assert found == state
    assert detail == "it fails (OSError: libnvvm.so: no such file); pip install 'ddf-convert[cuda13]'"
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    assert doctor.check_cuda_compiler()[1].endswith("unset it")


def test_doctor_finds_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert doctor.check_cuda_kernel_cache() == (doctor.State.OK, str(tmp_path / "ddf_convert_cuda"))
    (tmp_path / "ddf_convert_cuda").write_text("a file stands in the way")
    state, detail = doctor.check_cuda_kernel_cache()
    assert state == "note"
    assert "set NUMBA_CACHE_DIR" in detail


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU number {torch.device(device).index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.parametrize(
    ("reason", "installed", "expected"),
    [
        (None, True, ("ok", "agree with the reference")),
        ("the driver is old: update it", True, ("problem", "PyTorch reference: the driver is old: update it")),
        ("numba-cuda is not installed", False, ("note", "PyTorch reference: numba-cuda is not installed")),
    ],
)
def test_doctor_tries_every_gpu(
    monkeypatch: pytest.MonkeyPatch, reason: str | None, installed: bool, expected: tuple[str, str]
) -> None:
    from ddf_convert import cuda

    known, check_kernels, tried = doctor.package_version, doctor.check_kernels, []

    def on_the_cpu(device: str) -> doctor.Result:
        tried.append(device)
        return check_kernels("cpu")

    pretend_gpus(monkeypatch, 2)
    monkeypatch.setattr(cuda, "unusable", lambda device: reason)
    monkeypatch.setattr(doctor, "check_kernels", on_the_cpu)
    monkeypatch.setattr(
        doctor, "package_version", lambda name: known(name) if installed or name != "numba-cuda" else None
    )
    checks = checked()
    for index in (0, 1):
        check = checks[f"cuda:{index}"]
        assert check.detail.startswith(f"GPU number {index}, compute capability 9.0: ")
        assert check.state == expected[0]
        assert expected[1] in check.detail
    assert tried == ["cpu", *(["cuda:0", "cuda:1"] if reason is None else [])]


@pytest.mark.gpu
def test_doctor_on_a_gpu() -> None:
    checks = checked()
    assert checks["CUDA compiler"].state == "ok"
    assert checks["cuda:0"].state == "ok", checks["cuda:0"].detail
    assert "agree with the reference" in checks["cuda:0"].detail
