"""Benchmarks of time, memory and size: the commands behind the tables of the documentation."""

from .model_table import ModelRow, list_models, markdown, measure, model_names

__all__ = ["ModelRow", "list_models", "markdown", "measure", "model_names"]
