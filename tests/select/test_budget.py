"""What a selection may spend: never exceeded, whatever it is counted in."""

import dataclasses
import io
import multiprocessing
import os
import signal

import pytest

from lensjax.errors import InputError, SelectionError
from lensjax.finetune import Progress
from lensjax.jobs import job, process, runner
from lensjax.journal import Run
from lensjax.progress.console import Console
from lensjax.select import cli, driver, session
from lensjax.select import request as request_module
from lensjax.select.budget import Budget, Ledger
from support.journals import journal


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("0.05", "share", 0.05),
        ("5%", "share", 0.05),
        ("2e16", "flops", 2e16),
        ("2.5e15 FLOPs", "flops", 2.5e15),
        ("3h", "seconds", 10800),
        ("90 min", "seconds", 5400),
        ("45s", "seconds", 45),
        ("2 days", "seconds", 172800),
        ("10 hours", "seconds", 36000),
        ("1,500,000 samples", "samples", 1.5e6),
        ("20_000samples", "samples", 20000),
    ],
)
def test_budgets_are_read_with_their_units(text, kind, amount):
    found = Budget.parse(text)
    assert found.kind == kind
    assert found.amount == pytest.approx(amount)


@pytest.mark.parametrize(
    "text", ["", "-1", "0", "100%", "1e400", "5 parsecs", "many", "1.2.3", "nan", "2,5h", "0,05", "1,0000 samples"]
)
def test_texts_that_are_no_budget_are_refused(text):
    with pytest.raises(InputError, match=r"is no amount that can be spent; give it as 0\.05 or 5%"):
        Budget.parse(text)


def run(key, size, flops, part_of="", loss=1.0):
    return Run(key, "a", size, loss, flops=flops, samples=10 * size, part_of=part_of, seconds=2.0)


def ledger(text):
    return Ledger(
        Budget.parse(text),
        weights={"a": 10.0, "b": 30.0},
        flops_per_sample={"a": 60.0, "b": 180.0},
        passes=5,
        target=100,
    )


def test_the_amount_spent_depends_on_the_journal_alone():
    lines = [
        run("x1", 10, 100.0, part_of="x"),  # in the record of its run
        run("x", 10, 300.0),
        run("y1", 20, 50.0, part_of="y"),  # of a run that was killed: it is made again, at its full price
        run("z1", 20, 30.0, part_of="z"),  # of a run that failed
        run("z", 20, 70.0, loss=None),
        run("w1", 20, 5.0, part_of="w"),  # of a run that failed once, and then did not
        run("w", 20, 2.0, loss=None),
        run("w", 20, 9.0),
        run("k", 8, 11.0, part_of="tangents"),
        run("v", 100, 1e6),  # for verification
        run("0", 0, 0.0),
    ]
    flops = 300 + 30 + 70 + 2 + 9 + 11
    samples = 10 * (10 + 20 + 20 + 20 + 20 + 8)
    for text, spent in (("1e9", flops), ("1e5 samples", samples), ("0.5", 10 * (10 + 20 + 20 + 20))):
        account = ledger(text)
        account.update(lines)
        assert account.spent == spent
    timed = ledger("1h")
    timed.update(lines, elapsed=123.0)
    assert timed.spent == 123.0


def test_a_price_is_an_upper_bound_of_a_runs_cost():
    assert ledger("1e9").price("b", 20) == 5 * 180 * 20
    assert ledger("1e9 samples").price("b", 20) == 5 * 20
    assert ledger("0.5").price("b", 20) == 30 * 20
    assert ledger("0.5").amount == 0.5 * (10 + 30) * 100
    timed = ledger("1h")
    assert timed.price("a", 10) == 0
    timed.update([run("x", 10, 300.0)])
    # The second run is slower for its size: it had to be compiled.
    timed.update([run("x", 10, 300.0), run("y", 5, 150.0)], elapsed=4.0)
    assert timed.price("b", 10) == pytest.approx(1.25 * 180 * 10 * 2.0 / (60 * 10))
    assert timed.refuses("b", 10**6)
    assert timed.refuses("b", 10**6, needed=True) == ""
    timed.update([], elapsed=3600.0)
    assert timed.refuses("b", 1, needed=True)


