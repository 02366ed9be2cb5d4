"""The default selector: a Bayesian average over rectified laws with shared hyper-priors, mixed with AtS.

A single best-fitting law predicts worse than a posterior average over laws (benchmarks/LOG.md). The laws are

    log L(D) = a + log(e + (1 - e) / (1 + (D / D0)^beta))

with the level a integrated out, so that results do not depend on the scale of the losses. e is the irreducible share of
the loss, D0 the size at which the power phase begins. Candidates of one table are trained on the same data, so their D0
and beta are assumed to be spread around a common centre. The hyper-prior, which says where that centre is, how wide the
spread is and how large e tends to be, is inferred from the losses of all candidates together (empirical Bayes).

Choosing the lowest prediction favours candidates whose extrapolation is too optimistic (the winner's curse):
predictions differ more than the losses turn out to differ. So where all candidates are extrapolated equally far, the
choice weighs the predicted loss against the loss at the largest measured size.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lensjax.errors import InputError
from lensjax.losses.curves import Curves
from lensjax.selectors.baselines import ats
from lensjax.selectors.certainty import CREDIBLE_LEVEL, best_probability, out_of_order, smallest_credible_set
from lensjax.selectors.scores import Scores

FLOORS = np.array([0, 0.04, 0.08, 0.12, 0.18, 0.24, 0.3, 0.37, 0.44, 0.52, 0.6, 0.68, 0.76, 0.84, 0.92])
ONSETS = np.geomspace(30, 1e7, 16)
EXPONENTS = np.geomspace(0.03, 1.6, 14)
ONSET_CENTRES = 100 * np.exp(np.arange(11.0))
EXPONENT_CENTRES = np.array([0.05, 0.08, 0.12, 0.17, 0.25, 0.35, 0.5, 0.7, 1.0])
FLOOR_PRIORS = ((0.35, 0.5), (0.5, 0.5), (0.5, 1.0))  # Beta distributions of e
EXPONENT_WIDTHS = np.array([0.2, 0.3])
NUM_DRAWS, NUM_BLOCKS = 4000, 32
PAD_MULTIPLE = 8  # columns are padded to a multiple of this, so that one compiled program serves many tables


@dataclasses.dataclass(frozen=True)
class Settings:
    """Constants of the average.

    benchmarks/default_selector.py finds `largest_size_weight`, with all three published tables and also when any one of
    them is left out, and `stretch`, with all three. The other constants were set by hand with all three tables in view
    (benchmarks/LOG.md).

    Attributes
    ----------
    noise : float
        Standard deviation of a log loss around the law, in units of each curve's own scale.
    drift : float
        Standard deviation of the law's drift from the largest size to half of it; it gives larger sizes more weight.
    fade : float
        Factor by which the precision of the drift's steps falls with each halving of the size; at 0.5 the drift's
        variance is `drift`^2 (largest / size - 1).
    degrees_of_freedom : float
        Degrees of freedom of each curve's own scale (Student-t); at 1 the fit tolerates a jump in the losses.
    onset_width : float
        Spread of log D0 over the candidates of one table.
    power_mean_order : float
        The predicted loss is the power mean of this order over the predictive distribution. Above 1 it leans towards
        high losses: of two candidates with the same median, the one with the narrower distribution wins.
    ats_share : float
        Weight of AtS in the scores and intervals, as one more law. It improves the ranking, not the predicted losses.
    largest_size_weight : float
        Weight of the log loss at the largest measured size in the choice; the predicted log loss has the rest.
    run_noise : float
        Standard deviation of a log loss between runs that differ only in their random seed; used for the probability
        of being the best.
    stretch : (float, float)
        Factors by which the predictive distribution is stretched below and above its median, in log loss, so that
        the 90 % interval has its nominal coverage, on either side, for tables that were not used to set it.
    """

    noise: float = 0.003
    drift: float = 0.015
    fade: float = 0.5
    degrees_of_freedom: float = 1.0
    onset_width: float = 1.0
    power_mean_order: float = 6.0
    ats_share: float = 0.15
    largest_size_weight: float = 0.3
    run_noise: float = 0.03
    stretch: tuple[float, float] = (1.5, 0.9)


DEFAULT_SETTINGS = Settings()


@functools.cache
def law_grid() -> np.ndarray:
    """Return the grid of laws: e, D0 and beta of each, float64 (G, 3)."""
    return np.array(list(itertools.product(FLOORS, ONSETS, EXPONENTS)))


@functools.cache
def hyper_priors(settings: Settings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the hyper-priors of e (F, E), of D0 (O, D) and of beta (X, B), float64, rows adding to 1.

    Under a hyper-prior of the table, one row of each, e, D0 and beta are independent.
    """
    edges = np.concatenate([[0], (FLOORS[1:] + FLOORS[:-1]) / 2, [1]])
    with jax.enable_x64(True):
        floor = np.stack(
            [np.diff(np.asarray(jax.scipy.special.betainc(a, b, jnp.asarray(edges)))) for a, b in FLOOR_PRIORS]
        )

    def log_normals(values: np.ndarray, centres: np.ndarray, widths: np.ndarray) -> np.ndarray:
        away = (np.log(values) - np.log(centres)[:, None]) / widths.reshape(-1, 1, 1)
        found = np.exp(-0.5 * away**2).reshape(-1, len(values))
        return np.asarray(found / found.sum(axis=1, keepdims=True))

    return (
        floor / floor.sum(axis=1, keepdims=True),
        log_normals(ONSETS, ONSET_CENTRES, np.array([settings.onset_width])),
        log_normals(EXPONENTS, EXPONENT_CENTRES, EXPONENT_WIDTHS),
    )


