"""Options from a TOML file and printed back, shell completion, help."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lensjax.commands.completion import completion
from lensjax.commands.options import SHELLS
from lensjax.errors import InputError
from lensjax.jobs import runner
from lensjax.select.cli import run
from lensjax.select.config_file import print_config, read_config
from lensjax.select.options import SCRIPT, parser
from lensjax.selectors import DEFAULT, SELECTORS
from lensjax.selectors.methods import NAMES


@pytest.fixture
def file(tmp_path):
    def file(text):
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return path

    return file


def given(*arguments):
    return parser().parse_args([str(a) for a in arguments])


class TestReadConfig:
    def test_gives_the_same_options_as_flags(self, file):
        path = file(
            """
            max-length = 64
            seed = 3
            [task]
            task = "my data.jsonl"
            template = "--{input}"
            [candidates]
            models = ["a", "b+lora"]
            lora_rank = 4
            [choice]
            budget = "3h"
            verify = true
            [training]
            learning_rate = [1e-3, 0.002]
            dropout = false
            """
        )
        flags = ["--max-length", 64, "--seed", 3, "--task", "my data.jsonl", "--template=--{input}", "--models", "a"]
        flags += ["b+lora", "--lora-rank", 4, "--budget", "3h", "--verify", "--learning-rate", "0.001", "0.002"]
        assert given(*read_config(path)) == given(*flags, "--no-dropout")

    def test_the_command_line_overrides_the_file(self, file, command):
        path = file('method = "lens"\n[choice]\ntarget = 5\nverify = true\n')
        arguments = ["--config", path, "--target", 7, "--method=ats", "--no-verify"]
        _, text = command(*arguments, "--print-config")
        choice = tomllib.loads(text)["choice"]
        assert (choice["target"], choice["method"], choice["verify"]) == (7, "ats", False)

    def test_quiet_and_verbose_give_way_to_each_other(self, file, command):
        path = file("[output]\nquiet = true\n")
        for flags, wanted in (([], (True, False)), (["--verbose"], (False, True)), (["--quiet"], (True, False))):
            _, text = command("--config", path, *flags, "--print-config")
            output = tomllib.loads(text)["output"]
            assert (output["quiet"], output["verbose"]) == wanted

    def test_a_byte_order_mark_is_skipped(self, file):
        assert read_config(file("\ufeffseed = 3\n")) == ["--seed=3"]

    def test_chooses_as_the_flags_do(self, file, command):
        path = file('losses = "published:flan"\nvisible = 51200\nmethod = "subtuning"\n')
        flags = ["--losses", "published:flan", "--visible", 51200, "--method", "subtuning"]
        assert command("--config", path) == command(*flags)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('metod = "x"', "metod is no option. Did you mean method?"),
            ("[training]\nlearning-rte = 1", "training.learning-rte is no option. Did you mean learning-rate?"),
            ("zzz = 1", "zzz is no option. See python -m lensjax.select --print-config."),
            ("resume = 'x'", "resume is no option. See python -m lensjax.select --print-config."),
            ("[tsk]\na = 1", "there is no table [tsk]. Did you mean task?"),
            ("[choice]\nseed = 1", "choice.seed belongs in the table [task], or at the top."),
            ("seed = 1\n[task]\nseed = 1", "task.seed is there twice; keep one of them."),
            ("max_length = 1\nmax-length = 1", "max-length is there twice; keep one of them."),
            ('verify = "yes"', "verify is 'yes'; it must be true or false."),
            ("verify = 1", "verify is 1; it must be true or false."),
            ("seed = true", "seed is True; it must be text or a number."),
            ("seed = [1]", "seed is [1]; it must be one value."),
            ("learning_rate = []", "learning_rate is []; it must hold at least one value."),
            ("models = [['a']]", "models is ['a']; it must be text or a number."),
            ("seed = 2026-11-22", "seed is datetime.date(2026, 11, 22); it must be text or a number."),
            ("seed = -1", "seed: -1 is not a whole number, 0 or more. See python -m lensjax.select --help."),
            (
                "[training]\nlearning-rate = ['0,1']",
                "training.learning-rate: '0,1' is not a number. Write 0.1: the decimal sign is a point. See python -m "
                "lensjax.select --help.",
            ),
            (
                "quiet = true\n[output]\nverbose = true",
                "output.verbose: not allowed with argument --quiet. See python -m lensjax.select --help.",
            ),
            (
                "seed 1",
                "is no TOML: Expected '=' after a key in a key/value pair (at line 1, column 6). Text stands in "
                "quotes, lists in brackets.",
            ),
            ("seed = " + "9" * 5000, "cannot be read, for a number has too many digits. Correct it."),
            ("seed = " + "[" * 100000, "cannot be read, for it is nested too deep. Correct it."),
            ("seed = " + "{a=" * 100000, "cannot be read, for it is nested too deep. Correct it."),
        ],
    )
    def test_refuses(self, file, text, message):
        path = file(text)
        with pytest.raises(InputError) as caught:
            read_config(path)
        assert str(caught.value) == f"--config {path}: {message}"

    def test_refuses_what_is_no_text_file(self, tmp_path, refused):
        missing, binary = tmp_path / "none.toml", tmp_path / "b.toml"
        binary.write_bytes(b"a = '\xff'")
        hint = "there is no such file; --print-config prints one to begin with."
        assert refused("--config", missing) == f"--config {missing}: {hint}"
        assert refused("--config", tmp_path) == f"--config {tmp_path}: is a directory; name a TOML file."
        assert refused("--config", binary) == f"--config {binary}: is not UTF-8 (byte 5); save it as UTF-8."


class TestNaming:
    """What a file says is refused as what an option says is, and the file and the key are named."""

    @pytest.mark.parametrize(
        ("text", "message", "keys"),
        [
            ("learning_rate = -1", "--learning-rate is -1; it must be positive and finite.", "learning_rate"),
            (
                "losses = 'published:flan'\n[choice]\ntau = -1",
                "tau is -1; the deviation allowed is a positive number. The paper uses 1 to 5.",
                "tau",
            ),
            (
                "[training]\nbatch-size = 8\nmicro-batch = 3",
                "micro-batch 3 does not divide the batch size 8; choose one of its divisors.",
                "batch_size, micro_batch",
            ),
            (
                "models = ['a+lora', 'b']\nlora_dropout = 2",
                "LoRA's dropout is 2.0; it must be at least 0 and less than 1.",
                "lora_dropout",
            ),
            ("task = 'https://a.b/c'", "https://a.b/c: is an address; download it and name the file, or", "task"),
            ("models = ['no/such/model', 'b']\nverify = true", "no/such/model", "models"),
            ("losses = 'none.csv'\ntarget = 9", "none.csv: no such file. Give a CSV file of losses or one", "losses"),
            (
                "losses = 'published:flan'\ntarget = 200\nvisible = 400\ngamma = 3",
                "--target 200 is not above the largest visible size 400. Raise --target, or hide sizes with --visible",
                "target, visible",
            ),
            ("method = 'lenz'", "method 'lenz' is unknown; there are:", "method"),
            ("seed = 3\nlosses = 'published:flan'", "--seed belongs to selection by fine-tuning; ", "seed, losses"),
        ],
    )
    def test_of_what_is_refused_later(self, file, refused, text, message, keys):
        path = file(text)
        found = refused("--config", path)
        assert found.startswith(message)
        assert found.endswith(f" From --config {path}: {keys}.")

    def test_not_of_what_the_command_line_says(self, file, refused):
        path = file("losses = 'published:flan'\ntau = -1\nvisible = 400\nverify = true\ngamma = 3")
        wrong = "--verify belongs to selection by fine-tuning; remove --verify or --losses."
        assert refused("--config", path, "--tau", 2) == f"{wrong} From --config {path}: losses, verify."
        assert refused("--config", path, "--no-verify", "--losses=none", "--tau", 2) == wrong
        rule = "tau is 0; the deviation allowed is a positive number. The paper uses 1 to 5."
        assert refused("--config", path, "--tau", 0) == rule


class TestPrintConfig:
    @pytest.mark.parametrize(
        "arguments",
        [
            [],
            ["--task", 'a "b"\\\x7fé\n.jsonl', "--models", "x", "y z+lora", "--budget", "2.5%", "--dropout"],
            ["--budget", "3h", "--learning-rate", "1e-3", "2e-3", "--batch-size", "8", "16", "--figures", "d"],
            ["--budget", "2e16", "--seed", "7", "--out", "runs/x", "--quiet"],
            ["--losses", "published:flan", "--visible", "51200", "--method", "all", "--tau", "3"],
        ],
    )
    def test_reads_back_as_itself(self, file, arguments):
        text = print_config(given(*arguments))
        again = given(*read_config(file(text)))
        assert print_config(again) == text
        mine = {name: value for name, value in vars(given(*arguments)).items() if value not in (None, False)}
        assert {name: getattr(again, name) for name in mine} == mine

    def test_is_accepted_as_a_whole(self, file, command):
        arguments = ["--losses", "published:flan", "--visible", 51200]
        _, text = command(*arguments, "--print-config")
        assert command("--config", file(text)) == command(*arguments)

    def test_prints_every_option_that_a_file_may_hold(self):
        texts = print_config(given()), print_config(given("--losses", "x"))
        once = {"config", "print_config", "completion", "help", "dry_run", "resume"}
        for action in parser().options:
            lines = [text.count(f"\n{action.dest} =") + text.count(f"\n# {action.dest} =") for text in texts]
            assert (sum(lines) > 0) == (action.dest not in once), action.dest
            assert max(lines) <= 1

    def test_defaults_are_those_of_a_selection(self):
        found = tomllib.loads(print_config(given("--task", "x", "--models", "a", "b")))
        assert found["training"]["learning_rate"] == [0.0003]
        assert found["choice"]["smallest"] == 200
        assert found["choice"]["method"] == DEFAULT

    def test_the_demos_defaults_do_not_stay_in_force(self, file):
        text = print_config(given())
        assert "# learning_rate = [0.002]  # in the demo" in text
        assert "# smallest = 50  # in the demo" in text
        assert '# input_field = "word"  # in the demo' in text
        mine = text.replace("# task =", 'task = "x"').replace("# models =", 'models = ["a", "b"]')
        again = given(*read_config(file(mine)))
        assert (again.learning_rate, again.smallest, again.input_field) == (None, None, None)

    def test_lasting_leaves_out_options_for_one_call(self):
        found = tomllib.loads(print_config(given("--quiet", "--html", "x", "--out", "y", "--seed", 5), lasting=True))
        assert found["task"]["seed"] == 5
        assert not {"quiet", "html", "out", "verbose", "json"} & set(found.get("output", {}))


class TestCompletion:
    @pytest.mark.parametrize("shell", SHELLS)
    def test_knows_every_option(self, shell):
        script = completion(parser(), SCRIPT, shell)
        # fish writes long options without their dashes.
        assert all(action.option_strings[-1].removeprefix("--") in script for action in parser().options)

    def test_completes_in_bash(self, tmp_path):
        (tmp_path / "completion").write_text(completion(parser(), SCRIPT, "bash"))
        ask = (
            "source completion; complete -p lensjax-select | grep -o 'F _[a-z_]*' | cut -c3- > f; "
            'ask() { COMP_WORDS=(lensjax-select "$@"); COMP_CWORD=$#; COMPREPLY=(); $(<f); echo "${COMPREPLY[@]}"; }; '
            "ask --lea; ask --method re; ask --schedule ''"
        )
        done = subprocess.run(["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.split("\n")[:3] == ["--learning-rate", "rectified", "constant linear cosine"]

    def test_the_command_prints_it(self, command):
        assert command("--completion", "bash") == (0, completion(parser(), SCRIPT, "bash"))

    def test_an_unknown_shell_gets_a_suggestion(self, refused):
        message = "argument --completion: invalid choice: 'bas' (choose from bash, zsh, fish, tcsh). Did you mean bash?"
        assert refused("--completion", "bas") == f"{message} See python -m lensjax.select --help."


class TestHelp:
    def test_examples_first_and_nothing_heavy(self):
        code = (
            "import sys, runpy; sys.argv[1:] = ['--help']\n"
            "try: runpy.run_module('lensjax.select', run_name='__main__')\n"
            "except SystemExit: pass\n"
            "heavy = {'jax', 'transformers', 'datasets', 'flax', 'rich', 'shtab'} & set(sys.modules)\n"
            "print('heavy:', sorted(heavy))"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        text = done.stdout
        assert text.endswith("heavy: []\n")
        assert text.index("examples:") < text.index("--task DATA")
        assert text.index("--dry-run\n      say what would") < text.index("-h, --help")

    def test_all_methods_are_named_the_default_first(self):
        assert set(NAMES) == {*SELECTORS, "all"}
        assert NAMES[0] == DEFAULT

    def test_an_unknown_option_gets_a_suggestion(self, refused):
        hint = "Did you mean --learning-rate? See python -m lensjax.select --help."
        assert refused("--learning-rte", "3") == f"unrecognized arguments: --learning-rte 3. {hint}"


def test_a_name_that_is_not_utf8_is_refused(refused):
    message = "'b\\udcffd.jsonl': is not UTF-8; rename the file, and name it as it is then."
    assert refused("--task", "b\udcffd.jsonl") == message


def test_a_selection_leaves_its_options_and_is_resumed_from_them(tmp_path, file, scripted_run, monkeypatch):
    import io

    monkeypatch.setattr(
        runner.CandidateRunner, "run", scripted_run(lambda name, size: 3 - len(name) / 20 + 40 / (size + 30))
    )
    config = file('method = "subtuning"\n[choice]\nvisible = 100\n')
    directory = tmp_path / "run"
    out = io.StringIO()
    arguments = ["--config", str(config), "--out", str(directory), "--in-process", "--verbose"]
    assert run(arguments, out, io.StringIO()) == 0
    assert tomllib.loads((directory / "config.toml").read_text())["choice"]["visible"] == 100
    # The file may change: what was started goes on as it was.
    Path(config).write_text('method = "lens"\n')
    again = io.StringIO()
    twice = ["--resume", str(tmp_path), "--resume", str(directory)]
    assert run([*twice, "--quiet"], again, io.StringIO()) == 0
    assert again.getvalue() == out.getvalue()
    assert "--resume" not in json.loads((directory / "command.json").read_text())["arguments"]
