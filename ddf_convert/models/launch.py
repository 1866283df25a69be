"""Runs a script that knows nothing of this package with the DDF-ResNets registered in timm.

``python -m ddf_convert.models.launch train.py --model ddf_mul_resnet50`` is otherwise ``python train.py ...``. It works
under torchrun as well: ``torchrun --nproc-per-node 4 -m ddf_convert.models.launch train.py ...``.
"""

from __future__ import annotations

import os
import runpy
import sys

import ddf_convert  # noqa: F401  (registers the models)

USAGE = "python -m ddf_convert.models.launch SCRIPT [ARGUMENTS...]"


def main(arguments: list[str]) -> None:
    """Runs ``arguments[0]`` as ``__main__``, with the rest as its arguments; exits as the script does.

    Args:
        arguments: The script's path and its arguments. Without a script that exists, one line and exit code 2.
    """
    if not arguments:
        _refuse(f"no script was given: {USAGE}")
    script = arguments[0]
    if not os.path.isfile(script):
        _refuse(f"{script}: {'is a folder, not a script' if os.path.isdir(script) else 'no such script'}; {USAGE}")
    sys.argv = list(arguments)
    sys.path[0] = os.path.dirname(os.path.abspath(script))  # as Python does: the script's neighbors can be imported
    runpy.run_path(script, run_name="__main__")


def _refuse(reason: str) -> None:
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
