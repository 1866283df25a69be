"""The parts of benchmarks/recipes_mobilenet.py, recipes_vgg.py and recipes_mnist.py."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before timm is imported: what is needed comes by way of fetch_real.py
