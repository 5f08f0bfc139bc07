"""However a model comes to its weights, it computes what the original does."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from emax_testing import randn, randomise
from tiers import mostly_slow
from torch import Tensor, nn

import emax_timm

NAMES = ["test_resnet_emax", "test_convnext_emax", "resnet18_ema"]


def make(name: str, **kwargs: Any) -> Any:
    return timm.create_model(name, num_classes=5, **kwargs)


def original(name: str, **kwargs: Any) -> Any:
    """A model in eval mode whose weights are random in every part."""
    model = make(name, **kwargs).eval()
    for module in model.modules():
        if isinstance(module, emax_timm.EMAX):
            randomise(module)
    return model


def images(seed: int = 0) -> Tensor:
    return randn(2, 3, 64, 48, seed=seed, dtype=torch.float32)


@pytest.mark.parametrize("assign", [False, True], ids=["to_empty", "assign"])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_built_on_the_meta_device_computes_the_same(name: str, assign: bool) -> None:
    model = original(name)
    with torch.device("meta"):
        other = make(name)
    if not assign:
        other.to_empty(device="cpu")
        for tensor in [*other.parameters(), *other.buffers()]:
            tensor.detach().fill_(float("nan") if tensor.is_floating_point() else 7)
    other.load_state_dict(model.state_dict(), assign=assign)
    assert torch.equal(other.eval()(images()), model(images()))


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_holds_every_buffer_and_parameter(name: str) -> None:
    """Nothing is left to be filled by whoever loads it."""
    model = make(name)
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    assert set(model.state_dict()) == set(names)


INSERTED = ["regnetx_002", "densenet121", "vgg11"]  # a plain stage, and two that change their class


@pytest.mark.parametrize("name", mostly_slow(INSERTED, 0))
def test_inserted_attention_survives_copy_and_pickle(name: str) -> None:
    model = emax_timm.insert_attention(make(name).eval(), "emax")
    for layer in model.modules():
        if isinstance(layer, emax_timm.EMAX):
            nn.init.constant_(layer.residual_gate, 0.3)
    expected = model(images())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images()), expected)
        assert type(other.get_submodule("")) is type(model)
    layer = next(m for m in other.modules() if isinstance(m, emax_timm.EMAX))
    nn.init.ones_(layer.residual_gate)
    assert not torch.equal(other(images()), model(images())), "a copy is independent"


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    torch.set_num_threads(1)
    with torch.no_grad():
        return model(images)


@pytest.mark.parametrize("inserted", mostly_slow([False, True]))
def test_a_model_can_be_sent_to_a_spawned_process(inserted: bool) -> None:
    if inserted:
        model = emax_timm.insert_attention(make("densenet121").eval(), "emax")
    else:
        model = original("test_resnet_emax")
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply(_logits, (model, images()))
    torch.testing.assert_close(there, _logits(model, images()))


@pytest.mark.slow
def test_a_model_of_transformers_that_holds_one_survives_from_pretrained(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    class Config(transformers.PretrainedConfig):
        model_type = "holds_emax"

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.backbone = timm.create_model("resnet18_emax", num_classes=5)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            pass

        def forward(self, images: Tensor) -> Tensor:
            return self.backbone(images)

    model = Model(Config()).eval()
    for layer in model.modules():
        if isinstance(layer, emax_timm.EMAX):
            randomise(layer)
    model.save_pretrained(tmp_path)
    other = Model.from_pretrained(tmp_path).eval()
    assert torch.equal(other(images()), model(images()))


SHARDED = """
import os, sys, timm, torch, emax_timm
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
dist.init_process_group("gloo")
torch.manual_seed(0)
whole = timm.create_model("test_resnet_emax", num_classes=5)
for layer in whole.modules():
    if isinstance(layer, emax_timm.EMAX):
        torch.nn.init.normal_(layer.residual_gate, 1, 0.1)
with torch.device("meta"):
    model = timm.create_model("test_resnet_emax", num_classes=5)
for layer in model.modules():
    if isinstance(layer, emax_timm.EMAX):
        fully_shard(layer)
fully_shard(model)
model.to_empty(device="cpu")
options = StateDictOptions(full_state_dict=True)
set_model_state_dict(model, whole.state_dict(), options=options)
x = torch.randn(4, 3, 64, 48)
outputs = [module.eval()(x) for module in (whole, model)]
assert torch.equal(*outputs)
for out in outputs:
    out.square().sum().backward()
for (name, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
    torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, msg=name)
print("the same")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_model_sharded_by_fsdp2_from_the_meta_device_computes_and_learns_the_same(
    tmp_path: Path,
) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("the same") == 2
