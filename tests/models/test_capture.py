"""Captured maps are those of the pass that ran, and capturing changes nothing."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_testing import in_new_process
from tiers import mostly_slow
from torch import Tensor, nn

import emax_timm
from emax_timm import EMAX, capture_attention
from emax_timm.interpret import GateMaps

SMALL = {"channels": (16, 16, 32, 32), "num_classes": 3, "zero_init_last": False}


def network(attention: str = "emax", **arguments: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t_emax", attn_layer=attention, **SMALL, **arguments)
    for name, parameter in model.named_parameters():
        if "group_controller" in name or "gamma" in name:
            nn.init.normal_(parameter)
    return model


def images() -> Tensor:
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def hooks_of(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def inputs_by_hand(model: Any, x: Tensor) -> dict[str, Tensor]:
    """The input of the attention of each block of a ResNet of basic blocks, computed anew."""
    found = {}
    x = model.maxpool(model.act1(model.bn1(model.conv1(x))))
    for stage in range(1, 5):
        for index, block in enumerate(getattr(model, f"layer{stage}")):
            y = block.act1(block.bn1(block.conv1(x)))
            found[f"layer{stage}.{index}.se"] = y = block.bn2(block.conv2(y))
            shortcut = x if block.downsample is None else block.downsample(x)
            x = torch.relu(block.se(y) + shortcut)
    return found


@torch.no_grad()
def test_maps_are_those_of_features_taken_by_hand() -> None:
    model, x = network().eval(), images()
    with capture_attention(model) as maps:
        model(x)
    features = inputs_by_hand(model, x)
    assert list(maps) == list(features)
    for name, feature in features.items():
        expected = model.get_submodule(name).attention(feature)
        for field in expected._fields:
            assert torch.equal(getattr(maps[name], field), getattr(expected, field)), field
    assert len({int(count) for m in maps.values() for count in m.group_count}) > 1  # type: ignore[union-attr]


@torch.no_grad()
def test_ema_gives_its_spatial_map_behind_a_gate_too() -> None:
    model, x = network("ema").eval(), images()
    with capture_attention(model) as maps:
        model(x)
    for name, feature in inputs_by_hand(model, x).items():
        expected = model.get_submodule(name).attention.attention(feature)
        found = maps[f"{name}.attention"]
        assert found.spatial is not None
        assert torch.equal(found.spatial, expected)
        assert found.channel is None


@pytest.mark.parametrize("attention", ["cbam", "se", "eca"])
@torch.no_grad()
def test_maps_of_timms_layers_are_what_they_multiply_with(attention: str) -> None:
    model, x = network(attention).eval(), images()
    with capture_attention(model) as maps:
        model(x)
    for name, feature in inputs_by_hand(model, x).items():
        found = maps[f"{name}.attention"]
        assert isinstance(found, GateMaps)
        assert found.channel is not None
        expected = feature * found.channel[:, :, None, None]
        if attention == "cbam":
            assert found.spatial is not None
            assert found.spatial.shape == (4, 1, *feature.shape[2:])
            expected = expected * found.spatial
        else:
            assert found.spatial is None
        assert torch.equal(model.get_submodule(name).attention(feature), expected)


@pytest.mark.parametrize("training", [False, True])
def test_capture_changes_no_bit(training: bool) -> None:
    model = network(drop_rate=0.3).train(training)
    plain, watched = copy.deepcopy(model), copy.deepcopy(model)
    results = []
    for copied, context in ((plain, None), (watched, capture_attention(watched))):
        torch.manual_seed(3)
        if context is None:
            logits = copied(images())
        else:
            with context:
                logits = copied(images())
        logits.square().sum().backward()
        results.append((logits, torch.rand(3)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    for (name, left), (_, right) in zip(
        plain.state_dict().items(), watched.state_dict().items(), strict=True
    ):
        assert torch.equal(left, right), name
    for left, right in zip(plain.parameters(), watched.parameters(), strict=True):
        assert left.grad is not None
        assert right.grad is not None
        assert torch.equal(left.grad, right.grad)
    assert hooks_of(watched) == 0
    assert vars(watched).keys() == vars(plain).keys()


def test_maps_in_training_are_of_the_noise_that_the_pass_drew() -> None:
    torch.manual_seed(0)
    layer = EMAX(32, channel_gate=False, global_gate=False)
    x = torch.randn(16, 32, 7, 7)
    seen = []
    for _ in range(3):
        with capture_attention(layer) as maps:
            y = layer(x)
        spatial = maps[""].spatial  # a layer alone has no name
        assert spatial is not None
        assert torch.allclose(x * spatial, y, atol=1e-6)
        seen.append(spatial)
    assert not torch.equal(seen[0], seen[1])


def test_hooks_go_after_an_error_and_a_context_can_be_used_in_another() -> None:
    model = network().eval()

    def fail() -> None:
        with capture_attention(model), torch.no_grad():
            model(images()[:, :1])

    with pytest.raises(RuntimeError):
        fail()
    assert hooks_of(model) == 0
    with torch.no_grad(), capture_attention(model) as outer:
        model(images())
        first = dict(outer)
        with capture_attention(model) as inner:
            model(images() + 1)
        assert hooks_of(model) == len(outer)
    assert hooks_of(model) == 0
    for name, maps in outer.items():
        assert torch.equal(maps.spatial, inner[name].spatial)  # type: ignore[arg-type]
        assert not torch.equal(maps.spatial, first[name].spatial)  # type: ignore[arg-type]


def test_maps_are_detached_and_own_their_memory() -> None:
    model = network().eval()
    with capture_attention(model) as maps:
        model(images().requires_grad_())
    for found in maps.values():
        for value in found:
            assert value is not None
            assert not value.requires_grad
            assert value.device.type == "cpu"


@pytest.mark.parametrize("feature_cls", ["list", "dict", "getter", "hook"])
def test_features_only_models(feature_cls: str) -> None:
    options: dict[str, Any] = {"features_only": True, "feature_cls": feature_cls}
    model = network(**options).eval()
    with torch.no_grad(), capture_attention(model) as maps:
        model(images())
    assert len(maps) == 4
    modules = dict(model.named_modules())
    assert all(isinstance(modules[name], EMAX) for name in maps)


def test_half_precision_gives_float32() -> None:
    for attention in ("emax", "ema", "cbam", "se"):
        model = network(attention).eval().bfloat16()
        with torch.no_grad(), capture_attention(model) as maps:
            model(images().bfloat16())
        for found in maps.values():
            dtypes = {v.dtype for v in found if v is not None}
            assert dtypes <= {torch.float32, torch.int64}


@pytest.mark.parametrize("in_place", mostly_slow([False, True]))
def test_compiled_model_runs_its_plain_modules_in_the_context(in_place: bool) -> None:
    model = network().eval()
    calls = []

    def backend(graph: Any, _: Any) -> Any:
        calls.append("compiled")
        return lambda *values: (calls.append("run"), graph(*values))[1]

    with torch.no_grad(), capture_attention(model) as expected:
        model(images())
    compiled: Any = copy.deepcopy(model)
    if in_place:
        compiled.compile(backend=backend)
    else:
        compiled = torch.compile(compiled, backend=backend)
    with torch.no_grad():
        compiled(images())  # compiled before the context
        before = list(calls)
        assert "run" in before
        with capture_attention(compiled) as maps:
            compiled(images())
        assert calls == before
        compiled(images())
        assert calls == [*before, *["run"] * before.count("run")]
    assert maps.keys() == expected.keys()
    for name, found in maps.items():
        assert torch.equal(found.spatial, expected[name].spatial)  # type: ignore[arg-type]


def test_distributed_model_has_the_names_of_the_model_inside() -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(network())
        with capture_attention(model) as maps:
            model(images()).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert list(maps) == [f"layer{stage}.0.se" for stage in range(1, 5)]
    assert hooks_of(model) == 0


def test_model_without_attention_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="ResNet has no EMAX, EMA, CBAM, SE or ECA layer"),
        capture_attention(timm.create_model("test_resnet")),
    ):
        pass


def test_import_of_the_package_does_not_import_what_draws(tmp_path: Path) -> None:
    code = (
        "import sys, emax_timm; emax_timm.visualize_attention; "
        "drawing = {'matplotlib', 'pytorch_grad_cam', 'emax_timm.training'}; "
        "sys.exit(bool(drawing & set(sys.modules)))"
    )
    assert in_new_process(code, tmp_path).returncode == 0
    assert {"capture_attention", "visualize_attention"} <= set(emax_timm.__all__)
