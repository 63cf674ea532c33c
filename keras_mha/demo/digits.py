"""Scikit-learn's handwritten digits: 1797 images of 8 x 8 pixels."""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

Split = tuple[np.ndarray, np.ndarray]

TRAINING_DIGITS = 1408  # whole batches only, so that there is one shape to compile


def load() -> tuple[Split, Split]:
    """Splits the digits, always in the same way.

    Returns:
        Pair of training and test digits, each a pair of images `(digits, 8, 8)`,
        float32 from 0 to 1, and classes `(digits,)`.
    """
    digits = load_digits()
    images, test_images, classes, test_classes = train_test_split(
        (digits.images / 16).astype("float32"),
        digits.target,
        train_size=TRAINING_DIGITS,
        stratify=digits.target,
        random_state=0,
    )
    return (images, classes), (test_images, test_classes)


def shifted(images: np.ndarray, classes: np.ndarray) -> Split:
    """Adds each image moved by a pixel to the four sides.

    1408 digits are few: without this, the model learns them by heart.
    """
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    corners = [(1, 1), (0, 1), (2, 1), (1, 0), (1, 2)]
    moved = [padded[:, row : row + 8, column : column + 8] for row, column in corners]
    return np.concatenate(moved), np.tile(classes, len(corners))
