"""What a model attends to: its attention maps, figures of them, and a report."""

from ..models.capture import GateMaps, attention_of, capture_attention
from ..models.gradcam import grad_cam
from .figures import visualize_attention

__all__ = ["GateMaps", "attention_of", "capture_attention", "grad_cam", "visualize_attention"]
