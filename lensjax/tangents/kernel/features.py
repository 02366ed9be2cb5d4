"""Random features of per-example gradients, for examples in the hundreds of thousands."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lensjax.errors import InputError
from lensjax.tangents.kernel.compute import reduce_gradients, reverse_mode, validate
from lensjax.tangents.kernel.ntk import ntk
from lensjax.tangents.language_models import split_model_args
from lensjax.tangents.parameters import Select
from lensjax.tangents.program.reductions import TensorSketch


@dataclasses.dataclass(frozen=True)
class SketchError:
    """Difference of a sketched kernel from the exact one, on a block of randomly chosen examples.

    Attributes
    ----------
    relative : float
        Frobenius norm of the difference over that of the exact block.
    diagonal : float
        Root mean square of the relative errors of the diagonal.
    off_diagonal : float
        Root mean square of the differences off the diagonal, each over the geometric mean of the two examples'
        diagonal entries: the error of a cosine.
    examples : int
        Number of examples compared.
    """

    relative: float
    diagonal: float
    off_diagonal: float
    examples: int


def ntk_features(
    f: Any,
    params: Any,
    x: Any = None,
    *,
    width: int,
    key: jax.Array,
    output: str = "loss",
    parameters: Select = None,
    batch: int = 64,
) -> jax.Array:
    """Return random features whose inner products are the kernel in expectation.

    Entry (i, j) of a layer's gradient `A^T G`, signed at random, is added to feature h(i) + h'(j) modulo the width,
    with h and h' random: a tensor sketch. With few tokens it is computed from A and G by Fourier transforms, with many
    from the gradient of one example at a time. The layers' sketches, all independent, add up to one vector.

    Parameters
    ----------
    f, params, x, output, parameters : as in `lensjax.tangents.ntk`
    width : int
        Number of features, at least 4. The error of a squared norm is about sqrt(2 / width) of it, whatever the rank
        of the gradients; up to sqrt(6 / width) where rows and columns are more than the features.
    key : PRNG key
        The same key gives the same projections, so that features of different examples can be compared.
    batch : int
        Examples in one call of the function.

    Returns
    -------
    float array (N, width), or (N, C, width) if f returns several numbers. The kernel is their Gram matrix.

    Raises
    ------
    InputError, UnsupportedBackendError : as `lensjax.tangents.ntk`

    References
    ----------
    Pham & Pagh 2013, "Fast and scalable polynomial kernels via explicit feature maps" (tensor sketches); vectors:
    Charikar et al. 2002, the count sketch. Two-sided projections (Choe et al. 2024, LoGra, arXiv:2405.13954) cost less,
    but where gradients have rank one their error only falls as width**(-1/4).
    """
    f, params, x = split_model_args(f, output, params, x)
    problem = validate(f, params, x, None, parameters, False)
    if width < 4 or batch < 1:
        raise InputError(f"width={width} must be at least 4 and batch={batch} at least 1.")
    size = min(batch, problem.rows)
    part = dataclasses.replace(problem, rows=size)
    reduction = TensorSketch(size, width)
    pieces = []
    for start in range(0, problem.rows, size):
        places = np.minimum(np.arange(start, start + size), problem.rows - 1)
        own = jax.tree.map(lambda a, places=places: a[places], x)
        with reverse_mode("ntk_features", "take blocks of ntk(f, ..., method='jacobian')"):
            features = reduce_gradients(part, reduction, params, own, key).get(0)
        if features is None:
            features = jnp.zeros(reduction.shape(problem.outputs))
        pieces.append(jnp.swapaxes(features, 0, 1)[: problem.rows - start])
    features = jnp.concatenate(pieces)
    return features[:, 0] if problem.scalar else features


def sketch_error(
    f: Any,
    params: Any,
    x: Any = None,
    features: Any = None,
    *,
    key: jax.Array,
    examples: int = 32,
    output: str = "loss",
    parameters: Select = None,
) -> SketchError:
    """Compare the kernel of features with the exact one on randomly chosen examples.

    Parameters
    ----------
    f, params, x, output, parameters : as given to `ntk_features`
    features : float array (N, width) or (N, C, width)
        What that returned.
    key : PRNG key
        Chooses the examples.
    examples : int
        Number of examples, at least 2.

    Returns
    -------
    SketchError

    Raises
    ------
    InputError
        If `features` are not those of `x`, or too few examples are asked for.
    """
    f, params, x, features = split_model_args(f, output, params, x, features)
    problem = validate(f, params, x, None, parameters, False)
    count = min(examples, problem.rows)
    if features is None or len(features) != problem.rows or count < 2:
        raise InputError(
            f"features of shape {np.shape(features)} do not belong to {problem.rows} examples, or examples={examples} "
            "is less than 2; give what ntk_features returned for the same x."
        )
    places = np.asarray(jax.random.choice(key, problem.rows, (count,), replace=False))
    exact = ntk(f, params, jax.tree.map(lambda a: a[places], x), parameters=parameters)
    chosen = np.asarray(features, np.float64)[places].reshape(-1, np.shape(features)[-1])
    exact = np.asarray(exact, np.float64).reshape(len(chosen), len(chosen))
    wrong = chosen @ chosen.T - exact
    norms = np.sqrt(np.maximum(np.diag(exact), np.finfo(np.float64).tiny))
    cosines = wrong / np.outer(norms, norms)
    off = ~np.eye(len(chosen), dtype=bool)
    return SketchError(
        float(np.linalg.norm(wrong) / np.linalg.norm(exact)),
        float(np.sqrt(np.mean(np.diag(cosines) ** 2))),
        float(np.sqrt(np.mean(cosines[off] ** 2))),
        count,
    )
