"""Kernels and Hessian traces that were recorded while models were fine-tuned: the packaged live benchmark."""

from __future__ import annotations

import dataclasses
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lensjax import data
from lensjax._display import listed
from lensjax._messages import packaged_like
from lensjax.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class RecordedTangents:
    """Kernels and Hessian traces of M candidates at S sizes, on K training samples of one task.

    Kernels and traces are taken at the weights that a fine-tuning run returned (at size 0: before fine-tuning). NaN
    where nothing was or can be measured.

    Attributes
    ----------
    source : str
    names : tuple of str
        Candidates, M; in the order of the table of the same name (`lensjax.read_losses`).
    sizes : int array (S,)
        Training samples; 0 is before fine-tuning.
    outputs : tuple of str
        Kernels' outputs, as in `lensjax.tangents.ntk_outputs`.
    steps : float64 array (M, S)
        Optimiser steps after which the weights were kept: t of eq. 9. 0 at size 0.
    learning_rate, flops : float64 array (M, S)
        Highest learning rate of a run; what the run took. NaN and 0 at size 0.
    second_loss : float64 array (M, S)
        Test loss of a second run, with other random numbers, nats per token; NaN where there was none.
    eigenvalues : mapping of output to float64 array (M, S, K)
        Of the kernel of the samples, ascending; of several outputs, of the sum of their kernels.
    residual : mapping of output to float64 array (M, S, K)
        Outputs less what training drives them to (loss to 0, probability of the target tokens to 1) along the
        eigenvectors, up to each one's sign; for outputs that have such a target.
    cosine, cosine_low : mapping of output to float64 array (M, S)
        Mean cosine similarity of two samples' gradients; the same over the half of the samples whose target tokens are
        least probable.
    alignment : mapping of output to float64 array (M, S)
        Cosine of the kernel and the outer product of the residual.
    change, kept : mapping of output to float64 array (M, S)
        Relative Frobenius distance from the kernel before fine-tuning, and cosine with it; NaN at size 0.
    trace_hessian, trace_gauss_newton, trace_hessian_error, trace_gauss_newton_error : float64 array (M, S)
        Of the mean token loss, estimated, with the standard error of the probes; nats / weight^2.

    Examples
    --------
    >>> from lensjax.data.live_benchmark import read_tangents
    >>> seen = read_tangents("live:packages")
    >>> len(seen.names), seen.outputs
    (12, ('loss', 'gold_probability', 'gold_logit', 'projections'))
    >>> seen.eigenvalues["loss"].shape, seen.trace_hessian.shape
    ((12, 7, 32), (12, 7))
    """

    source: str
    names: tuple[str, ...]
    sizes: np.ndarray
    outputs: tuple[str, ...]
    steps: np.ndarray
    learning_rate: np.ndarray
    flops: np.ndarray
    second_loss: np.ndarray
    eigenvalues: Mapping[str, np.ndarray]
    residual: Mapping[str, np.ndarray]
    cosine: Mapping[str, np.ndarray]
    cosine_low: Mapping[str, np.ndarray]
    alignment: Mapping[str, np.ndarray]
    change: Mapping[str, np.ndarray]
    kept: Mapping[str, np.ndarray]
    trace_hessian: np.ndarray
    trace_hessian_error: np.ndarray
    trace_gauss_newton: np.ndarray
    trace_gauss_newton_error: np.ndarray

    def __repr__(self) -> str:
        return (
            f"RecordedTangents({self.source}, {len(self.names)} candidates: {listed(self.names)}; {len(self.sizes)} "
            f"sizes; kernels of {', '.join(self.outputs)})"
        )


PER_OUTPUT = ("eigenvalues", "residual", "cosine", "cosine_low", "alignment", "change", "kept")
PER_RUN = (
    *("steps", "learning_rate", "flops", "second_loss"),
    *("trace_hessian", "trace_hessian_error", "trace_gauss_newton", "trace_gauss_newton_error"),
)


def read_tangents(source: str | os.PathLike[str]) -> RecordedTangents:
    """Read what the live benchmark recorded of kernels and Hessian traces.

    Parameters
    ----------
    source : str or path
        ``live:definitions``, ``live:packages``, ``live:novels`` (packaged), or a file that
        benchmarks/live/package.py wrote.

    Returns
    -------
    RecordedTangents

    Raises
    ------
    InputError
        No such table or file, or a file of another kind.

    Examples
    --------
    F(Theta, t) of LensLLM's eq. 9 of each candidate, by the kernel of its losses before fine-tuning, at the time when
    training on 400 samples stopped:

    >>> from lensjax import read_losses
    >>> from lensjax.data.live_benchmark import read_tangents
    >>> from lensjax.laws import kernel_residual
    >>> seen = read_tangents("live:novels")
    >>> seen.names == read_losses("live:novels").names
    True
    >>> at = list(seen.sizes).index(400)
    >>> eigenvalues, residual = seen.eigenvalues["loss"][:, 0], seen.residual["loss"][:, 0]
    >>> kernel_residual(seen.steps[:, at], eigenvalues, residual, 1e-3 / 32).shape == (len(seen.names),)
    True
    """
    text = os.fspath(source)
    name = text.removeprefix("live:")
    if text.startswith("live:"):
        if name not in data.LIVE:
            known = ", ".join(f"live:{n}" for n in data.LIVE)
            hint = packaged_like(name, {"live": data.LIVE})
            raise InputError(f"{text}: nothing is recorded under this name. There are: {known}.{hint}")
        path = data.path("live", f"{name}.npz")
    else:
        path = Path(text)
    try:
        # Opened here, for np.load leaves a broken file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
        outputs = tuple(arrays["outputs"].tolist())
        own: dict[str, Any] = {key: arrays[key].astype(np.float64) for key in PER_RUN}
        for key in PER_OUTPUT:
            own[key] = {o: arrays[f"{key}.{o}"].astype(np.float64) for o in outputs if f"{key}.{o}" in arrays}
        names = tuple(arrays["names"].tolist())
        return RecordedTangents(text, names, arrays["sizes"], outputs, **own)
    except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{text}: cannot be read as recorded tangents ({type(error).__name__}: {error}). Give live:NAME or a file "
            "that benchmarks/live/package.py wrote."
        ) from error
