"""Attention in models of tokens, by `insert_attention`.

The models have random weights, which stand for pretrained ones: what counts is that every layer
changes the outputs, and that the inserted attention does not until its gate opens.
"""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from tiers import mostly_slow
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F

from emax_timm import EMAX, capture_attention, insert_attention
from emax_timm.models.gradcam import grad_cam
from emax_timm.models.tokens import TokenAttention

SMALL: dict[str, Any] = {"embed_dim": 48, "depth": 7, "num_heads": 3, "img_size": 64}
ANY_SIZE: dict[str, Any] = {**SMALL, "dynamic_img_size": True}
WINDOWS: dict[str, Any] = {
    **{"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 1, 2, 1)},
    "num_heads": (1, 2, 2, 4),
}
# A small model of each family: its arguments, another size of images, and the grids of its stages
# at that size. Models with `img_size` in the second place have to be created for another size.
FAMILIES: dict[str, tuple[dict[str, Any], tuple[int, int], str, list[tuple[int, int]]]] = {
    "test_vit": ({**ANY_SIZE, "num_heads": 2}, (32, 96), "call", [(2, 6)] * 2),
    "swin_tiny_patch4_window7_224": (
        {**WINDOWS, "strict_img_size": False},
        (96, 64),
        "call",
        [(24, 16), (12, 8), (6, 4), (3, 2)],
    ),
    "deit3_small_patch16_224": (ANY_SIZE, (32, 96), "call", [(2, 6)] * 2),
    "deit_tiny_distilled_patch16_224": (ANY_SIZE, (32, 96), "call", [(2, 6)] * 2),
    "vit_small_patch14_reg4_dinov2": ({**ANY_SIZE, "img_size": 56}, (28, 70), "call", [(2, 5)] * 2),
    "eva02_tiny_patch14_224": ({**ANY_SIZE, "img_size": 56}, (28, 70), "call", [(2, 5)] * 2),
    "vit_tiny_patch16_dinov3_qkvb": (ANY_SIZE, (32, 96), "call", [(2, 6)] * 2),
    "vit_tiny_r_s16_p8_224": (ANY_SIZE, (32, 96), "call", [(1, 3)] * 2),
    "beit_base_patch16_224": (SMALL, (32, 96), "create", [(2, 6)] * 2),
    "test_vit_relpos": ({"img_size": 64}, (32, 96), "create", [(2, 6)] * 2),
    "samvit_base_patch16_224": (
        {**SMALL, "global_attn_indexes": (2,)},
        (32, 96),
        "create",
        [(2, 6)] * 2,
    ),
    "vitamin_small_224": ({"img_size": 64, "depth": 4}, (32, 96), "create", [(2, 6)]),
    "swinv2_tiny_window8_256": (
        {**WINDOWS, "strict_img_size": False},
        (96, 64),
        "call",
        [(24, 16), (12, 8), (6, 4), (3, 2)],
    ),
    "swinv2_cr_tiny_224": (WINDOWS, (64, 128), "create", [(16, 32), (8, 16), (4, 8), (2, 4)]),
    "hiera_tiny_224": (
        {"img_size": (64, 64), "embed_dim": 24, "stages": (1, 1, 2, 1)},
        (64, 96),
        "create",
        [(16, 24), (8, 12), (4, 6), (2, 3)],
    ),
    "sam2_hiera_tiny": ({}, (64, 96), "call", [(16, 24), (8, 12), (4, 6), (2, 3)]),
    "pvt_v2_b0": ({}, (64, 96), "call", [(16, 24), (8, 12), (4, 6), (2, 3)]),
    "twins_svt_small": ({}, (64, 96), "call", [(16, 24), (8, 12), (4, 6), (2, 3)]),
    "cait_xxs24_224": (SMALL, (32, 96), "create", [(2, 6)] * 2),
    "convit_tiny": (
        {"embed_dim": 12, "depth": 7, "local_up_to_layer": 4, "img_size": 64},
        (64, 64),
        "create",
        [(4, 4)] * 2,
    ),
    "xcit_nano_12_p8_224": (
        {"embed_dim": 48, "depth": 7, "num_heads": 3},
        (32, 96),
        "call",
        [(4, 12)] * 2,
    ),
    "mixer_s32_224": ({"img_size": 64}, (32, 96), "create", [(1, 3)] * 2),
    "resmlp_12_224": ({"img_size": 64}, (32, 96), "create", [(2, 6)] * 3),
    "levit_128s": ({}, (224, 224), "create", [(14, 14), (7, 7), (4, 4)]),
    "efficientformer_l1": ({}, (224, 224), "call", [(56, 56), (28, 28), (14, 14), (7, 7)]),
    "volo_d1_224": ({"img_size": 64}, (96, 64), "create", [(12, 8), (6, 4), (6, 4), (6, 4)]),
    "sequencer2d_s": (
        {
            **{"embed_dims": (24, 48, 48, 48), "layers": (1, 1, 1, 1)},
            "hidden_sizes": (8, 8, 8, 8),
        },
        (70, 98),
        "call",
        [(10, 14), (5, 7), (5, 7), (5, 7)],
    ),
    "test_mambaout": ({}, (64, 96), "call", [(16, 24), (8, 12), (4, 6), (2, 3)]),
    "deepseek_vit_412m": (
        {"embed_dim": 48, "depth": 4, "num_heads": 3},
        (56, 84),
        "call",
        [(4, 6)],
    ),
    "qwen3_vit_88m": ({"embed_dim": 48, "depth": 4, "num_heads": 3}, (64, 96), "call", [(4, 6)]),
}
KEPT = (0, 1)


def plain(name: str, **kwargs: Any) -> Any:
    """A model in which no layer scale and no empty head hides the attention."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **{**FAMILIES[name][0], **kwargs})
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1 and not key.endswith("bias"):
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.02)
    return model.eval()


def images(*size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def attentions(model: nn.Module) -> list[EMAX]:
    return [module for module in model.modules() if isinstance(module, EMAX)]


def open_gates(model: nn.Module) -> None:
    """Let the attention matter: by default it is nearly one scale for all tokens."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in attentions(model):
            layer.residual_gate.fill_(1.0)
            layer.conv3x3.weight.normal_(generator=generator)
            layer.gn.weight.normal_(std=3.0, generator=generator)


def outputs(model: Any, x: Tensor) -> list[Tensor]:
    """Logits, features and all feature maps."""
    features, maps = model.forward_intermediates(x)
    return [model(x), model.forward_features(x), features, *maps]


def grids(model: nn.Module, run: Callable[[], object]) -> list[tuple[int, int]]:
    """The sizes of the feature maps that the attention gets."""
    found: list[tuple[int, int]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: found.append(tuple(args[0].shape[2:])))
        for layer in attentions(model)
    ]
    run()
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", mostly_slow(FAMILIES, *KEPT))
@torch.inference_mode()
def test_insertion_changes_no_bit_until_a_gate_opens(name: str) -> None:
    arguments, other, how, expected = FAMILIES[name]
    size = arguments.get("img_size", 64 if how == "call" else 224)
    default = (size, size) if isinstance(size, int) else size
    if name in ("deepseek_vit_412m", "sequencer2d_s", "efficientformer_l1"):
        default = other
    models = [plain(name), plain(name, **({"img_size": other} if how == "create" else {}))]
    for model, shape in zip(models, (default, other), strict=True):
        x = images(*shape)
        keys = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        before = outputs(model, x)
        assert insert_attention(model) is model
        now = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        assert now.items() >= keys.items()
        after = outputs(model, x)
        assert len(after) == len(before)
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        open_gates(model)
        after = outputs(model, x)
        assert not torch.allclose(after[0], before[0], rtol=1e-3, atol=1e-5)
        assert not torch.allclose(after[1], before[1], rtol=1e-3, atol=1e-5)
    assert grids(models[1], lambda: models[1](images(*other))) == expected


