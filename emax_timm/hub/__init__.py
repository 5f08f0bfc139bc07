"""Taking models elsewhere: releases on the Hugging Face Hub, and files that run without us."""

from .export import export
from .exporter import ExportReport, export_model
from .predict import Prediction, predict, predictions
from .publish import publish
from .verify import Check, ExportError

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
