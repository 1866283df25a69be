"""DDF2d and DDFUp2d give the outputs of the authors' implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.layer_helpers import LAYOUTS, golden_cases, golden_layer, pretend_cuda, use_reference, with_hooks
from support.tolerances import far
from torch import nn

from ddf_convert.layers import DDF2d, DDFUp2d

CASES = [(layer, case) for layer in (DDF2d, DDFUp2d) for case in golden_cases(layer.__name__)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("backend", ["kernels", "reference", "normalized by the operator", "single modules"])
@pytest.mark.parametrize(("kind", "case"), CASES, ids=[case["file"] for _, case in CASES])
def test_outputs_are_the_authors(
    kind: type[nn.Module],
    case: dict[str, Any],
    backend: str,
    layout: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, input, expected = golden_layer(kind, case)
    if backend == "reference":
        use_reference(monkeypatch)
    elif backend == "normalized by the operator":
        pretend_cuda(monkeypatch)
    elif backend == "single modules":
        layer = with_hooks(layer)
    output = layer(input.to(memory_format=layout))
    torch.testing.assert_close(output, expected, **far(torch.float64, output))
    assert backend == "reference" or output.is_contiguous(memory_format=layout)


def test_all_golden_cases_are_there() -> None:
    assert [kind for kind, _ in CASES] == [DDF2d] * 3 + [DDFUp2d] * 2
