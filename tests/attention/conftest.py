"""Failures in the contracts are shown with values, as those in test modules are."""

import pytest

pytest.register_assert_rewrite("attention_contract", "graph_contract", "ema_contract")
