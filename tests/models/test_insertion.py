"""Attention in any CNN of timm, by `insert_attention` and by the name `with_attention`."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from hub_testing import in_new_process
from tiers import mostly_slow
from torch import nn

import emax_timm
from emax_timm import insert_attention
from emax_timm.attention import ATTENTIONS, GatedAttention

# A model of each of many families, and how many stages it has.
AFTER_STAGES = {
    "resnet10t": 4,
    "seresnet18": 4,
    "regnetx_002": 4,
    "regnety_002": 4,
    "efficientnet_b0": 5,
    "mobilenetv3_small_050": 4,
    "convnext_atto": 4,
    "densenet121": 5,
    "dla46x_c": 6,
    "dpn48b": 5,
    "vgg11": 6,
    "hgnetv2_b0": 4,
    "ghostnet_050": 4,
    "fasternet_t0": 4,
    "fastvit_t8": 4,
    "mobileone_s0": 4,
    "legacy_xception": 5,
    "inception_v3": 5,
    "resnetv2_18": 4,
    "efficientvit_m0": 3,  # keeps tensors from one call to the next
}
# A model of each family with a slot in its blocks, and how many blocks it has.
IN_BLOCKS = {
    "resnet10t": 4,
    "seresnet18": 8,
    "skresnet18": 8,
    "res2net50_14w_8s": 16,
    "regnetx_002": 13,
    "regnety_002": 13,
    "efficientnet_b0": 16,
    "efficientnetv2_rw_t": 37,
    "mobilenetv2_050": 17,
    "mobilenetv3_small_050": 11,
    "mobilenetv4_conv_small": 12,
    "convnext_atto": 12,
    "convnext_atto_ols": 12,
    "convnextv2_atto": 12,
}
CASES = [
    *((name, "stage", count) for name, count in AFTER_STAGES.items()),
    *((name, "block", count) for name, count in IN_BLOCKS.items()),
]


def plain(name: str, **kwargs: Any) -> Any:
    """A model with weights as training leaves them, in which nothing hides the attention."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    for key, tensor in model.state_dict().items():
        if key.endswith("running_var") or (tensor.ndim == 1 and key.endswith(("weight", "gamma"))):
            tensor.uniform_(0.5, 1.5)
    return model.eval()


def image(model: Any, batch: int = 2) -> torch.Tensor:
    channels, *size = model.pretrained_cfg["input_size"]
    side = min(*size, 96) if not model._traits.get("fixed_input_size") else size[0]
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(0))


def layers(model: nn.Module) -> list[Any]:
    kinds = (emax_timm.EMAX, GatedAttention)
    return [module for module in model.modules() if isinstance(module, kinds)]


@pytest.mark.parametrize(
    ("name", "where", "count"), mostly_slow(CASES, *range(0, len(CASES), 6)), ids=str
)
def test_insertion_changes_no_bit_until_a_gate_opens(name: str, where: str, count: int) -> None:
    model = plain(name)
    x = image(model)
    keys = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    with torch.inference_mode():
        before = model(x)
        features = model.forward_features(x)
        assert insert_attention(model, where=where) is model
        assert torch.equal(model(x), before)
        assert torch.equal(model.forward_features(x), features)
        assert len(layers(model)) == count
        now = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        assert now.items() >= keys.items()
        # Each is run once, and matters.
        calls: Counter[int] = Counter()
        for layer in layers(model):
            layer.register_forward_hook(lambda layer, *_: calls.update([id(layer)]))
            layer.residual_gate.fill_(1.0)
        assert not torch.allclose(model(x), before, rtol=1e-3, atol=1e-5)
    assert calls == Counter(id(layer) for layer in layers(model))


