"""Which subset sizes to measure next, by gradient descent: the least doubt about the winner for the money.

Two candidates lead after the first runs. What is in doubt is the difference of their log losses on the full data.
Around the fitted laws the posterior is taken as Gaussian (Laplace): every measurement at size D adds g(D) g(D)^T /
noise^2 to the information about a candidate's parameters, g the gradient of its log loss. So the variance of the
difference after any set of further runs is known before one of them is made, and has derivatives by their sizes. A
budget is divided among K runs of each candidate by a softmax, none of them smaller than the largest made so far, and
descended, for K = 1 and 2; the better one is the design.

Then a check in the real world: pairs of neighbours in the published tables, of which the losses that the design asks
for (at the nearest sizes that are there) are looked up and given to the default selector, against one run each of
equal size.

Run: PYTHONPATH=.:kernels python benchmarks/studies/next_sizes.py
It writes benchmarks/results/studies/next_sizes.json.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from study import agreement, central, finish, require

import lensjax
from lensjax.selectors.bayesian_average import posterior

VISIBLE, TARGET = 6_400.0, 1_638_400.0
NOISE = 0.01  # of a measured log loss
PRIOR = np.array([5.0, 1.0, 0.3, 3.0])  # standard deviations of log B, log E, beta, log D_l: weak
RUNS = (1, 2)  # of each of the two candidates
SHARE = 1 / 32  # of fine-tuning both on the target: what further runs may cost
STEPS, RATE = 200, 0.2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Contest:
    """Two candidates and what is known of them.

    Attributes
    ----------
    laws : float array (2, 4)
        log B, log E, beta, log D_l of the rectified law.
    sizes : float array (S,)
        Measured already, for both.
    parameters : float array (2,)
        Numbers of weights: what a sample costs.
    target : float
    """

    laws: Any
    sizes: Any
    parameters: Any
    target: Any = TARGET

    @property
    def full(self) -> Any:
        """Cost of fine-tuning both on the target, in weights x samples."""
        return self.parameters.sum() * self.target


def slopes(law: Any, sizes: Any) -> Any:
    """Differentiate log losses by a law's parameters: (4,), (K,) -> (K, 4)."""

    def log_loss(one: Any, size: Any) -> Any:
        named = {"B": jnp.exp(one[0]), "E": jnp.exp(one[1]), "beta": one[2], "D_l": jnp.exp(one[3])}
        return lensjax.rectified_law(named, size)

    return jax.vmap(jax.grad(log_loss), (None, 0))(law, sizes)


@jax.jit
def variance(contest: Contest, further: Any) -> Any:
    """Posterior variance of the difference of both log losses at the target, after `further` (2, K) sizes."""
    total = jnp.zeros(())
    for law, more in zip(contest.laws, further, strict=True):
        seen = slopes(law, jnp.concatenate([contest.sizes, more]))
        information = jnp.diag(1 / PRIOR**2) + seen.T @ seen / NOISE**2
        end = slopes(law, jnp.asarray(contest.target)[None])[0]
        total += end @ jnp.linalg.solve(information, end)
    return total


def divided(contest: Contest, logits: Any, budget: Any) -> Any:
    """Return sizes (2, K) that together cost exactly the budget, none below the largest one measured."""
    least = contest.sizes.max()
    rest = budget - logits.shape[1] * least * contest.parameters.sum()
    shares = jax.nn.softmax(logits.ravel()).reshape(logits.shape)
    return least + shares * rest / contest.parameters[:, None]


@jax.jit
def doubt(contest: Contest, logits: Any, budget: Any) -> Any:
    """Log of that variance over the present one: 0 is nothing learned."""
    none = jnp.zeros((2, 0))
    return jnp.log(variance(contest, divided(contest, logits, budget)) / variance(contest, none))


@functools.partial(jax.jit, static_argnames=("runs", "steps"))
def descend(contest: Contest, budget: Any, runs: int, steps: int) -> tuple[Any, Any]:
    """Descend the doubt with Adam: logits (2, K) and the course of the doubt."""
    adam = optax.adam(RATE)
    logits = jnp.linspace(0.0, 2.0, runs) * jnp.ones((2, 1))

    def step(carry: Any, _: Any) -> tuple[Any, Any]:
        at, state = carry
        value, slope = jax.value_and_grad(lambda x: doubt(contest, x, budget))(at)
        updates, state = adam.update(slope, state)
        return (at + updates, state), value

    (logits, _), course = jax.lax.scan(step, (logits, adam.init(logits)), None, length=steps)
    return logits, course


def design(contest: Contest, budget: Any, steps: int = STEPS) -> tuple[np.ndarray, np.ndarray]:
    """Find sizes (2, K), ascending, and how the doubt fell on the way there."""
    found = []
    for runs in RUNS:
        logits, course = descend(contest, budget, runs, steps)
        found.append((float(course[-1]), np.sort(np.asarray(divided(contest, logits, budget)), axis=1), course))
    _, sizes, course = min(found, key=lambda one: one[0])
    return sizes, np.asarray(course)


def check(contest: Contest, budget: float, step: float = 1e-4) -> dict[str, float]:
    """Compare the derivatives by the logits with finite differences."""
    with jax.enable_x64(True):
        at = np.random.default_rng(0).normal(size=(2, RUNS[-1]))
        exact = jax.grad(lambda x: doubt(contest, x, budget))(jnp.asarray(at))
        units = np.eye(at.size).reshape(-1, *at.shape)
        repeated = [central(lambda x: doubt(contest, jnp.asarray(x), budget), at, unit, step) for unit in units]
    return agreement(exact, repeated)


