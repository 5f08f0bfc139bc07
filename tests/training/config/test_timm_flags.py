"""A timm user's command line: the same flags with the same defaults."""

import dataclasses
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml
from interpreters import ROOT, Interpreter
from tiers import mostly_slow
from training_testing import TRAIN, VALIDATE

from emax_timm.training import TrainConfig, UsageError
from emax_timm.training.config import from_mapping, parse_settings
from emax_timm.training.config.checks import check_config
from emax_timm.training.config.flags import flags_of
from emax_timm.training.config.timm_flags import timm_flags

PAGE = runpy.run_path(str(ROOT / "docs" / "make_timm_flags.py"))
SCRIPTS, is_option, timm_page = PAGE["SCRIPTS"], PAGE["is_option"], PAGE["timm_page"]

# Options of timm's train.py that are here too, with timm's defaults.
TIMM_DEFAULTS: dict[str, Any] = {
    flag.replace("-", "_"): entry["default"]
    for flag, entry in timm_flags().items()
    if "train" in entry and is_option("train", flag) and flag != "config"
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


def test_every_option_of_timm_is_here_or_says_what_is() -> None:
    for flag, entry in timm_flags().items():
        for script, kind in SCRIPTS.items():
            if script not in entry or is_option(script, flag):
                continue
            for name in [f"--{flag}", *entry.get("also", ())]:
                with pytest.raises(UsageError) as caught:
                    parse_settings(kind, [name, "1"], f"{script}.py")
                assert str(caught.value) == f"timm's {name} is not supported: {entry['here']}"


def test_a_message_names_options_that_are_here() -> None:
    """What is said to be in place of an option is an option of one of the two commands."""
    both = [set(flags_of(kind, "")._option_string_actions) for kind in SCRIPTS.values()]
    others = {"--nproc-per-node"}  # of torchrun
    for entry in timm_flags().values():
        named = set(re.findall(r"--[a-z][a-z-]+", entry.get("here", "")))
        assert named <= set.union(*both, others), entry


def test_page_of_timms_options_is_what_its_generator_gives() -> None:
    """If not, `python docs/make_timm_flags.py` writes it anew."""
    page = (ROOT / "docs" / "timm_flags.md").read_text(encoding="utf-8")
    assert page == timm_page()
    assert all(re.search(rf"^\| `(--)?{flag}`", page, re.MULTILINE) for flag in timm_flags())


def test_several_unknown_flags_are_named_at_once() -> None:
    argv = "--native-amp --num-gpu 2 --modle x --kd-model-name y --kd-temperature 2"
    with pytest.raises(UsageError) as caught:
        parse_settings(TrainConfig, argv.split(), "train.py")
    assert str(caught.value) == (
        "timm's --native-amp is not supported: use --amp; timm's --num-gpu is not supported: there "
        "is a process for each GPU: start with torchrun --nproc-per-node N; timm's "
        "--kd-model-name, --kd-temperature are not supported: there is no distillation; "
        "unknown flag --modle; the nearest valid one is --model"
    )


def is_current(name: str) -> bool:
    """Whether the newest train.py has an option."""
    entry = timm_flags()[name.replace("_", "-")]
    return len(entry.get("train", ())) == 1 and name not in ("config", "opt_foreach")


# What timm's newest train.py writes into args.yaml where nothing is given but the folder.
ARGS = {flag.replace("-", "_"): entry["default"] for flag, entry in timm_flags().items()}
ARGS = {
    **{name: ARGS[name] for name in ARGS if is_current(name)},
    **{"data": "DIR", "model": "resnet18", "device": "cpu"},
}


def test_args_yaml_of_timm_is_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "args.yaml"
    path.write_text(yaml.safe_dump(ARGS))
    config = from_mapping(TrainConfig, parse_settings(TrainConfig, ["-c", str(path)], ""), "")
    expected = {name: value for name, value in ARGS.items() if name in OPTIONS}
    assert len(expected) > 110
    expected["output"] = "output/train"
    assert {name: getattr(config, name) for name in expected} == expected


def test_args_yaml_names_all_that_is_not_here_at_once(tmp_path: Path) -> None:
    asked = {"fast_norm": True, "worker_seeding": "part", "log_wandb": True, "tta": 2, "lrr": 1}
    path = tmp_path / "args.yaml"
    path.write_text(yaml.safe_dump(ARGS | asked))
    with pytest.raises(UsageError) as caught:
        parse_settings(TrainConfig, ["-c", str(path)], "")
    message = str(caught.value)
    assert message.startswith(f"{path}: timm's ")
    assert all(f"timm's {name} is not supported: " in message for name in asked if name != "lrr")
    assert message.endswith("unknown key lrr; the nearest valid one is lr")
    assert message.count("not supported") == 4


# timm's documentation, "Training Examples": https://huggingface.co/docs/timm/training_script
PUBLISHED = {
    "efficientnet_b2": "-b 128 --sched step --epochs 450 --decay-epochs 2.4 --decay-rate .97 "
    "--opt rmsproptf --opt-eps .001 -j 8 --warmup-lr 1e-6 --weight-decay 1e-5 --drop 0.3 "
    "--drop-path 0.2 --model-ema --model-ema-decay 0.9999 --aa rand-m9-mstd0.5 --remode pixel "
    "--reprob 0.2 --amp --lr .016",
    "mobilenetv3_large_100": "-b 512 --sched step --epochs 600 --decay-epochs 2.4 --decay-rate "
    ".973 --opt rmsproptf --opt-eps .001 -j 7 --warmup-lr 1e-6 --weight-decay 1e-5 --drop 0.2 "
    "--drop-path 0.2 --model-ema --model-ema-decay 0.9999 --aa rand-m9-mstd0.5 --remode pixel "
    "--reprob 0.2 --amp --lr .064 --lr-noise 0.42 0.9",
    "resnext50_32x4d": "--lr 0.6 --warmup-epochs 5 --epochs 240 --weight-decay 1e-4 --sched "
    "cosine --reprob 0.4 --recount 3 --remode pixel --aa rand-m7-mstd0.5-inc1 -b 192 -j 6 --amp "
    "--dist-bn reduce",
}


@pytest.mark.parametrize("model", mostly_slow(PUBLISHED, 0))
def test_published_command_line_of_timm_is_accepted(model: str) -> None:
    argv = ["--model", model, *PUBLISHED[model].split()]
    check_config(from_mapping(TrainConfig, parse_settings(TrainConfig, argv, ""), ""))


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
