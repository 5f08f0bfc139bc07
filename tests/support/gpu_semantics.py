"""Have torch do on a CPU what it does on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["one_hot_as_on_a_gpu"]


def one_hot_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have torch's one_hot not read the least and the greatest class, as it does on a CPU alone."""

    def one_hot(index: Tensor, classes: int) -> Tensor:
        zeros = torch.zeros(*index.shape, classes, dtype=torch.int64, device=index.device)
        return zeros.scatter_(-1, index[..., None], 1)

    monkeypatch.setattr(F, "one_hot", one_hot)
