"""benchmarks/gpu_check.py, run dry on the CPU; and what it makes of wrong kernels and of figures."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import gpu_check
import pytest
import torch
from gpu import correctness
from gpu.page import page
from gpu.run import Run
from gpu.targets import targets
from support.paths import BENCHMARKS

from ddf_convert import cuda, ops

CPU = torch.device("cpu")


def make_run(dry: bool = False, parts: dict[str, Any] | None = None) -> Run:
    return Run(CPU, dry, math.inf, lambda: None, {} if parts is None else parts, math.inf)


@pytest.fixture
def dry_run(tmp_path, monkeypatch):
    """Runs gpu_check.py in this process; returns the exit code, the report and the page."""
    threads = torch.get_num_threads()

    def call(*arguments: str) -> tuple[int, dict[str, Any], str]:
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--dry-run", "--output-dir", str(tmp_path), *arguments])
        code = gpu_check.main()
        return code, json.loads((tmp_path / "gpu_dry-run.json").read_text()), (tmp_path / "gpu_dry-run.md").read_text()

    yield call
    torch.set_num_threads(threads)


@pytest.mark.long
def test_a_dry_run_passes_every_part(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--dry-run", "--output-dir", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    parts = json.loads((tmp_path / "gpu_dry-run.json").read_text())["parts"]
    assert list(parts) == list(gpu_check.NAMES)
    assert {part["status"] for part in parts.values()} == {"passed"}
    worst = parts["correctness"]["worst"]
    assert worst["forward K 3: float32, channels_last"]["cases"] >= 6
    assert worst["grad_input K 3 upscaled: bfloat16, contiguous"]["cases"] == 1
    assert all(entry["error"] <= entry["tolerance"] for entry in worst.values())
    assert {target["met"] for target in parts["targets"]["list"]} == {None}
    text = (tmp_path / "gpu_dry-run.md").read_text()
    for words in ("CUDA graph: needs a GPU", "| DDF op |", "| DDF-Up apart |"):
        assert words in text


def test_what_there_is_no_time_for_is_left_out(dry_run):
    code, report, text = dry_run("--part", "correctness,targets", "--minutes", "0.001")
    assert code == gpu_check.INCOMPLETE  # what was not checked did not pass
    assert report["parts"]["correctness"]["status"] == "incomplete"
    assert "no time left" in text


def test_an_unknown_part_is_refused(dry_run, capsys):
    with pytest.raises(SystemExit) as ended:
        dry_run("--part", "corectness")
    assert ended.value.code == 2
    assert "no part is called corectness; there are machine, compilation, correctness" in capsys.readouterr().err


def test_a_failing_part_is_recorded_and_the_next_one_runs(dry_run, monkeypatch, capsys):
    def breaks(run: Run, record: dict[str, Any]) -> None:
        record["found"] = 1
        raise ValueError("first line\nsecond line")

    parts = (gpu_check.Part("op", breaks), gpu_check.Part("machine", gpu_check.machine))
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    code, report, text = dry_run()
    assert code == 1
    assert (report["parts"]["op"]["status"], report["parts"]["op"]["found"]) == ("failed", 1)
    assert report["parts"]["machine"]["status"] == "passed"
    assert "- op: ValueError: first line second line" in text
    assert "failed: op" in capsys.readouterr().out


@pytest.mark.slow
def test_wrong_kernels_are_found(monkeypatch):
    right = ops.ddf

    def misses_a_pixel(input: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        output = right(input, *rest, **options)
        output[-1, -1, -1, -1] += 1
        return output

    monkeypatch.setattr(ops, "ddf", misses_a_pixel)
    record: dict[str, Any] = {}
    correctness.correctness(make_run(dry=True), record)
    wrong = {what.split(":")[0] for what, found in record["worst"].items() if found["error"] > found["tolerance"]}
    kinds = ("3", "5", "3 upscaled")
    plain = {f"forward K {kind}{which}" for kind in kinds for which in ("", ", before rounding")}
    assert wrong == plain | {"forward, normalized"}
    assert record["failed"] >= 12


def test_half_types_must_not_be_rounded_twice():
    """What one rounding explains is no error; what it does not is one, though half precision would tolerate it."""
    exact = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    terms = torch.full_like(exact, 100.0)  # of a long sum that cancels
    for dtype in (torch.float16, torch.bfloat16):
        once = exact.to(dtype)
        assert correctness.error(correctness._before_rounding(once, exact), exact, terms) == 0
        wrong = (exact + 0.5).to(dtype)
        assert correctness.error(wrong, exact, terms) < 1.6e-2
        assert correctness.error(correctness._before_rounding(wrong, exact), exact, terms) > 1e-5


def test_kernels_that_are_not_in_use_fail_the_run(monkeypatch):
    monkeypatch.setattr(cuda, "usable", lambda tensor: False)
    run = make_run()
    gpu_check._run_part(run, gpu_check.Part("machine", gpu_check.machine))
    assert run.parts["machine"]["status"] == "failed"
    report = {"device": "a GPU", "dry_run": False, "parts": run.parts}
    assert "The CUDA kernels are not in use" in page(report).splitlines()[2]


def judge(words: str, where: str, tables: dict[str, Any]) -> dict[str, Any]:
    """Returns one target as judged by these figures of the part "op"."""
    record: dict[str, Any] = {}
    targets(make_run(parts={"op": {"tables": tables, "host": {"ddf": 20.0, "empty_op": 6.0}}}), record)
    (found,) = [target for target in record["list"] if words in target["target"] and target["where"] == where]
    return found


@pytest.mark.parametrize(("shares", "met"), [((0.8, 0.9, 0.85), True), ((0.9, 0.79, 0.9), False), ((0.9, 0.9), None)])
def test_a_target_is_met_if_every_size_is(shares, met):
    rows = {
        str(size): {"DDF op": {"forward_of_copy": share}} for size, share in zip((56, 112, 224), shares, strict=False)
    }
    target = judge("80 %", "float32, contiguous", {"float32": {"contiguous": rows}})
    assert target["met"] is met
    assert [value for value in target["values"].values() if value is not None] == list(shares)


def test_targets_compare_columns_of_one_table():
    columns = {"Conv": 4.0, "DDF module": 2.0, "DwConv": 1.0, "DDF op": 1.25}
    row = {name: {"forward_ms": value, "forward_backward_ms": value} for name, value in columns.items()}
    sizes = (7, 14, 28, 56, 112, 224)
    figures = {"float32": {"contiguous": {str(size): row for size in sizes}}}
    dense = judge("the dense conv, forward (", "float32, contiguous", figures)
    assert dense["values"] == dict.fromkeys(map(str, sizes), 2.0)
    assert dense["met"] is True
    assert judge("the depthwise conv, forward (", "float32, contiguous", figures)["met"] is False
    assert judge("host time", "float32", figures)["met"] is True
