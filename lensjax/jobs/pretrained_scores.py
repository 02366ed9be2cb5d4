"""Scores of a pretrained candidate without fine-tuning: from the spectra of its weights, from its features (LogME)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx

from lensjax import models
from lensjax.errors import InputError
from lensjax.finetune import target_features
from lensjax.models.checkpoints.mapping import parameter_shapes
from lensjax.selectors import log_me, nlp_metrics
from lensjax.tasks import Encoded

MIN_EIGENVALUES = 50  # as the metrics' authors; fewer show no tail. Scores compare only if it is the same for all.
POSITIONS = 4_000  # target tokens
FORWARD_FLOPS = 2  # per weight and token
EXPONENTS = ("pl_alpha", "e_tpl_alpha", "e_tpl_lambda")


def spectra(model: Any) -> dict[str, Any]:
    """Measure the spectra of a model's weight matrices: NLPmetrics.

    Parameters
    ----------
    model : lensjax.models.LanguageModel
        Its `nnx.Param`s are measured, embeddings included.

    Returns
    -------
    dict
        ``pl_alpha``, ``e_tpl_alpha``, ``e_tpl_lambda``: means over the matrices, see `lensjax.selectors.nlp_metrics`;
        ``matrices``: how many were measured; ``min_eigenvalues``: matrices with a smaller side are left out.

    Raises
    ------
    InputError
        If there is no such matrix, or the spectrum of one has no tail.
    """
    metrics = nlp_metrics(nnx.state(model, nnx.Param), min_eigenvalues=MIN_EIGENVALUES)
    _finite("pl_alpha", metrics.mean("pl_alpha"))
    means = {name: metrics.mean(name) for name in EXPONENTS}
    finite = {name: value for name, value in means.items() if math.isfinite(value)}
    return {**finite, "matrices": len(metrics.names), "min_eigenvalues": MIN_EIGENVALUES}


def spectra_flops(config: models.ModelConfig) -> float:
    """Count the floating-point operations of `spectra`, from the shapes alone.

    For a matrix W with sides m >= n, the product W^T W takes 2 m n^2, its eigenvalues 4/3 n^3.
    """
    total = 0.0
    for shape in parameter_shapes(config).values():
        if len(shape) >= 2 and min(shape[-2:]) >= MIN_EIGENVALUES:
            n, m = sorted(shape[-2:])
            total += math.prod(shape[:-2]) * (2 * m * n**2 + 4 / 3 * n**3)
    return total


def evidence(model: Any, samples: Encoded, buckets: Sequence[int], pad_id: int) -> dict[str, Any]:
    """Measure how well a model's features explain the target tokens of some samples: LogME.

    Parameters
    ----------
    model : lensjax.models.LanguageModel
    samples : Encoded
    buckets, pad_id : sequence of int, int
        Padded lengths and the token for padding.

    Returns
    -------
    dict
        ``log_me``: nats per position, see `lensjax.selectors.log_me`; ``positions``, at most `POSITIONS`;
        ``classes``: different tokens among them.

    Raises
    ------
    InputError
        If there are fewer than two classes, or a feature is not finite.
    """
    features, tokens = target_features(model, samples, buckets, pad_id, positions=POSITIONS)
    score = _finite("log_me", log_me(features, tokens))
    return {"log_me": score, "positions": len(tokens), "classes": len(np.unique(tokens))}


def samples_for(train: Encoded, limit: int) -> int:
    """Return how many of the first training samples it takes for `POSITIONS` target tokens; at most `limit`."""
    # The first token of a single sequence has no features: nothing comes before it.
    uncounted = np.maximum(train.prompt_lengths[:limit], 0 if train.separate else 1)
    targets_up_to = np.cumsum(train.token_counts[:limit] - uncounted)
    return min(int(np.searchsorted(targets_up_to, POSITIONS)) + 1, len(targets_up_to))


def evidence_flops(parameters: int, samples: Encoded) -> float:
    """Count the floating-point operations of the forward pass in `evidence`, attention's scores left out."""
    return float(FORWARD_FLOPS) * parameters * float(samples.token_counts.sum())


def _finite(name: str, value: float) -> float:
    """Return a score, or raise `InputError` if it is not finite."""
    if not math.isfinite(value):
        raise InputError(f"{name} is {value:g}; check the model's weights.")
    return value
