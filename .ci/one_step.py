"""Train the quickstart for one step, validate it and classify an image: `python .ci/one_step.py`.

Nothing here depends on the platform; CI runs it on Linux, macOS and Windows.
"""

import json
import os
import sys
import tarfile
import tempfile
from pathlib import Path

from emax_cli import main

# Of the 1,000 test images 100 train, as one batch, and the others validate.
TRAIN = "train -c quickstart --train-split test.tar --test-split= --val-fraction 0.9 --epochs 1"
TRAIN += " -b 100 --output ."
VALIDATE = "validate --checkpoint quickstart/last.safetensors"
PREDICT = "predict image.png --model local-dir:quickstart"


def one_step() -> int:
    """Run the three commands in the current folder; returns the status of the first that fails."""
    import emax_timm

    samples = Path(emax_timm.__file__).parent / "samples" / "fashion_mnist"
    with tarfile.open(samples / "test.tar") as tar:
        image = next(member for member in tar if member.isfile())
        stream = tar.extractfile(image)
        assert stream is not None
        Path("image.png").write_bytes(stream.read())
    for command in (TRAIN, VALIDATE, PREDICT):
        print("emax", command, flush=True)
        if status := main(command.split()):
            return status
    row = json.loads(Path("quickstart", "log.jsonl").read_text(encoding="utf-8"))
    assert row["step"] == 1, row
    return 0


if __name__ == "__main__":
    home = Path.cwd()
    # Windows removes neither the current folder nor files that are open.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.chdir(folder)
        status = one_step()
        os.chdir(home)
    sys.exit(status)
