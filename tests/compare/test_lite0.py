"""Attention inserted into a real pretrained network leaves its outputs as they are, to the bit."""

from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from emax_timm.attention import ATTENTIONS
from emax_timm.compare import lite0
from emax_timm.samples.scenes import load_sample
from emax_timm.training import TrainConfig
from emax_timm.training.build import build_trainer
from emax_timm.training.distributed import DistributedContext

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def images() -> Tensor:
    items = torch.from_numpy(load_sample("test")[0][:8]).float().unsqueeze(1) / 127.5 - 1
    return nn.functional.interpolate(items, size=96, mode="bilinear").expand(-1, 3, -1, -1)


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.eval()(images)


@pytest.fixture(scope="module")
def plain(lite0_weights: Path, images: Tensor) -> Tensor:
    overlay = {"file": str(lite0_weights)}
    model = timm.create_model(lite0.MODEL, pretrained=True, pretrained_cfg_overlay=overlay)
    return logits(model, images)


def test_weights_are_those_of_a_trained_network(lite0_weights: Path) -> None:
    """It finds ImageNet's words for a pullover, a coat and an ankle boot of Fashion-MNIST."""
    items = torch.from_numpy(load_sample("test")[0][[200, 400, 900]]).float().unsqueeze(1)
    large = nn.functional.interpolate(items / 127.5 - 1, size=160, mode="bilinear")
    overlay = {"file": str(lite0_weights)}
    model = timm.create_model(lite0.MODEL, pretrained=True, pretrained_cfg_overlay=overlay)
    best = logits(model, large.expand(-1, 3, -1, -1)).topk(5).indices.tolist()
    sweatshirt, trench_coat, cowboy_boot = 841, 869, 514
    assert sweatshirt in best[0]
    assert trench_coat in best[1]
    assert cowboy_boot in best[2]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_closed_attention_leaves_the_logits_to_the_bit(
    attention: str, lite0_weights: Path, images: Tensor, plain: Tensor
) -> None:
    model = timm.create_model(
        "with_attention",
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": safetensors.torch.load_file(lite0_weights)},
        base_model=lite0.MODEL,
        attention=attention,
        where="block",
    )
    gates = [p for name, p in model.named_parameters() if name.endswith("residual_gate")]
    assert len(gates) == 16
    assert torch.equal(logits(model, images), plain)
    with torch.no_grad():
        for gate in gates:
            gate.fill_(0.1)
    assert not torch.equal(logits(model, images), plain)


@pytest.mark.parametrize("attention", ["emax", "se"])
def test_fine_tuning_starts_where_the_plain_network_starts(
    attention: str, lite0_weights: Path, images: Tensor, tmp_path: Path
) -> None:
    inserted = {"base_model": lite0.MODEL, "attention": attention, "where": "block"}
    models = []
    for name, arguments in ((lite0.MODEL, {}), ("with_attention", inserted)):
        config = TrainConfig(
            dataset="scenes/sample_96",
            val_split="validation",
            model=name,
            model_kwargs=arguments,
            pretrained_path=str(lite0_weights),
            img_size=96,
            output=str(tmp_path),
            experiment=name,
            device="cpu",
            workers=0,
        )
        trainer = build_trainer(config, DistributedContext(torch.device("cpu")))
        assert trainer.model.num_classes == 10
        models.append(trainer.model)
    stored = safetensors.torch.load_file(lite0_weights)
    assert torch.equal(models[1].state_dict()["conv_stem.weight"], stored["conv_stem.weight"])
    assert torch.equal(*(logits(model, images) for model in models))
