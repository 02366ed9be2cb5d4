"""What happens to a candidate's process: it ends, it says why, and interrupts wait for it."""

import signal

import pytest

from lensjax.jobs import job, process
from lensjax.jobs.process import CandidateProcess, signal_name


class Dead:
    """Stands in for a process that has ended."""

    def __init__(self, status):
        self.exitcode = status

    def join(self, timeout=None):
        pass

    def kill(self):
        pass

    def is_alive(self):
        return True


class Broken:
    """Stands in for the connection to it."""

    def send(self, what):
        raise BrokenPipeError

    def close(self):
        pass


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (-9, "its process was killed by SIGKILL, as the system does when memory runs out (its output is in a.log)"),
        (-11, "its process was killed by SIGSEGV (its output is in a.log)"),
        (-40, "its process was killed by signal 40 (its output is in a.log)"),
        (3, "its process ended with status 3 (its output is in a.log)"),
    ],
)
def test_a_process_that_died_says_how(status, reason, tmp_path):
    own = CandidateProcess(job.RunnerConfig("a", tmp_path, 1, None, None, None, 0, log="a.log"))
    own._process, own._connection = Dead(status), Broken()
    with pytest.raises(job.RunFailedError) as failed:
        own.run(job.FineTuning(10), job.Callbacks())
    assert str(failed.value) == reason
    assert own._process is None


def test_real_time_signals_have_numbers_only():
    assert signal_name(signal.SIGTERM) == "SIGTERM"
    assert signal_name(40) == "signal 40"


def test_an_interrupt_waits_for_the_end_of_the_block():
    reached = []

    def block():
        with process._deferred_interrupts():
            signal.raise_signal(signal.SIGINT)
            reached.append(True)

    with pytest.raises(KeyboardInterrupt):
        block()
    assert reached
