"""The steps of the pass over x, against a plain statement of what they compute."""

import pytest
import torch
import torch.nn.functional as F
from emax_testing import randn

from emax_timm.attention.fine_maps import border_means


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (2, 2), (1, 2), (7, 5)], ids=str)
def test_border_means_are_the_means_of_the_nine_one_tap_convolutions(size: tuple[int, int]) -> None:
    x = randn(2, 3, 4, *size)
    images = x.reshape(-1, 1, *size)
    expected = F.conv2d(images, torch.eye(9).double().view(9, 1, 3, 3), padding=1).mean((2, 3))
    actual = border_means(x, x.mean(4), x.mean(3))
    torch.testing.assert_close(actual, expected.view(2, 3, 4, 9), rtol=0, atol=1e-14)
