"""Exports models as ONNX and ``torch.export`` files, checked against PyTorch before they are written."""

from ddf_convert.export.checking import Check, Exported
from ddf_convert.export.onnx_file import OPSET, to_onnx
from ddf_convert.export.sizes import Size
from ddf_convert.export.torch_file import to_torch_export

__all__ = ["OPSET", "Check", "Exported", "Size", "to_onnx", "to_torch_export"]
