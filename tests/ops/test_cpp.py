"""The C++ backend, built by a real compiler: once, whoever asks first."""

import os
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from backend_harness import Tolerances, exact_results
from backend_tester import BackendTester
from emax_testing import force
from filelock import FileLock

from emax_timm.attention import EMAX
from emax_timm.ops import BackendError, use_backend
from emax_timm.ops.cpp import library

pytestmark = [pytest.mark.cpp, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", autouse=True)
def _loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let this process have the library, in this file: other tests ask for the portable backend."""
    # A folder that all workers share.
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with pytest.MonkeyPatch.context() as patch:
        if not library.library_path().is_file():
            patch.setenv("EMAX_KERNELS_DIR", str(shared / "kernels"))
            with FileLock(shared / "kernels.lock"):
                if not library.library_path().is_file():
                    library.build()
        if library._problem is not None:
            patch.setattr(library, "_problem", library._NOT_TRIED)
            assert library.problem() is None
        yield


class TestCpp(BackendTester):
    name = "cpp"
    dtypes: ClassVar = {
        torch.float32: Tolerances(1e-6, 3e-5, 1e-3),
        torch.bfloat16: Tolerances(4e-3, 3e-5, 2e-3),
    }
    operators = ("emax_timm.forward", "emax_timm.backward")

    @pytest.mark.parametrize("batch", [1, 3, 4])
    @pytest.mark.parametrize("batch_vote", [False, True])
    def test_two_threads(self, batch: int, batch_vote: bool, dtype: torch.dtype) -> None:
        """They take samples each, or share the tiles of all of them."""
        threads = torch.get_num_threads()
        module = self.layer(EMAX, 64, batch_vote=batch_vote)
        force(module, 4)
        torch.set_num_threads(2)
        try:
            self.check(module, self.features(batch, 64, 36, 30, dtype=dtype))
        finally:
            torch.set_num_threads(threads)

    def test_batches_that_do_not_fit_into_the_cache(self, dtype: torch.dtype) -> None:
        """They go through the passes a few samples at a time."""
        module = self.layer(EMAX, 256).train()
        force(module, 4, margin=0.0)
        self.check(module, self.features(9, 256, 28, 28, dtype=dtype), seed=1)

    def test_scratch_memory_is_large_enough_for_every_size(self) -> None:
        """Sizes around those of vectors, where a sum that reads too far meets other numbers."""
        for d in (1, 7, 8, 9, 31, 33):
            module = self.layer(EMAX, 2 * d, factor=2)
            force(module, 1)
            for size in ((1, 8), (4, 9), (5, 8), (9, 1), (16, 17), (3, 57)):
                self.check(module, self.features(2, 2 * d, *size))

    def test_transforms_of_torch_func_get_another_backend(self) -> None:
        """They do not see into an operator: asked for, it says so."""
        module, x = self.layer(EMAX, 64), self.features(4, 2, 64, 5, 7)
        with pytest.raises(BackendError, match="cpp was asked for, but transforms of"):
            torch.vmap(module)(x)
        with use_backend("auto"), torch.no_grad():
            together = torch.vmap(module)(x)
        assert self.calls == {"portable.forward": 1}
        expected = torch.stack([module(images) for images in x])
        torch.testing.assert_close(together, expected)

    def test_exactness_can_be_told_from_a_slightly_wrong_layer(self) -> None:
        """The tolerance notices a weight that is off by a thousandth."""
        module, x = self.layer(EMAX, 64), self.features(2, 64, 7, 7)
        exact = exact_results(module, x)
        with torch.no_grad():
            module.conv3x3.weight[0, 0, 0, 1] *= 1.001
        error = (self.compute(module, x)["out"].double() - exact["out"]).abs().max()
        assert error > self.dtypes[x.dtype].features
