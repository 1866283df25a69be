"""Models in timm's registry; importing this package registers them."""

from ddf_convert.models import ddf_resnet

__all__ = ["ddf_resnet"]
