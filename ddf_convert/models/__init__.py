"""Models: DDF-ResNets in timm's registry (importing this package registers them), and DDF-Up-Net."""

from ddf_convert.models import ddf_resnet
from ddf_convert.models.ddf_upnet import DDFUpNet, JointConvUpNet

__all__ = ["DDFUpNet", "JointConvUpNet", "ddf_resnet"]
