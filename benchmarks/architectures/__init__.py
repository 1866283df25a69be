"""The parts of ``zoo.py``."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before timm is imported: nothing here may ever be downloaded
