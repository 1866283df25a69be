"""Runs a script with the DDF-ResNets registered in timm: ``python -m ddf_convert.models.launch train.py ...``.

It works under torchrun too: ``torchrun --nproc-per-node 4 -m ddf_convert.models.launch train.py ...``.
"""

from __future__ import annotations

import os
import runpy
import sys

import ddf_convert  # noqa: F401  (registers the models)

USAGE = "python -m ddf_convert.models.launch SCRIPT [ARGUMENTS...]"


def main(arguments: list[str]) -> None:
    """Runs the script ``arguments[0]`` as ``__main__`` with the rest as its arguments, and exits as it does.

    If there is no such script, it prints one line and exits with code 2.
    """
    if not arguments:
        _refuse(f"no script was given: {USAGE}")
    script = arguments[0]
    if not os.path.isfile(script):
        _refuse(f"{script}: {'is a folder, not a script' if os.path.isdir(script) else 'no such script'}; {USAGE}")
    sys.argv = list(arguments)
    sys.path[0] = os.path.dirname(os.path.abspath(script))  # as Python does, for imports from the script's folder
    runpy.run_path(script, run_name="__main__")


def _refuse(reason: str) -> None:
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
