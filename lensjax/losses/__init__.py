"""Loss curves from what other tools leave behind: Hugging Face Trainer, Weights & Biases, MLflow, our own journal.

Each run of such a tool is one point of a curve: a model fine-tuned on a number of samples. The run's configuration says
which model and how many samples, or its name does, by a pattern such as ``{model}-{samples}``. A number at the end of a
name that could be a run counter, a seed or a date is never taken for a number of samples, see `lensjax.losses.names`.
Which of a run's losses counts is decided in `lensjax.losses.evaluations`, for all sources.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lensjax.errors import InputError
from lensjax.journal import JOURNAL
from lensjax.losses.curves import Curves
from lensjax.losses.huggingface_trainer import TRAINER_STATE, read_trainer_states
from lensjax.losses.run_directory import read_journal
from lensjax.losses.stores import is_database
from lensjax.losses.table import read_losses
from lensjax.losses.trackers import is_chart, read_mlflow, read_wandb, table_of

__all__ = ["read", "read_journal", "read_mlflow", "read_trainer_states", "read_wandb"]


def read(source: str | os.PathLike[str], **options: Any) -> Curves:
    r"""Read losses from a table, a run directory or another tool's files, told apart by what they look like.

    Parameters
    ----------
    source : str or path
        What `lensjax.losses.table.read_losses` takes; a directory with a journal (``runs.jsonl``) or the file itself;
        one with ``trainer_state.json`` files; an MLflow store or database; a CSV export of Weights & Biases or MLflow.
    **options
        Of the reader that this comes to: `read_trainer_states`, `read_wandb`, `read_mlflow`, `read_journal`; of a table
        of losses, `repeats`.

    Raises
    ------
    InputError
        See the readers; an option that the reader does not have.

    Examples
    --------
    A chart exported from Weights & Biases, the runs named MODEL-nSAMPLES:

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "chart.csv"
    >>> _ = path.write_text("Step,gpt2-n200 - eval/loss,opt-n200 - eval/loss\n50,3.5,3.3\n100,3.1,3.2\n")
    >>> curves = read(path)
    >>> curves.names, curves.at(200)
    (('gpt2', 'opt'), array([3.1, 3.2]))
    """
    reader = _reader(source)
    known = inspect.signature(reader).parameters
    unknown = next((name for name in options if name not in known), None)
    if unknown is not None:
        raise InputError(f"{os.fspath(source)}: {unknown} does not apply to {KINDS[reader]}; remove it.")
    return reader(source, **options)


KINDS: dict[Callable[..., Curves], str] = {
    read_losses: "a table of losses",
    read_journal: "runs of lensjax",
    read_trainer_states: "runs of a Trainer",
    read_wandb: "an export of Weights & Biases",
    read_mlflow: "runs of MLflow",
}


def _reader(source: str | os.PathLike[str]) -> Callable[..., Curves]:
    text = os.fspath(source)
    path = Path(text)
    if path.is_dir():
        if (path / JOURNAL).is_file():
            return read_journal
        if any(path.rglob(TRAINER_STATE)):
            return read_trainer_states
        if is_database(path) or any(path.rglob("meta.yaml")):
            return read_mlflow
        raise InputError(
            f"{text}: a directory without {JOURNAL}, {TRAINER_STATE} files or an MLflow store. Name one with those, or "
            "a CSV file of losses."
        )
    if path.name == TRAINER_STATE:
        raise InputError(
            f"{text}: one run makes no curve. Name the directory that holds the runs of all models, laid out as "
            "MODEL/SAMPLES/trainer_state.json."
        )
    if is_database(path):
        return read_mlflow
    if path.suffix == ".jsonl" and path.is_file():
        return read_journal
    if path.suffix == ".csv" and path.is_file():
        header = _header(path)
        if any(c.startswith("metrics.") for c in header) or "run id" in header:
            return read_mlflow
        if is_chart(header) or {"name", "state"} <= set(header):
            return read_wandb
    return read_losses


def _header(path: Path) -> list[str]:
    """Return the columns of a table of runs in lower case; no columns if the file is not such a table."""
    try:
        return [c.lower() for c in table_of(path)[0]]
    except InputError:
        return []  # what is wrong with it, the reader of tables of losses says
