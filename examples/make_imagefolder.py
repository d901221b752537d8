"""Write some classes of an npz of images as the folder of PNG files that ``imagefolder:PATH`` reads.

python examples/make_imagefolder.py cifar10.npz animals --classes cat deer dog horse --per-class 500
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("npz", type=Path, help="with train_images, train_labels, test_images, test_labels, class_names")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--classes", nargs="+", required=True)
    parser.add_argument("--per-class", type=int, default=500, help="training images of each class")
    parser.add_argument("--test-per-class", type=int, default=1000, help="test images of each class")
    arguments = parser.parse_args()
    arrays = np.load(arguments.npz)
    names = [str(name) for name in arrays["class_names"]]
    for split, limit in (("train", arguments.per_class), ("test", arguments.test_per_class)):
        # Each access reads the whole array from the file.
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"].ravel()
        for name in arguments.classes:
            chosen = np.flatnonzero(labels == names.index(name))[:limit]
            folder = arguments.folder / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for index in chosen:
                Image.fromarray(images[index]).save(folder / f"{index:05d}.png")


if __name__ == "__main__":
    main()