@pytest.mark.parametrize("where", ["stage", "block"])
@pytest.mark.parametrize("attention", mostly_slow(ATTENTIONS, 0, 3))
def test_every_attention_can_be_inserted(attention: str, where: str) -> None:
    model = plain("regnety_002")
    x = image(model)
    with torch.inference_mode():
        before = model(x)
        insert_attention(model, attention, where=where)
        assert torch.equal(model(x), before)
    kind = ATTENTIONS[attention]
    inner = [layer if attention == "emax" else layer.attention for layer in layers(model)]
    assert inner
    assert all(type(layer) is kind for layer in inner)


@pytest.mark.parametrize("where", ["stage", "block"])
def test_stages_are_those_of_the_features(where: str) -> None:
    model = insert_attention(plain("efficientnet_b0"), stages=[1, 3, 3], where=where)
    named = {name for name, module in model.named_modules() if isinstance(module, emax_timm.EMAX)}
    if where == "stage":
        assert named == {"blocks.1.attention", "blocks.4.attention"}
    else:  # stride 16 is two sequences of blocks, of which timm's feature_info names the last
        assert {name[:8] for name in named} == {"blocks.1", "blocks.3", "blocks.4"}
    model = insert_attention(plain("resnet10t"), stages=[0])  # not the stem
    assert isinstance(model.layer1.attention, emax_timm.EMAX)


def test_insertion_keeps_modes_gradients_types_and_devices() -> None:
    model: Any = timm.create_model("regnety_002", dtype=torch.bfloat16)
    model.s1.eval()
    model.stem.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    insert_attention(model, "cbam")
    for name, module in model.named_modules():
        if name in modes:
            assert module.training == modes[name], name
    named = dict(model.named_modules())
    assert not named["s1.attention"].training
    assert named["s2.attention"].training
    assert not any(p.requires_grad for p in model.stem.parameters())
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    with torch.device("meta"):
        empty = insert_attention(timm.create_model("resnet10t"))
    assert all(p.device.type == "meta" for p in empty.parameters())


@pytest.mark.parametrize("where", ["stage", "block"])
def test_training_opens_the_gates(where: str) -> None:
    model = insert_attention(plain("regnety_002").train(), where=where)
    model(image(model)).square().sum().backward()
    for layer in layers(model):
        assert layer.residual_gate.grad.abs().sum() > 0
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
def test_result_is_copied_and_exported() -> None:
    for where in ("stage", "block"):
        options: dict[str, Any] = {"stages": [0], "attn_kwargs": {"gate_init": 0.5}}
        model = insert_attention(plain("regnety_002"), where=where, **options)
        x = image(model)
        with torch.inference_mode():
            expected = model(x)
            # Tensors elsewhere in memory may be summed in another order.
            assert torch.allclose(copy.deepcopy(model)(x), expected, rtol=1e-4, atol=1e-5)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        found = program.module()(torch.cat([x, x]))
        assert torch.allclose(found[:2], expected, rtol=1e-4, atol=1e-5)


