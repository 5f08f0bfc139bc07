"""Seeing what a model attends to: its maps, figures of them, a report."""

from .capture import GateMaps, attention_of, capture_attention
from .figures import visualize_attention
from .gradcam import grad_cam

__all__ = ["GateMaps", "attention_of", "capture_attention", "grad_cam", "visualize_attention"]
