"""Grad-CAM against gradients taken by hand, and the model as it was."""

import copy
import sys
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

from emax_timm.interpret import grad_cam


def network() -> Any:
    torch.manual_seed(0)
    return timm.create_model(
        "resnet10t_emax", channels=(16, 16, 32, 32), num_classes=5, zero_init_last=False
    )


def test_grad_cam_is_that_of_gradients_by_hand() -> None:
    model, images, classes = network().eval(), torch.randn(3, 3, 64, 64), [4, 0, 2]
    found = grad_cam(model, images, "layer3", classes)
    features = model.layer3(model.layer2(model.layer1(model.maxpool(
        model.act1(model.bn1(model.conv1(images)))
    ))))  # fmt: skip
    logits = model.forward_head(model.layer4(features))
    (gradient,) = torch.autograd.grad(logits[range(3), classes].sum(), features)
    cam = (gradient.mean((2, 3), keepdim=True) * features).sum(1).relu().detach()
    expected = F.interpolate(cam.unsqueeze(1), (64, 64), mode="bilinear").squeeze(1)
    expected = expected - expected.amin((1, 2), keepdim=True)
    expected = expected / expected.amax((1, 2), keepdim=True)
    assert torch.allclose(found, expected, atol=1e-4)
    likeliest = model(images).argmax(1)
    assert torch.equal(
        grad_cam(model, images, "layer3"), grad_cam(model, images, "layer3", likeliest)
    )


def test_grad_cam_leaves_the_model_as_it_was() -> None:
    model, images = network().train(), torch.randn(2, 3, 64, 64)
    model(images).sum().backward()
    before = copy.deepcopy(model.state_dict())
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    with torch.inference_mode():
        grad_cam(torch.nn.DataParallel(model), images, "layer4")
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert not any(module._forward_hooks for module in model.modules())


def test_grad_cam_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="ResNet has no layer layer9"):
        grad_cam(timm.create_model("test_resnet"), torch.zeros(1, 3, 32, 32), "layer9")
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(ImportError, match=r"pip install 'emax-timm\[viz\]'"):
        grad_cam(network(), torch.zeros(1, 3, 32, 32), "layer4")