def test_a_run_that_might_exceed_the_budget_is_refused_with_a_reason():
    account = ledger("10000")
    assert account.refuses("a", 33) == ""
    assert account.refuses("a", 34) == (
        "34 samples may cost up to 1.02e+04 FLOPs; of the budget of 1e+04 FLOPs, 1e+04 FLOPs are left"
    )
    account.update([run("x", 10, 9800.0)])
    assert "200 FLOPs are left" in account.refuses("a", 1)
    assert Ledger(None, weights={"a": 1.0}, flops_per_sample={"a": 1.0}, passes=1, target=1).refuses("a", 10**9) == ""


@pytest.fixture
def options(tiny_models, tiny_task):
    sizes = ("--smallest", 10, "--validation", 20, "--test", 20, "--max-length", 24, "--target", 800)
    return ["--models", *tiny_models, "--task", tiny_task, *sizes, "--max-epochs", 2, "--batch-size", 8, "--in-process"]


@pytest.mark.parametrize("method", ["averaged", "lens"])
@pytest.mark.parametrize("unit", ["flops", "samples"])
def test_no_selection_exceeds_its_budget_and_more_money_buys_more(
    options, tmp_path, monkeypatch, scripted_run, method, unit
):
    # Each run costs the most it may, two epochs of a trial and two of its retry: the hardest case.
    law = scripted_run(lambda name, size: {"tiny-8": 3.2, "tiny-16": 3.0}[name] * (1 + size) ** -0.1)

    def dear(own, work, *rest):
        result, size = law(own, work, *rest), work.size
        tokens = 4 * int(own.config.tokens.train.token_counts[:size].sum())
        weights = {"tiny-8": 17784, "tiny-16": 37104}[own.config.name]
        costs = {"samples": 4 * size, "tokens": tokens, "flops": 6.0 * weights * tokens}
        return job.Result(dataclasses.replace(result.outcome, **costs), {})

    monkeypatch.setattr(runner.CandidateRunner, "run", dear)
    spent = []
    amounts = {
        ("averaged", "flops"): (5e8, 4e9),
        ("averaged", "samples"): (300, 2400),
        ("lens", "flops"): (1.3e9, 4e9),
        ("lens", "samples"): (600, 2400),
    }[method, unit]
    for amount in amounts:
        out = tmp_path / f"{amount}"
        text = io.StringIO()
        visible = () if method == "averaged" else ("--visible", 80)
        arguments = (*options, *visible, "--method", method, "--budget", f"{amount}{unit}", "--out", out)
        assert cli.run([str(a) for a in arguments], io.StringIO(), text) == 0
        spent.append(sum(r[unit] for r in journal(out)))
        assert 0 < spent[-1] <= amount
        cut = "subsets of 80 samples and more may cost more than --budget and are left out" in text.getvalue()
        assert cut == (method == "lens" and amount == amounts[0])
    assert spent[1] > spent[0]


def test_a_budget_of_time_ends_a_run_that_would_exceed_it(options, tmp_path, monkeypatch, scripted_run):
    now = [0.0]
    monkeypatch.setattr(process.time, "monotonic", lambda: now[0])
    law = scripted_run(lambda _, size: 3.0 * (1 + size) ** -0.1)
    made = []

    def slow(own, work, callbacks, deadline):
        made.append((own.config.name, work.size, deadline))
        seconds = work.size / 10
        if now[0] + seconds > deadline:
            now[0] = deadline
            raise job.OutOfTimeError("the time is spent")
        now[0] += seconds
        callbacks.progress(Progress(1, 2, 1, 3.0, 0.5, 5))
        return law(own, work, callbacks)

    monkeypatch.setattr(runner.CandidateRunner, "run", slow)
    out = tmp_path / "out"
    arguments = [str(a) for a in (*options, "--budget", "20s", "--quiet", "--out", out)]
    first, again = io.StringIO(), io.StringIO()
    assert cli.run(arguments, first, io.StringIO()) == 0
    assert [deadline for *_, deadline in made] == [20.0] * len(made)
    assert 100 in {size for _, size, _ in made}
    spent = sum(r["seconds"] for r in journal(out))
    assert now[0] == spent <= 20
    # What the first session took is not given again.
    now[0], before = 100.0, len(made)
    assert cli.run(["--resume", str(out)], again, io.StringIO()) == 0
    assert again.getvalue() == first.getvalue()
    assert all(deadline == 100 + 20 - spent for *_, deadline in made[before:])
    assert sum(r["seconds"] for r in journal(out)) <= 20