def law_weights(likelihood: Any, priors: tuple[Any, Any, Any]) -> tuple[Any, Any]:
    """Return the posterior weights of the laws (M, G) and the posterior of the hyper-priors (H,).

    `likelihood` is (M, G), each row up to a factor; H counts every combination of the hyper-priors' rows. Arrays of
    NumPy or JAX.
    """
    xp = jnp if isinstance(likelihood, jax.Array) else np
    grid = likelihood.reshape(len(likelihood), *(p.shape[1] for p in priors))
    evidence = xp.einsum("medb,fe,od,xb->mfox", grid, *priors, optimize=True)
    log_evidence = xp.log(evidence).sum(axis=0)
    hyper_posterior = xp.exp(log_evidence - log_evidence.max())
    hyper_posterior = hyper_posterior / hyper_posterior.sum()
    prior = xp.einsum("mfox,fe,od,xb->medb", hyper_posterior / evidence, *priors, optimize=True)
    weights = likelihood * prior.reshape(likelihood.shape)
    return weights / weights.sum(axis=1, keepdims=True), hyper_posterior.ravel()


def log_relative_loss(grid: Any, sizes: Any) -> Any:
    """Return log L(D) - a of the laws `grid` (G, 3) at `sizes` (S,): array (G, S).

    Arrays of NumPy or JAX.
    """
    e, onset, beta = grid[:, 0, None], grid[:, 1, None], grid[:, 2, None]
    xp = jnp if isinstance(sizes, jax.Array) else np
    return xp.log(e + (1 - e) / (1 + (sizes / onset) ** beta))


@jax.jit
def _posterior_arrays(
    y: jax.Array,
    known: jax.Array,
    sizes: jax.Array,
    target: jax.Array,
    grid: jax.Array,
    priors: tuple[jax.Array, jax.Array, jax.Array],
    constants: jax.Array,
) -> tuple[jax.Array, ...]:
    """Return `weights`, `log_loss`, `hyper_posterior` and `likelihood` of `Posterior`.

    `y` (M, S) are log losses at `sizes` (S,), valid where `known`; `constants` are noise, drift, fade and degrees of
    freedom.
    """
    noise, drift, fade, freedom = constants
    measured = jnp.where(known, jnp.log2(sizes), -jnp.inf)
    age = jnp.where(known, measured.max(axis=1, keepdims=True) - jnp.log2(sizes), 0.0)
    # Random walk from the largest size backwards, with longer steps further back.
    walked = drift**2 * (fade**-age - 1) / (1 / fade - 1)
    both = known[:, :, None] & known[:, None, :]
    walk = jnp.where(both, jnp.minimum(walked[:, :, None], walked[:, None, :]), 0.0)
    covariance = walk + jnp.eye(len(sizes)) * jnp.where(known, noise**2, 1.0)[:, :, None]
    factor = jnp.linalg.cholesky(covariance)
    inverse = jax.scipy.linalg.solve_triangular(factor, jnp.broadcast_to(jnp.eye(len(sizes)), factor.shape), lower=True)

    def whiten(columns: jax.Array) -> jax.Array:
        """(M, S, K) -> (M, S, K)."""
        return jnp.matmul(inverse, columns, precision="highest")

    ones = whiten(known[:, :, None].astype(y.dtype))
    residual = jnp.where(known[:, :, None], y[:, :, None] - log_relative_loss(grid, sizes).T, 0.0)
    residual = whiten(residual)
    information = (ones**2).sum(axis=1)
    level = (ones * residual).sum(axis=1) / information
    chi = ((residual - ones * level[:, None]) ** 2).sum(axis=1)
    count = known.sum(axis=1, keepdims=True)
    likelihood = -0.5 * (freedom + count - 1) * jnp.log1p(chi / freedom)
    likelihood = jnp.exp(likelihood - likelihood.max(axis=1, keepdims=True))
    weights, hyper_posterior = law_weights(likelihood, priors)
    prediction = level + log_relative_loss(grid, target[None])[:, 0]
    return weights, prediction, hyper_posterior, likelihood


