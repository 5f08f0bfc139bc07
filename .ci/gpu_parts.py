"""The parts of `.ci/gpu`: a name, commands, a time limit in seconds, and what they need."""

from typing import NamedTuple

__all__ = ["PARTS", "Command", "Part"]


class Command(NamedTuple):
    """A command of a part.

    Args:
        words: Its words, after the name of the interpreter. {root}, {cache}, {ci} and {json} stand
            for the checkout, the folder of caches, that of these scripts, and the result.
        result: The JSON file that holds its result; by default what {json} stands for.
    """

    words: str
    result: str = "{json}"


class Part(NamedTuple):
    """A part of `.ci/gpu`.

    Args:
        text: What it shows.
        commands: Commands that run one after the other; if one fails, the rest still runs.
        seconds: The time limit of all commands together.
        needs: What must be there: `gpu`, `module NAME`, or `file PATH` in the checkout.
        default: Whether it runs unless others are asked for.
    """

    name: str
    text: str
    commands: list[Command]
    seconds: int
    needs: list[str]
    default: bool = True


PYTEST = "-m pytest -c {root}/pyproject.toml --rootdir {root} -o addopts= -p no:cacheprovider"
PYTEST += " --basetemp {cache}/pytest -v --tb short {root}/tests/"
TEST = f"{PYTEST}ops/test_triton.py"
STEPS = ("compare/test_graphs.py", "compare/test_turns.py", "training/test_sync.py")
EMAX = "-m emax_cli benchmark"
ON_GPU = "--device cuda --amp bf16 --json {json}"
NETWORKS = f"{EMAX} models {ON_GPU} --channels-last -b 128 --rounds 5"
COMPILED = f"{EMAX} models {ON_GPU} --channels-last -b 128 --rounds 3 --no-inference"
TRAIN = "-m emax_cli train -c quickstart --device cuda --amp --epochs 4 -j 4"
TRAIN += " --output {cache}/runs"
LAYERS = "SE CBAM 'EMAX, Triton'"
LIBRARY = ["gpu", "package"]

PARTS = [
    Part(
        "modules",
        "layers: wall time, GPU time, launches and memory, batch 128, bfloat16",
        [
            Command(f"{EMAX} modules {ON_GPU} --rounds 5 --methods {LAYERS} --channels-last"),
            Command(f"{EMAX} modules {ON_GPU} --rounds 5 --methods {LAYERS}"),
        ],
        85,
        LIBRARY,
    ),
    Part(
        "models",
        "networks: images per second in inference and training, peak memory",
        [
            Command(f"{NETWORKS} --models {base} --methods baseline {LAYERS}")
            for base in ("resnet50", "convnext_tiny")
        ],
        75,
        LIBRARY,
    ),
    Part(
        "tester",
        "the Triton backend against the formulas in float64, on the GPU, at full sizes",
        [Command(TEST)],
        105,
        ["file tests/ops/test_triton.py", "module pytest", *LIBRARY],
    ),
    Part(
        "train",
        "four epochs of the quickstart in bfloat16 and in float16",
        [
            Command(
                f"{TRAIN} --amp-dtype {dtype} --experiment {dtype}",
                "{cache}/runs/" + dtype + "/summary.json",
            )
            for dtype in ("bfloat16", "float16")
        ],
        65,
        LIBRARY,
    ),
    Part(
        "loop",
        "the training loop against timm's parts in a plain loop",
        [Command(f"{EMAX} train --device cuda --amp -j 4 --rounds 3 --json {{json}}")],
        40,
        LIBRARY,
    ),
    Part(
        "resume",
        "a run that was killed and resumed ends with the bits of one that ran through",
        [Command("{ci}/gpu_resume.py --folder {cache}/resume --json {json}")],
        45,
        LIBRARY,
    ),
    Part(
        "compile",
        "seconds to compile a training step of resnet18 with SE, and with EMAX",
        [
            Command(f"{COMPILED} --models resnet18 --methods '{method}, compiled'")
            for method in ("SE", "EMAX, Triton")
        ],
        65,
        LIBRARY,
    ),
    Part(
        "together",
        "runs of a study side by side, each step a CUDA graph: bits, and the time of a step",
        [
            *(Command(f"{PYTEST}{file} -k gpu") for file in STEPS),
            Command("{ci}/gpu_together.py --folder {cache}/together --json {json}"),
        ],
        240,
        ["file tests/compare/test_graphs.py", "module pytest", *LIBRARY],
        default=False,
    ),
]
