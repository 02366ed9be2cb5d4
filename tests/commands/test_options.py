"""The parser that the commands share."""

import re

from lensjax.commands.options import Parser
from lensjax.select import options as of_select
from lensjax.tune import cli as of_tune


def test_options_are_listed_under_the_titles_of_their_groups():
    p = Parser(prog="program")
    p.add_argument("file")
    data, output = p.add_argument_group("data"), p.add_argument_group("output")
    output.add_argument("--out")
    data.add_argument("--task")
    either = output.add_mutually_exclusive_group()
    either.add_argument("--quiet", action="store_true")
    either.add_argument("--verbose", action="store_true")
    p.add_argument_group("nothing in it")
    names = {title: [option.dest for option in options] for title, options in p.options_by_group.items()}
    assert names.pop("positional arguments") == ["file"]
    assert names.pop("options") == ["help"]
    assert names == {"output": ["out", "quiet", "verbose"], "data": ["task"]}
    assert [option.dest for option in p.options] == ["help", "file", "out", "task", "quiet", "verbose"]


def test_every_option_of_the_commands_is_in_one_group():
    for p in (of_select.parser(), of_tune.parser()):
        grouped = [option for options in p.options_by_group.values() for option in options]
        assert sorted(map(id, grouped)) == sorted(map(id, p.options))
        # And --help shows it there: a section begins with a line that is not indented.
        sections = {part.partition(":")[0]: part for part in re.split(r"\n(?=\S)", p.format_help())}
        for title, options in p.options_by_group.items():
            assert all(option.option_strings[0] in sections[title] for option in options), title
