import math

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from lensjax.errors import InputError
from lensjax.selectors import log_me
from lensjax.selectors import logme as module
from lensjax.selectors.logme import class_evidence


def log_evidence(features, y, alpha, beta):
    """Log evidence of one regression, as the paper writes it: a dense matrix, float64."""
    n, d = features.shape
    A = alpha * np.eye(d) + beta * features.T @ features
    m = beta * np.linalg.solve(A, features.T @ y)
    misfit = np.sum((features @ m - y) ** 2)
    return (
        0.5 * n * math.log(beta)
        + 0.5 * d * math.log(alpha)
        - 0.5 * n * math.log(2 * math.pi)
        - 0.5 * beta * misfit
        - 0.5 * alpha * (m @ m)
        - 0.5 * np.linalg.slogdet(A)[1]
    )


def reference(features, labels):
    """Evidence per position of each class, maximised over both precisions from several starts."""
    found = []
    for label in np.unique(labels):
        y = (labels == label).astype(np.float64)
        best = max(
            -scipy.optimize.minimize(
                lambda v, y=y: -log_evidence(features, y, math.exp(v[0]), math.exp(v[1])),
                start,
                method="Nelder-Mead",
                bounds=[(-25.0, 25.0)] * 2,
                options={"xatol": 1e-7, "fatol": 1e-11, "maxiter": 2000},
            ).fun
            for start in ([-6.0, 0.0], [0.0, 0.0], [6.0, 0.0], [0.0, 10.0], [5.0, 20.0])
        )
        found.append(best / len(labels))
    return np.array(found)


def problem(seed=0, positions=60, width=8, classes=4, signal=1.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=positions) * 7 + 3
    features = rng.standard_normal((positions, width)) * np.geomspace(1, 5, width)
    features[:, : min(classes, width)] += signal * (labels[:, None] // 7 == np.arange(min(classes, width)))
    return features, labels


@pytest.mark.parametrize(("positions", "width", "signal"), [(60, 8, 1.0), (60, 8, 4.0), (25, 40, 1.0), (60, 5, 0.3)])
def test_evidence_is_the_dense_maximum(positions, width, signal):
    features, labels = problem(1, positions, width, 4, signal)
    np.testing.assert_allclose(class_evidence(features, labels), reference(features, labels), rtol=1e-6, atol=1e-7)
    assert log_me(features, labels) == pytest.approx(reference(features, labels).mean(), rel=1e-6)


def test_large_features_in_blocks_and_classes_in_blocks(monkeypatch):
    """More than 2^20 elements, three blocks of positions and 300 classes; a fixed-point iteration by SVD beside it."""
    rng = np.random.default_rng(2)
    n, d, k = 9000, 120, 300
    assert n * d > 2**20
    labels = np.concatenate([np.arange(k), rng.integers(k, size=n - k)])
    directions = rng.standard_normal((k, d))
    features = (rng.standard_normal((n, d)) + 0.7 * directions[labels]).astype(np.float32)
    found = class_evidence(jnp.asarray(features), labels)
    U, s, _ = np.linalg.svd(features.astype(np.float64), full_matrices=False)
    for at in (0, 5, 255, 256, 299):
        y = (labels == at).astype(np.float64)
        z = U.T @ y
        alpha = beta = 1.0
        for _ in range(3000):
            shrunk = beta * s * z / (alpha + beta * s**2)
            used = np.sum(beta * s**2 / (alpha + beta * s**2))
            misfit = y @ y - z @ z + np.sum((z - s * shrunk) ** 2)
            alpha, beta = used / (shrunk @ shrunk), (n - used) / misfit
        want = 0.5 * (
            n * math.log(beta / (2 * math.pi))
            + d * math.log(alpha)
            - beta * misfit
            - alpha * (shrunk @ shrunk)
            - np.sum(np.log(alpha + beta * s**2))
        )
        assert found[at] == pytest.approx(want / n, rel=1e-7)
    monkeypatch.setattr(module, "BLOCK_ROWS", 1000)
    monkeypatch.setattr(module, "BLOCK_CLASSES", 64)
    np.testing.assert_allclose(class_evidence(features, labels), found, rtol=1e-10)


def test_features_that_know_the_label_win():
    weak, labels = problem(3, signal=0.2)
    strong, _ = problem(3, signal=5.0)
    assert log_me(strong, labels) > log_me(weak, labels)


def test_rotations_scales_and_names_of_classes_do_not_matter():
    features, labels = problem(4)
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0]
    want = log_me(features, labels)
    assert log_me(features @ rotation, labels) == pytest.approx(want, rel=1e-9)
    assert log_me(1e4 * features, labels) == pytest.approx(want, rel=1e-9)
    assert log_me(features, 1000 - labels) == pytest.approx(want, rel=1e-9)


def test_no_features_leave_the_noise_alone():
    labels = np.array([0, 0, 1, 1, 1])
    want = [-2.5 * (math.log(2 * math.pi * count / 5) + 1) / 5 for count in (2, 3)]
    np.testing.assert_allclose(class_evidence(np.zeros((5, 3)), labels), want, rtol=1e-12)


def test_bad_input_is_refused():
    features, labels = problem()
    with pytest.raises(InputError, match=r"features have shape \(60, 8\) and labels \(59,\)"):
        log_me(features, labels[1:])
    with pytest.raises(InputError, match="at least two classes, found 1"):
        log_me(features, np.zeros(60, int))
    features[3, 2] = np.nan
    with pytest.raises(InputError, match="a feature is not a finite number"):
        log_me(features, labels)
