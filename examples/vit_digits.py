"""The data that the ViT example is trained and measured on: scikit-learn's handwritten digits.
1797 grey images of 8x8 pixels; every fourth is held out, which no training sees.
"""

import numpy as np

SIZE = 8
LABELS = [str(i) for i in range(10)]
# How vit_model's preprocessing scales them.
SETTINGS = {
    "do_resize": True,
    "size": {"height": SIZE, "width": SIZE},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5],
    "image_std": [0.5],
}


def load(held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns images, float32 (n, 8, 8, 1) with values from 0 to 255, and labels, int32 (n,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = (np.arange(len(digits.target)) % 4 == 0) == held_out
    images = digits.images[chosen, :, :, None].astype(np.float32) * (255 / 16)
    return images, digits.target[chosen].astype(np.int32)
