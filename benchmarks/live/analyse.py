"""What the live benchmark says: every method side by side, and whether kernels and traces know more than losses.

    python benchmarks/live/analyse.py [--dry]          # after package.py; a minute; --dry writes nothing

For each task and budget (the largest size seen), all methods predict the losses after fine-tuning on all samples:
PearCorr, RelAcc, RMSE, share of the cost of tuning all. LensLLM's law (eq. 10) is fitted with F free, and with F(Theta,
t) measured: from the kernel of each output choice, with t fitted or observed, under the same weak priors.

Where t is fitted, F is one free number again, between 0 and ||f_0 - y||^2: that cap is all that a kernel adds.

Then: does anything measured of kernels and traces at or below the budget go along with what the default selector gets
wrong? The losses themselves do (they stand in the table as controls), so rank correlations are taken over candidates
with the ranks of the zero-shot loss and of the loss at the budget regressed out of both sides. Tests permute
candidates, those that only decode and those that encode and decode among themselves, in all tasks and budgets alike,
and count the largest of all quantities: signed, and by the squares of each task's mean, for signs may differ by task.
Candidates of one family or one pre-training text are alike, which makes p too small. Would a correction by a quantity,
fitted on other tasks and other candidates, have helped, and by how much does the best of as many quantities help by
chance? Which quantity tells before fine-tuning how many samples are needed? Do the traces fall with n? How much is
noise? Result: results/live.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts are run by path

from environment import write_result
from scipy.stats import rankdata

from lensjax import Curves, InputError, fit, read_losses
from lensjax.data import LIVE
from lensjax.data.live_benchmark import RecordedTangents, read_tangents
from lensjax.laws import kernel_residual
from lensjax.metrics import pear_corr, rel_acc, rmse
from lensjax.selectors import SELECTORS, averaged
from lensjax.selectors.scaling import weak_priors

BUDGETS = (400, 800, 1_600)  # all methods can be used from the first on
EXAMPLES, LENGTH = 32, 128  # of a kernel
PERMUTATIONS, CORRECTIONS = 2_000, 60
SEQ2SEQ = ("t5", "bart")
NEAR = 0.1  # log loss above that of all samples at which a candidate counts as nearly there

JUDGED = ("PearCorr", "RelAcc", "log_RMSE")

Predictor = Callable[[Curves, RecordedTangents, float], np.ndarray]


def spectrum(seen: RecordedTangents, output: str) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues before fine-tuning and the residual along their vectors, both (M, K).

    An output without a target has no residual; one spread evenly takes its place.
    """
    eigenvalues = np.maximum(seen.eigenvalues[output][:, 0], 0.0)
    if output in seen.residual:
        return eigenvalues, seen.residual[output][:, 0]
    return eigenvalues, np.ones_like(eigenvalues)


def fitted_time(output: str) -> Predictor:
    """Eq. 10 with F(Theta, t) by the kernel before fine-tuning, t fitted: the paper's prediction of losses."""

    def predict(curves: Curves, seen: RecordedTangents, target: float) -> np.ndarray:
        eigenvalues, residual = spectrum(seen, output)
        fits = fit(curves, law="lens", eigenvalues=eigenvalues, projections=residual, prior=weak_priors(curves))
        return np.asarray(fits.predict(target))

    return predict


def observed_time(output: str, rate: float) -> Predictor:
    """Eq. 10 with F(Theta, t) at the step at which each run stopped; at the target, a line through log t."""

    def predict(curves: Curves, seen: RecordedTangents, target: float) -> np.ndarray:
        eigenvalues, residual = spectrum(seen, output)
        visible = np.isin(seen.sizes, curves.sizes)
        t, above = seen.steps[:, visible], curves.sizes > 0
        slope, level = np.polyfit(np.log(curves.sizes[above]), np.log(np.maximum(t[:, above], 1.0)).T, 1)
        then = np.exp(level + slope * np.log(target))
        kernel = {"eigenvalues": eigenvalues, "projections": residual, "learning_rate": rate}
        fits = fit(curves, law="lens", t=t, prior=weak_priors(curves), **kernel)
        return np.asarray(fits.predict(target, t=then[:, None]))

    return predict


