"""The optimized denoiser for other programs: torch.export, ONNX, TensorRT."""

from evdit_opt.export.program import export_program
from evdit_opt.export.steps import export_onnx_steps
from evdit_opt.export.to_onnx import export_onnx

__all__ = ["export_onnx", "export_onnx_steps", "export_program"]
