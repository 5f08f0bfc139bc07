"""The Triton backend: on the GPU that EMAX_TEST_DEVICE names, else interpreted on the CPU."""

import os
from typing import ClassVar

import pytest
import torch
from backend_harness import Tolerances
from backend_tester import BackendTester

DEVICE = os.environ.get("EMAX_TEST_DEVICE", "cpu")


class TestTriton(BackendTester):
    name = "triton"
    device = DEVICE
    dtypes: ClassVar = {
        torch.float32: Tolerances(1e-6, 3e-5, 1e-3),
        torch.bfloat16: Tolerances(4e-3, 3e-5, 2e-3),
        torch.float16: Tolerances(5e-4, 3e-5, 2e-3),
    }
