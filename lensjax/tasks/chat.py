"""Dialogues as a tokenizer's own chat template writes them; a template comes with a checkpoint and is not trusted."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from lensjax.errors import InputError
from lensjax.tasks.example import Example

TIME_LIMIT, TIME_LIMIT_PER_SAMPLE = 10.0, 0.02
"""Seconds that a template may take, and that each sample adds."""

TEMPLATE_FILE_NAMES = frozenset(("<template>", "<unknown>"))
"""What jinja2 calls the file of the code that it compiles a template to."""


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
        The prompt with the beginning of the assistant's turn; the whole dialogue with the end of that turn; and the
        character of the whole dialogue at which the answer begins. That is the prompt's length if the dialogue begins
        with the prompt. Some templates end a prompt with text that the dialogue does not have: then it is where the
        dialogues of two different answers begin to differ.

    Raises
    ------
    InputError
        If there is no template, if it fails or takes too long, or if it does not write the answer as it is.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            f"--template chat: a candidate's tokenizer has no chat template{tokenizer_suffix(tokenizer)}; give a "
            "template with {input} instead."
        )
    written = []
    allowed = TIME_LIMIT + TIME_LIMIT_PER_SAMPLE * len(examples)
    try:
        with _deadline(allowed):
            for example in examples:
                written.append(_dialogue(example, tokenizer))
    except InputError:
        raise
    except _TooLong:
        raise _refusal(tokenizer, f"had not ended after {allowed:.0f} seconds") from None
    except ImportError as error:
        raise InputError(
            f"--template chat: needs jinja2 ({_first_line(error)}); install it: pip install jinja2."
        ) from error
    except Exception as error:
        # A template is a program: it may raise anything, and so may jinja2 and its sandbox; memory may run out.
        raise _refusal(tokenizer, f"fails ({type(error).__name__}: {_first_line(error)})") from error
    return written


def tokenizer_suffix(tokenizer: Any) -> str:
    """Return " (NAME)" with the name of a tokenizer, or "" if it has none; it ends phrases in messages."""
    known = getattr(tokenizer, "name_or_path", "")
    return f" ({known})" if known else ""


def _dialogue(example: Example, tokenizer: Any) -> tuple[str, str, int]:
    """Return one sample's prompt, whole dialogue and the character where the answer begins."""
    question = {"role": "user", "content": example.input}

    def with_answer(answer: str) -> str:
        messages = [question, {"role": "assistant", "content": answer}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False))

    prompt = str(tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True))
    whole = with_answer(example.target)
    start = len(prompt)
    if not whole.startswith(prompt):
        start = shared_length(with_answer("0"), with_answer("1"))
    if example.target.strip() not in whole[start:]:
        raise _refusal(tokenizer, f"does not write the answer {example.target[:60]!r} as it is")
    return prompt, whole, start


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the length of the longest common prefix of two sequences."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _refusal(tokenizer: Any, problem: str) -> InputError:
    """Return an error about a tokenizer's chat template; `problem` goes on the sentence."""
    return InputError(
        f"--template chat: the chat template of a candidate's tokenizer{tokenizer_suffix(tokenizer)} {problem}; "
        "mend it in its directory, give a template with {input} instead, or leave this candidate out."
    )


def _first_line(error: BaseException, limit: int = 200) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:limit].rstrip(".")


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise `_TooLong` in the template's code once the time is over; works in every thread."""
    end = time.monotonic() + seconds

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            raise _TooLong
        return trace if frame.f_code.co_filename in TEMPLATE_FILE_NAMES else None

    # An alarm works in the main thread only, and starting a process for it would take seconds.
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