@dataclasses.dataclass(frozen=True, eq=False)
class Posterior:
    """Predictive distribution of the losses of M candidates at one size: G weighted laws for each, and AtS.

    Attributes
    ----------
    target : float
        Training samples.
    largest : float64 array (M,)
        Largest size at which each candidate was measured.
    weights : float64 array (M, G)
        Posterior probability of each law, rows adding to 1.
    log_loss : float64 array (M, G)
        Log loss each law predicts.
    hyper_posterior : float64 array (H,)
        Probability of each hyper-prior (`hyper_priors`, the rows of beta running fastest), given all candidates.
    likelihood : float64 array (M, G)
        Likelihood of each law, up to a factor for each candidate.
    ats : float64 array (M,)
        Log loss predicted by AtS; NaN where it has too few points.
    settings : Settings
    """

    target: float
    largest: np.ndarray
    weights: np.ndarray
    log_loss: np.ndarray
    hyper_posterior: np.ndarray
    likelihood: np.ndarray
    ats: np.ndarray
    settings: Settings

    @functools.cached_property
    def mean(self) -> np.ndarray:
        """Mean log loss of the laws, without AtS (M,)."""
        return np.asarray((self.weights * self.log_loss).sum(axis=1))

    @functools.cached_property
    def shift(self) -> np.ndarray:
        """How far AtS lies from that mean (M,); 0 where there is no AtS."""
        return np.where(np.isnan(self.ats), 0.0, self.ats - self.mean)

    @functools.cached_property
    def log_power_mean(self) -> np.ndarray:
        """Logarithm of the laws' power mean of order `power_mean_order`, without AtS (M,)."""
        order, highest = self.settings.power_mean_order, self.log_loss.max(axis=1, keepdims=True)
        return highest[:, 0] + np.log((self.weights * np.exp(order * (self.log_loss - highest))).sum(axis=1)) / order

    def loss(self) -> np.ndarray:
        """Return the predicted losses (M,): the laws' power mean of order `power_mean_order`."""
        return np.exp(self.log_power_mean)

    @functools.cached_property
    def log_loss_with_ats(self) -> np.ndarray:
        """Logarithm of the predicted losses mixed with AtS in log loss (M,)."""
        line = np.where(np.isnan(self.ats), self.log_power_mean, self.ats)
        return np.asarray(self.log_power_mean + self.settings.ats_share * (line - self.log_power_mean))

    def criterion(self) -> np.ndarray:
        """Return the selection criterion (M,), lower is better.

        Where all candidates were measured at the same largest size, it is a weighted mean of the laws' log losses at
        that size and at `target`, without AtS. Otherwise it is `log_loss_with_ats`: in a race the better candidates are
        measured at larger sizes, and weighing in those losses would undo that (benchmarks/LOG.md).
        """
        if np.ptp(self.largest) > 0:
            return self.log_loss_with_ats
        change = log_relative_loss(law_grid(), np.array([self.largest[0], self.target]))
        seen = self.mean + (self.weights * (change[:, 0] - change[:, 1])).sum(axis=1)
        return np.asarray(self.log_power_mean + self.settings.largest_size_weight * (seen - self.log_power_mean))

    def score(self) -> np.ndarray:
        """Return the scores (M,): losses with AtS mixed in, the chosen candidate's lowered to be the lowest."""
        score, choice = np.exp(self.log_loss_with_ats), int(np.argmin(self.criterion()))
        if score[choice] > score.min():
            score[choice] = score.min() * (1 - 1e-9)
        return score

    def best_probability(self) -> np.ndarray:
        """Return the probability that each candidate's run turns out best (M,).

        Each candidate's draws are shifted by the difference between `criterion` and `log_loss_with_ats`, so that the
        probabilities agree with the choice.
        """
        draws = self.draws()
        noise = np.random.default_rng(1).standard_normal(draws.shape)
        return best_probability(draws + (self.criterion() - self.log_loss_with_ats) + self.settings.run_noise * noise)

    def rows(self, which: np.ndarray) -> Posterior:
        """Return the posterior for some of the candidates, by position, as if there were no others."""
        likelihood = self.likelihood[which]
        weights, hyper_posterior = law_weights(likelihood, hyper_priors(self.settings))
        return dataclasses.replace(
            self,
            largest=self.largest[which],
            weights=weights,
            log_loss=self.log_loss[which],
            hyper_posterior=hyper_posterior,
            likelihood=likelihood,
            ats=self.ats[which],
        )

    @functools.cached_property
    def median(self) -> np.ndarray:
        """Median log loss (M,)."""
        return self._log_quantiles((0.5,))[:, 0]

    def quantiles(self, levels: tuple[float, ...]) -> np.ndarray:
        """Return quantiles (M, len(levels)) of the predictive distribution of the losses.

        The distribution is that of the laws, and with probability `ats_share` the same moved to AtS, stretched about
        its median; a quantile is the smallest loss whose cumulative probability reaches the level.
        """
        return np.exp(self._stretched(self._log_quantiles(levels).T).T)

    @functools.cached_property
    def _atoms(self) -> tuple[np.ndarray, np.ndarray]:
        """Log losses in ascending order and their cumulative probability, both (M, 2 G), before stretching."""
        share = self.settings.ats_share
        atoms = np.concatenate([self.log_loss, self.log_loss + self.shift[:, None]], axis=1)
        weights = np.concatenate([(1 - share) * self.weights, share * self.weights], axis=1)
        order = np.argsort(atoms, axis=1)
        return np.take_along_axis(atoms, order, axis=1), np.cumsum(np.take_along_axis(weights, order, axis=1), axis=1)

    def _log_quantiles(self, levels: tuple[float, ...]) -> np.ndarray:
        atoms, cumulative = self._atoms
        # Rounding must not push a level of nearly 1 past the end.
        at = [np.minimum((cumulative < level).sum(axis=1), atoms.shape[1] - 1) for level in levels]
        return np.stack([atoms[np.arange(len(atoms)), i] for i in at], axis=1)

    def _stretched(self, log_loss: np.ndarray) -> np.ndarray:
        """(N, M) -> (N, M)."""
        below, above = self.settings.stretch
        away = log_loss - self.median
        return self.median + np.where(away < 0, below, above) * away

    def draws(self, number: int = NUM_DRAWS, seed: int = 0) -> np.ndarray:
        """Draw log losses of all candidates together (number, M).

        Candidates share the hyper-prior, and whether AtS is right: their errors have a common part.
        """
        rng = np.random.default_rng(seed)
        floor, onset, exponent = hyper_priors(self.settings)
        # Systematic sampling: hyper-priors at equal steps of their cumulative probability, one for each block of draws,
        # have a lower variance than independent ones.
        steps = (np.arange(NUM_BLOCKS) + 0.5) / NUM_BLOCKS
        chosen = np.searchsorted(np.cumsum(self.hyper_posterior), steps * self.hyper_posterior.sum())
        found = np.empty((number, len(self.weights)))
        rows, end = np.arange(len(self.weights)), self.weights.shape[1] * np.arange(1, len(self.weights) + 1)
        for centre, block in zip(chosen, np.array_split(np.arange(number), NUM_BLOCKS), strict=True):
            f, o, x = np.unravel_index(centre, (len(floor), len(onset), len(exponent)))
            prior = floor[f][:, None, None] * onset[o][:, None] * exponent[x]
            cumulative = np.cumsum(self.likelihood * prior.ravel(), axis=1)
            # One sorted array for all candidates: the k-th takes the values from k to k + 1.
            cumulative = cumulative / cumulative[:, -1:] + rows[:, None]
            law = np.searchsorted(cumulative.ravel(), rng.random((len(block), len(rows))) + rows, side="right")
            found[block] = self.log_loss.ravel()[np.minimum(law, end - 1)]
        right = rng.random((number, 1)) < self.settings.ats_share
        return self._stretched(found + np.where(right, self.shift, 0.0))


