"""The commands ``bench op``, ``up``, ``layer`` and ``model``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddf_convert import cli, ops
from ddf_convert.bench import measure, op
from ddf_convert.bench import model as models

TINY_OP = ("--device", "cpu", "--channels", 4, "--batch", 1, "--seconds", 0.001)
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
def test_mistakes_are_reported_before_anything_is_measured(run, monkeypatch, arguments, words):
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
def test_a_missing_gpu_is_an_error(run):
    ran = run("op", "--device", "cuda")
    assert (ran.code, ran.err) == (2, "error: --device cuda: torch finds no NVIDIA GPU here; give cpu\n")


def test_a_missing_matplotlib_is_an_error(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    ran = run("op", "--plot", "figures.png")
    assert (ran.code, ran.err) == (2, "error: --plot needs matplotlib: pip install 'ddf-convert[plot]'\n")


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_layer_counts_what_it_measures(run):
    ran = run("layer", *TINY_LAYER, "--kernel-size", 5, "--heads", 2, "--dtype", "float64", "--json", "-")
    assert ran.code == 0, ran.err
    results = json.loads(ran.out)["results"]
    assert list(results) == ["Conv2d", "DDF2d", "DDFConv2d"]
    assert results["Conv2d"]["parameters"] == 4 * 4 * 25
    assert results["Conv2d"]["macs"] == 4 * 4 * 25 * 36
    assert results["DDFConv2d"]["parameters"] == results["DDF2d"]["parameters"] + 4 * 4
    assert all(found["forward_ms"] > 0 for found in results.values())


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_baseline_that_fails_is_a_gap_and_ours_an_error(run, monkeypatch):
    def fails(*arguments: object, **options: object) -> None:
        raise RuntimeError("not implemented here\nand a long story")

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "unfold", fails)
        ran = run("op", *TINY_OP, "--resolution", 5, "--layout", "contiguous", "--plot", "figures.png")
    assert ran.code == 0, ran.err
    assert "unfold, contiguous, 5x5: RuntimeError: not implemented here\n" in ran.out
    monkeypatch.setattr(ops, "ddf", fails)
    assert run("op", *TINY_OP, "--resolution", 5).code == 1
