"""The measures of heatmaps on cases whose values are known, and the benchmark end to end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_testing import only_line

from emax_timm.compare import faithfulness as study
from emax_timm.compare.measures import area_under, insertion_deletion, pointing_game
from emax_timm.models.capture import heatmap
from emax_timm.samples.scenes import load_items


def test_heatmap_is_the_mean_of_the_groups() -> None:
    spatial = torch.rand(2, 4, 8, 8)
    assert torch.equal(heatmap(spatial, (8, 8)), spatial.mean(1))
    large = heatmap(spatial, (16, 16))
    # Half a pixel apart: the weights of bilinear interpolation are 9/16, 3/16, 3/16 and 1/16.
    m = spatial.mean(1)
    expected = (9 * m[:, 1, 1] + 3 * m[:, 0, 1] + 3 * m[:, 1, 0] + m[:, 0, 0]) / 16
    assert torch.allclose(large[:, 2, 2], expected)


def test_pointing_game_counts_hits_and_shares_ties() -> None:
    heat, masks = torch.zeros(4, 2, 4), torch.zeros(4, 2, 4, dtype=torch.bool)
    masks[:, 0, :2] = True
    heat[0, 0, 1] = heat[1, 1, 1] = 1  # a hit and a miss
    heat[2, 0, 0] = heat[2, 1, 3] = 1  # one of two
    # The last has no contrast: chance, the object's share of the image.
    assert pointing_game(heat, masks).tolist() == [1, 0, 0.5, 0.25]


class Brightness(nn.Module):
    """The probability of class 1 is the share of the lower half that is lit."""

    def forward(self, images: Tensor) -> Tensor:
        lit = images[:, 0, images.shape[2] // 2 :].mean((1, 2)).clamp(1e-6, 1 - 1e-6)
        return torch.stack([(1 - lit).log(), lit.log()], 1)


def test_insertion_and_deletion_follow_the_order_of_the_map() -> None:
    images = torch.zeros(2, 1, 8, 8)
    images[:, :, 4:] = 1
    rows = torch.arange(8.0)[:, None].expand(8, 8)
    heat = torch.stack([rows, -rows])  # the lit half first, and last
    insertion, deletion = insertion_deletion(Brightness(), images, heat, torch.tensor([1, 1]), 4)
    steps = torch.linspace(0, 1, 5)
    expected = torch.stack([(1 - 2 * steps).clamp_min(0), (2 - 2 * steps).clamp_max(1)])
    assert torch.allclose(deletion, expected, atol=1e-5)
    assert torch.allclose(area_under(deletion), torch.tensor([0.25, 0.75]), atol=1e-5)
    start = insertion[0, 0]  # the blurred image's
    assert 0 < start < 1
    assert torch.allclose(insertion[:, -1], torch.ones(2), atol=1e-5)
    assert (insertion[0] > insertion[1] - 1e-6).all()
    assert insertion[0, 2] == pytest.approx(1, abs=1e-5)


def test_equal_pixels_take_turns_at_random() -> None:
    images, heat = torch.ones(1, 1, 32, 32), torch.zeros(1, 32, 32)
    first, again = (
        insertion_deletion(Brightness(), images, heat, torch.tensor([1]), 4)[1] for _ in range(2)
    )
    assert torch.allclose(first[0], torch.linspace(1, 0, 5), atol=0.06)
    assert torch.equal(again, first)


def test_scenes_of_the_benchmark_hold_one_item_where_the_mask_is() -> None:
    items = load_items("test")
    scenes = study.make_scenes(items, 40, seed=3)
    assert scenes.images.shape == (40, 1, 64, 64)
    assert set(scenes.labels.tolist()) <= set(range(4))
    areas = scenes.masks.flatten(1).double().mean(1)
    assert ((areas > 0.01) & (areas < 0.35)).all()
    again = study.make_scenes(items, 40, seed=3)
    assert torch.equal(scenes.images, again.images)
    bare = study.compose(items, np.random.default_rng(0), 64, (1, 1), (20, 36))
    cluttered = study.compose(items, np.random.default_rng(0), 64, (1, 1), (20, 36), 12)
    assert (cluttered.image > 96 / 255).sum() > (bare.image > 96 / 255).sum()


SMALL = "--seeds 0 1 --attentions emax cbam --steps 1 --train-scenes 64 --test-scenes 8 --curves 4"


@pytest.mark.slow
def test_benchmark_rates_every_map_and_continues_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- faithfulness: begin -->\n<!-- faithfulness: end -->\nb\n")
    arguments = [*SMALL.split(), "--output", str(tmp_path / "runs"), "--write", str(page)]
    assert study.faithfulness(arguments) == 0
    tables = capsys.readouterr().out
    assert tables.strip() in page.read_text()
    assert "Made by `python -m emax_timm.compare.faithfulness --seeds 0 1" in page.read_text()
    kinds = [f"{k}, layer{i}" for k in ("attention", "Grad-CAM", "features") for i in range(1, 5)]
    for name in [*kinds, "constant", "random", "centre prior", "the object itself"]:
        assert tables.count(f"\n| {name} | ") == 3, name
    # The object's own mask always points at the object.
    assert "| the object itself | 100.0 ± 0.0 | 100.0 ± 0.0 |" in tables
    ratings = sorted((tmp_path / "runs").glob("*.json"))
    assert len(ratings) == 4
    # A map without contrast hits as often as chance: the share of the object.
    area = study.make_scenes(load_items("test"), 8, study.TEST_SEED).masks.double().mean()
    found: Any = [json.loads(path.read_text()) for path in ratings]
    assert found[0]["constant"]["pointing"] == pytest.approx(100 * area.item())
    assert found[0]["random"]["pointing"] == found[3]["random"]["pointing"]

    def fail(*_: Any) -> None:
        raise AssertionError("trained or rated once more")

    monkeypatch.setattr(study, "train", fail)
    monkeypatch.setattr(study, "rate", fail)
    assert study.faithfulness(arguments) == 0
    assert capsys.readouterr().out == tables


def test_benchmark_refuses_a_page_without_marks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "page.md").write_text("nothing\n")
    runs = tmp_path / "runs"
    assert study.faithfulness(["--output", str(runs), "--write", f"{tmp_path}/page.md"]) == 2
    assert "must have the line <!-- faithfulness: begin -->" in only_line(capsys.readouterr().err)
    assert not runs.exists()