def free(curves: Curves, seen: RecordedTangents, target: float) -> np.ndarray:
    """Eq. 10 with F free, under the same priors and of the same sizes: what measuring F has to improve on."""
    return np.asarray(fit(curves, law="lens", prior=weak_priors(curves)).predict(target))


def measured_methods(seen: RecordedTangents) -> dict[str, Predictor]:
    """LensLLM's law with F measured, by name."""
    found: dict[str, Predictor] = {"lens law, F free": free}
    for output in seen.outputs:
        evenly = "" if output in seen.residual else ", residual spread evenly"
        found[f"lens law, F({output}{evenly}), t fitted"] = fitted_time(output)
        for name, rate in (("eta", 1e-3), ("eta / N", 1e-3 / EXAMPLES)):
            found[f"lens law, F({output}{evenly}), t observed, {name}"] = observed_time(output, rate)
    return found


def costs(
    seen: RecordedTangents, parameters: np.ndarray, sizes: np.ndarray, used: Any = True, kernels: int = 0
) -> float:
    """Share of the cost of tuning all candidates on all samples: the runs used (M, sizes), and kernels at size 0."""
    runs = (seen.flops[:, np.isin(seen.sizes, sizes)] * used).sum()
    per_kernel = 6 * EXAMPLES * LENGTH + 2 * EXAMPLES**2
    return float((runs + kernels * (parameters * per_kernel).sum()) / seen.flops[:, -1].sum())


def compare() -> dict[str, dict[str, dict[str, float]]]:
    """Metrics of each method: method -> metric -> "TASK BUDGET" -> number."""
    found: dict[str, dict[str, dict[str, float]]] = {}

    def add(method: str, cell: str, score: np.ndarray, predicted: np.ndarray, truth: np.ndarray, cost: float) -> None:
        own = found.setdefault(method, {})
        numbers = {"PearCorr": 100 * pear_corr(score, truth), "RelAcc": 100 * rel_acc(score, truth)}
        numbers |= {"RMSE": rmse(predicted, truth), "cost": 100 * cost}
        for metric, value in numbers.items():
            own.setdefault(metric, {})[cell] = float(value)

    for task in LIVE:
        curves, seen = read_losses(f"live:{task}"), read_tangents(f"live:{task}")
        assert curves.parameters is not None
        target = float(curves.sizes[-1])
        truth = curves.at(target)
        for budget in BUDGETS:
            visible, cell = curves.visible(budget), f"{task} {budget}"
            for method, selector in SELECTORS.items():
                try:
                    scores = selector(visible, target)
                except InputError as error:
                    print(f"{cell}: {method} cannot be used: {error}")
                    continue
                cost = costs(seen, curves.parameters, visible.sizes, scores.used)
                add(method, cell, scores.score, scores.predicted_loss, truth, cost)
            for method, predict in measured_methods(seen).items():
                predicted = predict(visible, seen, target)
                kernels = 0 if method.endswith("free") else 1
                cost = costs(seen, curves.parameters, visible.sizes, kernels=kernels)
                add(method, cell, predicted, predicted, truth, cost)
    return found


def certainty() -> dict[str, dict[str, float]]:
    """How often the default selector's intervals and sets hold what they promise, on data it was not made with."""
    found = {}
    for task in LIVE:
        curves = read_losses(f"live:{task}")
        target = float(curves.sizes[-1])
        truth = curves.at(target)
        covered, contained, size = [], [], []
        for budget in BUDGETS:
            scores = averaged(curves.visible(budget), target)
            assert scores.interval is not None
            assert scores.credible_set is not None
            low, high = scores.interval.T
            covered.append(np.mean((low <= truth) & (truth <= high)))
            contained.append(scores.credible_set[truth.argmin()])
            size.append(scores.credible_set.sum())
        found[task] = {
            "coverage": float(np.mean(covered)),
            "set_contains_best": float(np.mean(contained)),
            "set_size": float(np.mean(size)),
        }
    return found


