"""Attention at the end of a module of timm, whose own parameters keep their names."""

import functools
from collections.abc import Callable
from typing import Any

from timm.models import regnet
from torch import nn

from .tokens import TokenAttention, grid_of, run_on_grid

__all__ = ["append", "with_grid"]

Make = Callable[[type[nn.Module]], type[nn.Module]]


def append(module: nn.Module, attention: nn.Module) -> None:
    """Make a module end with `attention`, a child of it, in place.

    Args:
        module: A module that returns one tensor.
        attention: A module that takes it; `TokenAttention` is also given the grid.
    """
    if isinstance(attention, TokenAttention):
        module.__class__ = with_token_attention(type(module))
    # Modules of these classes run all their children in turn.
    elif not isinstance(module, nn.Sequential | regnet.RegStage):
        module.__class__ = with_attention(type(module))
    module.add_module("attention", attention)


@functools.cache
def with_attention(cls: type[nn.Module]) -> type[nn.Module]:
    """Make a subclass of `cls` whose output goes through `self.attention`.

    The attention is a child of the module itself, so that the parameters of both have plain names.
    A forward hook would be lost in TorchScript and in torch.export.
    """

    def forward(self, *args, **kwargs):
        return self.attention(cls.forward(self, *args, **kwargs))

    namespace: dict[str, Any] = {"forward": forward}
    if issubclass(cls, nn.ModuleDict):
        # The blocks of DenseNet run all of their items.
        namespace["items"] = lambda self: [
            (name, layer) for name, layer in self._modules.items() if name != "attention"
        ]
    return derived(with_attention, cls, namespace)


@functools.cache
def with_token_attention(cls: type[nn.Module]) -> type[nn.Module]:
    """Make a subclass of `cls` whose output goes through `self.attention` with its grid."""

    def forward(self, x, *args, **kwargs):
        grid = grid_of(x)
        return self.attention(cls.forward(self, x, *args, **kwargs), grid)

    return derived(with_token_attention, cls, {"forward": forward})


@functools.cache
def with_grid(cls: type[nn.Module]) -> type[nn.Module]:
    """Make a subclass of a model's class that says on which grid the tokens of its blocks lie."""

    def entry(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def on_grid(self, x, *args, **kwargs):
            return run_on_grid(method, self, x, *args, **kwargs)

        return on_grid

    names = ("forward", "forward_features", "forward_intermediates")
    namespace = {name: entry(getattr(cls, name)) for name in names if hasattr(cls, name)}
    return derived(with_grid, cls, namespace)


def derived(make: Make, cls: type[nn.Module], namespace: dict[str, Any]) -> type[nn.Module]:
    """Make a subclass of `cls` whose objects can be pickled.

    Args:
        make: The function that makes this subclass of `cls`: pickle cannot import the subclass, and
            calls the function instead.
        cls: The class.
        namespace: What the subclass has of its own.
    """

    def reduce_ex(self, protocol):
        _, _, *state = cls.__reduce_ex__(self, protocol)
        return _empty, (make, cls), *state

    own: dict[str, Any] = {**namespace, "__reduce_ex__": reduce_ex, "__module__": __name__}
    return type(f"{cls.__name__}WithAttention", (cls,), own)  # pyright: ignore[reportReturnType]


def _empty(make: Make, cls: type[nn.Module]) -> nn.Module:
    """Create an object of a derived class, for pickle to fill."""
    kind = make(cls)
    return kind.__new__(kind)
