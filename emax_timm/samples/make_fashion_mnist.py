"""Make the sample of Fashion-MNIST: 400 training and 100 test images of each class, as PNG tars.

    apt-get install dataset-fashion-mnist
    python -m emax_timm.samples.make_fashion_mnist OUTPUT_FOLDER

The images are drawn with a fixed seed from the set's own training and test part. The folders in
the tars carry the set's labels, so that timm's reader numbers the classes as the set does.
"""

import gzip
import io
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SOURCE = Path("/usr/share/datasets/fashion-mnist")
CLASSES = [
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle-boot"),
]
PARTS = {"train": ("train", 400), "test": ("t10k", 100)}


def read_idx(path: Path, header: int) -> np.ndarray:
    """Read the bytes of a gzipped IDX file after its header of `header` bytes."""
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


def write_tar(path: Path, images: np.ndarray, labels: np.ndarray, per_class: int) -> None:
    """Write a tar of PNG images, drawn from each class without replacement.

    Args:
        path: The tar file to write.
        images: All images, uint8 [n, 28, 28].
        labels: Their labels, uint8 [n].
        per_class: The number of images to draw from each class.
    """
    random = np.random.default_rng(0)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for label, name in enumerate(CLASSES):
            for index in sorted(random.permutation(np.flatnonzero(labels == label))[:per_class]):
                png = io.BytesIO()
                Image.fromarray(images[index]).save(png, "PNG", optimize=True)
                # Only name and size are set, so that the same images make the same file.
                member = tarfile.TarInfo(f"{label}_{name}/{index:05d}.png")
                member.size = len(png.getvalue())
                tar.addfile(member, io.BytesIO(png.getvalue()))


def make(folder: Path, source: Path = SOURCE) -> None:
    """Write train.tar and test.tar into `folder` from the four files of the Debian package."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, (prefix, per_class) in PARTS.items():
        images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz", header=16)
        labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz", header=8)
        write_tar(folder / f"{part}.tar", images.reshape(-1, 28, 28), labels, per_class)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not SOURCE.is_dir():
        sys.exit(__doc__)
    make(Path(sys.argv[1]))
