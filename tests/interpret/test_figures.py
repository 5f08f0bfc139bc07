"""Figures show the numbers that they are about."""

import sys
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tiers import mostly_slow
from torch import Tensor

import emax_timm
from emax_timm import EMAX, EMAXMaps, visualize_attention
from emax_timm.interpret import GateMaps, attention_of
from emax_timm.interpret.figures import (
    comparison_figure,
    figure_bytes,
    groups_figure,
    spatial_figure,
    weights_figure,
)
from emax_timm.interpret.selection import (
    contrasting_groups,
    one_per_stage,
    prepare,
    shown,
    single,
)
from emax_timm.interpret.set_figures import choices_figure, gates_figure, training_figure
from emax_timm.models.capture import heatmap


@pytest.fixture(scope="module")
def model() -> Any:
    return timm.create_model("test_resnet_emax.fashion_mnist", pretrained=True).eval()


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def maps(model: Any, picture: Image.Image) -> dict[str, Any]:
    return single(attention_of(model, prepare(model, picture).unsqueeze(0)), 0)


def heights(axis: Any) -> Tensor:
    return torch.tensor([bar.get_height() for bar in axis.patches], dtype=torch.float32)


def widths(axis: Any) -> Tensor:
    return torch.tensor([bar.get_width() for bar in axis.patches], dtype=torch.float32)


def test_visualize_attention_draws_the_maps(
    model: Any, picture: Image.Image, maps: dict[str, Any]
) -> None:
    figure = visualize_attention(model, picture)
    # The last layer with a map of at least 4 x 4 pixels.
    found = maps["layer2.0.se"]
    spatial, channel, global_ = figure.axes[:3]
    assert figure.get_suptitle() == "layer2.0.se"
    heat = spatial.images[1].get_array()
    expected = torch.nn.functional.interpolate(
        found.spatial.mean(0)[None, None], (32, 32), mode="bilinear"
    )[0, 0]
    assert np.allclose(heat, expected, atol=1e-6)
    assert torch.allclose(heights(channel), found.channel)
    assert torch.allclose(heights(global_), found.global_)
    titles = [axis.get_title() for axis in (spatial, channel, global_)]
    assert titles == [
        "spatial attention, mean of the groups",
        "channel attention",
        "global attention",
    ]
    other = visualize_attention(model, picture, "layer1.0.se")
    assert torch.allclose(heights(other.axes[1]), maps["layer1.0.se"].channel)


def test_visualize_attention_takes_layers_and_tensors_and_keeps_modes(picture: Image.Image) -> None:
    torch.manual_seed(0)
    layer = EMAX(32).train()
    figure = visualize_attention(layer, torch.randn(32, 9, 7))
    assert layer.training
    assert figure.axes[0].images[0].get_array().shape == (9, 7, 3)
    with pytest.raises(ValueError, match="draws one image, not 2"):
        visualize_attention(layer, torch.randn(2, 32, 9, 7))
    with pytest.raises(ValueError, match="there is no attention layer 'layer9'; there are "):
        visualize_attention(layer, torch.randn(32, 9, 7), "layer9")
    with pytest.raises(ValueError, match="has no EMAX"):
        visualize_attention(torch.nn.ReLU(), torch.randn(32, 9, 7))
    squeeze = timm.create_model("test_resnet_emax", attn_layer="se")
    titles = [axis.get_title() for axis in visualize_attention(squeeze, picture).axes]
    assert titles == ["no spatial attention", "channel attention", "no global attention"]


def test_picture_is_what_was_prepared(model: Any) -> None:
    image = Image.new("RGB", (32, 32), (10, 200, 90))
    found = shown(model, prepare(model, image))
    assert found.shape == (32, 32, 3)
    assert np.allclose(found, np.array([10, 200, 90]) / 255, atol=1e-5)


def test_spatial_figure_has_the_mean_the_groups_and_grad_cam(maps: dict[str, Any]) -> None:
    picture = np.zeros((32, 32, 3))
    cams = {f"layer{stage}": torch.rand(32, 32) for stage in range(1, 5)}
    figure = spatial_figure(picture, maps, cams)
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert "input" in panels
    drawn = [axis for axis in figure.axes if axis.get_title() == "Grad-CAM"]
    for axis, cam in zip(drawn, cams.values(), strict=True):
        assert np.array_equal(axis.images[1].get_array(), cam.numpy())
    for stage, name in one_per_stage([*maps]).items():
        spatial = maps[name].spatial
        side = spatial.shape[1]
        heat = panels[f"{stage} ({side}x{side})\nmean"].images[1].get_array()
        assert heat.shape == (32, 32)
        expected = heatmap(spatial.unsqueeze(0), (32, 32))[0]
        assert np.allclose(heat, expected, atol=1e-6)
    groups = [axis for axis in figure.axes if axis.get_title() == "group 17"]
    expected = heatmap(maps["layer1.0.se"].spatial[None, 16:17], (32, 32))[0]
    assert any(np.allclose(axis.images[1].get_array(), expected, atol=1e-6) for axis in groups)


def test_map_of_one_pixel_shows_no_contrast(maps: dict[str, Any]) -> None:
    figure = spatial_figure(np.zeros((32, 32, 3)), maps)
    (axis,) = (a for a in figure.axes if a.get_title().startswith("layer4 (1x1)"))
    assert np.ptp(axis.images[1].get_array()) == 0