def posterior(curves: Curves, target: float, settings: Settings = DEFAULT_SETTINGS) -> Posterior:
    """Predict the losses at `target` samples from all measured losses above 0 samples.

    Parameters
    ----------
    curves : Curves
        NaN is a loss that was not measured; each candidate may have been measured at sizes of its own.
    target : float
        Training samples, any positive number.
    settings : Settings

    Returns
    -------
    Posterior

    Raises
    ------
    InputError
        If a candidate has no loss above 0 samples.
    """
    tuned = curves.sizes > 0
    sizes, losses = curves.sizes[tuned], curves.losses[:, tuned]
    known = np.isfinite(losses)
    if not known.any(axis=1).all():
        name = curves.names[int(np.argmin(known.any(axis=1)))]
        raise InputError(
            f"{curves.source}: {name} has no visible loss above 0 samples, but method averaged needs one. Fine-tune it "
            "on a small subset, make more of its losses visible (--visible), or leave it out."
        )
    padding = -len(sizes) % PAD_MULTIPLE
    y = np.pad(np.log(np.where(known, losses, 1.0)), ((0, 0), (0, padding)))
    constants = (settings.noise, settings.drift, settings.fade, settings.degrees_of_freedom)
    with jax.enable_x64(True):
        found = _posterior_arrays(
            jnp.asarray(y),
            jnp.asarray(np.pad(known, ((0, 0), (0, padding)))),
            jnp.asarray(np.pad(sizes, (0, padding), constant_values=1.0)),
            jnp.asarray(float(target)),
            jnp.asarray(law_grid()),
            tuple(jnp.asarray(prior) for prior in hyper_priors(settings)),
            jnp.asarray(constants, jnp.float64),
        )
        weights, log_loss, hyper_posterior, likelihood = (np.asarray(value) for value in found)
    log_ats = np.full(len(curves), np.nan)
    enough = np.flatnonzero(known.sum(axis=1) >= 2)
    if len(enough) and settings.ats_share:
        log_ats[enough] = np.log(ats(curves.rows(enough), target).predicted_loss)
    return Posterior(
        target=float(target),
        largest=np.where(known, sizes, 0.0).max(axis=1),
        weights=weights,
        log_loss=log_loss,
        hyper_posterior=hyper_posterior,
        likelihood=likelihood,
        ats=log_ats,
        settings=settings,
    )


