"""The optimized denoiser for other programs: torch.export, ONNX, TensorRT."""

from evdit_opt.export.program import export_program

__all__ = ["export_program"]