def test_groups_are_those_with_contrast_one_of_each_coarse_group() -> None:
    spatial = torch.zeros(8, 2, 2)
    spatial[4:6, 0, 0] = 1
    spatial[6:8, 0, 0] = 0.5
    assert contrasting_groups(spatial, 4, 2) == [4, 6]
    assert contrasting_groups(spatial, 1, 2) == [0]


def test_weights_are_sorted_bars(maps: dict[str, Any]) -> None:
    figure = weights_figure(maps)
    panels = {axis.get_title(): axis for axis in figure.axes}
    for stage, name in one_per_stage([*maps]).items():
        expected = maps[name].channel.sort(descending=True).values
        assert torch.allclose(heights(panels[f"{stage}: channel"]), expected)
        expected = maps[name].global_.sort(descending=True).values
        assert torch.allclose(heights(panels[f"{stage}: global"]), expected)


def test_group_probabilities_stand_in_their_column(model: Any, maps: dict[str, Any]) -> None:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, EMAX)}
    figure = groups_figure(maps, {name: m.candidates for name, m in layers.items()})
    (axis,) = figure.axes
    table = axis.images[0].get_array()
    columns = [int(label.get_text()) for label in axis.get_xticklabels()]
    for row, (name, layer) in enumerate(layers.items()):
        for column, count in enumerate(columns):
            if count in layer.candidates:
                value = maps[name].group_probs[layer.candidates.index(count)]
                assert table[row, column] == pytest.approx(value.item())
            else:
                assert table.mask[row, column] or np.isnan(table[row, column])


@pytest.mark.slow
def test_comparison_has_a_row_for_each_model(maps: dict[str, Any]) -> None:
    torch.manual_seed(0)
    picture, rows = np.zeros((32, 32, 3)), {"emax": maps}
    for attention in ("ema", "cbam", "se"):
        other = timm.create_model("test_resnet_emax", attn_layer=attention)
        rows[attention] = single(attention_of(other, torch.randn(1, 3, 32, 32)), 0)
    figure = comparison_figure([picture] * 4, rows)
    titles = [axis.get_title() for axis in figure.axes]
    assert [title for title in titles if title in rows] == [*rows]
    bars = [axis for axis in figure.axes if axis.get_title() == "layer3: channels"]
    expected = rows["se"]["layer3.0.se.attention"].channel.sort(descending=True).values
    assert torch.allclose(heights(bars[0]), expected)
    assert titles.count("layer3") == 3


def test_choices_are_shares_of_each_class() -> None:
    figure = choices_figure({"layer1.0.se": {"bag": {1: 1, 4: 3}, "coat": {2: 5}}})
    (axis,) = figure.axes
    found = [(bar.get_x(), bar.get_width()) for bar in axis.patches]
    # By count, and in it by class.
    assert found == [(0, 0.25), (0, 0), (0.25, 0), (0, 1), (0.25, 0.75), (1, 0)]
    assert axis.yaxis_inverted()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        *("1 group", "2 groups", "4 groups")
    ]


def test_gates_are_those_of_the_layers(model: Any) -> None:
    left, right = gates_figure(model).axes
    layers = [m for m in model.modules() if isinstance(m, EMAX)]
    gammas = [m.gamma.item() for m in layers if m.gamma is not None]
    assert widths(left).tolist() == pytest.approx(gammas)
    means = [m.residual_gate.mean().item() for m in layers]
    assert right.lines[0].get_xdata() == pytest.approx(means)


def test_training_figure_shows_the_log() -> None:
    def row(epoch: int, gate: float) -> dict[str, Any]:
        layer = {"group_counts": [1, 4], "histogram": [3, 1], "gamma": gate / 2}
        return {"epoch": epoch, "layer1.0.se": {**layer, "residual_gate": gate}}

    figure = training_figure([row(0, 0.2), row(1, 0.6)])
    curves = {axis.get_title(): axis.lines[0].get_xydata().tolist() for axis in figure.axes}
    assert curves == {
        "gamma": [[1, 0.1], [2, 0.3]],
        "mean |residual gate|": [[1, 0.2], [2, 0.6]],
        "mean chosen group count": [[1, 1.75], [2, 1.75]],
    }


def test_stage_is_known_by_the_layer_name() -> None:
    names = ["layer1.0.se", "layer1.1.se", "stages.0.blocks.2.attention", "s2.b1.se", "attention"]
    assert one_per_stage(names) == {
        "layer1": "layer1.1.se",
        "stages.0": "stages.0.blocks.2.attention",
        "s2": "s2.b1.se",
        "attention": "attention",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file_format", "head"), mostly_slow([("png", b"\x89PNG"), ("svg", b"<?xml")], 0)
)
def test_same_figure_gives_the_same_file(
    model: Any, picture: Image.Image, file_format: str, head: bytes
) -> None:
    first, again = (
        figure_bytes(visualize_attention(model, picture), file_format) for _ in range(2)
    )
    assert first.startswith(head)
    assert first == again


def test_maps_of_one_image_have_no_batch() -> None:
    both = {
        "a": EMAXMaps(*(torch.arange(2.0),) * 5),
        "b": GateMaps(channel=torch.arange(6.0).view(2, 3)),
    }
    found = single(both, 1)
    assert found["a"].spatial == 1
    assert found["b"].spatial is None
    assert found["b"].channel is not None
    assert found["b"].channel.tolist() == [3, 4, 5]


def test_without_matplotlib_the_error_says_what_to_install(
    model: Any, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'emax-timm\[viz\]'"):
        emax_timm.visualize_attention(model, picture)
