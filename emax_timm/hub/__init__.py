"""Releases on the Hugging Face Hub, export to ONNX and torch.export, and prediction."""

from ..models.export_check import Check, ExportError
from ..models.export_file import ExportReport, export_model
from .export import export
from .predict import Prediction, predict, predictions
from .publish import publish

__all__ = [
    "Check",
    "ExportError",
    "ExportReport",
    "Prediction",
    "export",
    "export_model",
    "predict",
    "predictions",
    "publish",
]
