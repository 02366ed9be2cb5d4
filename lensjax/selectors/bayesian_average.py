"""The default selector: a Bayesian average over rectified laws, shared hyper-priors, and a share of AtS.

A law fitted to its optimum predicts worse than an average over all laws that the losses allow (benchmarks/LOG.md).
The laws are

    log L(D) = a + log(e + (1 - e) / (1 + (D / D0)^beta))

with the level a integrated out, which makes everything invariant to the scale of the losses: e is the share of the
loss that no amount of data removes, D0 the size at which the power phase begins. Candidates of one table see the same
data, so their D0 and beta are spread around a common centre; what centre and spread are likely and how large e tends
to be, the losses of all candidates together say, before any truth is known.

The candidate with the lowest predicted loss is the one whose luck was greatest: differences between extrapolations are
larger than differences between the losses they will meet. So where all are extrapolated equally far, the choice is made
by a compromise between the predicted loss and the loss at the largest size seen.
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
from lensjax.selectors.certainty import CERTAINTY, best_probability, out_of_order, smallest_set
from lensjax.selectors.scores import Scores

FLOORS = np.array([0, 0.04, 0.08, 0.12, 0.18, 0.24, 0.3, 0.37, 0.44, 0.52, 0.6, 0.68, 0.76, 0.84, 0.92])
ONSETS = np.geomspace(30, 1e7, 16)
EXPONENTS = np.geomspace(0.03, 1.6, 14)
ONSET_CENTRES = 100 * np.exp(np.arange(11.0))
EXPONENT_CENTRES = np.array([0.05, 0.08, 0.12, 0.17, 0.25, 0.35, 0.5, 0.7, 1.0])
FLOOR_PRIORS = ((0.35, 0.5), (0.5, 0.5), (0.5, 1.0))  # Beta distributions of e
EXPONENT_WIDTHS = np.array([0.2, 0.3])
DRAWS, BLOCKS = 4000, 32
PAD = 8  # columns are padded to a multiple of this, so that one compiled program serves many tables


@dataclasses.dataclass(frozen=True)
class Settings:
    """Constants of the average.

    `restraint` is what benchmarks/default_selector.py finds, with all three published tables and without any one of
    them; `stretch` is what it finds with all three. The others, which no rule chose, were set while looking at all
    three (benchmarks/LOG.md).

    Attributes
    ----------
    noise : float
        Standard deviation of a log loss around the law, in units of each curve's own scale.
    drift : float
        The same of the law's drift from the largest size to half of it: why recent points weigh more.
    fade : float
        Factor by which the precision of the drift's steps falls with each halving of the size; at 0.5 the drift's
        variance is `drift`^2 (largest / size - 1).
    freedom : float
        Degrees of freedom of the scale that each curve has of its own (Student-t); 1: a jump is forgiven.
    onset_width : float
        Spread of log D0 over the candidates of one table.
    caution : float
        The predicted loss is the power mean of this order over the predictive distribution. Above 1 it leans to what
        is feared: of two candidates with the same median the better known one wins.
    ats_share : float
        Weight of AtS in the scores and intervals, as one more law; it helps the order, not the predicted losses.
    restraint : float
        Weight of the log loss at the largest size seen, against the predicted log loss, in the choice.
    spread : float
        Standard deviation of a log loss between runs that differ by their random numbers only, for the probability of
        being the best.
    stretch : (float, float)
        Factors by which the predictive distribution is stretched below and above its median, in log loss, so that
        truths of a table that was not seen fall outside of its 90 % interval as rarely as they should, on either side.
    """

    noise: float = 0.003
    drift: float = 0.015
    fade: float = 0.5
    freedom: float = 1.0
    onset_width: float = 1.0
    caution: float = 6.0
    ats_share: float = 0.15
    restraint: float = 0.3
    spread: float = 0.03
    stretch: tuple[float, float] = (1.5, 0.9)


SETTINGS = Settings()


@functools.cache
def laws() -> np.ndarray:
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

    def bells(values: np.ndarray, centres: np.ndarray, widths: np.ndarray) -> np.ndarray:
        away = (np.log(values) - np.log(centres)[:, None]) / widths.reshape(-1, 1, 1)
        found = np.exp(-0.5 * away**2).reshape(-1, len(values))
        return np.asarray(found / found.sum(axis=1, keepdims=True))

    return (
        floor / floor.sum(axis=1, keepdims=True),
        bells(ONSETS, ONSET_CENTRES, np.array([settings.onset_width])),
        bells(EXPONENTS, EXPONENT_CENTRES, EXPONENT_WIDTHS),
    )


def posterior(likelihood: Any, priors: tuple[Any, Any, Any]) -> tuple[Any, Any]:
    """Likelihoods (M, G), each row up to a factor -> weights of the laws (M, G), probabilities of hyper-priors (H,).

    H is every combination of the hyper-priors' rows. Arrays of NumPy or JAX.
    """
    xp = jnp if isinstance(likelihood, jax.Array) else np
    grid = likelihood.reshape(len(likelihood), *(p.shape[1] for p in priors))
    evidence = xp.einsum("medb,fe,od,xb->mfox", grid, *priors, optimize=True)
    log_evidence = xp.log(evidence).sum(axis=0)
    centres = xp.exp(log_evidence - log_evidence.max())
    centres = centres / centres.sum()
    prior = xp.einsum("mfox,fe,od,xb->medb", centres / evidence, *priors, optimize=True)
    weights = likelihood * prior.reshape(likelihood.shape)
    return weights / weights.sum(axis=1, keepdims=True), centres.ravel()


def shape(grid: Any, sizes: Any) -> Any:
    """Log loss below the level: (G, 3) laws at (S,) sizes -> (G, S). Arrays of NumPy or JAX."""
    e, onset, beta = grid[:, 0, None], grid[:, 1, None], grid[:, 2, None]
    xp = jnp if isinstance(sizes, jax.Array) else np
    return xp.log(e + (1 - e) / (1 + (sizes / onset) ** beta))


@jax.jit
def _posterior(
    y: jax.Array,
    known: jax.Array,
    sizes: jax.Array,
    target: jax.Array,
    grid: jax.Array,
    priors: tuple[jax.Array, jax.Array, jax.Array],
    constants: jax.Array,
) -> tuple[jax.Array, ...]:
    """Log losses (M, S) where `known`, at `sizes` (S,) -> see `Posterior`; also the posterior (M, G) of the laws."""
    noise, drift, fade, freedom = constants
    measured = jnp.where(known, jnp.log2(sizes), -jnp.inf)
    age = jnp.where(known, measured.max(axis=1, keepdims=True) - jnp.log2(sizes), 0.0)
    # A random walk that started at the largest size and takes longer steps further back.
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
    residual = jnp.where(known[:, :, None], y[:, :, None] - shape(grid, sizes).T, 0.0)
    residual = whiten(residual)
    information = (ones**2).sum(axis=1)
    level = (ones * residual).sum(axis=1) / information
    chi = ((residual - ones * level[:, None]) ** 2).sum(axis=1)
    count = known.sum(axis=1, keepdims=True)
    likelihood = -0.5 * (freedom + count - 1) * jnp.log1p(chi / freedom)
    likelihood = jnp.exp(likelihood - likelihood.max(axis=1, keepdims=True))
    weights, centres = posterior(likelihood, priors)
    prediction = level + shape(grid, target[None])[:, 0]
    return weights, prediction, centres, likelihood


@dataclasses.dataclass(frozen=True, eq=False)
class Posterior:
    """What the losses of M candidates will be at a size: a weighted set of G laws for each, and AtS.

    Attributes
    ----------
    target : float
    largest : float64 array (M,)
        Largest size at which each candidate was measured.
    weights : float64 array (M, G)
        Posterior probability of each law, rows adding to 1.
    log_loss : float64 array (M, G)
        Log loss each law predicts.
    centres : float64 array (H,)
        Probability of each hyper-prior (`hyper_priors`, the rows of beta running fastest), given all candidates.
    likelihood : float64 array (M, G)
        Of each law, up to a factor per candidate.
    ats : float64 array (M,)
        Log loss predicted by AtS; NaN where it has too few points.
    settings : Settings
    """

    target: float
    largest: np.ndarray
    weights: np.ndarray
    log_loss: np.ndarray
    centres: np.ndarray
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
    def cautious(self) -> np.ndarray:
        """Logarithm of the laws' power mean of order `caution`, without AtS (M,)."""
        order, highest = self.settings.caution, self.log_loss.max(axis=1, keepdims=True)
        return highest[:, 0] + np.log((self.weights * np.exp(order * (self.log_loss - highest))).sum(axis=1)) / order

    def loss(self) -> np.ndarray:
        """Return the predicted losses (M,): the laws' power mean of order `caution`."""
        return np.exp(self.cautious)

    @functools.cached_property
    def mixed(self) -> np.ndarray:
        """Logarithm of the predicted losses mixed with AtS in log loss (M,)."""
        line = np.where(np.isnan(self.ats), self.cautious, self.ats)
        return np.asarray(self.cautious + self.settings.ats_share * (line - self.cautious))

    def merit(self) -> np.ndarray:
        """Return what the choice is made by (M,), lower is better.

        Where all candidates were measured at the same largest size: the laws' log losses at that size and at `target`,
        mixed; AtS has no part in it. Otherwise `mixed`: in a race those that are extrapolated less far have been looked
        at more closely, and restraint would undo that (benchmarks/LOG.md).
        """
        if np.ptp(self.largest) > 0:
            return self.mixed
        change = shape(laws(), np.array([self.largest[0], self.target]))
        seen = self.mean + (self.weights * (change[:, 0] - change[:, 1])).sum(axis=1)
        return np.asarray(self.cautious + self.settings.restraint * (seen - self.cautious))

    def score(self) -> np.ndarray:
        """Return the scores (M,): losses with AtS mixed in, that of the choice lowered to just below the lowest."""
        score, choice = np.exp(self.mixed), int(np.argmin(self.merit()))
        if score[choice] > score.min():
            score[choice] = score.min() * (1 - 1e-9)
        return score

    def best_probability(self) -> np.ndarray:
        """Return the probability that each candidate's run turns out best (M,).

        Each candidate's losses are moved by what restraint moves its place in the choice: what is said of the chosen
        one goes with the choice.
        """
        draws = self.draws()
        noise = np.random.default_rng(1).standard_normal(draws.shape)
        return best_probability(draws + (self.merit() - self.mixed) + self.settings.spread * noise)

    def rows(self, which: np.ndarray) -> Posterior:
        """Return the forecast for some of the candidates, by position, as if there were no others."""
        likelihood = self.likelihood[which]
        weights, centres = posterior(likelihood, hyper_priors(self.settings))
        return dataclasses.replace(
            self,
            largest=self.largest[which],
            weights=weights,
            log_loss=self.log_loss[which],
            centres=centres,
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

    def draws(self, number: int = DRAWS, seed: int = 0) -> np.ndarray:
        """Draw log losses of all candidates together (number, M).

        Candidates share the hyper-prior, and whether AtS is right: their errors have a common part.
        """
        rng = np.random.default_rng(seed)
        floor, onset, exponent = hyper_priors(self.settings)
        # Hyper-priors at equal steps of their cumulative probability, each for a block of draws: few of them are as
        # good as many at random.
        steps = (np.arange(BLOCKS) + 0.5) / BLOCKS
        chosen = np.searchsorted(np.cumsum(self.centres), steps * self.centres.sum())
        found = np.empty((number, len(self.weights)))
        rows, end = np.arange(len(self.weights)), self.weights.shape[1] * np.arange(1, len(self.weights) + 1)
        for centre, block in zip(chosen, np.array_split(np.arange(number), BLOCKS), strict=True):
            f, o, x = np.unravel_index(centre, (len(floor), len(onset), len(exponent)))
            prior = floor[f][:, None, None] * onset[o][:, None] * exponent[x]
            cumulative = np.cumsum(self.likelihood * prior.ravel(), axis=1)
            # One sorted array for all candidates: the k-th takes the values from k to k + 1.
            cumulative = cumulative / cumulative[:, -1:] + rows[:, None]
            law = np.searchsorted(cumulative.ravel(), rng.random((len(block), len(rows))) + rows, side="right")
            found[block] = self.log_loss.ravel()[np.minimum(law, end - 1)]
        right = rng.random((number, 1)) < self.settings.ats_share
        return self._stretched(found + np.where(right, self.shift, 0.0))


def forecast(curves: Curves, target: float, settings: Settings = SETTINGS) -> Posterior:
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
    padding = -len(sizes) % PAD
    y = np.pad(np.log(np.where(known, losses, 1.0)), ((0, 0), (0, padding)))
    constants = (settings.noise, settings.drift, settings.fade, settings.freedom)
    with jax.enable_x64(True):
        found = _posterior(
            jnp.asarray(y),
            jnp.asarray(np.pad(known, ((0, 0), (0, padding)))),
            jnp.asarray(np.pad(sizes, (0, padding), constant_values=1.0)),
            jnp.asarray(float(target)),
            jnp.asarray(laws()),
            tuple(jnp.asarray(prior) for prior in hyper_priors(settings)),
            jnp.asarray(constants, jnp.float64),
        )
        weights, log_loss, centres, likelihood = (np.asarray(value) for value in found)
    line = np.full(len(curves), np.nan)
    enough = np.flatnonzero(known.sum(axis=1) >= 2)
    if len(enough) and settings.ats_share:
        line[enough] = np.log(ats(curves.rows(enough), target).predicted_loss)
    return Posterior(
        float(target), np.where(known, sizes, 0.0).max(axis=1), weights, log_loss, centres, likelihood, line, settings
    )


def averaged(curves: Curves, target: float, *, settings: Settings = SETTINGS) -> Scores:
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
    found = forecast(curves, target, settings)
    predicted, score = found.loss(), found.score()
    raised = score < np.exp(found.mixed)  # the choice alone, unless it is first anyway
    probability = found.best_probability()
    grid = laws()
    level = found.log_loss - shape(grid, np.array([float(target)]))[:, 0]
    used = np.isfinite(curves.losses) & (curves.sizes > 0)
    margin = (1 - CERTAINTY) / 2
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
        credible_set=smallest_set(probability, CERTAINTY),
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
