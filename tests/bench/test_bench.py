"""Measuring: the commands ``bench op``, ``layer`` and ``model``, what they measure with."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.paths import BENCHMARKS

from ddf_convert import cli, ops
from ddf_convert.bench import layer, measure, op, plot, up
from ddf_convert.bench import model as models
from ddf_convert.cost import timing
from ddf_convert.errors import UsageError

CPU = torch.device("cpu")
TINY_OP = ("--device", "cpu", "--channels", 4, "--batch", 1, "--seconds", 0.001)
TINY_SETTINGS: dict[str, Any] = {"channels": 4, "batch": 1, "kernel_size": 3, "device": CPU, "seconds": 0.001}
TINY_LAYER = (*TINY_OP, "--size", 6)
MODEL = """
import torch

class Net(torch.nn.Sequential):
    def __init__(self):
        print("talks")
        super().__init__({})
"""
CONVOLUTIONS = "torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.Conv2d(32, 32, 3, padding=1)"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty current folder but for a model; 80 columns."""
    (tmp_path / "net_for_bench.py").write_text(MODEL.format(CONVOLUTIONS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("COLUMNS", "80")
    yield tmp_path
    sys.modules.pop("net_for_bench", None)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: object) -> SimpleNamespace:
        code = cli.run(["bench", *map(str, arguments)])
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return call


def tiny_model(*arguments: object) -> tuple[object, ...]:
    return ("model", "net_for_bench:Net", "--input-size", 3, 16, 16, "--batch", 2, "--seconds", 0.001, *arguments)


# --- the commands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["op", "up", "layer", "model"])
def test_help_fits_the_terminal(run, command):
    shown = run(command, "--help")
    assert shown.code == 0
    assert max(map(len, shown.out.splitlines())) <= 80
    assert {"--json", "--plot", "--device", "--seconds"} <= set(shown.out.split())


MISTAKES = [
    (("op", "--kernel-size", 4), "--kernel-size 4: must be odd"),
    (("op", "--dtype", "float23"), "'float32', 'float64', 'float16', 'bfloat16'"),
    (("op", "--batch", 0), "--batch"),
    (("op", "--device", "gpu"), "--device gpu: no such device; give cpu, cuda or cuda:N"),
    (("op", "--device", "meta"), "--device meta: only cpu and cuda are measured"),
    (("op", "--json", "nowhere/figures.json"), "--json nowhere/figures.json: there is no folder nowhere"),
    (("op", "--plot", "nowhere/figures.png"), "--plot nowhere/figures.png: there is no folder nowhere"),
    (("op", "--plot", "figures.svg"), "--plot figures.svg: plots are PNG; give a name that ends in .png"),
    (("up", "--scale-factor", 3), "--scale-factor 3: must be even, and at least 2"),
    (("layer", "--heads", 3), "--heads 3: must divide the 256 channels"),
    (("layer", "--se-ratio", 0), "--se-ratio 0.0: must be above 0"),
    (("model", "resnet51"), "did you mean"),
    (("model", "resnet18", "--dtype", "float16"), "'float32', 'bfloat16'"),
    (("model", "resnet18", "--input-size", 3, 0, 8), "--input-size 3 0 8: every number must be at least 1"),
    (("model", "vit_tiny_patch16_224"), "nothing to convert in vit_tiny_patch16_224"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=lambda value: value if isinstance(value, str) else None)
def test_mistakes_are_told_before_anything_is_measured(run, monkeypatch, arguments, words):
    def measured(*arguments: object, **options: object) -> None:
        raise AssertionError("something was measured")

    for module in (measure, models):
        monkeypatch.setattr(module, "median_ms", measured)
    ran = run(*arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert words in ran.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(run):
    ran = run("op", "--device", "cuda")
    assert (ran.code, ran.err) == (2, "error: --device cuda: torch finds no NVIDIA GPU here; give cpu\n")


def test_matplotlib_is_asked_for_when_missing(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    ran = run("op", "--plot", "figures.png")
    assert (ran.code, ran.err) == (2, "error: --plot needs matplotlib: pip install 'ddf-convert[plot]'\n")


def test_op_prints_json_alone(run):
    ran = run("op", *TINY_OP, "--resolution", 5, "--resolution", 7, "--json", "-")
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)
    assert document["batches"] == {"5": 1, "7": 1}
    assert set(document["results"]) == {"contiguous", "channels_last"}
    for rows in document["results"].values():
        assert list(rows) == ["5", "7"]
        for size, row in rows.items():
            assert list(row) == ["Conv", "DwConv", "DDF op", "DDF module", "unfold", "slices"]
            for found in row.values():
                assert found["forward_ms"] > 0
                assert found["forward_backward_ms"] > 0
                assert found["host_us"] is None
            moved = 4 * (2 * 4 * int(size) ** 2 + 4 * 9 + 9 * int(size) ** 2)  # maps, channel filter, spatial filter
            speed = moved / row["DDF op"]["forward_ms"] / 1e6
            assert row["DDF op"]["forward_of_copy"] == pytest.approx(speed / document["copy_gb_per_s"])


def test_figures_of_older_runs_are_read_alike():
    """What quotes the file of figures finds the same keys in a new one."""
    old = json.loads((BENCHMARKS / "results" / "cpu_op.json").read_text())
    settings = op.OpSettings(
        **TINY_SETTINGS, resolutions=(5,), dtype="float32", layouts=("contiguous",), compiled=False
    )
    new = json.loads(json.dumps(op.run(settings)))
    assert set(old) <= set(new)
    assert set(old["machine"]) <= set(new["machine"])
    columns = old["results"]["contiguous"]["7"]
    assert set(columns) == set(new["results"]["contiguous"]["5"])
    assert all(set(columns[name]) <= set(found) for name, found in new["results"]["contiguous"]["5"].items())


@pytest.mark.parametrize(
    "arguments",
    [
        ("op", *TINY_OP, "--resolution", 5),
        ("up", *TINY_OP, "--resolution", 5),
        ("layer", *TINY_LAYER, "--stride", 2),
        tiny_model("--device", "cpu"),
    ],
    ids=lambda value: value[0],
)
def test_tables_fit_and_files_are_written(run, folder, arguments):
    ran = run(*arguments, "--json", "figures.json", "--plot", "figures.png")
    assert ran.code == 0, ran.err
    assert max(map(len, ran.out.splitlines())) <= 80
    assert "talks" not in ran.out
    document = json.loads((folder / "figures.json").read_text())
    assert document["bench"] == arguments[0]
    png = (folder / "figures.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.rstrip(b"\x00").endswith(b"IEND\xaeB`\x82")
    assert sorted(path.name for path in folder.iterdir()) == ["figures.json", "figures.png", "net_for_bench.py"]


def test_the_forms_of_upsampling_agree():
    """The branches apart are the fused layer; what unfolds is bilinear once its filters are."""
    settings = up.UpSettings(**TINY_SETTINGS, resolutions=(5,), scale_factor=2, dtype="float64", layout="channels_last")
    named = {each.name: each.function for each in settings.implementations()}
    input = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    fused, apart = named[up.UP](input), named[up.SEPARATE](input)
    torch.testing.assert_close(fused, apart)
    assert all(layer(input).shape == (2, 4, 10, 12) for layer in named.values())
    unfolded = named[up.UNFOLDED]
    weights = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.75, 0.25]], dtype=torch.float64)
    filters = torch.einsum("yi,xj->yxij", weights, weights).reshape(4, 9)
    unfolded.encode.weight.data.zero_()
    unfolded.encode.bias.data.copy_(filters.clamp_min(1e-300).log().flatten())
    inside = (..., slice(2, -2), slice(2, -2))
    torch.testing.assert_close(unfolded(input)[inside], named[up.BILINEAR](input)[inside])


def test_layer_counts_what_it_measures(run):
    ran = run("layer", *TINY_LAYER, "--kernel-size", 5, "--heads", 2, "--dtype", "float64", "--json", "-")
    assert ran.code == 0, ran.err
    results = json.loads(ran.out)["results"]
    assert list(results) == ["Conv2d", "DDF2d", "DDFConv2d"]
    assert results["Conv2d"]["parameters"] == 4 * 4 * 25
    assert results["Conv2d"]["macs"] == 4 * 4 * 25 * 36
    assert results["DDFConv2d"]["parameters"] == results["DDF2d"]["parameters"] + 4 * 4
    assert all(found["forward_ms"] > 0 for found in results.values())


def test_model_before_and_after(run):
    ran = run(*tiny_model("--device", "cpu", "--dtype", "bfloat16", "--layout", "channels_last", "--json", "-"))
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)  # the model prints while it is built
    before, after = document["results"]["before"], document["results"]["after"]
    assert before["parameters"] == 3 * 32 * 9 + 32 + 32 * 32 * 9 + 32
    assert after["parameters"] < before["parameters"]
    assert after["macs"] < before["macs"]
    for found in (before, after):
        assert found["inference_images_per_s"] > 0
        assert found["training_images_per_s"] > 0


def test_a_model_that_cannot_run_is_one_line(run, folder):
    broken = f"{CONVOLUTIONS}, torch.nn.Flatten(), torch.nn.BatchNorm1d(32 * 256)"
    (folder / "net_for_bench.py").write_text(MODEL.format(broken))
    arguments = ("model", "net_for_bench:Net", "--input-size", 3, 16, 16, "--batch", 1, "--device", "cpu")
    ran = run(*arguments)  # batch norm cannot train on one image
    assert ran.code == 1
    said, error = ran.err.splitlines()
    assert said == "talks"
    assert error.startswith("error: net_for_bench:Net before conversion does not run on an input of 1x3x16x16")


def test_ctrl_c_leaves_nothing(run, folder, monkeypatch):
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(op, "run", interrupted)
    ran = run("op", "--json", "figures.json")
    assert ran.code == 130
    assert [path.name for path in folder.iterdir()] == ["net_for_bench.py"]


def test_a_peer_that_fails_is_a_gap_and_ours_an_error(run, monkeypatch):
    def fails(*arguments: object, **options: object) -> None:
        raise RuntimeError("not implemented here\nand a long story")

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "unfold", fails)
        ran = run("op", *TINY_OP, "--resolution", 5, "--layout", "contiguous", "--plot", "figures.png")
    assert ran.code == 0, ran.err
    assert "unfold, contiguous, 5x5: RuntimeError: not implemented here\n" in ran.out
    monkeypatch.setattr(ops, "ddf", fails)
    assert run("op", *TINY_OP, "--resolution", 5).code == 1


# --- what it measures with -------------------------------------------------------------------------------------------


class Clock:
    """Stands in for torch.cuda: a call costs the host some time, and the GPU, which works behind it, some other."""

    def __init__(self, host: float, gpu: float) -> None:
        self.host, self.gpu = host, gpu
        self.now = self.queue_ends = 0.0  # seconds

    def launch(self) -> None:
        self.now += self.host
        self.queue_ends = max(self.queue_ends, self.now) + self.gpu

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = clock.queue_ends = max(clock.queue_ends, clock.now)

            def synchronize(self) -> None:
                clock.now = max(clock.now, self.at)

            def elapsed_time(self, other: Any) -> float:
                return (other.at - self.at) * 1e3

        def sleep(cycles: int) -> None:
            clock.queue_ends = max(clock.queue_ends, clock.now) + cycles / 2e9

        def synchronize(device: object = None) -> None:
            clock.now = max(clock.now, clock.queue_ends)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", sleep)
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        monkeypatch.setattr(torch.cuda, "device", lambda device: measure.contextlib.nullcontext())
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))


@pytest.mark.parametrize(("host", "gpu"), [(20e-6, 3e-6), (20e-6, 5e-3), (2e-3, 1e-3)])
def test_the_hosts_time_is_hidden_on_a_gpu(monkeypatch, host, gpu):
    clock = Clock(host, gpu)
    clock.install(monkeypatch)
    where = torch.device("cuda", 0)
    assert timing.median_ms(clock.launch, where, 0.1) == pytest.approx(gpu * 1e3)
    assert timing.host_us(clock.launch, where, 0.1) == pytest.approx(host * 1e6)
    seen = timing.median_ms(clock.launch, where, 0.1, hide_host=False)
    assert max(host, gpu) * 1e3 <= seen * 1.0001
    assert seen <= (host + gpu) * 1e3


def test_inputs_take_turns_and_exceed_the_cache(monkeypatch):
    tensor = torch.empty(1000)  # 4000 bytes
    assert timing.copies_needed([tensor], CPU) == 1
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=10_000))
    copies = timing.copies_needed([tensor], torch.device("cuda", 0))
    assert copies * 4000 >= 4 * 10_000
    seen: list[int] = []
    call = timing.in_turn(seen.append, [(number,) for number in range(3)])
    for _ in range(7):
        call()
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_medians_on_the_cpu():
    assert timing.median_ms(lambda: time.sleep(0.003), CPU, 0.03) == pytest.approx(3, rel=0.5)
    assert timing.host_us(lambda: None, CPU, 0.1) is None


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts the pages")
def test_peak_memory_of_a_call():
    with measure.keep_freed_memory():
        torch.ones(2**24).sum()  # what it frees is there to be taken, and must not hide the need of the next
        assert measure.peak_mib(lambda: torch.ones(2**24).sum(), CPU) == pytest.approx(64, rel=0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_kept():
    resource = importlib.import_module("resource")

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(6):
            torch.ones(2**24)
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt) - before

    pages = 2**26 // 4096
    with measure.keep_freed_memory():
        faults()
        assert faults() < 6 * pages / 2  # the heap may find it another place once or twice
    assert measure.peak_mib(lambda: None, CPU) == pytest.approx(0, abs=8)


def test_bytes_that_must_be_moved():
    """Counted tensor by tensor, at stride 2."""
    input, channel, spatial = torch.empty(2, 8, 10, 12), torch.empty(2, 8, 3, 3), torch.empty(2, 9, 5, 6)
    output = torch.empty(2, 8, 5, 6)
    maps, filters, outputs = 4 * 2 * 8 * 120, 4 * (2 * 8 * 9 + 2 * 9 * 30), 4 * 2 * 8 * 30
    forward = maps + filters + outputs
    assert measure.forward_bytes(input, channel, spatial, output) == forward
    grad_input = outputs + filters + maps
    grad_filters = maps + outputs + 2 * filters
    both = measure.forward_backward_bytes(input, channel, spatial, output)
    assert both == forward + grad_input + grad_filters


def test_a_copys_bandwidth(monkeypatch):
    monkeypatch.setattr(measure, "median_ms", lambda call, device, seconds: 2.0)
    assert measure.copy_bandwidth(CPU, 0.01, size=4000) == 8000 / 2e-3


def test_precision_is_put_back():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def state() -> tuple[bool, bool, bool]:
        return cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32

    before = state()
    with measure.convolution_settings(tf32=not before[2]):
        assert state() == (True, not before[2], not before[2])
    assert state() == before


@pytest.mark.parametrize("column", ["DDF op", "unfold", "slices", "slices compiled"])
def test_the_forms_of_the_operator_agree(monkeypatch, column):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)  # it would need a C++ compiler
    work = op.OpWorkload(6, 4, 2, 5, "float64", "channels_last", CPU)
    torch.manual_seed(0)
    tensors = work.inputs()
    found = {each.name: each for each in work.implementations(compiled=True)}
    expected = ops.ddf(*tensors, padding=2)
    assert tensors[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(found[column].function(*tensors), expected)


def test_modules_have_the_workloads_dtype_and_layout():
    work = op.OpWorkload(6, 4, 2, 3, "bfloat16", "channels_last", CPU)
    for column in work.implementations(compiled=False):
        if isinstance(column.function, torch.nn.Module):
            assert {parameter.dtype for parameter in column.function.parameters()} == {torch.bfloat16}
            assert column.function(*work.inputs()[: column.inputs]).shape == (2, 4, 6, 6)


def test_settings_made_in_python_are_checked_too():
    with pytest.raises(UsageError, match="--heads 2: must divide the 3 channels"):
        layer.LayerSettings(
            **{**TINY_SETTINGS, "channels": 3},
            size=6,
            stride=1,
            dilation=1,
            heads=2,
            se_ratio=0.2,
            combine="mul",
            dtype="float32",
            layout="contiguous",
            tf32=False,
        )
    with pytest.raises(UsageError, match="plots are PNG"):
        plot.check_plot(Path("figures.pdf"))
