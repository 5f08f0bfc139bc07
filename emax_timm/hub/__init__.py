"""Taking models elsewhere: releases on the Hugging Face Hub, and files that run without us."""

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