def by_hand(attention: nn.Module, tokens: Tensor, prefix: int, height: int, width: int) -> Tensor:
    """Attention for tokens [b, n, c], one at a time."""
    batch, _, channels = tokens.shape
    features = torch.empty(batch, channels, height, width)
    for row in range(height):
        for column in range(width):
            features[:, :, row, column] = tokens[:, prefix + row * width + column]
    attended = attention(features)
    result = tokens.clone()
    for row in range(height):
        for column in range(width):
            result[:, prefix + row * width + column] = attended[:, :, row, column]
    return result


@torch.no_grad()
def test_tokens_lie_on_the_grid_by_rows_and_prefix_tokens_pass() -> None:
    torch.manual_seed(0)
    layer = EMAX(16).eval()
    layer.conv3x3.weight.normal_()
    for prefix in (0, 1, 5):
        x = torch.randn(2, prefix + 6, 16)
        found = TokenAttention(layer, prefix)(x, (2, 3))
        torch.testing.assert_close(found, by_hand(layer, x, prefix, 2, 3))
        assert torch.equal(found[:, :prefix], x[:, :prefix])
    assert not torch.allclose(found, TokenAttention(layer, 5)(x, (3, 2)), atol=1e-3)
    with pytest.raises(AssertionError, match="merged or dropped"):
        TokenAttention(layer, 1)(torch.randn(2, 6, 16), (2, 3))


