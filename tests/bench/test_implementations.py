"""What is measured side by side computes the same; settings and results as plain data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paths import BENCHMARKS

from ddf_convert import ops
from ddf_convert.bench import layer, op, plot, up
from ddf_convert.errors import UsageError

CPU = torch.device("cpu")
TINY_SETTINGS: dict[str, Any] = {"channels": 4, "batch": 1, "kernel_size": 3, "device": CPU, "seconds": 0.001}


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


@pytest.mark.slow
def test_results_keep_the_keys_of_older_runs():
    """Pages that quote stored results find the same keys in new ones."""
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
