"""Which numbers in runs' names are numbers of training samples."""

import json

import pytest

from lensjax.errors import InputError
from lensjax.losses import read


def run(directory):
    """Write a run of a Trainer that was evaluated once."""
    directory.mkdir(parents=True)
    history = [{"step": 10, "eval_loss": 2.0}]
    (directory / "trainer_state.json").write_text(json.dumps({"global_step": 10, "log_history": history}))


@pytest.mark.parametrize(
    "names",
    [
        ("rosy-dawn-1", "lively-sky-2", "still-moon-3", "vague-river-4"),
        ("gpt2/run-0", "gpt2/run-1", "opt/run-0", "opt/run-1"),
        ("gpt2/run-200", "gpt2/run-400", "opt/run-200", "opt/run-400"),
        ("gpt2-step_100", "gpt2-step_200", "opt-step_100", "opt-step_200"),
        ("gpt2-42", "gpt2-43", "opt-42", "opt-43"),
        ("gpt2-42", "opt-42"),
        ("gpt2-100", "opt-100"),
        ("gpt2-42", "gpt2-1234", "opt-42", "opt-1234"),
        ("gpt2-13", "gpt2-21", "gpt2-42", "opt-13", "opt-21", "opt-42"),
        ("gpt2-100", "gpt2-200", "gpt2-300", "opt-100", "opt-200", "opt-300"),
        ("gpt2-1", "gpt2-2", "gpt2-4", "gpt2-8", "opt-1", "opt-2", "opt-4", "opt-8"),
        ("gpt2-20261130", "opt-20261201"),
        ("gpt2_20261130", "gpt2_20261201", "opt_20261130", "opt_20261201"),
        ("gpt2-1796081879", "opt-1796082401"),
        ("gpt2-070000", "gpt2-140000", "opt-070000", "opt-140000"),
        ("pythia-70M", "pythia-160M", "opt-125M"),
        ("gpt2/0", "gpt2/1", "opt/0", "opt/1"),
        ("gpt2-n200/1", "gpt2-n200/2", "opt-n200/1", "opt-n200/2"),
    ],
)
def test_numbers_that_end_names_are_not_taken_for_samples(tmp_path, names):
    for name in names:
        run(tmp_path / name)
    with pytest.raises(
        InputError, match=r"the number at the end of .* may count runs.*\(samples=\.\.\., --samples-col"
    ):
        read(tmp_path)


@pytest.mark.parametrize(
    ("names", "sizes", "doubtful"),
    [
        (("gpt2-n200", "opt-n200"), [200], False),
        (("gpt2_n=1_600", "opt-n=200"), [200, 1600], False),
        (("gpt2/200samples", "opt/1.6k-samples"), [200, 1600], False),
        (("gpt2-ntrain_200", "opt_max_train_samples=400"), [200, 400], False),
        (("gpt2/200", "gpt2/400", "opt/200", "opt/400"), [200, 400], True),
        (("gpt2-0", "gpt2-50", "gpt2-100", "opt-0", "opt-50", "opt-100"), [0, 50, 100], True),
        (("gpt2-100", "gpt2-200", "gpt2-500", "opt-100", "opt-200", "opt-500"), [100, 200, 500], True),
        (("gpt2-64", "gpt2-1024", "opt-64"), [64, 1024], True),
        (("gpt2-51200", "gpt2-102400", "opt-51200"), [51200, 102400], True),
    ],
)
def test_numbers_that_can_only_be_samples(tmp_path, names, sizes, doubtful):
    for name in names:
        run(tmp_path / name)
    curves = read(tmp_path)
    assert curves.names == ("gpt2", "opt")
    assert curves.sizes.tolist() == sizes
    shown = ", ".join(f"{size:g}" for size in sizes)
    assert curves.notes == (
        (f"the numbers of samples ({shown}) are those at the ends of the runs' names",) if doubtful else ()
    )


def test_what_names_do_not_say_a_column_or_a_pattern_does(tmp_path):
    path = tmp_path / "runs.csv"
    rows = [
        (f"rosy-dawn-{i}", m, 100 * 2**s, 4 - s - i / 10)
        for i, (m, s) in enumerate((m, s) for m in "ab" for s in (1, 2))
    ]
    path.write_text("Name,State,model,rows,eval/loss\n" + "".join(f"{n},finished,{m},{s},{x}\n" for n, m, s, x in rows))
    with pytest.raises(InputError, match="the number at the end of 'rosy-dawn-0' may count runs"):
        read(path)
    curves = read(path, samples="rows")
    assert (curves.names, curves.sizes.tolist()) == (("a", "b"), [200, 400])
    assert read(path, pattern="{model}-dawn-{samples}").sizes.tolist() == [0, 1, 2, 3]  # who says so, means it
    path.write_text("Name,State,samples,eval/loss\ngpt2-1,finished,200,3\nopt-2,finished,200,2\n")
    with pytest.raises(
        InputError, match=r"no column says the model, and the name 'gpt2-1' ends in 1, not in the number"
    ):
        read(path)
    path.write_text("Name,State,samples,eval/loss\ngpt2-200,finished,200,3\nopt-200,finished,200,2\n")
    assert read(path).names == ("gpt2", "opt")
