"""The portable backend, in all of its dtypes."""

from typing import ClassVar

import torch
from backend_harness import Tolerances
from backend_tester import BackendTester


class TestPortable(BackendTester):
    name = "portable"
    dtypes: ClassVar = {
        torch.float64: Tolerances(1e-13, 1e-12, 1e-10),
        torch.float32: Tolerances(1e-6, 1e-5, 1e-3),
        # Half precision is that of the input and output alone: 4e-3 and 5e-4 are half a unit in
        # the last place.
        torch.bfloat16: Tolerances(4e-3, 1e-5, 2e-3),
        torch.float16: Tolerances(5e-4, 1e-5, 2e-3),
    }
