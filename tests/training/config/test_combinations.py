"""Options that do not go together are refused in one line before the data is looked at."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiers import mostly_slow

from emax_timm.training.commands import train, validate

SMALL = "--model test_resnet_emax --img-size 32 -b 4 --epochs 4 --warmup-epochs 0 --lr 0.1 -j 0"

# Options, and what the line says of them.
REFUSED = [
    ("--in-chans 4", "give --input-img-mode RGBA or CMYK"),
    ("--in-chans 1 --input-img-mode RGB", "give --input-img-mode L or I or F"),
    ("--input-img-mode L", "give --input-img-mode RGB or"),
    ("--in-chans 2", "images have 1, 3 or 4"),
    ("--input-size 3 64 64", "--img-size 32 and --input-size 3 64 64 differ"),
    ("--input-size 3 32 32 --in-chans 1", "--in-chans 1 and --input-size 3 32 32 differ"),
    ("--model-kwargs num_classes=3", "there is --num-classes for that"),
    ("--model-kwargs features_only=True", "a classifier is trained"),
    ("-b 3 --mixup 0.2", "even --batch-size"),
    ("-b 3 --cutmix 1 --mixup-mode elem", "even --batch-size"),
    ("--aug-splits 2 --mixup 0.2", "without mixup and cutmix"),
    ("--aug-splits 1", "at least 2"),
    ("--aug-splits 2 --no-prefetcher", "leave out --no-prefetcher"),
    ("--jsd-loss", "needs --aug-splits"),
    ("--jsd-loss --aug-splits 2 --bce-loss", "exclude each other"),
    ("--clip-mode agc", "needs --clip-grad"),
    ("--on-spike stop", "needs --loss-spike"),
    ("--scale 1 0.1", "scale must ascend"),
    ("--scale -1 1", "scale must be above 0"),
    ("--cutmix-minmax 0.8 0.2", "cutmix_minmax must ascend"),
    ("--mean 0.5 0.5", "mean has 2 values for 3 channels"),
    ("--std 0", "std must be above 0"),
    ("--smoothing 1", "smoothing must be in"),
    ("--drop-path 2", "drop_path must be in"),
    ("--sched plateau --val-split=", "needs a validation after every epoch"),
    ("--sched plateau --val-interval 2", "needs a validation after every epoch"),
    ("--sched plateau --sched-on-updates", "leave out --sched-on-updates"),
    ("--sched wsd", "requires 0 < decay_epochs <= epochs"),
    ("--sched step --decay-epochs 0", "decay_epochs must be above 0"),
    ("--sched multistep --decay-milestones 3 2", "decay_milestones must ascend"),
    ("--lr-noise 0.1 0.2 0.3", "one or two fractions"),
    ("--lr-base-size 0", "lr_base_size must be at least 1"),
    ("--opt adamw --opt-betas 0.9", "optimizer adamw: --opt-betas takes two values"),
    ("--opt adamw --opt-betas 0.9 2", "Invalid beta parameter"),
    ("--opt-kwargs foo=1", "unexpected keyword argument 'foo'"),
    ("--opt adahessian", "second derivatives"),
    ("--layer-decay 0", "layer_decay must be above 0"),
    ("--torchcompile-mode max-autotune", "needs --torchcompile"),
    ("--torchcompile eager --torchcompile-mode default", "for the backend inductor"),
    ("--torchcompile inductor --torchcompile-mode foo", "unknown torch.compile mode foo"),
]


def convolutions_are_checked() -> bool:
    """Whether this torch checks sizes on the meta device; the lowest version does not."""
    image, kernel = torch.empty(1, 1, 1, 1, device="meta"), torch.empty(1, 1, 2, 2, device="meta")
    try:
        F.conv2d(image, kernel)
    except RuntimeError:
        return True
    return False


# What a model, or Pillow's augmentation, does not take.
TRIED = [
    ("-b 1", "one value per channel, for model test_resnet_emax on images of 3 x 32 x 32"),
    pytest.param(
        *("--model convnext_atto_emax --img-size 16", "Kernel size can't be greater"),
        marks=pytest.mark.skipif(not convolutions_are_checked(), reason="this torch does not"),
    ),
    ("--model vgg11 --img-size 16", "Output size is too small"),
    ("--model vit_tiny_patch16_224 --img-size 64", "doesn't match model (224)"),
    ("--model vgg11 --grad-checkpointing", "does not support --grad-checkpointing"),
    ("--model-kwargs drop_rate=3", "dropout probability"),
    ("--num-classes 0 --head-init-scale 0.1", "num_classes must be at least 1"),
    ("--in-chans 1 --aa rand-m9", "images of mode L cannot be augmented as asked"),
    ("--in-chans 4 --input-img-mode RGBA --grayscale-prob 0.5", "mode RGBA cannot be augmented"),
    ("--in-chans 1 --input-img-mode I", "mode I cannot be augmented"),
    ("--aa foo", "Unknown AA policy foo"),
]


@pytest.mark.parametrize(
    ("options", "said"),
    [*REFUSED, *mostly_slow(TRIED, 0, 1, 4, 7)],
)
def test_combination_is_refused_before_the_data(
    options: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = [str(tmp_path / "absent"), "--output", str(tmp_path), *SMALL.split(), *options.split()]
    assert train(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert "absent" not in lines[0]  # the data folder, which does not exist, was not looked for
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["--input-size 4 32 32", "--in-chans 1 --input-img-mode RGB"])
def test_validation_refuses_the_same_inputs(size: str, capsys: Any) -> None:
    assert validate(["absent", "--model", "test_resnet_emax", *size.split()]) == 2
    assert "channels" in capsys.readouterr().err


ACCEPTED = [
    "--in-chans 4 --input-img-mode RGBA",
    "--in-chans 1 --grayscale-prob 0.5",
    "-b 1 --aug-splits 2",
    "--mixup 0.2 --mixup-mode pair -b 6",
    "--aug-splits 3 --jsd-loss",
    "--sched wsd --decay-epochs 0.5 --lr-decay-fn linear",
    "--torchcompile eager",
    "--opt adamw --opt-kwargs fused=True",
    "--layer-decay 0.7 --layer-decay-no-opt-scale 0.1",
    "--head-init-scale 0.1",
]


@pytest.mark.parametrize("options", mostly_slow(ACCEPTED, 0, 1, 2))
def test_combination_is_tried_without_data(options: str, tmp_path: Path, capsys: Any) -> None:
    argv = [str(tmp_path / "absent"), *SMALL.split(), *options.split()]
    assert train(argv) == 2
    assert f"the data folder {tmp_path / 'absent'} does not exist" in capsys.readouterr().err
