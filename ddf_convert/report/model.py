"""The report of a plan as plain data: what ``--json`` prints and ``report.json`` holds."""

from __future__ import annotations

import platform
from typing import Any

import timm
import torch

from ddf_convert.conversion.plan import Plan
from ddf_convert.version import __version__

FORMAT_VERSION = 1
_NOT_REPORTED = {"replacement_cost", "operation", "kernel_size", "override"}  # of a site


def report(plan: Plan, model: str | None = None) -> dict[str, Any]:
    """What a plan does to a model and what that saves, ready for ``json.dumps``.

    Args:
        plan: The plan.
        model: What to call the model; the plan's own words if None.

    Returns:
        ``model``; ``input_size`` (C, H, W); ``before`` and ``after``, each with ``params``, ``macs``
        (multiply-accumulates of one forward pass of the example input), ``activation_bytes`` (kept for the backward
        pass) and ``latency_ms`` (None where it was not measured, else on ``machine``); ``sites``, every convolution
        with ``name``, ``kind``, ``action``, ``reason``, shapes, ``calls``, ``replacement``, ``before`` and ``after``;
        ``notes``; and the ``config`` and ``versions`` that led to it.
    """
    return {
        "format": "ddf_convert report",
        "format_version": FORMAT_VERSION,
        "model": model or plan.model,
        "input_size": list(plan.input_size),
        "config": plan.config.model_dump(mode="json"),
        "versions": versions(),
        "machine": plan.machine,
        "before": plan.before.model_dump(),
        "after": plan.after.model_dump(),
        "sites": [site.model_dump(mode="json", exclude=_NOT_REPORTED) for site in plan.sites],
        "notes": plan.notes,
    }


def versions() -> dict[str, str]:
    """Of what counted and measured."""
    return {
        "ddf_convert": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }
