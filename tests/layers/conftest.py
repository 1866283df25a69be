"""Every test of the layers starts from one seed, and an empty compiler cache."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
