"""Every attention of the factory keeps the contract, bare and behind a gate."""

from typing import Any, ClassVar

import pytest
from attention_contract import AttentionContract, GateContract
from ema_contract import EMAContract
from graph_contract import CompileContract, ExportContract, GraphContract

slow = pytest.mark.slow


class GatedContract(GateContract, ExportContract, CompileContract):
    """What takes seconds is tested behind the gate alone, which has the bare attention inside."""

    gate_init = 0.5


class TestEMA(EMAContract):
    name = "ema"
    sizes = ("channels", "factor")


@slow
class TestGatedEMA(GatedContract, GraphContract):
    name = "ema"
    exact_under_autocast = True


class TestSE(AttentionContract, GraphContract):
    name = "se"


class TestGatedSE(GateContract, TestSE):
    gate_init = 0.5


@slow
class TestGraphsOfGatedSE(ExportContract, CompileContract):
    name = "se"
    gate_init = 0.5


@slow
class TestECA(AttentionContract, GraphContract):
    name = "eca"


@slow
class TestGatedECA(GatedContract, TestECA):
    pass


@slow
class TestCBAM(AttentionContract, GraphContract):
    name = "cbam"


@slow
class TestGatedCBAM(GatedContract, TestCBAM):
    pass


@slow
class TestCoord(AttentionContract, GraphContract):
    name = "coord"


@slow
class TestGatedCoord(GatedContract, TestCoord):
    pass


@slow
class TestMSA(AttentionContract, GraphContract):
    name = "msa"
    sizes = ("channels", "head_dim", "max_size")


@slow
class TestGatedMSA(GatedContract, TestMSA):
    pass


# EMAX has a gate of its own, and parts that it can lack -------------------------------------------


class EMAXContract(GateContract, EMAContract):
    name = "emax"


class TestEMAX(EMAXContract, ExportContract, CompileContract):
    sizes = ("channels", "factor", "reduction")
    exact_under_autocast = True


class Variant(EMAXContract):
    widths = (2, 40)


@slow
class TestEMAXFinest(Variant):
    knobs: ClassVar[dict[str, Any]] = {"group_counts": "finest"}


@slow
class TestEMAXWithoutFinest(Variant):
    knobs: ClassVar[dict[str, Any]] = {"group_counts": [1, 2]}


@slow
class TestEMAXOneCoarse(Variant):
    knobs: ClassVar[dict[str, Any]] = {"group_counts": [2]}


@slow
class TestEMAXNoChannelGate(Variant):
    knobs: ClassVar[dict[str, Any]] = {"channel_gate": False}


@slow
class TestEMAXNoGlobalGate(Variant):
    knobs: ClassVar[dict[str, Any]] = {"global_gate": False}


@slow
class TestEMAXSpatialOnly(Variant):
    knobs: ClassVar[dict[str, Any]] = {"channel_gate": False, "global_gate": False}


@slow
class TestEMAXOneHiddenUnit(Variant):
    knobs: ClassVar[dict[str, Any]] = {"reduction": 1000}


@slow
class TestEMAXBatchVote(Variant):
    knobs: ClassVar[dict[str, Any]] = {"batch_vote": True}
    independent = False  # the batch votes on the group count
