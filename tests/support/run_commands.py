"""Command lines that take a run."""

from pathlib import Path

__all__ = ["COMMANDS", "command"]

# Every command that takes a model or weights, on a run's folder.
COMMANDS = {
    "predict": "predict IMAGE -m RUN",
    "validate": "validate --checkpoint RUN -j 0",
    "validate by --model": "validate --model RUN -j 0",
    "export": "export RUN --output OUT/model.pt2 --fixed-size --fixed-batch",
    "export of weights": "export test_resnet_emax --checkpoint RUN --num-classes 2 --img-size 32 "
    "--output OUT/model.pt2 --fixed-size --fixed-batch",
    "visualize": "visualize -m RUN --images IMAGE --output OUT/report --no-grad-cam",
    "visualize --checkpoint": "visualize --checkpoint RUN --images IMAGE --output OUT/report "
    "--no-grad-cam",
    "train on": "train IMAGES --model RUN --epochs 1 -b 8 -j 0 --output OUT --experiment again",
    "train from": "train IMAGES --model test_resnet_emax --img-size 32 --initial-checkpoint RUN "
    "--epochs 1 -b 8 -j 0 --output OUT --experiment again",
    "train from pretrained": "train IMAGES --model test_resnet_emax --img-size 32 "
    "--pretrained-path RUN --epochs 1 -b 8 -j 0 --output OUT --experiment again",
    "resume": "train --resume RUN --epochs 3",
    "publish": "publish RUN --repo me/cats --output OUT/release -j 0",
    "curves": "curves RUN",
    "verify": "weights verify RUN",
}


def command(name: str, run: str | Path, images: Path, out: Path) -> list[str]:
    image = images / "validation" / "cat" / "0.png"
    values = {"RUN": run, "IMAGES": images, "IMAGE": image}
    words = COMMANDS[name].split()
    return [str(values.get(word, word)).replace("OUT", str(out)) for word in words]
