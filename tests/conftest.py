"""How programs are compiled in tests; tiny models and a tiny task, made in seconds, for tests that really fine-tune."""

import gc
import io
import json
import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a model hub; read when huggingface_hub is imported

import jax
import numpy as np
import pytest

from lensjax import data, models
from lensjax.finetune import Outcome
from lensjax.jobs import job
from lensjax.jobs.resources import keep_compiled
from lensjax.select.cli import run

TOKENIZER = next(p for p in sorted(data.path("demo", "models").iterdir()) if p.is_dir())
CONFIG = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_positions": 64,
    "n_layer": 1,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

# Tests ask for right numbers of small programs, and most of their time is compilation: XLA is told to optimise little,
# and each worker to keep to one core. LENSJAX_TESTS_OPTIMISED=1 compiles as for users; see also `fully_optimised`.
OPTIMISED = os.environ.get("LENSJAX_TESTS_OPTIMISED", "0") != "0"
if not OPTIMISED:
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # of the processes that tests start
    own_flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_multi_thread_eigen=false"
    os.environ["XLA_FLAGS"] = f"{own_flags} {os.environ.get('XLA_FLAGS', '')}".strip()  # read by the first program


def pytest_configure(config):
    """Keep compiled programs from one test, worker and session for the next; look for garbage less often.

    Tracing makes millions of small objects that live on, and which Python would walk through again and again.
    """
    gc.set_threshold(50_000, 20, 50)
    cache = getattr(config, "cache", None)
    if cache is not None:
        keep_compiled(cache.mkdir("compiled"))


@pytest.fixture
def fully_optimised():
    """Let LLVM optimise as for users; what XLA counts of a program, memory and operations, is the same without it."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", not OPTIMISED)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Keep what tests leave in caches away from the user's."""
    os.environ["LENSJAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Two random GPT-2 models of different width with the demo tokenizer: list of directories."""
    vocabulary = json.loads((TOKENIZER / "config.json").read_text())["vocab_size"]
    root = tmp_path_factory.mktemp("models")
    found = []
    for number, width in enumerate((8, 16)):
        model = models.init_model({**CONFIG, "n_embd": width, "vocab_size": vocabulary}, jax.random.key(number))
        directory = root / f"tiny-{width}"
        models.save_pretrained(model, directory)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TOKENIZER / file, directory / file)
        found.append(directory)
    return found


@pytest.fixture(scope="session")
def tiny_task(tmp_path_factory):
    """A task of 140 samples that can be learned: the answer names the parity and the size of a number."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("task") / "parity.jsonl"
    numbers = rng.permutation(1000)[:140]
    rows = [{"input": str(n), "target": ("even" if n % 2 == 0 else "odd") + " number"} for n in numbers]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def command():
    """Run the command in this process: arguments -> (exit status, text on standard output)."""

    def command(*arguments):
        out = io.StringIO()
        status = run([str(a) for a in arguments], out, io.StringIO())
        return status, out.getvalue()

    return command


@pytest.fixture(scope="session")
def scripted_run():
    """Return what makes a stand-in for `CandidateRunner.run` from a law, which notes what it is asked for."""

    def script(loss, asked=None):
        """Stand in for `CandidateRunner.run`: no training, the losses of a function of (candidate, size)."""

        def run(runner, work, callbacks, deadline=None):
            name, size = runner.config.name, work.size
            if asked is not None:
                asked.append((name, size, runner.config.tokens))
            steps = int(size > 0)
            given = {"validation_loss": 1.0, "steps": steps, "steps_run": steps, "samples": size, "tokens": 8 * size}
            rest = {"seconds": 0.1, "validation_history": (), "reason": "scripted", "trainable": 1}
            outcome = Outcome(
                test_loss=loss(name, size), flops=float(size), learning_rate=0.1, batch_size=8, **given, **rest
            )
            return job.Result(outcome, {})

        return run

    return script


@pytest.fixture
def common_terminal(monkeypatch):
    """Whatever terminal the tests run in, the view is that of a common one."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