def quantities(curves: Curves, seen: RecordedTangents, budget: float) -> dict[str, np.ndarray]:
    """All that is known of each candidate beside its losses, up to a budget: name -> (M,)."""
    at = int(np.searchsorted(seen.sizes, budget))
    found: dict[str, np.ndarray] = {}
    for output in seen.outputs:
        for when, column in (("before", 0), ("after", at)):
            values = np.maximum(seen.eigenvalues[output][:, column], 0.0)
            found[f"log trace of kernel, {output}, {when}"] = np.log(values.sum(axis=1))
            found[f"largest share of an eigenvalue, {output}, {when}"] = values[:, -1] / values.sum(axis=1)
            found[f"cosine, {output}, {when}"] = seen.cosine[output][:, column]
            found[f"cosine of unsure samples, {output}, {when}"] = seen.cosine_low[output][:, column]
            if output in seen.residual:
                found[f"alignment, {output}, {when}"] = seen.alignment[output][:, column]
        found[f"change of kernel, {output}"] = seen.change[output][:, at]
        found[f"cosine with kernel before, {output}"] = seen.kept[output][:, at]
        if output in seen.residual:
            eigenvalues, residual = spectrum(seen, output)
            left = np.asarray(kernel_residual(seen.steps[:, at], eigenvalues, residual, 1e-3 / EXAMPLES))
            found[f"log F(Theta, t), {output}"] = np.log(np.maximum(left, 1e-30))
            found[f"share of F left, {output}"] = left / (residual**2).sum(axis=1)
    for matrix in ("hessian", "gauss_newton"):
        trace = getattr(seen, f"trace_{matrix}")
        found[f"trace, {matrix}, before"] = np.arcsinh(trace[:, 0])  # a logarithm that bears negative traces
        found[f"trace, {matrix}, after"] = np.arcsinh(trace[:, at])
        found[f"growth of trace, {matrix}"] = np.arcsinh(trace[:, at]) - np.arcsinh(trace[:, at - 1])
    found["log steps"] = np.log(np.maximum(seen.steps[:, at], 1.0))
    assert curves.parameters is not None
    found["log parameters"] = np.log(curves.parameters)
    found |= {name: np.asarray(values) for name, values in curves.facts.items()}
    return found


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, ties in the middle, with mean 0 and length 1 (0 where all are equal)."""
    assert np.isfinite(values).all()
    order = rankdata(values, axis=-1)
    centred = order - order.mean(axis=-1, keepdims=True)
    length = np.linalg.norm(centred, axis=-1, keepdims=True)
    return np.divide(centred, length, out=np.zeros_like(centred), where=length > 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """One task at one budget: losses seen, what else is known of the candidates (quantities, M), error and truth."""

    task: str
    losses: np.ndarray
    features: np.ndarray
    error: np.ndarray
    predicted: np.ndarray
    truth: np.ndarray


def read_cells() -> tuple[list[Cell], list[str], list[str]]:
    """Return the cells, the quantities' names, and those of the controls among them."""
    cells: list[Cell] = []
    names: list[str] = []
    controls: list[str] = []
    everyone = {read_losses(f"live:{task}").names for task in LIVE}
    everyone |= {read_tangents(f"live:{task}").names for task in LIVE}
    if len(everyone) != 1:
        raise SystemExit("the tasks have different candidates: finish benchmarks/live/make.py first.")
    for task in LIVE:
        curves, seen = read_losses(f"live:{task}"), read_tangents(f"live:{task}")
        target = float(curves.sizes[-1])
        truth = curves.at(target)
        for budget in BUDGETS:
            visible = curves.visible(budget)
            scores = averaged(visible, target)
            logs = np.log(visible.losses)
            own = {
                "control: zero-shot loss": logs[:, 0],
                "control: loss at the budget": logs[:, -1],
                "control: fall of the loss": logs[:, -2] - logs[:, -1],
                "control: predicted loss": np.log(scores.predicted_loss),
            }
            known = quantities(curves, seen, budget)
            controls, names = list(own), [*own, *known]
            features = np.array([*own.values(), *known.values()])
            error = np.log(truth) - np.log(scores.predicted_loss)
            cells.append(Cell(task, logs[:, [0, -1]].T, features, error, scores.predicted_loss, truth))
    return cells, names, controls


def architectures() -> np.ndarray:
    """Whether each candidate encodes and decodes, bool (M,)."""
    families = read_losses(f"live:{LIVE[0]}").families
    assert families is not None
    return np.isin(families, SEQ2SEQ)


