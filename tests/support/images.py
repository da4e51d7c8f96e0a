"""Images on disk, for the tests of what loads them."""

from __future__ import annotations

import numpy as np
from PIL import Image


def pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def make_imagefolder(root, images=3):
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            (root / part / label).mkdir(parents=True)
            for i in range(images):
                Image.fromarray(pixels(40 + 8 * i, 50, 3)).save(root / part / label / f"{i}.jpg")
    return root