@pytest.mark.slow
@torch.no_grad()
def test_hieras_tokens_are_put_in_the_order_of_rows() -> None:
    model = insert_attention(plain("hiera_tiny_224", img_size=(64, 96)))
    open_gates(model)
    x = images(64, 96)
    seen: dict[str, Tensor] = {}
    for stage, end in enumerate(model.stage_ends):
        layer = model.blocks[end].attention
        layer.register_forward_hook(
            lambda _, args, output, i=stage: seen.update({f"{i}": args[0], f"{i}'": output})
        )
    _, maps = model.forward_intermediates(x)  # in the order of rows, after the attention
    for stage, end in enumerate(model.stage_ends):
        layer = model.blocks[end].attention
        rows = model.reroll(seen[f"{stage}"], end).permute(0, 3, 1, 2)
        torch.testing.assert_close(maps[stage], layer.attention.attention(rows))


@pytest.mark.parametrize("name", mostly_slow(["test_vit", "swin_tiny_patch4_window7_224"], 0))
def test_every_new_parameter_gets_a_gradient(name: str) -> None:
    model = insert_attention(plain(name).train(), attn_kwargs={"gate_init": 0.5})
    model.set_grad_checkpointing(False)
    model(images(64, 64)).square().sum().backward()
    for layer in attentions(model):
        for key, parameter in layer.named_parameters():
            assert parameter.grad is not None, key
        assert layer.residual_gate.grad is not None
        assert layer.residual_gate.grad.abs().sum() > 0
        assert layer.conv3x3.weight.grad is not None
        assert layer.conv3x3.weight.grad.abs().sum() > 0


def test_checkpointing_computes_each_pass_on_its_own_grid() -> None:
    # 2 x 6 and 6 x 2 patches: the number of tokens does not tell one grid from the other.
    batches = [images(32, 96), images(96, 32)]
    gradients = []
    for checkpointing in (False, True):
        model = insert_attention(plain("test_vit"))
        open_gates(model)
        model.set_grad_checkpointing(checkpointing)
        losses = [model(batch).square().sum() for batch in batches]
        for loss in losses:
            loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_grad_cam_is_that_of_the_features_on_the_grid() -> None:
    model, x = insert_attention(plain("test_vit")), images(32, 96)
    open_gates(model)
    layer, seen = model.blocks[2].attention.attention, []
    hook = layer.register_forward_hook(lambda _, args, output: seen.append(output))
    logits = model(x)
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[[0, 1], [4, 2]].sum(), seen[0])
    cam = (gradient.mean((2, 3), keepdim=True) * seen[0]).sum(1).relu().detach()
    expected = F.interpolate(cam.unsqueeze(1), (32, 96), mode="bilinear").squeeze(1)
    expected = expected - expected.amin((1, 2), keepdim=True)
    expected = expected / expected.amax((1, 2), keepdim=True).clamp_min(1e-12)
    found = grad_cam(model, x, "blocks.2", [4, 2])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_block_outside_of_a_pass_says_what_is_missing() -> None:
    model = insert_attention(plain("test_vit"))
    with pytest.raises(RuntimeError, match="size of the images"):
        model.blocks[2](torch.randn(1, 17, 48))


COMPILED = {
    "test_vit": (96, 32),
    "swin_tiny_patch4_window7_224": (96, 64),
    "eva02_tiny_patch14_224": (70, 28),
    "hiera_tiny_224": (64, 64),
}