def contest_of(curves: lensjax.Curves, rows: Any, visible: float = VISIBLE, target: float = TARGET) -> Contest:
    """Fit both candidates' laws to what is visible, with priors as weak as those of the design."""
    seen = curves.visible(visible).rows(rows)
    lowest = np.nanmin(seen.losses, axis=1)
    fits = lensjax.fit(seen, law="rectified", prior={"beta": (0.25, 0.1), "E": (0.5 * lowest, 1e-3 / lowest**2)})
    found = fits.params
    laws = np.stack([np.log(found["B"]), np.log(np.maximum(found["E"], 1e-3)), found["beta"], np.log(found["D_l"])], 1)
    assert curves.parameters is not None
    return Contest(laws, seen.sizes, curves.parameters[np.asarray(rows)], target)


def looked_up(curves: lensjax.Curves, rows: Any, wanted: np.ndarray, contest: Contest) -> tuple[float, float]:
    """Give the default selector the losses at the wanted sizes; return its error, and the share of the full cost."""
    seen = np.where(curves.sizes <= VISIBLE, curves.losses, np.nan)[list(rows)]
    cost = 0.0
    for place, row in enumerate(rows):
        for size in wanted[place]:
            column = int(np.argmin(np.abs(np.log(np.maximum(curves.sizes, 1) / size))))
            if curves.sizes[column] > VISIBLE and np.isnan(seen[place, column]):
                seen[place, column] = curves.losses[row, column]
                cost += curves.sizes[column] * contest.parameters[place]
    expected = posterior(dataclasses.replace(curves.rows(rows), losses=seen), contest.target).loss()
    truth = curves.at(contest.target)[list(rows)]
    return float(np.log(expected[0] / expected[1]) - np.log(truth[0] / truth[1])), float(cost / contest.full)


def pairs(curves: lensjax.Curves, most: int) -> list[tuple[int, int]]:
    """Return neighbours in the order that is predicted from what is visible, the leaders first."""
    order = np.argsort(posterior(curves.visible(VISIBLE), TARGET).loss())
    known = np.isfinite(curves.losses[:, curves.sizes > 0]).all(axis=1)
    order = [int(row) for row in order if known[row]]
    return list(itertools.pairwise(order))[:most]


def compare(name: str, most: int = 12) -> dict[str, Any]:
    """Compare design and single runs on pairs of one published table."""
    curves = lensjax.read_losses(f"published:{name}")
    errors: dict[str, list[float]] = {"nothing": [], "single": [], "design": []}
    costs: dict[str, list[float]] = {"single": [], "design": []}
    for rows in pairs(curves, most):
        contest = contest_of(curves, rows)
        sizes, _ = design(contest, SHARE * contest.full)
        plans = {"nothing": np.zeros((2, 0)), "single": np.full((2, 1), SHARE * TARGET), "design": sizes}
        for plan, wanted in plans.items():
            error, cost = looked_up(curves, rows, wanted, contest)
            errors[plan].append(abs(error))
            if plan in costs:
                costs[plan].append(cost)
    return {
        "pairs": len(errors["nothing"]),
        "mean_error_of_log_difference": {plan: float(np.mean(v)) for plan, v in errors.items()},
        "share_of_full_cost": {plan: float(np.mean(v)) for plan, v in costs.items()},
    }


def main() -> None:
    start = time.perf_counter()
    curves = lensjax.read_losses("published:flan")
    with jax.enable_x64(True):
        rows = pairs(curves, 1)[0]
        contest = contest_of(curves, rows)
        budget = SHARE * contest.full
        found = check(contest, budget)
        require(found, 1e-6, "doubt by the division of the budget")
        sizes, course = design(contest, budget)
        doubling = np.array([[VISIBLE, VISIBLE * 2, VISIBLE * 4]] * 2)
        doubling *= budget / (doubling * contest.parameters[:, None]).sum()
        plans = {"single": np.full((2, 1), SHARE * TARGET), "doubling": doubling, "design": sizes}
        none = float(variance(contest, jnp.zeros((2, 0))))
        left = {plan: float(variance(contest, jnp.asarray(v))) / none for plan, v in plans.items()}
        budgets = {}
        for share in (1 / 64, 1 / 32, 1 / 16, 1 / 8):
            _, one = design(contest, share * contest.full)
            budgets[f"{share:.4f}"] = {
                "variance_left": float(np.exp(one[-1])),
                "gain_per_share": float(-one[-1] / share),
            }
        real = {name: compare(name) for name in ("flan", "gigaword", "wmt19")}
    names = [curves.names[row] for row in rows]
    for name, own in zip(names, sizes, strict=True):
        print(f"{name}: measure next at {', '.join(f'{size:,.0f}' for size in own)} samples")
    print("variance left: " + ", ".join(f"{plan} {100 * value:.1f} %" for plan, value in left.items()))
    for table, result in real.items():
        print(table, result["mean_error_of_log_difference"], "at", result["share_of_full_cost"])
    finish(
        "next_sizes",
        {
            "what": "sizes to measure next for the least posterior variance of the leaders' difference, by descent",
            "budget_share": SHARE,
            "agreement": found,
            "contest": dict(zip(names, sizes.tolist(), strict=True)),
            "variance_left": left,
            "descent": {"start": float(np.exp(course[0])), "end": float(np.exp(course[-1]))},
            "by_budget": budgets,
            "published_pairs": real,
            "seconds": time.perf_counter() - start,
        },
    )


if __name__ == "__main__":
    main()
