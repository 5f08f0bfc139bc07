"""A part of a data set."""

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

__all__ = ["Subset"]


class Subset(Dataset):
    """A subset of a map-style data set; timm's loader sets its data set's transform through it."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = indices

    @property
    def transform(self) -> Any:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.indices[index]]
