"""Second half of ``make demo``: loads the converted ResNet-50 in another process and compares.

``python scripts/demo_check.py DIR`` converts the same model in memory, from the same seed, and expects equal outputs of
the loaded one. Then it times the original and the converted model.
"""

from __future__ import annotations

import sys
import time

import timm
import torch
from torch import Tensor, nn

import ddf_convert as ddf

SEED = 0
PARAMETERS = 16_843_748  # of the authors' DDF-ResNet-50


def main(folder: str) -> None:
    torch.manual_seed(SEED)
    original = timm.create_model("resnet50").eval()
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(SEED))
    expected = ddf.convert(original, example_input=image).eval()
    loaded = ddf.load(folder).eval()
    with torch.inference_mode():
        equal = torch.equal(loaded(image), expected(image))
    parameters = ddf.count_parameters(loaded)
    print(f"outputs equal: {'yes' if equal else 'NO'}")
    print(f"parameters:    {parameters:,} ({'exactly as the authors have' if parameters == PARAMETERS else 'WRONG'})")
    before, after = milliseconds(original, image), milliseconds(loaded, image)
    threads = torch.get_num_threads()
    print(f"one image:     {before:.0f} ms before, {after:.0f} ms after (forward, float32, CPU with {threads} threads)")
    if not equal or parameters != PARAMETERS:
        sys.exit(1)


def milliseconds(model: nn.Module, image: Tensor, repeats: int = 10) -> float:
    """Returns the fastest of several forward passes: other work of the machine only adds to the others."""
    times = []
    with torch.inference_mode():
        for _ in range(repeats):
            start = time.perf_counter()
            model(image)
            times.append(time.perf_counter() - start)
    return 1000 * min(times)


if __name__ == "__main__":
    main(sys.argv[1])