REBUILD = """
import sys, timm, torch, emax_timm
folder, x, expected, threads = sys.argv[1:]
torch.set_num_threads(int(threads))  # it decides the last bits
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
with torch.inference_mode():
    print(torch.equal(model(torch.load(x)), torch.load(expected)))
features = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True)
print(len(features(torch.load(x))))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stages", "where"),
    mostly_slow(
        [
            ("regnety_002", [1, 2], "block"),
            ("convnext_atto", None, "stage"),
            ("densenet121", [0], "stage"),
            ("test_vit", None, "stage"),
        ],
        0,
    ),
)
def test_result_is_rebuilt_from_its_config(
    name: str, stages: list[int] | None, where: str, tmp_path: Path
) -> None:
    model = plain(name, num_classes=7, in_chans=1)
    options: dict[str, Any] = {"factor": 8, "gate_init": 0.5}
    insert_attention(model, stages=stages, where=where, attn_kwargs=options)
    x = torch.randn(2, 1, 64, 64)
    folder = tmp_path / "model"
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    torch.save(x, tmp_path / "x")
    with torch.inference_mode():
        torch.save(model(x).clone(), tmp_path / "y")
    arguments = (folder, tmp_path / "x", tmp_path / "y", str(torch.get_num_threads()))
    result = in_new_process(REBUILD, tmp_path, *arguments)
    assert result.stdout.split() == ["True", str(len(model.feature_info))], result.stderr


@pytest.mark.slow
def test_model_by_name_is_the_model_by_function(tmp_path: Path) -> None:
    weights = {k: v.contiguous() for k, v in plain("regnety_002").state_dict().items()}
    file = tmp_path / "plain.safetensors"
    safetensors.torch.save_file(weights, file)
    # The base's weights, as its hub would give them: the attention starts closed.
    arguments: dict[str, Any] = {"base_model": "regnety_002", "attention": "se", "stages": [1]}
    model = timm.create_model(
        "with_attention",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(file)},
        **arguments,
    ).eval()
    baseline = plain("regnety_002")
    x = image(baseline)
    with torch.inference_mode():
        assert torch.equal(model(x), baseline(x))
    assert len(layers(model)) == 1
    function = insert_attention(baseline, "se", stages=[1])
    assert model.state_dict().keys() == function.state_dict().keys()
    extractor = timm.create_model(
        "with_attention", features_only=True, out_indices=(1, 3), **arguments
    )
    assert [tuple(f.shape[1:]) for f in extractor(x)] == [(24, 24, 24), (152, 6, 6)]
    assert len(layers(extractor)) == 1


def state(model: nn.Module) -> tuple[Any, ...]:
    modules = [(name, type(module)) for name, module in model.named_modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    return modules, hooks, list(model.state_dict())


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "match"),
    [
        *mostly_slow(
            [
                ("naflexvit_base_patch16_gap", {}, ValueError, "packed patches"),
                ("crossvit_9_240", {}, ValueError, "not a stage that is run once"),
                ("vgg11", {"where": "block"}, ValueError, 'where="stage"'),
            ]
        ),
        ("test_vit", {"where": "block"}, ValueError, "no slot for attention"),
        ("hrnet_w18_small", {}, ValueError, "which modules are its stages"),
        ("selecsls42", {}, ValueError, "does not map one tensor to one"),
        ("resnet10t", {"where": "blocks"}, ValueError, '"stage" or "block"'),
        ("resnet10t", {"stages": [4]}, ValueError, r"0 to 3, not \[4\]"),
        ("resnet10t", {"stages": [-1]}, ValueError, r"0 to 3, not \[-1\]"),
        ("resnet10t", {"attention": "emx"}, ValueError, "emax, ema, cbam"),
        ("resnet10t", {"attn_kwargs": {"facto": 1}}, TypeError, "facto"),
        ("resnet10t", {"attn_kwargs": {"factor": 0}}, ValueError, "factor"),
        ("resnet10t_emax", {}, ValueError, "has attention already"),
    ],
)
def test_refusal_has_a_reason_and_leaves_the_model_as_it_was(
    name: str, kwargs: dict[str, Any], error: type[Exception], match: str
) -> None:
    model = timm.create_model(name)
    before = state(model)
    with pytest.raises(error, match=match):
        insert_attention(model, **kwargs)
    assert state(model) == before


def test_refusal_of_what_is_no_model_of_timms() -> None:
    with pytest.raises(ValueError, match="not made by timm"):
        insert_attention(nn.Sequential(nn.Conv2d(3, 8, 3)))
    with pytest.raises(ValueError, match="features_only=True"):
        insert_attention(timm.create_model("resnet10t", features_only=True))
    model = insert_attention(timm.create_model("resnet10t"))
    with pytest.raises(ValueError, match="has attention already"):
        insert_attention(model)
    with pytest.raises(ValueError, match="unknown base_model 'regnetz_002'; the nearest is regnet"):
        timm.create_model("with_attention", base_model="regnetz_002")
