"""The EMAX ResNets as timm users meet them."""

from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

import emax_timm

NAMES = [
    *("resnet10t_emax", "resnet14t_emax", "resnet18_emax", "resnet26_emax", "resnet34_emax"),
    *("resnet50_emax", "resnet50d_emax", "resnet101_emax", "resnet152_emax"),
]


def small_model(**kwargs) -> Any:
    return timm.create_model("resnet10t_emax", num_classes=3, **kwargs)


def attentions(model: nn.Module) -> dict[str, emax_timm.EMAX]:
    return {n: m for n, m in model.named_modules() if isinstance(m, emax_timm.EMAX)}


def test_registry_lists_the_models_in_a_module_of_their_own() -> None:
    assert sorted(timm.list_models("resnet*_emax")) == sorted(NAMES)
    assert sorted(timm.list_models(module="emax_resnet")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_model_is_its_plain_twin_plus_attention_after_the_last_norm(name: str) -> None:
    with torch.device("meta"):
        model: Any = timm.create_model(name)
        twin = timm.create_model(name.removesuffix("_emax"))
    ours = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    theirs = {key: tuple(value.shape) for key, value in twin.state_dict().items()}
    assert ours.items() >= theirs.items()
    assert all(".se." in key for key in ours.keys() - theirs.keys())
    blocks = [m for n, m in model.named_modules() if n.count(".") == 1 and n.startswith("layer")]
    assert len(attentions(model)) == len(blocks) > 0
    block: Any
    for block in blocks:
        width = block.bn3.num_features if hasattr(block, "bn3") else block.bn2.num_features
        assert block.se.residual_gate.shape == (width,)


def test_model_gives_the_twin_the_same_initial_weights_for_a_seed() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18_emax")
    torch.manual_seed(0)
    twin = timm.create_model("resnet18")
    for key, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_model_with_closed_gates_computes_what_its_twin_computes() -> None:
    model = timm.create_model("resnet18_emax", attn_kwargs={"gate_init": 0.0}).eval()
    twin = timm.create_model("resnet18", zero_init_last=False).eval()
    missing, unexpected = model.load_state_dict(twin.state_dict(), strict=False)
    assert not unexpected
    assert all(".se." in key for key in missing)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), twin(images))


@pytest.mark.parametrize("name", ["resnet10t_emax", "resnet14t_emax"])
def test_model_keeps_the_initialisation_of_emax(name: str) -> None:
    for layer in attentions(timm.create_model(name)).values():
        assert layer.conv3x3.bias is not None
        assert torch.equal(layer.conv3x3.bias, torch.full_like(layer.conv3x3.bias, 2.0))
        bound = layer.conv3x3.weight[0].numel() ** -0.5
        assert layer.conv3x3.weight.abs().max() <= bound  # torch's default, not ResNet's kaiming
        assert layer.gamma is not None
        assert layer.gamma.item() == 0
        assert torch.equal(layer.residual_gate, torch.ones_like(layer.residual_gate))


def test_attn_stages_choose_where() -> None:
    assert {name.split(".")[0] for name in attentions(small_model(attn_stages=[1, 3]))} == {
        *("layer2", "layer4")
    }
    assert not attentions(small_model(attn_stages=()))


def test_attn_kwargs_choose_how() -> None:
    layers = attentions(small_model(attn_kwargs={"factor": 8, "group_counts": "finest"})).values()
    assert {layer.groups for layer in layers} == {8}
    assert all(layer.candidates == [8] for layer in layers)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"attn_stages": (0, 4)}, ValueError, r"0 to 3, not \[4\]"),
        ({"attn_kwargs": {"facto": 8}}, TypeError, "facto"),
        ({"attn_kwargs": {"factor": 0}}, ValueError, "factor"),
        ({"attn_kwargs": {"group_counts": [5]}}, ValueError, r"\[5\]"),
        ({"attn_stage": (0,)}, TypeError, "attn_stage"),
    ],
)
def test_wrong_options_are_refused(kwargs: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        small_model(**kwargs)


def test_pretrained_raises_while_there_are_no_weights() -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("resnet50_emax", pretrained=True)


def test_features_and_intermediates_come_from_the_attended_stages() -> None:
    model = small_model().eval()
    images = torch.randn(2, 3, 64, 64)
    extractor = timm.create_model("resnet10t_emax", features_only=True, out_indices=(2, 4)).eval()
    missing, unexpected = extractor.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert set(unexpected) == {"fc.weight", "fc.bias"}
    with torch.no_grad():
        features = extractor(images)
        _, intermediates = model.forward_intermediates(images, indices=[2, 4])
        expected = model.layer4(model.layer3(intermediates[0]))
    assert [tuple(f.shape) for f in features] == [(2, 128, 8, 8), (2, 512, 2, 2)]
    for feature, intermediate in zip(features, intermediates, strict=True):
        assert torch.equal(feature, intermediate)
    assert torch.allclose(features[1], expected)


def test_classifier_can_be_replaced() -> None:
    model = small_model()
    model.reset_classifier(7)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    model.reset_classifier(0)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, model.num_features)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    # Batch norm sees other statistics when a block is recomputed, so its momentum is not compared.
    model = small_model()
    images = torch.randn(4, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(0)  # of the Gumbel noise
        model(images).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})  # type: ignore
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5), name


def test_parameter_groups_follow_the_blocks_and_leave_gates_undecayed() -> None:
    model = small_model()
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert groups["layer2.0.se.residual_gate"] == groups["layer2.0.conv1.weight"]
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=0.1)
    undecayed = {
        id(p) for g in optimizer.param_groups if not g["weight_decay"] for p in g["params"]
    }
    for layer in attentions(model).values():
        assert id(layer.residual_gate) in undecayed
        assert id(layer.gamma) in undecayed


def test_model_can_be_rebuilt_from_a_saved_folder(tmp_path) -> None:
    model = small_model(attn_stages=[2, 3], attn_kwargs={"group_counts": [1, 4]}).eval()
    timm.models.save_for_hf(
        model,
        str(tmp_path),
        model_args={"attn_stages": [2, 3], "attn_kwargs": {"group_counts": [1, 4]}},
        safe_serialization=True,
    )
    copy = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(copy(images), model(images))
