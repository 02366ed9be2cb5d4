"""How far two arrays are from each other."""

import numpy as np


def relative(ours, theirs):
    """Largest difference over the tensor's largest value."""
    return np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max()
