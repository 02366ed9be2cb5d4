"""Reading model and number of training samples from a run's name, where the number can mean nothing else.

Names of runs end in numbers of every kind: run counters, trials, seeds, dates, steps. Such a number counts as a number
of samples in two cases only. Either a word says so (``gpt2-n200``, ``gpt2-n=200``, ``gpt2-200samples``), or
the numbers can hardly be anything else: the same few growing sizes for each model, such as 200, 400, 800.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

from lensjax.errors import InputError

NUMBER = r"\d[\d_]*(?:\.\d+)?[kM]?"
PATTERNS = ("{model}/{samples}", "{model}-{samples}", "{model}_{samples}")
BEFORE = "n=?|(?:n_?|num_?|max_?)?(?:train_?)?samples?[=_-]?|(?:n|num|max)_?train[=_-]?|train_?size[=_-]?"
AFTER = "samples?|examples?"
WORDED = (
    re.compile(rf"(?P<model>.+?)[-_/. ]+(?:{BEFORE})(?P<samples>{NUMBER})", re.IGNORECASE),
    re.compile(rf"(?P<model>.+?)[-_/. ]+(?P<samples>{NUMBER})[-_ ]?(?:{AFTER})", re.IGNORECASE),
)
OTHER_WORDS = re.compile(
    r"(?:.*[-_/. ])?(?:runs?|trials?|seeds?|s|(?:global_?)?steps?|iters?|iterations?|it|epochs?|ep|checkpoint|ckpt|job|"
    r"try|attempt|version|ver|v|fold|exp|experiment|bs|batch|lr|rank|r|len|length|id|no|sweep|rep|repeats?|part)",
    re.IGNORECASE,
)
"""What a name ends in before a number that is none of samples."""
SMALLEST, GROWTH, EVEN = 16, 1.4, 1.15
"""Of sizes that a ladder may have: the smallest, the least ratio of neighbours, and how much the ratios may differ."""
REMEDY = (
    "Say how many training samples each run had: name the column that holds it (samples=..., --samples-column), say "
    "how names are made (pattern='{model}-{samples}', --pattern), or let names end as in MODEL-200samples."
)


def expression_of(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a pattern with ``{model}`` and ``{samples}``; ``*`` is any text left out.

    Raises
    ------
    InputError
        If one of the two is not there once.
    """
    if pattern.count("{model}") != 1 or pattern.count("{samples}") != 1:
        raise InputError(f"pattern {pattern!r} must hold {{model}} and {{samples}} once each.")
    text = re.escape(pattern).replace(re.escape("{model}"), "(?P<model>.+)").replace(re.escape("*"), ".*")
    return re.compile(text.replace(re.escape("{samples}"), f"(?P<samples>{NUMBER})"))


def worded(names: Iterable[str]) -> dict[str, tuple[str, str]] | None:
    """Return model and samples of names that all end in a number with a word for samples; None if one does not."""
    return fitting(names, WORDED)


def fitting(names: Iterable[str], expressions: Sequence[re.Pattern[str]]) -> dict[str, tuple[str, str]] | None:
    """Return model and samples of names, each by the first expression that it fits; None if one fits none."""
    found = {}
    for name in names:
        match = next(filter(None, (expression.fullmatch(name) for expression in expressions)), None)
        if match is None:
            return None
        found[name] = (match["model"], match["samples"])
    return found


def doubt(found: Mapping[str, tuple[str, str]], cells: Sequence[tuple[str, float]]) -> str:
    """Return why numbers at the ends of names are not taken for numbers of samples, or "".

    Parameters
    ----------
    found : mapping of name to (text before the number, the number's text)
    cells : sequence of (model, number)
        Of the same runs; the model may be known from elsewhere.
    """
    for name, (before, number) in found.items():
        if OTHER_WORDS.fullmatch(before):
            return f"{name!r} ends in the number of something else"
        if len(number) > 1 and number.startswith("0"):
            return f"{name!r} ends in a number that begins with 0"
    by_model: dict[str, set[float]] = {}
    for model, size in cells:
        by_model.setdefault(model, set()).add(size)
    sizes = sorted({size for own in by_model.values() for size in own} - {0.0})
    if len(found) < 2:
        return ""  # no choice at all, which is said elsewhere
    if not set.intersection(*by_model.values()):
        return "the models have no number in common"
    return _no_ladder(sizes)


def _no_ladder(sizes: Sequence[float]) -> str:
    shown = ", ".join(f"{size:g}" for size in sizes[:4]) + (", ..." if len(sizes) > 4 else "")
    if len(sizes) < 2:
        return f"all runs have the same number, {shown}"
    ratios = [after / before for before, after in itertools.pairwise(sizes)]
    if sizes[0] < SMALLEST or min(ratios) < GROWTH:
        return f"{shown} do not grow as sizes do"
    if len(sizes) > 2 and max(ratios) <= EVEN * min(ratios):
        return ""
    steps = {after - before for before, after in itertools.pairwise(sizes)}
    evenly = len(sizes) > 2 and len(steps) == 1
    multiples = sizes[0] >= 50 and sizes[0] % 10 == 0 and all(size % sizes[0] == 0 for size in sizes)
    if not evenly and (multiples or all(map(_is_round, sizes))):
        return ""
    return f"{shown} do not grow as sizes do"


def _is_round(size: float) -> bool:
    """Return whether people would choose a number as a size: 1500, 2e5 or a power of two, but not 42 or 1234."""
    number = int(size)
    return number >= 50 and (number & (number - 1) == 0 or (len(str(number).rstrip("0")) <= 2 and number % 10 == 0))
