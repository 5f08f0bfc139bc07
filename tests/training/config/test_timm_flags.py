"""A timm user's command line: the same flags with the same defaults."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from interpreters import Interpreter
from tiers import mostly_slow
from training_testing import TRAIN, VALIDATE

from emax_timm.training import TrainConfig, UsageError
from emax_timm.training.config import from_mapping, parse_settings
from emax_timm.training.config.options import UNSUPPORTED_FLAGS

# Read off the argparse parser of timm's own train.py (huggingface/pytorch-image-models, release
# 1.0.31): the default of each of its flags that this project has too.
TIMM_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(
        [
            *("data", "data_dir", "train_num_samples", "val_num_samples", "input_img_mode"),
            *("input_key", "target_key", "pretrained_path", "num_classes", "gp", "img_size"),
            *("in_chans", "input_size", "crop_pct", "mean", "std", "validation_batch_size"),
            *("head_init_scale", "head_init_bias", "torchcompile", "torchcompile_mode"),
            *("opt_eps", "opt_betas", "clip_grad", "layer_decay", "layer_decay_no_opt_scale"),
            *("lr", "lr_noise", "train_crop_mode", "color_jitter_prob", "grayscale_prob"),
            *("gaussian_blur_prob", "aa", "bce_target_thresh", "bce_pos_weight", "cutmix_minmax"),
            *("drop_path", "drop_block", "bn_momentum", "bn_eps"),
        ]
    ),
    **dict.fromkeys(
        [
            *("dataset_download", "pretrained", "channels_last", "grad_checkpointing", "amp"),
            *("no_ddp_bb", "sched_on_updates", "warmup_prefix", "no_aug", "jsd_loss", "bce_loss"),
            *("bce_sum", "resplit", "sync_bn", "model_ema", "model_ema_warmup"),
            *("pin_mem", "no_prefetcher"),
        ],
        False,
    ),
    **dict.fromkeys(
        [
            *("dataset", "class_map", "initial_checkpoint", "resume", "interpolation"),
            *("lr_base_scale", "output", "experiment"),
        ],
        "",
    ),
    **{"train_split": "train", "val_split": "validation", "model": "resnet50"},
    **{"batch_size": 128, "grad_accum_steps": 1, "model_kwargs": {}, "opt_kwargs": {}},
    **{"device": "cuda", "amp_dtype": "float16", "dist_bn": "reduce", "seed": 42},
    **{"opt": "sgd", "momentum": 0.9, "weight_decay": 2e-05, "clip_mode": "norm"},
    **{"layer_decay_min_scale": 0, "sched": "cosine", "lr_base": 0.1, "lr_base_size": 256},
    **{"lr_noise_pct": 0.67, "lr_noise_std": 1.0, "lr_cycle_mul": 1.0, "lr_cycle_decay": 0.5},
    **{"lr_cycle_limit": 1, "lr_k_decay": 1.0, "warmup_lr": 1e-05, "min_lr": 0, "epochs": 300},
    **{"epoch_repeats": 0.0, "decay_milestones": [90, 180, 270], "decay_epochs": 90},
    **{"warmup_epochs": 5, "cooldown_epochs": 0, "patience_epochs": 10, "decay_rate": 0.1},
    **{"scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3], "hflip": 0.5, "vflip": 0.0},
    **{"color_jitter": 0.4, "aug_repeats": 0, "aug_splits": 0, "reprob": 0.0},
    **{"remode": "pixel", "recount": 1, "mixup": 0.0, "cutmix": 0.0, "mixup_prob": 1.0},
    **{"mixup_switch_prob": 0.5, "mixup_mode": "batch", "mixup_off_epoch": 0, "smoothing": 0.1},
    **{"train_interpolation": "random", "drop": 0.0, "model_ema_decay": 0.9998},
    **{"log_interval": 50, "val_interval": 1, "workers": 4, "eval_metric": "top1"},
    **{"recovery_interval": 0, "checkpoint_hist": 10},
}

OPTIONS = {field.name: field for field in dataclasses.fields(TrainConfig)}


def test_options_that_timm_lacks_are_few() -> None:
    added = OPTIONS.keys() - TIMM_DEFAULTS.keys()
    added -= {"crop_mode"}  # of timm's validate.py
    assert added == {
        *("val_fraction", "test_split", "grouping_warmup", "grouping_temperature"),
        *("recovery_minutes", "nonfinite", "loss_spike", "on_spike", "dist_timeout", "log_to"),
        *("exif_orientation", "max_broken_fraction"),
    }


@pytest.mark.parametrize("name", TIMM_DEFAULTS)
def test_option_has_timms_default_or_says_so(name: str) -> None:
    config = TrainConfig()
    if getattr(config, name) != TIMM_DEFAULTS[name]:
        assert "timm" in OPTIONS[name].metadata["help"], name


def test_unsupported_flags_of_timm_say_what_to_use() -> None:
    for flag, hint in UNSUPPORTED_FLAGS.items():
        assert flag[2:].replace("-", "_") not in OPTIONS
        with pytest.raises(UsageError, match=hint) as caught:
            parse_settings(TrainConfig, [flag, "1"], "train.py")
        assert flag in str(caught.value)


def test_flags_are_spelt_as_timms() -> None:
    argv = "DIR -b 3 -vb 4 -j 5 --dr 0.5 --lr-noise 0.4 0.9 --torchcompile --mean 0.5 --std 0.2"
    settings = parse_settings(TrainConfig, argv.split(), "train.py")
    assert settings == {
        **{"data": "DIR", "batch_size": 3, "validation_batch_size": 4, "workers": 5},
        **{"decay_rate": 0.5, "lr_noise": [0.4, 0.9], "torchcompile": "inductor"},
        **{"mean": [0.5], "std": [0.2]},
    }
    for name, default in TIMM_DEFAULTS.items():
        if default is False:
            flag = "--" + name.replace("_", "-")
            assert parse_settings(TrainConfig, [flag], "train.py") == {name: True}


TYPICAL = (
    "-b 8 -j 1 --opt adamw --lr 1e-3 --weight-decay 0.05 --sched cosine --warmup-epochs 1 "
    "--aa rand-m9-mstd0.5 --mixup 0.2 --cutmix 1.0 --smoothing 0.1 --reprob 0.25 --drop-path 0.1 "
    "--model-ema --model-ema-decay 0.9 --amp --amp-dtype bfloat16 --channels-last "
    "--clip-grad 1.0 --epochs 1 --img-size 32 --num-classes 2 --log-interval 2 --seed 3"
)


@pytest.mark.slow
@pytest.mark.parametrize("model", mostly_slow(["test_resnet_emax", "resnet18_emax", "resnet18"], 0))
def test_typical_timm_command_line_runs(
    programs: Interpreter, images: Path, tmp_path: Path, model: str
) -> None:
    arguments = ["--model", model, *TYPICAL.split(), "--output", tmp_path, "--experiment", "run"]
    result = programs.run(TRAIN, images, *arguments, cwd=tmp_path)
    assert result.status == 0, result.stderr
    assert "top1: " in result.last_line
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["model"], summary["epochs"]) == (model, 1)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    expected = {"lr": 1e-3, "mixup": 0.2, "cutmix": 1.0, "aa": "rand-m9-mstd0.5", "reprob": 0.25}
    assert expected.items() <= config.items()
    assert config["amp"] is config["model_ema"] is config["channels_last"] is True
    validated = programs.run(
        VALIDATE, "--checkpoint", tmp_path / "run" / "model.safetensors", cwd=tmp_path
    )
    assert validated.status == 0, validated.stderr
    assert validated.last_line == result.last_line[-len(validated.last_line) :]


@pytest.mark.parametrize(
    ("opt", "batch_size", "accumulation", "expected"),
    [
        # timm: lr_base * (global batch / lr_base_size), its square root for adaptive optimizers.
        *(("sgd", 64, 1, 0.1 * 64 / 256), ("sgd", 64, 2, 0.1 * 128 / 256)),
        *(("adamw", 64, 1, 0.1 * 0.5), ("lamb", 64, 4, 0.1), ("lion", 64, 1, 0.025)),
    ],
)
def test_learning_rate_scales_with_the_batch_as_timms(
    opt: str, batch_size: int, accumulation: int, expected: float
) -> None:
    import torch

    from emax_timm.training.build import _resolve
    from emax_timm.training.distributed import DistributedContext

    data_config = {"input_size": (3, 8, 8), "mean": (0,), "std": (1,)}
    data_config |= {"interpolation": "bilinear", "crop_pct": 1.0}
    config = TrainConfig(opt=opt, batch_size=batch_size, grad_accum_steps=accumulation)
    resolved = _resolve(config, data_config, 2, DistributedContext(torch.device("cpu")))
    assert resolved.lr == pytest.approx(expected)
    two = _resolve(config, data_config, 2, DistributedContext(torch.device("cpu"), size=2))
    factor = 2**0.5 if opt in ("adamw", "lamb") else 2
    assert two.lr == pytest.approx(expected * factor)
    given = from_mapping(TrainConfig, {"lr": 0.3}, "")
    assert _resolve(given, data_config, 2, DistributedContext(torch.device("cpu"))).lr == 0.3
