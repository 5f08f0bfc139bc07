"""A page to try a model on: its classes, what it attends to, Grad-CAM. Spaces of the Hub run it."""

from .command import demo, serve

__all__ = ["demo", "serve"]