def averaged(curves: Curves, target: float, *, settings: Settings = DEFAULT_SETTINGS) -> Scores:
    """Average over the laws that the losses allow: the default.

    Every law of a grid of rectified laws is weighted by how well it explains the candidate's losses, the larger sizes
    counting more, and by a prior common to the candidates of the table, which is itself weighted by how well it
    predicts their losses; a share of AtS is mixed into the scores. The choice itself is made with restraint: by the
    laws' log loss at the target with a share of that at the largest size seen, if that is the same for all; the
    candidate chosen is scored just below all others. Works from one size on, then with wide intervals.

    Parameters
    ----------
    curves : Curves
    target : float
    settings : Settings

    Returns
    -------
    Scores
        With 90 % intervals, the probability of being the best of the table, and the smallest set of candidates that
        contains the best with probability 0.9. Details: `E` (the floor), `beta`, and `transition` (D0), as their
        posterior means (of the logarithm for D0).

    Raises
    ------
    InputError
        If a candidate has no loss above 0 samples.

    References
    ----------
    The law: ICML 2024 (arXiv 2402.02314), eq. 4, written with D0 = D_l^(1/beta). AtS: the same, Algorithm 1.
    """
    found = posterior(curves, target, settings)
    predicted, score = found.loss(), found.score()
    raised = score < np.exp(found.log_loss_with_ats)  # the choice alone, unless it is first anyway
    probability = found.best_probability()
    grid = law_grid()
    level = found.log_loss - log_relative_loss(grid, np.array([float(target)]))[:, 0]
    used = np.isfinite(curves.losses) & (curves.sizes > 0)
    margin = (1 - CREDIBLE_LEVEL) / 2
    return Scores(
        method="averaged",
        names=curves.names,
        score=score,
        predicted_loss=predicted,
        status=tuple(_status(int(n), settings) for n in used.sum(axis=1)),
        used=used,
        details={
            "beta": found.weights @ grid[:, 2],
            "E": (found.weights * grid[:, 0] * np.exp(level)).sum(axis=1),
            "transition": np.exp(found.weights @ np.log(grid[:, 1])),
        },
        remarks=tuple(
            _remark(int(n), bool(r), why)
            for n, r, why in zip(
                used.sum(axis=1), raised, out_of_order(score, predicted, probability, found.largest), strict=True
            )
        ),
        interval=found.quantiles((margin, 1 - margin)),
        best_probability=probability,
        credible_set=smallest_credible_set(probability, CREDIBLE_LEVEL),
    )


def _remark(points: int, raised: bool, why: str) -> str:
    remarks = ["one size only: a guess"] if points == 1 else []
    if raised:
        remarks.append("chosen before lower predictions that owe more to extrapolation")
    elif why:
        remarks.append(why)
    return "; ".join(remarks)


def _status(points: int, settings: Settings) -> str:
    laws_text = f"average over {math.prod((len(FLOORS), len(ONSETS), len(EXPONENTS))):,} laws"
    return f"{laws_text} weighted by {points} size(s)" + (" and AtS" if points > 1 and settings.ats_share else "")
