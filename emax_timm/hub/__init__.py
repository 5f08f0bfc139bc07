"""Taking models elsewhere: files that run without this package."""

from .export import export
from .exporter import ExportReport, export_model
from .verify import Check, ExportError

__all__ = ["Check", "ExportError", "ExportReport", "export", "export_model"]