@pytest.mark.parametrize("name", mostly_slow(COMPILED))
@torch.no_grad()
def test_model_compiles_without_graph_breaks(name: str) -> None:
    model = insert_attention(plain(name))
    open_gates(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    size = FAMILIES[name][0]["img_size"]
    for x in (
        images(*(size if isinstance(size, tuple) else (size, size))),
        images(*COMPILED[name]),
    ):
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", mostly_slow(COMPILED))
@torch.no_grad()
def test_model_is_exported_with_any_batch_at_another_size(name: str) -> None:
    model = insert_attention(plain(name))
    open_gates(model)
    x = images(*COMPILED[name])
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(model, (x,), dynamic_shapes=dynamic).module()
    for batch in (x, images(*COMPILED[name], batch=3)):
        torch.testing.assert_close(program(batch), model(batch), rtol=1e-4, atol=1e-5)
    traced: Any = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_copies_and_timms_methods_work_as_in_the_baseline() -> None:
    baseline = plain("test_vit")
    model = insert_attention(plain("test_vit"))
    x = images(32, 96)
    expected = model(x)
    pickled = io.BytesIO()
    pickle.dump(model, pickled)
    for copied in (copy.deepcopy(model), pickle.loads(pickled.getvalue())):
        assert torch.equal(copied(x), expected)
    assert model.no_weight_decay() == baseline.no_weight_decay()
    assert model.group_matcher() == baseline.group_matcher()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, layer_decay=0.5)
    scales = {
        id(parameter): group["lr_scale"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    block = model.blocks[2]
    assert scales[id(block.attention.attention.residual_gate)] == scales[id(block.norm1.weight)]
    model.set_input_size((96, 32))
    baseline.set_input_size((96, 32))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert torch.equal(model.forward_features(x), baseline.forward_features(x))
    features = timm.create_model(
        "with_attention",
        base_model="test_vit",
        features_only=True,
        out_indices=(2, 4),
        **FAMILIES["test_vit"][0],
    )
    assert [tuple(f.shape) for f in features(x)] == [(2, 48, 2, 6)] * 2
    assert len(attentions(features)) == 1


def test_maps_have_the_size_of_the_grid() -> None:
    model = insert_attention(plain("test_vit"))
    with torch.no_grad(), capture_attention(model) as maps:
        model(images(32, 96))
    assert list(maps) == ["blocks.2.attention.attention", "blocks.5.attention.attention"]
    assert all(m.spatial is not None and m.spatial.shape == (2, 16, 2, 6) for m in maps.values())


class MergingBlock(nn.Module):
    """A block that merges neighbouring tokens, as ToMe (arXiv 2210.09461) does."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], x[:, 1:].unflatten(1, (-1, 2)).mean(2)], 1)


def test_models_without_a_grid_are_refused_with_the_reason() -> None:
    model = plain("test_vit")
    model.blocks.insert(1, MergingBlock())
    with pytest.raises(ValueError, match=r"blocks.2 .* neither feature maps nor tokens on a grid"):
        insert_attention(model)
    for name in ("test_vit", "eva02_tiny_patch14_224"):
        with pytest.raises(ValueError, match="drops patches in training"):
            insert_attention(plain(name, patch_drop_rate=0.25))
    assert insert_attention(plain("test_vit", patch_drop_rate=0.0))


@pytest.mark.parametrize(
    ("name", "match"),
    mostly_slow(
        [
            ("naflexvit_base_patch16_gap", "packed patches"),
            ("gemma4_vit_167m", "packed patches"),
            ("gemma4_vit_167m_enc", "packed patches"),
            ("mvitv2_tiny", "which modules are its stages"),
            ("tnt_s_patch16_224", "does not map one tensor to one"),
            ("pit_ti_224", "does not map one tensor to one"),
            ("crossvit_9_240", "not a stage that is run once"),
            ("coat_tiny", "neither feature maps nor tokens on a grid"),
        ]
    ),
)
def test_families_without_a_grid_are_refused_with_the_reason(name: str, match: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match=match):
        insert_attention(model)


def test_stages_of_equal_blocks_are_three_blocks_each_but_for_the_last() -> None:
    model = insert_attention(plain("test_vit", depth=8), stages=[1])
    assert [name for name, module in model.named_modules() if isinstance(module, EMAX)] == [
        "blocks.5.attention.attention"
    ]
    # Nothing after the last block would reach the class token.
    assert len(attentions(insert_attention(plain("test_vit", depth=6)))) == 1
    with pytest.raises(ValueError, match="stages of this model are 0 to 1, not"):
        insert_attention(plain("test_vit", depth=8), stages=[2])
    model = insert_attention(plain("test_vit", depth=2))
    assert len(attentions(model)) == 1
