"""What --verbose says of a run, in words."""

from __future__ import annotations

from lensjax._display import number, percent
from lensjax.finetune import Trial
from lensjax.journal import Run
from lensjax.selectors import Scores


def of_trial(trial: Trial) -> str:
    """Say with what a trial was made, how it went and how it ended."""
    text = f"trial with learning rate {trial.learning_rate:g}, batch size {trial.batch_size}: {trial.status}"
    if trial.test_loss is not None:
        text += f", test loss {trial.test_loss:.4f} with the weights of step {trial.steps}"
    history = ", ".join(f"{loss:.4f} at step {step}" for step, loss in trial.validation_history)
    return f"{text}; {trial.reason}; validation loss {history}"


def of_run(run: Run) -> str:
    """Say on what a run was made."""
    facts = run.facts
    if "device" not in facts:
        return f"{run.flops:.3g} FLOPs"
    text = f"made on {facts['devices']} JAX device(s) {facts['device']} in {facts['precision']}"
    text += f", sharding {facts['sharding']}; {run.flops:.3g} FLOPs"
    if "peak_bytes" in facts:
        text += f", at most {facts['peak_bytes'] / 2**20:,.0f} MiB of memory"
    return text


def of_scores(scores: Scores) -> str:
    """Say in which order the candidates are."""
    parts = []
    for row in scores.order:
        text = f"{scores.names[row]} {number(float(scores.predicted_loss[row]), 4)}"
        if scores.best_probability is not None:
            text += f" ({percent(float(scores.best_probability[row]), 0)} %)"
        parts.append(text)
    return ", ".join(parts)
