"""The way out: models as ONNX and ``torch.export`` files, checked against PyTorch before they are written."""

from ddf_convert.export.onnx_file import OPSET, to_onnx
from ddf_convert.export.result import Check, Exported, Size
from ddf_convert.export.torch_file import to_torch_export

__all__ = ["OPSET", "Check", "Exported", "Size", "to_onnx", "to_torch_export"]