@pytest.mark.parametrize("method", ["averaged", "rectified"])
def test_time_pays_for_what_is_needed_first_and_a_finished_selection_stays_as_it_is(
    options, tmp_path, monkeypatch, scripted_run, method
):
    """Small runs mostly load and compile: their price for each sample must not forbid the ones that all need."""
    now = [0.0]
    monkeypatch.setattr(process.time, "monotonic", lambda: now[0])
    law = scripted_run(lambda _, size: 3.0 * (1 + size) ** -0.1)

    def slow(own, work, callbacks, deadline):
        seconds = 2.0 + work.size / 20
        if now[0] + seconds > deadline:
            now[0] = deadline
            raise job.OutOfTimeError("the time is spent")
        now[0] += seconds
        return law(own, work, callbacks)

    monkeypatch.setattr(runner.CandidateRunner, "run", slow)
    visible = () if method == "averaged" else ("--visible", 80)
    for seconds in (16, 25, 50):
        out = tmp_path / f"{seconds}"
        arguments = (*options, *visible, "--method", method, "--budget", f"{seconds}s", "--quiet", "--out", out)
        now[0] = 0.0
        if method == "rectified" and seconds == 16:
            with pytest.raises(SelectionError, match="the budget was spent after"):
                cli.run([str(a) for a in arguments], io.StringIO(), io.StringIO())
            continue
        first, again = io.StringIO(), io.StringIO()
        assert cli.run([str(a) for a in arguments], first, io.StringIO()) == 0
        assert now[0] <= seconds
        before = len(journal(out))
        now[0] = 1000.0
        assert cli.run(["--resume", str(out)], again, io.StringIO()) == 0
        if len(journal(out)) == before:
            assert again.getvalue() == first.getvalue()
        assert now[0] - 1000.0 <= seconds


def test_time_is_up_in_the_middle_of_a_run(tiny_models, tiny_task):
    request = request_module.Request(
        models=tuple(map(str, tiny_models)), task=tiny_task, smallest=10, visible=20, validation=20, test=20
    )
    prepared = request_module.prepare(request)
    config = session.runner_config(prepared, prepared.candidates[0])
    heard = []
    for own in (runner.CandidateRunner(config), process.CandidateProcess(config)):
        # In the middle of training: the time is over at the first sign of life.
        callbacks = job.Callbacks(progress=heard.append)
        whole = own.run(job.FineTuning(20), callbacks)
        assert whole.outcome.steps_run > 0
        with pytest.raises(job.OutOfTimeError, match="the time is spent"):
            own.run(job.FineTuning(20), callbacks, deadline=0.0)
        own.close()
    assert heard
    assert not multiprocessing.active_children()


def test_a_process_that_dies_is_recorded_and_the_others_go_on(options, tmp_path):
    """Killed from outside in the middle of its training, as by the system when memory runs out."""

    class Killer(Console):
        killed = 0

        def status(self, text):
            if "tiny-8: 10 samples, step" in text:
                for child in multiprocessing.active_children():
                    os.kill(child.pid, signal.SIGKILL)
                    self.killed += 1

    request = request_module.Request(
        models=(options[1].as_posix(), options[2].as_posix(), f"{options[1]}+lora"),
        task=options[4],
        smallest=10,
        visible=20,
        validation=20,
        test=20,
        max_length=24,
    )
    console = Killer(io.StringIO())
    found = driver.select(session.Session(request_module.prepare(request), tmp_path / "out", console))
    assert console.killed == 1
    assert list(found.failures) == ["tiny-8"]
    assert found.failed_flops > 0
    assert "its process was killed by SIGKILL, as the system does when memory runs out" in found.failures["tiny-8"]
    assert set(found.curves.names) == {"tiny-16", "tiny-8+lora"}
    assert not multiprocessing.active_children()
    runs = journal(tmp_path / "out")
    (failed,) = [r for r in runs if r["test_loss"] is None]
    assert (failed["candidate"], failed["size"]) == ("tiny-8", 10)
    assert failed["flops"] > 0
    for done in (r for r in runs if r["test_loss"] is not None):
        assert done["facts"]["peak_bytes"] > 50e6
        assert done["facts"]["versions"]["jax"]
    # Given again, the failed run is made again, and everything is ranked.
    quiet = Console(io.StringIO())
    again = driver.select(session.Session(request_module.prepare(request), tmp_path / "out", quiet))
    assert not again.failures
    assert len(journal(tmp_path / "out")) == len(runs) + 1
    assert not (tmp_path / "out" / session.COMPILED).exists()
