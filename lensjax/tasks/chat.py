"""Dialogues as a tokenizer's own chat template writes them; templates come with checkpoints, so none is trusted."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from lensjax.errors import InputError
from lensjax.tasks.task import Example

SECONDS, SECONDS_EACH = 10.0, 0.02
"""A template may take so long, and so much longer for each sample."""

RENDERED = frozenset(("<template>", "<unknown>"))
"""File names of the code that jinja2 makes of a template."""


class _TooLong(Exception):  # noqa: N818
    """A template took too long."""


def dialogues(examples: Sequence[Example], tokenizer: Any) -> list[tuple[str, str, int]]:
    """Write each sample as a dialogue of one question and one answer.

    Parameters
    ----------
    examples : sequence of Example
    tokenizer : transformers tokenizer

    Returns
    -------
    list of (str, str, int)
        What the template writes to ask for an answer, what it writes of the whole dialogue, with all that ends the
        assistant's turn, and where in this the answer begins: after the former if it is the beginning of the latter;
        else, for templates that ask with words which they later take back, where two different answers part.

    Raises
    ------
    InputError
        If there is no template, if it fails or takes too long, or if it does not write the answer as it is.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            f"--template chat: a candidate's tokenizer has no chat template{of(tokenizer)}; give a template with "
            "{input} instead."
        )
    found = []
    allowed = SECONDS + SECONDS_EACH * len(examples)
    try:
        with _deadline(allowed):
            for example in examples:
                found.append(_dialogue(example, tokenizer))
    except InputError:
        raise
    except _TooLong:
        raise _refusal(tokenizer, f"had not ended after {allowed:.0f} seconds") from None
    except ImportError as error:
        raise InputError(
            f"--template chat: needs jinja2 ({_first_line(error)}); install it: pip install jinja2."
        ) from error
    except Exception as error:
        # A template is a program of its own: it raises what it likes, and jinja2, its sandbox and memory do too.
        raise _refusal(tokenizer, f"fails ({type(error).__name__}: {_first_line(error)})") from error
    return found


def of(tokenizer: Any) -> str:
    """Say which candidate's tokenizer it is, as far as it knows."""
    known = getattr(tokenizer, "name_or_path", "")
    return f" ({known})" if known else ""


def _dialogue(example: Example, tokenizer: Any) -> tuple[str, str, int]:
    question = {"role": "user", "content": example.input}

    def whole(answer: str) -> str:
        talk = [question, {"role": "assistant", "content": answer}]
        return str(tokenizer.apply_chat_template(talk, tokenize=False))

    asked = str(tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True))
    written = whole(example.target)
    before = asked
    if not written.startswith(asked):
        before = written[: shared_length(whole("0"), whole("1"))]
    if example.target.strip() not in written[len(before) :]:
        raise _refusal(tokenizer, f"does not write the answer {example.target[:60]!r} as it is")
    return asked, written, len(before)


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many items two sequences have in common at their beginnings."""
    parts = next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    return min(len(one), len(other)) if parts is None else parts


def _refusal(tokenizer: Any, problem: str) -> InputError:
    return InputError(
        f"--template chat: the chat template of a candidate's tokenizer{of(tokenizer)} {problem}; mend it in "
        "its directory, give a template with {input} instead, or leave this candidate out."
    )


def _first_line(error: BaseException, most: int = 200) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:most].rstrip(".")


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise `_TooLong` in a template's code when the time is over, in whichever thread it runs."""
    end = time.monotonic() + seconds

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            raise _TooLong
        return trace if frame.f_code.co_filename in RENDERED else None

    # An alarm would need the main thread, and a process of its own seconds to start.
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