def beyond_losses() -> dict[str, Any]:
    """Find what goes along with the default selector's errors, and what a correction by it would have given."""
    (cells, names, controls), blocks = read_cells(), architectures()
    tasks = np.array([cell.task for cell in cells])
    raw_features = np.array([ranks(cell.features) for cell in cells])  # (cells, quantities, M)
    raw_error = np.array([ranks(cell.error) for cell in cells])  # (cells, M)
    features, error = [], []
    for cell, x, y in zip(cells, raw_features, raw_error, strict=True):
        seen = np.linalg.qr(np.concatenate([np.ones((1, len(y))), ranks(cell.losses)]).T)[0]
        features.append(unit(x - (x @ seen) @ seen.T))
        error.append(unit(y - (y @ seen) @ seen.T))
    x, y = np.array(features), np.array(error)

    def statistics(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Correlation of each quantity by task (tasks, quantities), its mean, and the sum of its squares."""
        by_cell = np.einsum("cqm,cm->cq", x, y)
        by_task = np.array([by_cell[tasks == task].mean(axis=0) for task in LIVE])
        return by_task, by_task.mean(axis=0), (by_task**2).sum(axis=0)

    by_task, mean, squares = statistics(x)
    raw = np.einsum("cqm,cm->cq", raw_features, raw_error)
    own = np.array([name not in controls for name in names])
    rng = np.random.default_rng(0)
    chance_mean, chance_squares = np.empty((2, PERMUTATIONS, len(names)))
    for row in range(PERMUTATIONS):
        _, chance_mean[row], chance_squares[row] = statistics(x[:, :, shuffled(rng, blocks)])
    largest_mean, largest_squares = np.abs(chance_mean[:, own]).max(axis=1), chance_squares[:, own].max(axis=1)

    def p_of(chance: np.ndarray, value: float) -> float:
        return float((1 + (chance >= value - 1e-12).sum()) / (1 + PERMUTATIONS))

    plain = np.mean([judge(np.log(cell.predicted), cell.truth) for cell in cells], axis=0)
    found: dict[str, Any] = {}
    corrected = np.array([correction(cells, [cell.features[at] for cell in cells]) for at in range(len(names))])
    for at, name in enumerate(names):
        found[name] = {
            "rank_correlation_with_error": dict(zip(LIVE, task_means(raw[:, at], tasks), strict=True)),
            "partial": dict(zip(LIVE, by_task[:, at].tolist(), strict=True)),
            "partial_mean": float(mean[at]),
            "p": p_of(np.abs(chance_mean[:, at]), abs(mean[at])),
            "p_among_all": p_of(largest_mean, abs(mean[at])),
            "p_of_squares": p_of(chance_squares[:, at], squares[at]),
            "p_of_squares_among_all": p_of(largest_squares, squares[at]),
            "corrected": dict(zip(JUDGED, corrected[at].tolist(), strict=True)),
        }
    best = []
    for _ in range(CORRECTIONS):
        order = shuffled(rng, blocks)
        results = [correction(cells, [c.features[at][order] for c in cells]) for at in np.flatnonzero(own)]
        best.append((np.max(results, axis=0)[0], np.max(results, axis=0)[1], np.min(results, axis=0)[2]))
    return {
        "uncorrected": dict(zip(JUDGED, plain.tolist(), strict=True)),
        "quantities_that_improve": {
            metric: int((corrected[own, at] > plain[at] if at < 2 else corrected[own, at] < plain[at]).sum())
            for at, metric in enumerate(JUDGED)
        },
        "of": int(own.sum()),
        "best_correction_by_chance_mean": dict(zip(JUDGED, np.mean(best, axis=0).tolist(), strict=True)),
        "best_correction_by_chance_95_percent": {
            metric: float(np.quantile(np.array(best)[:, at], 0.05 if at == 2 else 0.95))
            for at, metric in enumerate(JUDGED)
        },
        "largest_mean_by_chance_95_percent": float(np.quantile(largest_mean, 0.95)),
        "quantities": found,
    }


def task_means(values: np.ndarray, tasks: np.ndarray) -> list[float]:
    """Mean over the cells of each task."""
    return [float(values[tasks == task].mean()) for task in LIVE]


def unit(values: np.ndarray) -> np.ndarray:
    """Rows of length 1; what rounding alone is left of becomes 0."""
    length = np.linalg.norm(values, axis=-1, keepdims=True)
    return np.divide(values, length, out=np.zeros_like(values), where=length > 1e-9)


def shuffled(rng: np.random.Generator, blocks: np.ndarray) -> np.ndarray:
    """Return a random order of the candidates, each block in its own places."""
    order = np.arange(len(blocks))
    for block in np.unique(blocks):
        order[blocks == block] = rng.permutation(order[blocks == block])
    return order


def judge(log_predicted: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """PearCorr, RelAcc in percent, RMSE of log losses."""
    predicted = np.exp(log_predicted)
    error = float(np.sqrt(np.mean((log_predicted - np.log(truth)) ** 2)))
    return 100 * pear_corr(predicted, truth), 100 * rel_acc(predicted, truth), error


def correction(cells: list[Cell], features: list[np.ndarray]) -> np.ndarray:
    """Return how good the predictions are on average, corrected by a quantity (M,) of each cell.

    Each candidate's log loss is corrected by what other tasks and other candidates teach. Differences between the
    candidates of a cell are learned, not a common shift: quantity and error are centred.
    """
    found = []
    for cell, own in zip(cells, features, strict=True):
        others = [(f, c.error) for f, c in zip(features, cells, strict=True) if c.task != cell.task]
        x, y = (np.array(values) for values in zip(*others, strict=True))  # (cells, M)
        # Sums over all candidates but one, of values centred without it.
        n = x.shape[1] - 1
        sums_x, sums_y = x.sum(axis=1, keepdims=True) - x, y.sum(axis=1, keepdims=True) - y
        products = (x * y).sum(axis=1, keepdims=True) - x * y - sums_x * sums_y / n
        squares = (x**2).sum(axis=1, keepdims=True) - x**2 - sums_x**2 / n
        slope = products.sum(axis=0) / np.maximum(squares.sum(axis=0), 1e-30)
        found.append(judge(np.log(cell.predicted) + slope * (own - own.mean()), cell.truth))
    return np.mean(found, axis=0)


def samples_needed() -> dict[str, Any]:
    """Which quantity, known before fine-tuning, goes along with the samples needed to be nearly there."""
    needed, before = [], []
    names: list[str] = []
    for task in LIVE:
        curves, seen = read_losses(f"live:{task}"), read_tangents(f"live:{task}")
        above = np.log(curves.losses) - np.log(curves.losses[:, -1:])
        own = []
        for gap in above:
            far = int(np.flatnonzero(gap > NEAR)[-1]) if (gap > NEAR).any() else -1
            if far <= 0:  # nearly there at the smallest size, or before
                own.append(np.log(curves.sizes[1]) if far == 0 else np.log(curves.sizes[1] / 2))
                continue
            share = (gap[far] - NEAR) / (gap[far] - gap[far + 1])
            own.append(np.log(curves.sizes[far]) + share * np.log(curves.sizes[far + 1] / curves.sizes[far]))
        needed.append(own)
        known = {k: v for k, v in quantities(curves, seen, BUDGETS[0]).items() if k.endswith("before")}
        known["zero-shot loss"] = curves.losses[:, 0]
        known |= dict(curves.facts)
        names = list(known)
        before.append([known[name] for name in names])
    y, x = np.array(needed), np.array(before)  # (tasks, M), (tasks, quantities, M)
    x_ranks, y_ranks = ranks(x), ranks(y)
    within = np.einsum("tqm,tm->q", x_ranks, y_ranks) / len(LIVE)
    pooled = ranks(x.transpose(1, 0, 2).reshape(len(names), -1)) @ ranks(y.reshape(-1))
    rng, blocks = np.random.default_rng(0), architectures()
    orders = [shuffled(rng, blocks) for _ in range(PERMUTATIONS)]
    chance = np.array([np.abs(np.einsum("tqm,tm->q", x_ranks, y_ranks[:, order])) for order in orders]) / len(LIVE)

    def p_of(chance: np.ndarray) -> np.ndarray:
        return (1 + (chance >= np.abs(within) - 1e-12).sum(axis=0)) / (1 + PERMUTATIONS)

    columns = zip(names, within, p_of(chance), p_of(chance.max(axis=1, keepdims=True)), pooled, strict=True)
    return {
        "samples_by_task_and_candidate": dict(zip(LIVE, np.exp(y).round(1).tolist(), strict=True)),
        "rank_correlation": {
            name: {"within_tasks": float(w), "p": float(p), "p_among_all": float(q), "over_all": float(o)}
            for name, w, p, q, o in columns
        },
    }


def traces() -> dict[str, dict[str, float]]:
    """How the traces change with n: exponents of n^-beta over sizes above 0, and how often they fall."""
    found = {}
    for matrix in ("hessian", "gauss_newton"):
        exponents: list[float] = []
        left_out = 0
        for task in LIVE:
            seen = read_tangents(f"live:{task}")
            trace = getattr(seen, f"trace_{matrix}")[:, 1:]
            good = (trace > 0).all(axis=1)
            left_out += int((~good).sum())
            exponents += (-np.polyfit(np.log(seen.sizes[1:]), np.log(trace[good]).T, 1)[0]).tolist()
        found[matrix] = {
            "curves": len(exponents),
            "left_out_for_a_trace_below_0": left_out,
            "mean_exponent": float(np.mean(exponents)),
            "least": float(np.min(exponents)),
            "largest": float(np.max(exponents)),
            "share_falling": float(np.mean(np.array(exponents) > 0)),
        }
    return found


def noise() -> dict[str, Any]:
    """Return the standard deviation of the log loss between two runs that differ by their random numbers, by size."""
    by_size: dict[int, list[float]] = {}
    for task in LIVE:
        curves, seen = read_losses(f"live:{task}"), read_tangents(f"live:{task}")
        difference = np.log(seen.second_loss) - np.log(curves.losses)
        for column, size in enumerate(seen.sizes):
            by_size.setdefault(int(size), []).extend(difference[np.isfinite(difference[:, column]), column].tolist())
    return {
        str(size): {"pairs": len(values), "log_loss_std": float(np.sqrt(np.mean(np.square(values)) / 2))}
        for size, values in by_size.items()
        if values
    }


def show(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Print and return averages over tasks and budgets."""
    averages = {
        method: {metric: float(np.mean(list(cells.values()))) for metric, cells in metrics.items()}
        for method, metrics in found.items()
    }
    print(f"{'method':75} PearCorr  RelAcc    RMSE   cost %")
    for method, own in averages.items():
        print(f"{method:75} {own['PearCorr']:8.1f} {own['RelAcc']:7.1f} {own['RMSE']:7.3f} {own['cost']:8.2f}")
    return averages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    methods = compare()
    averages = show(methods)
    known = beyond_losses()
    print({key: value for key, value in known.items() if key != "quantities"})
    by_p = sorted(known["quantities"].items(), key=lambda item: item[1]["p"])
    print(f"{'':50} {'with error':>24} {'partial':>24}  p      p all  p sq.  p sq. all  corrected")
    for name, own in [*by_p[:20], *((n, o) for n, o in by_p[20:] if n.startswith("control"))]:
        raw, partial = (
            " ".join(f"{v:+.2f}" for v in own[key].values()) for key in ("rank_correlation_with_error", "partial")
        )
        p = "  ".join(f"{own[key]:.3f}" for key in ("p", "p_among_all", "p_of_squares", "p_of_squares_among_all"))
        print(f"{name:50} {raw:>24} {partial:>24}  {p}  {[round(v, 3) for v in own['corrected'].values()]}")
    needed = samples_needed()
    for name, own in sorted(needed["rank_correlation"].items(), key=lambda item: -abs(item[1]["within_tasks"]))[:15]:
        print(f"{name:60} { {key: round(value, 3) for key, value in own.items()} }")
    result = {
        "candidates": list(read_losses(f"live:{LIVE[0]}").names),
        "budgets": BUDGETS,
        "methods_mean": averages,
        "methods": methods,
        "default_selector_certainty": certainty(),
        "beyond_losses": known,
        "samples_needed": needed,
        "traces": traces(),
        "noise": noise(),
    }
    for key in ("default_selector_certainty", "traces", "noise"):
        print(key, result[key])
    if not options.dry:
        write_result("live", result)


if __name__ == "__main__":
    main()
