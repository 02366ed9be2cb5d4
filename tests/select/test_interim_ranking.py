"""What a selection shows while it is under way: on a terminal, in a log, with --verbose and with --quiet."""

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import termios
import threading

import jax
import numpy as np
import pytest

from lensjax.errors import SelectionError
from lensjax.finetune import Progress, Trial
from lensjax.jobs import job, process, runner
from lensjax.progress.console import Console
from lensjax.select import cli, driver, session
from lensjax.select import request as request_module

LINES = 40


pytestmark = pytest.mark.usefixtures("common_terminal")


@pytest.fixture
def options(tiny_models, tiny_task, tmp_path):
    sizes = ("--smallest", 10, "--visible", 40, "--validation", 20, "--test", 20, "--max-length", 24)
    options = ("--models", *tiny_models, "--task", tiny_task, *sizes, "--out", tmp_path / "out", "--in-process")
    return [str(option) for option in options]


def law(name, size):
    return 3.0 * (1 + size) ** -{"tiny-8": 0.1, "tiny-16": 0.2}[name]


@pytest.fixture
def trained(monkeypatch, scripted_run):
    """No training, but progress and a trial are told of as by a real run."""
    scripted = scripted_run(law)

    def run(own, work, callbacks, deadline=None):
        result = scripted(own, work, callbacks, deadline)
        if work.size:
            for step in (1, 2, 2):
                callbacks.progress(Progress(step, 4, 1, 2.5, step / 4, 8 * step))
            fields = {f.name for f in dataclasses.fields(Trial)}
            given = {k: v for k, v in vars(result.outcome).items() if k in fields}
            history = ((0, 4.5), (2, 2.5))
            rest = {"status": "finished", "steps_per_epoch": 2, "step_flops": 1.0, "evaluation_flops": 1.0}
            callbacks.trials((Trial(**{**given, **rest, "validation_history": history}),))
        facts = {"device": "cpu", "devices": 1, "sharding": "none", "precision": "float32", "peak_bytes": 3 * 2**20}
        return job.Result(result.outcome, facts)

    monkeypatch.setattr(runner.CandidateRunner, "run", run)
    return run


