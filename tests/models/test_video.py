"""Attention in the video models of torchvision."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from tiers import mostly_slow
from torch import Tensor, nn
from torchvision.models import video
from torchvision.models.video.resnet import BasicBlock, Bottleneck, Conv3DSimple, VideoResNet

from emax_timm import EMAX3d, capture_attention, insert_attention, set_grouping

RESNETS = ("mc3_18", "r3d_18", "r2plus1d_18")
LAYERS = [f"layer{number}.attention" for number in range(1, 5)]


def randomised(model: Any) -> Any:
    """A model whose norms have weights and statistics as training leaves them."""
    torch.manual_seed(1)
    for key, tensor in model.state_dict().items():
        if key.endswith("running_var") or (tensor.ndim == 1 and key.endswith("weight")):
            tensor.uniform_(0.5, 1.5)
        elif key.endswith("running_mean"):
            tensor.normal_()
    return model.eval()


def plain(name: str) -> Any:
    torch.manual_seed(0)
    return randomised(getattr(video, name)(num_classes=5))


def small() -> Any:
    """A network of the same class, with one block per stage."""
    torch.manual_seed(0)
    blocks = [Conv3DSimple] * 4, [1] * 4
    return VideoResNet(BasicBlock, *blocks, video.resnet.BasicStem, num_classes=5)


def clips(*size: int, batch: int = 2) -> Tensor:
    size = size or (4, 24, 32)
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def attentions(model: nn.Module) -> dict[str, EMAX3d]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, EMAX3d)}


def open_gates(model: nn.Module) -> None:
    """Let the attention matter: by default it is nearly one scale for all pixels."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in attentions(model).values():
            layer.residual_gate.fill_(1.0)
            layer.conv3x3.weight.normal_(generator=generator)
            layer.gn.weight.normal_(std=3.0, generator=generator)


@pytest.mark.parametrize(
    ("name", "training"), mostly_slow([(n, t) for t in (False, True) for n in RESNETS], 0)
)
@torch.no_grad()
def test_insertion_changes_no_bit_until_a_gate_opens(name: str, training: bool) -> None:
    original = plain(name).train(training)
    model = insert_attention(copy.deepcopy(original))
    assert isinstance(model, VideoResNet)
    assert list(attentions(model)) == LAYERS
    assert [layer.residual_gate.numel() for layer in attentions(model).values()] == [
        64,
        128,
        256,
        512,
    ]
    assert all(layer.training == training for layer in attentions(model).values())
    x = clips()
    expected = original(x)
    assert torch.equal(model(x), expected)
    # In training the norms follow the clips, equally.
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in original.state_dict().items())
    open_gates(model)
    assert not torch.allclose(model(x), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", mostly_slow(RESNETS))
@torch.no_grad()
def test_weights_of_the_original_load(name: str) -> None:
    original = plain(name)
    torch.manual_seed(2)
    model = insert_attention(getattr(video, name)(num_classes=5)).eval()
    missing, unexpected = model.load_state_dict(original.state_dict(), strict=False)
    assert not unexpected
    assert all(".attention." in key for key in missing)
    assert torch.equal(model(clips()), original(clips()))


@pytest.mark.slow
@torch.no_grad()
def test_s3d_gets_it_after_its_stages() -> None:
    original = plain("s3d")
    model = insert_attention(copy.deepcopy(original))
    assert list(attentions(model)) == [f"features.{place}.attention" for place in (3, 6, 12, 15)]
    x = clips(16, 224, 224, batch=1)
    expected = original(x)
    assert torch.equal(model(x), expected)
    open_gates(model)
    assert not torch.allclose(model(x), expected, rtol=1e-2, atol=1e-3)


def test_stages_and_arguments_are_those_asked_for() -> None:
    with torch.device("meta"):
        stem = video.resnet.R2Plus1dStem
        model: Any = VideoResNet(Bottleneck, [Conv3DSimple] * 4, [1] * 4, stem).half()
        model.stem[0] = nn.Conv3d(1, 45, 3, dtype=torch.float16)  # of grey clips
    insert_attention(model, stages=[3, 1], attn_kwargs={"factor": 8, "gate_init": 0.5})
    found = attentions(model)
    assert list(found) == [LAYERS[1], LAYERS[3]]
    assert [layer.channels for layer in found.values()] == [512, 2048]
    for layer in found.values():
        assert (layer.groups, layer.gate_init) == (8, 0.5)
        assert all(p.dtype == torch.float16 and p.is_meta for p in layer.parameters())
    with pytest.raises(ValueError, match="VideoResNet has attention already"):
        insert_attention(model)


@pytest.mark.parametrize("name", mostly_slow(["small", *RESNETS], 0))
def test_networks_train_and_show_their_maps(name: str) -> None:
    model = insert_attention(small() if name == "small" else plain(name)).train()
    assert set_grouping(model, warmup=0.5, temperature=2.0) == 4
    assert all(layer.warmup == 0.5 for layer in attentions(model).values())
    with capture_attention(model) as maps:
        model(clips()).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    for layer in attentions(model).values():
        assert layer.residual_gate.grad is not None
        assert layer.residual_gate.grad.abs().sum() > 0
    assert list(maps) == LAYERS
    frames = [4] * 4 if name == "mc3_18" else [4, 2, 1, 1]
    sizes = [(12, 16), (6, 8), (3, 4), (2, 2)]
    for found, time, size in zip(maps.values(), frames, sizes, strict=True):
        assert found.spatial is not None
        assert found.spatial.shape[2:] == (time, *size)


@pytest.mark.slow
@torch.no_grad()
def test_result_is_copied_compiled_and_exported() -> None:
    model = insert_attention(plain("r2plus1d_18"))
    open_gates(model)
    x = clips()
    expected = model(x)
    pickled = io.BytesIO()
    pickle.dump(model, pickled)
    for copied in (copy.deepcopy(model), pickle.loads(pickled.getvalue())):
        # Tensors elsewhere in memory may be summed in another order.
        torch.testing.assert_close(copied(x), expected, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(model, (x,), dynamic_shapes=dynamic).module()
    torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-5)
    more = clips(batch=3)
    torch.testing.assert_close(program(more), model(more), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"attention": "se"}, ValueError, "dims of se must be 2, not 3: the number of axes"),
        ({"where": "block"}, ValueError, 'VideoResNet have no slot .* where="stage"'),
        ({"stages": [4]}, ValueError, r"0 to 3, not \[4\]"),
        ({"attn_kwargs": {"facto": 1}}, TypeError, "facto"),
        ({"attn_kwargs": {"dims": 2}}, TypeError, "dims"),
    ],
)
def test_refusal_has_a_reason_and_leaves_the_model_as_it_was(
    kwargs: dict[str, Any], error: type[Exception], match: str
) -> None:
    with torch.device("meta"):
        model = video.r3d_18()
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(error, match=match):
        insert_attention(model, **kwargs)
    assert [(name, type(module)) for name, module in model.named_modules()] == before


@pytest.mark.parametrize("name", mostly_slow(["mvit_v1_b", "mvit_v2_s", "swin3d_t"], 0))
def test_other_video_models_are_refused_with_the_reason(name: str) -> None:
    with torch.device("meta"):
        model = getattr(video, name)()
    with pytest.raises(ValueError, match=r"stages give \[b, c, t, h, w\].*VideoResNet and S3D"):
        insert_attention(model)
