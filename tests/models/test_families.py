"""The families of models as timm users meet them."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_testing import in_new_process
from tiers import mostly_slow
from timm.optim import create_optimizer_v2
from torch import nn

import emax_timm
from emax_timm.attention import ATTENTIONS, GatedAttention
from emax_timm.models.placement import ConvNeXtAttentionBlock

MODULES = ("emax_resnet", "emax_convnext", "emax_mobilenet")
NAMES = [name for module in MODULES for name in timm.list_models(module=module)]
# A model per family.
SMALL = ("resnet10t_emax", "convnext_atto_emax", "convnextv2_atto_emax", "mobilenetv2_100_emax")
# With linear layers and layer scale, which the atto models have not both.
OPTIONS: dict[str, dict[str, Any]] = {
    "convnextv2_atto_emax": {"conv_mlp": False, "ls_init_value": 0.5}
}


def small_model(name: str, **kwargs: Any) -> Any:
    return timm.create_model(name, num_classes=3, **OPTIONS.get(name, {}), **kwargs)


def baseline_of(name: str, **kwargs: Any) -> Any:
    return timm.create_model(name.rpartition("_")[0], **kwargs)


def attentions(model: nn.Module) -> dict[str, Any]:
    kinds = (emax_timm.EMAX, GatedAttention)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def open_gates(model: nn.Module) -> None:
    """No layer scale, norm or gate may hide the attention."""
    torch.manual_seed(1)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("residual_gate"):
            tensor.uniform_(0.2, 0.8)
        elif name.endswith(".gamma"):
            tensor.fill_(0.5)


def test_registered_names_are_the_issue_of_backbones_and_attentions() -> None:
    emax = [
        *(f"resnet{depth}_emax" for depth in ("10t", "14t", 18, 26, 34, 50, "50d", 101, 152)),
        *("resnext50_32x4d_emax", "wide_resnet50_2_emax", "mobilenetv2_100_emax"),
        *(
            f"convnext_{size}_emax"
            for size in ("atto", "femto", "pico", "nano", "tiny", "small", "base")
        ),
        *(f"convnextv2_{size}_emax" for size in ("atto", "nano", "tiny")),
        *("test_resnet_emax", "test_convnext_emax"),
    ]
    compared = [
        f"{backbone}_{attention}"
        for backbone in ("resnet18", "resnet50", "convnext_atto", "convnext_tiny")
        for attention in ("ema", "cbam", "se", "eca", "coord", "msa")
    ]
    assert sorted(NAMES) == sorted(emax + compared)


@pytest.mark.parametrize("name", mostly_slow(NAMES, *map(NAMES.index, SMALL)))
def test_model_is_its_baseline_plus_attention_in_every_block(name: str) -> None:
    with torch.device("meta"):
        model: Any = timm.create_model(name, num_classes=1000)  # also where its own weights have 10
        baseline = baseline_of(name)
    ours = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    theirs = {key: tuple(value.shape) for key, value in baseline.state_dict().items()}
    assert ours.items() >= theirs.items()
    assert all(".se." in key or ".attention." in key for key in ours.keys() - theirs.keys())
    layers = attentions(model)
    if "convnext" in name:
        blocks = [m for m in model.modules() if isinstance(m, ConvNeXtAttentionBlock)]
        widths = [block.conv_dw.out_channels for block in blocks]
    elif "mobilenet" in name:
        blocks = [block for stage in model.blocks for block in stage]
        widths = [block.conv_dw.out_channels for block in blocks]
    else:
        blocks = [m for n, m in model.named_modules() if n.count(".") == 1 and "layer" in n]
        widths = [(b.bn3 if hasattr(b, "bn3") else b.bn2).num_features for b in blocks]
    assert [len(layer.residual_gate) for layer in layers.values()] == widths
    assert len(widths) >= 4
    attention = ATTENTIONS[name.rpartition("_")[2]]
    for layer in layers.values():
        assert type(layer.attention if isinstance(layer, GatedAttention) else layer) is attention


@pytest.mark.parametrize("name", NAMES)
def test_default_config_is_the_baselines(name: str) -> None:
    baseline = timm.models.get_pretrained_cfg(name.rpartition("_")[0])
    assert baseline is not None
    own_weights = name in ("test_resnet_emax", "test_convnext_emax")
    ours = timm.models.get_pretrained_cfg(f"{name}.{baseline.tag}_warm" if own_weights else name)
    assert ours is not None
    for key in ("input_size", "pool_size", "mean", "std", "interpolation", "crop_pct"):
        assert getattr(ours, key) == getattr(baseline, key), key
    assert (ours.first_conv, ours.classifier) == (baseline.first_conv, baseline.classifier)
    assert ours.architecture == name
    warm = None if "convnextv2" in name else f"{baseline.tag}_warm"
    assert ours.tag == warm
    assert bool(ours.has_weights) == (warm is not None)


@pytest.mark.parametrize("name", mostly_slow(SMALL, 0))
def test_seed_gives_the_backbone_the_weights_of_its_baseline(name: str) -> None:
    torch.manual_seed(0)
    model = small_model(name)
    torch.manual_seed(0)
    baseline = baseline_of(name, num_classes=3, **OPTIONS.get(name, {}))
    for key, value in baseline.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize("attention", mostly_slow(ATTENTIONS, 0, 3))
@pytest.mark.parametrize("name", mostly_slow(SMALL, 0, 1))
def test_attention_by_name_behind_a_closed_gate_changes_nothing(name: str, attention: str) -> None:
    model = small_model(name, attn_layer=attention, attn_kwargs={"gate_init": 0.0}).eval()
    open_gates(model)
    baseline = baseline_of(name, num_classes=3, **OPTIONS.get(name, {})).eval()
    missing, unexpected = baseline.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert unexpected
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        opened = model(images)
        for layer in attentions(model).values():
            assert layer.residual_gate.shape
            layer.residual_gate.zero_()
        assert torch.equal(model(images), baseline(images))
        assert not torch.allclose(opened, baseline(images), rtol=1e-3)


@pytest.mark.parametrize("name", ["convnext_atto_emax", "convnextv2_atto_emax"])
def test_convnext_attends_between_mlp_and_layer_scale(name: str) -> None:
    model = small_model(name).eval()
    open_gates(model)
    block: Any = model.stages[1].blocks[1]
    x = torch.randn(2, 80, 9, 7)
    with torch.no_grad():
        y = block.conv_dw(x)
        if name == "convnextv2_atto_emax":
            assert isinstance(block.mlp.fc1, nn.Linear)
            y = block.mlp(block.norm(y.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        else:
            y = block.mlp(block.norm(y))
        y = block.attention(y) * block.gamma[:, None, None] + x
        assert torch.allclose(block(x), y, atol=1e-6)
        # The order matters here.
        assert not torch.allclose(block.gamma, torch.ones(()))


def test_convnext_drops_paths() -> None:
    model = small_model("convnext_atto_emax", drop_path_rate=0.5)
    rates = [block.drop_path for stage in model.stages for block in stage.blocks]
    assert isinstance(rates[0], nn.Identity)
    assert rates[-1].drop_prob == pytest.approx(0.5)
    block: Any = model.stages[3].blocks[1].train()
    x = torch.randn(64, 320, 2, 2)
    dropped = (block(x) == x).flatten(1).all(1).float().mean()
    assert 0.2 < dropped < 0.8


def test_mobilenet_attends_after_the_depthwise_convolution() -> None:
    model = small_model("mobilenetv2_100_emax").eval()
    open_gates(model)
    block = model.blocks[1][1]
    x = torch.randn(2, 24, 9, 7)
    with torch.no_grad():
        y = block.bn2(block.conv_dw(block.bn1(block.conv_pw(x))))
        y = block.bn3(block.conv_pwl(block.se(y))) + x
        assert torch.allclose(block(x), y, atol=1e-5)


def test_mobilenet_with_ema_has_the_published_number_of_parameters() -> None:
    # https://github.com/YOLOonMe/EMA-attention-module reports 3.55 M, against 3.50 M without.
    with torch.device("meta"):
        model = timm.create_model("mobilenetv2_100_emax", attn_layer="ema")
    own = [p.numel() for n, p in model.named_parameters() if not n.endswith("residual_gate")]
    assert round(sum(own) / 1e6, 2) == 3.55


@pytest.mark.parametrize("name", SMALL)
def test_attention_keeps_its_own_initialisation(name: str) -> None:
    for layer in attentions(small_model(name)).values():
        assert torch.equal(layer.conv3x3.bias, torch.full_like(layer.conv3x3.bias, 2.0))
        bound = layer.conv3x3.weight[0].numel() ** -0.5
        assert layer.conv3x3.weight.abs().max() <= bound  # torch's default, not the backbone's
        assert layer.gamma.item() == 0
        assert torch.equal(layer.residual_gate, torch.ones_like(layer.residual_gate))


STAGES = {"resnet": ["layer2", "layer4"], "convnext": ["stages.1", "stages.3"]}


@pytest.mark.parametrize("name", SMALL[:3])
def test_attn_stages_choose_where(name: str) -> None:
    prefixes = STAGES[name.split("1")[0].split("_")[0].removesuffix("v2")]
    chosen = attentions(small_model(name, attn_stages=[1, 3]))
    assert {layer[: len(prefixes[0])] for layer in chosen} == set(prefixes)
    assert not attentions(small_model(name, attn_stages=()))


def test_attn_stages_of_mobilenet_are_those_of_its_features() -> None:
    chosen = attentions(small_model("mobilenetv2_100_emax", attn_stages=[0, 3]))
    # Stride 16 is two sequences of blocks, of which timm's feature_info names the last.
    assert sorted({layer[:8] for layer in chosen}) == ["blocks.0", "blocks.3", "blocks.4"]


def test_attn_kwargs_choose_how() -> None:
    options = {"factor": 8, "group_counts": "finest"}
    layers = attentions(small_model("resnet10t_emax", attn_kwargs=options)).values()
    assert all(layer.candidates == [8] for layer in layers)
    ungated = small_model("resnet10t_emax", attn_layer="se", attn_kwargs={"gate_init": None})
    assert not attentions(ungated)
    assert "layer1.0.se.fc1.weight" in ungated.state_dict()


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"attn_stages": (0, 9)}, ValueError, r"0 to [34], not \[9\]"),
        ({"attn_stages": (-1,)}, ValueError, r"0 to [34], not \[-1\]"),
        ({"attn_kwargs": {"facto": 8}}, TypeError, "facto"),
        ({"attn_kwargs": {"factor": 0}}, ValueError, "factor"),
        ({"attn_kwargs": {"group_counts": [5]}, "attn_stages": [0]}, ValueError, r"\[5\]"),
        ({"attn_layer": "emx"}, ValueError, "emax, ema, cbam"),
        ({"attn_stage": (0,)}, TypeError, "attn_stage"),
    ],
)
@pytest.mark.parametrize(
    "name", mostly_slow(["resnet10t_emax", "convnext_femto_emax", "mobilenetv2_100_emax"], 0)
)
def test_wrong_options_are_refused(
    name: str, kwargs: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        small_model(name, **kwargs)


@pytest.mark.parametrize("name", mostly_slow(SMALL, 0, 1))
def test_features_are_the_intermediates(name: str) -> None:
    model = small_model(name).eval()
    open_gates(model)
    images = torch.randn(2, 3, 64, 64)
    extractor: Any = small_model(name, features_only=True).eval()
    own = extractor.state_dict()
    # timm flattens the sequences that a family's feature_cfg tells it to.
    named = {
        re.sub(r"^(stem|stages|blocks)\.", r"\1_", key): value
        for key, value in model.state_dict().items()
    }
    extractor.load_state_dict({key: named[key] for key in own})
    with torch.no_grad():
        intermediates = model.forward_intermediates(images, intermediates_only=True)
        features = extractor(images)
    assert len(features) == len(intermediates) == len(model.feature_info)
    for feature, intermediate, info in zip(
        features, intermediates, model.feature_info, strict=True
    ):
        assert torch.equal(feature, intermediate)
        assert feature.shape[1:] == (info["num_chs"], *[64 // info["reduction"]] * 2)


@pytest.mark.parametrize("name", mostly_slow(SMALL, 0, 1))
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    # Batch norm sees other statistics when a block is recomputed, so its momentum is not compared.
    model = small_model(name)
    open_gates(model)
    images = torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(0)  # of the Gumbel noise
        model(images).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for key, gradient in gradients[0].items():
        scale = gradient.abs().max().item()
        assert torch.allclose(gradient, gradients[1][key], rtol=1e-4, atol=1e-4 * scale), key


@pytest.mark.parametrize("name", SMALL)
def test_classifier_can_be_replaced(name: str) -> None:
    model = small_model(name)
    model.reset_classifier(7)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    model.reset_classifier(0)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, model.head_hidden_size)


@pytest.mark.parametrize("name", SMALL)
def test_optimizer_leaves_gates_undecayed(name: str) -> None:
    model = small_model(name)
    timm.models.group_parameters(model, model.group_matcher())
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=0.1)
    undecayed = {
        id(p) for g in optimizer.param_groups if not g["weight_decay"] for p in g["params"]
    }
    for layer in attentions(model).values():
        assert {id(layer.residual_gate), id(layer.gamma)} <= undecayed


@pytest.mark.parametrize("name", mostly_slow(SMALL, 0, 1))
def test_model_is_rebuilt_from_a_saved_folder(name: str, tmp_path: Any) -> None:
    options = {"attn_stages": [2, 3], "attn_kwargs": {"group_counts": [1, 4]}}
    model = small_model(name, **options).eval()
    open_gates(model)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    copy = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert list(attentions(copy)) == list(attentions(model))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(copy(images), model(images))


TAKEN = """
import logging, warnings, timm
from timm.models import register_model
logging.basicConfig(format="%(levelname)s %(message)s")

def resnet50_cbam(pretrained=False, **kwargs):
    return timm.create_model("resnet18")

resnet50_cbam.__module__ = "timm.models.resnet"
register_model(resnet50_cbam)
warnings.simplefilter("error")
warnings.simplefilter("ignore", ResourceWarning)  # of old versions of torch, at their end
import emax_timm
print(timm.model_entrypoint("resnet50_cbam") is resnet50_cbam)
print(timm.is_model("resnet50_emax"), timm.is_model("resnet50_se"))
"""


def test_name_that_timm_has_taken_is_left_to_it(tmp_path: Path) -> None:
    result = in_new_process(TAKEN, tmp_path)
    assert result.stdout.split() == ["True", "True", "True"], result.stderr
    assert result.stderr.startswith("ERROR resnet50_cbam is a model of timm.models.resnet")
    assert result.stderr.count("\n") == 1