@contextlib.contextmanager
def watched(columns):
    """Give a terminal's stream and what will hold, after the block, everything that was written to it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, columns, 0, 0))
    written = []

    def read():
        # A terminal holds only so much, and after its stream's end everything that was written can be read.
        with contextlib.suppress(OSError):
            while found := os.read(ours, 1 << 16):
                written.append(found)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    text = []
    try:
        with open(theirs, "w", encoding="utf-8") as stream:
            yield stream, text
    finally:
        reader.join()
        os.close(ours)
        text.append(b"".join(written).decode())


def last_view(text):
    """Return the rows of the view as it was drawn last, styles left out."""
    plain = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", text).replace("\r", "")
    return plain[plain.rindex("parity: choosing") :].split("\n")


def test_on_a_terminal_the_whole_command_shows_losses_and_the_final_ranking(options, tmp_path, trained):
    out = io.StringIO()
    with watched(100) as (stream, written):
        assert cli.run(options, out, stream) == 0
    (text,) = written
    # Hidden while it was drawn, then given back.
    assert text.count("\x1b[?25l") == 1
    assert text.rindex("\x1b[?25h") > text.rindex("parity: choosing") > text.index("\x1b[?25l")
    rows = [row.split() for row in last_view(text)]
    assert rows[1] == ["#", "candidate", "0", "10", "20", "40", "predicted", "P(best)"]
    document = json.loads((tmp_path / "out" / "selection.json").read_text())
    ranking = document["methods"]["averaged"]["ranking"]
    assert ranking[0]["name"] == "tiny-16"
    for row, place in zip(rows[2:4], ranking, strict=True):
        losses = [f"{law(place['name'], size):.4f}" for size in (0, 10, 20, 40)]
        best = f"{100 * place['best_probability']:.0f}"
        assert row == [str(place["rank"]), place["name"], *losses, f"{place['predicted_loss']:.4f}", best, "%"]
    # What ran has ended; what was measured stays above as lines.
    assert "now:" not in "\n".join(last_view(text))
    assert re.search(r"candidate 2/2 tiny-16: 20 samples: test loss", text)
    assert "now: tiny-8, 40 samples: loading and compiling; the method needs all" in text
    assert out.getvalue().startswith("Fine-tune tiny-16")


def test_an_interrupted_command_gives_the_cursor_back(options, monkeypatch, trained):
    def interrupted(own, work, callbacks, deadline=None):
        if own.config.name == "tiny-16":
            callbacks.progress(Progress(3, 4, 1, 2.5, 0.75, 24))
            raise KeyboardInterrupt
        return trained(own, work, callbacks, deadline)

    monkeypatch.setattr(runner.CandidateRunner, "run", interrupted)
    with watched(60) as (stream, written), pytest.raises(KeyboardInterrupt):
        cli.run(options, io.StringIO(), stream)
    (text,) = written
    assert text.rindex("\x1b[?25h") > text.rindex("parity: choosing") > text.rindex("\x1b[?25l")
    assert "stopped at: tiny-16, zero-shot: step 3 of at most 4" in "\n".join(last_view(text))


@pytest.fixture
def failing(monkeypatch, options, tiny_models, trained):
    """One more candidate, whose runs all fail."""

    def run(own, *rest):
        if own.config.name != "tiny-8+lora":
            return trained(own, *rest)
        try:
            raise MemoryError("no [red]room[/red]")
        except MemoryError as error:
            raise job.RunFailedError(job.first_line(error)) from error

    monkeypatch.setattr(runner.CandidateRunner, "run", run)
    options.insert(2, f"{tiny_models[0]}+lora")


def test_a_candidate_that_fails_is_shown_with_its_reason(options, failing):
    with watched(100) as (stream, written):
        assert cli.run(options, io.StringIO(), stream) == 1
    (text,) = written
    assert "\x1b[31mtiny-8+lora failed: MemoryError: no [red]room[/red]" in text
    rows = last_view(text)
    assert [row.split()[1] for row in rows[2:4]] == ["tiny-16", "tiny-8"]
    assert rows[4] == "tiny-8+lora failed: MemoryError: no [red]room[/red]"


def test_elsewhere_there_are_plain_lines_and_nothing_is_ranked_before_the_end(options, trained, monkeypatch):
    monkeypatch.setattr(session, "score_all", lambda *_, **__: pytest.fail("a ranking that nobody sees"))
    err = io.StringIO()
    assert cli.run(options, io.StringIO(), err) == 0
    assert "\x1b" not in err.getvalue()
    lines = [re.sub(r"\d+:\d\d", "T", line) for line in err.getvalue().splitlines()]
    assert lines[1:5] == [
        "[T] candidate 1/2 tiny-8: next zero-shot: the model as it is",
        "[T] candidate 1/2 tiny-8: zero-shot: test loss 3.0000 (T); time left not known yet",
        "[T] candidate 1/2 tiny-8: next 40 samples: the method needs all",
        f"[T] candidate 1/2 tiny-8: 40 samples: test loss {law('tiny-8', 40):.4f}, best weights at step 1 of 1 (T); "
        "at most about T left",
    ]
    assert len(lines) == 17


def test_quiet_says_nothing(options, trained):
    with watched(80) as (stream, written):
        assert cli.run([*options, "--quiet"], io.StringIO(), stream) == 0
    assert written == [""]


def test_verbose_says_how_each_run_went_and_why_one_failed(options, failing):
    err = io.StringIO()
    assert cli.run([*options, "--verbose"], io.StringIO(), err) == 1
    text = err.getvalue()
    assert f"JAX devices: {', '.join(map(str, jax.devices()))}" in text
    assert (
        "candidate 1/3 tiny-8: 20 samples, evaluated in epoch 1: step 2 of at most 4, validation loss 2.5000 at best"
    ) in text
    assert text.count("candidate 1/3 tiny-8: 20 samples, evaluated") == 1
    assert (
        "tiny-8: 20 samples: trial with learning rate 0.1, batch size 8: finished, test loss "
        f"{law('tiny-8', 20):.4f} with the weights of step 1; scripted; validation loss 4.5000 at step 0, 2.5000 at"
    ) in text
    assert "made on 1 JAX device(s) cpu in float32, sharding none; 20 FLOPs, at most 3 MiB of memory" in text
    assert "Traceback (most recent call last):" in text
    assert "MemoryError: no [red]room[/red]\n[" in text
    order = re.search(r"ranking so far: tiny-16 (\S+) \((\d+) %\), tiny-8 (\S+) \((\d+) %\)\n", text)
    assert float(order[1]) < float(order[3])
    assert int(order[2]) + int(order[4]) in (99, 100, 101)


def test_verbose_says_where_the_logs_are(options, tmp_path, monkeypatch):
    def end(made):
        raise SelectionError("enough")

    monkeypatch.setattr(driver, "descend", end)
    options.remove("--in-process")
    err = io.StringIO()
    with pytest.raises(SelectionError, match="enough"):
        cli.run([*options, "--verbose"], io.StringIO(), err)
    assert f"logs: {tmp_path / 'out' / 'logs'}\n" in err.getvalue()


def test_a_ranking_that_fails_breaks_nothing(options, trained, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("no ranking today")

    monkeypatch.setattr(session, "score_all", broken)
    out = io.StringIO()
    with watched(100) as (stream, written):
        assert cli.run([*options, "--verbose"], out, stream) == 0
    (text,) = written
    assert out.getvalue().startswith("Fine-tune tiny-16")
    assert "no ranking so far: ZeroDivisionError: no ranking today" in text
    rows = [row.split() for row in last_view(text)]
    # Measured, not ranked: the columns of the ranking are there and empty.
    assert rows[1][-2:] == ["predicted", "P(best)"]
    assert rows[2] == ["tiny-8", *(f"{law('tiny-8', size):.4f}" for size in (0, 10, 20, 40))]


def test_rankings_take_little_of_the_time(options, trained, tmp_path, monkeypatch):
    """Five seconds each, where each run takes ten: one when it first can be, and then one in the end."""
    now, ranked = [0.0], []
    run, score_all = runner.CandidateRunner.run, session.score_all

    def slow(*arguments, **named):
        now[0] += 10
        return run(*arguments, **named)

    def dear(curves, *arguments, **named):
        now[0] += 5
        ranked.append(int(np.isfinite(curves.losses).sum()))
        return score_all(curves, *arguments, **named)

    monkeypatch.setattr(runner.CandidateRunner, "run", slow)
    monkeypatch.setattr(session, "score_all", dear)
    request = request_module.Request(
        models=tuple(options[1:3]), task=options[4], smallest=5, visible=40, validation=20, test=20, max_length=24
    )
    console = Console(io.StringIO(), verbose=True, clock=lambda: now[0])
    own = session.Session(request_module.prepare(request), tmp_path / "out", console, isolate=False)
    found = driver.select(own)
    # With the first size of the second candidate, and with everything.
    assert ranked == [7, 10]
    assert np.isfinite(found.curves.losses).sum() == 10
    assert own.state.ranking["tiny-16"].rank == 1


def test_a_resumed_selection_ranks_once_for_all_it_finds(options, trained, monkeypatch):
    assert cli.run([*options, "--quiet"], io.StringIO(), io.StringIO()) == 0
    score_all, ranked = session.score_all, []
    monkeypatch.setattr(session, "score_all", lambda *a, **n: ranked.append(1) or score_all(*a, **n))
    assert cli.run([*options, "--verbose"], io.StringIO(), io.StringIO()) == 0
    assert len(ranked) == 1


def test_the_method_asked_for_ranks_as_far_as_it_can(options, trained, tmp_path, monkeypatch):
    """Algorithm 1 needs three sizes of at least two candidates; of all methods, the default one ranks."""
    score_all, seen = session.score_all, []

    def noted(curves, target, method, **options):
        seen.append((method, np.isfinite(curves.losses).sum(1).tolist()))
        return score_all(curves, target, method, **options)

    monkeypatch.setattr(session, "score_all", noted)
    for method, used in (("lens", "lens"), ("all", "averaged"), ("zero_shot", "zero_shot")):
        seen.clear()
        out = str(tmp_path / method)
        arguments = [*options, "--out", out, "--method", method, "--verbose"]
        assert cli.run(arguments, io.StringIO(), io.StringIO()) == 0
        assert {name for name, _ in seen} == {used}
        counts = [points for _, points in seen]
        assert all(len(points) == 2 for points in counts)
        if method == "lens":
            assert min(min(points) for points in counts) >= 3


def test_a_failure_in_another_process_says_where_it_was(monkeypatch):
    """The traceback crosses the connection."""
    sent, asked = [], [job.FineTuning(10)]

    class Connection:
        def recv(self):
            if not asked:
                raise EOFError
            return asked.pop()

        def send(self, what):
            sent.append(what)

    def failing(*_):
        try:
            raise ValueError("deep inside")
        except ValueError as error:
            raise job.RunFailedError("ValueError: deep inside") from error

    monkeypatch.setattr(runner.CandidateRunner, "run", failing)
    handler = signal.getsignal(signal.SIGINT)
    try:
        process.worker_main(Connection(), job.RunnerConfig("a", None, 1, None, None, None, 0))
    finally:
        signal.signal(signal.SIGINT, handler)
    ((kind, *content),) = sent
    assert kind == "failed"
    error = job.RunFailedError(*content)
    assert str(error) == "ValueError: deep inside"
    assert error.details.startswith("Traceback")
    assert error.details.endswith("ValueError: deep inside")
    assert job.RunFailedError("without a cause").details == ""
