"""The model card: a repository's README.md on the Hugging Face Hub."""

from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..training.config import TrainConfig

__all__ = ["CardFacts", "model_card"]

# The options that a reader of a recipe looks for first; config.yaml has all of them.
_RECIPE = (
    *("epochs", "batch_size", "grad_accum_steps", "opt", "lr", "weight_decay", "sched"),
    *("warmup_epochs", "smoothing", "mixup", "cutmix", "aa", "reprob", "scale", "drop_path"),
    *("model_ema", "pretrained", "seed"),
)


@dataclass(frozen=True)
class CardFacts:
    """The facts that a model card states about a run and its model."""

    repo: str
    model: str
    config: TrainConfig
    license: str
    classes: int
    parameters: int
    macs: int
    """Multiply-accumulates of one image."""
    input_size: tuple[int, int, int]
    """Channels, height and width."""
    summary: dict[str, Any]
    """The content of the run's summary.json."""
    version: str
    """The version of emax-timm."""


def model_card(facts: CardFacts) -> str:
    """Return the text of the model card; the same facts give the same text."""
    data = ModelCardData(
        license=facts.license,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "emax", "emax-timm"],
        model_name=facts.repo.partition("/")[2],
        eval_results=_results(facts) or None,
    )
    height, width = facts.input_size[1:]
    config = facts.config
    return f"""---
{data.to_yaml()}
---

# {facts.repo.partition("/")[2]}

{facts.model} trained on {_dataset(config)}: {facts.classes} classes,
images of {height} x {width} pixels, {facts.parameters / 1e6:.2f} M parameters,
{facts.macs / 1e6:.1f} M multiply-accumulates an image. {_start(config)}

{_use(facts)}
{_figures(facts)}
{_training(facts)}
## Intended use

Classifying images like those that it was trained on, and as a backbone to fine-tune. It has been
evaluated on the splits above alone; on other images, and for decisions about people, nothing is
known of its errors. The classes and their balance are those of the data set.

## Licence

{facts.license}, for the weights. The images have licences of their own.
"""


def _use(facts: CardFacts) -> str:
    return f"""## Use

The architecture is in the package emax-timm; importing it makes the model known to timm.

```python
import timm
import emax_timm

model = timm.create_model("hf-hub:{facts.repo}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
```

With transformers:

```python
import emax_timm
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("{facts.repo}")
model = AutoModelForImageClassification.from_pretrained("{facts.repo}")
```

As a feature extractor: `timm.create_model("hf-hub:{facts.repo}", pretrained=True,
features_only=True)`.

`emax weights verify {facts.repo}` compares every file with SHA256SUMS.
"""


def _figures(facts: CardFacts) -> str:
    summary, config = facts.summary, facts.config
    return f"""## Figures

| split | top-1 (%) | top-5 (%) | loss |
| --- | ---: | ---: | ---: |
{_rows(facts)}

The weights are those of epoch {summary["best_epoch"]} of {summary["epochs"]}, which had the best
{config.eval_metric} in validation{_tested(summary)}. In a copy of this repository,

```bash
emax validate --checkpoint model.safetensors{_data_flag(config)}
```

gives the figures of the {"test" if summary["test"] else "validation"} split.
"""


def _training(facts: CardFacts) -> str:
    config = facts.config
    return f"""## Training

```bash
emax train -c config.yaml{_data_flag(config)}
```

with emax-timm {facts.version} ([config.yaml](config.yaml), [log.csv](log.csv)):

{_recipe(config)}
"""


def _dataset(config: TrainConfig) -> str:
    return config.dataset or "a folder of images"


def _start(config: TrainConfig) -> str:
    if config.pretrained or config.pretrained_path or config.initial_checkpoint:
        return "Training started from the weights of another model, which config.yaml names."
    return "Training started from random weights."


def _results(facts: CardFacts) -> list[EvalResult]:
    results = []
    for split, name in (("validation", "validation"), ("test", "test")):
        found = facts.summary.get(split)
        if found:
            dataset = _dataset(facts.config)
            results += [
                EvalResult(
                    task_type="image-classification",
                    dataset_type=dataset,
                    dataset_name=dataset,
                    dataset_split=name,
                    metric_type="accuracy",
                    metric_name=f"top-{n}",
                    metric_value=round(found[f"top{n}"], 3),
                )
                for n in (1, 5)
            ]
    return results


def _rows(facts: CardFacts) -> str:
    return "\n".join(
        f"| {split} | {found['top1']:.3f} | {found['top5']:.3f} | {found['loss']:.4f} |"
        for split in ("validation", "test")
        if (found := facts.summary.get(split))
    )


def _tested(summary: dict[str, Any]) -> str:
    return ", and the test split was read once, with them" if summary["test"] else ""


def _data_flag(config: TrainConfig) -> str:
    return "" if config.dataset.startswith("sample/") else " --data-dir DATA"


def _recipe(config: TrainConfig) -> str:
    rows = [(name, getattr(config, name)) for name in _RECIPE]
    shown = [f"| {name} | {value} |" for name, value in rows if value not in (None, "", False)]
    return "\n".join(["| option | value |", "| --- | --- |", *shown])
