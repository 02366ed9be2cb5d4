"""One sample of a task, and how it is made from a row of a file or data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lensjax._messages import did_you_mean
from lensjax.errors import InputError

PROMPT = "{input}: "
"""The default template; the space at its end is scored together with the target's first word."""

CHAT = "chat"
"""As a template: the tokenizer's own chat template is used."""

ENCODING_VERSION = 2
"""Version of `encode`'s way of making tokens; a part of what tasks' fingerprints and cached tokens' names digest."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One sample: the model reads `input` and is scored on `target`, both as they were written.

    Only the template stands between them: nothing is added, and nothing is stripped. The spaces at its end are the
    separator, which is scored together with the target, because most tokenizers make one token of a space and the word
    after it. With `PROMPT` a model reads ``question:`` and is scored on `` answer``; with ``{input}``, the target
    follows at once, as source code and its indentation do.

    For language modelling the input and the template are empty, and the whole text is the target.
    """

    input: str
    target: str
    template: str = PROMPT

    @property
    def prompt(self) -> str:
        """The text before the separator, which an encoder reads; not used if the template is `CHAT`."""
        return self.template.rstrip(" ").replace("{input}", self.input)

    @property
    def separator(self) -> str:
        """The spaces at the end of the template; left out for a decoder that reads no prompt."""
        return self.template[len(self.template.rstrip(" ")) :]

    @property
    def completion(self) -> str:
        """The text that counts in the loss, the separator and the target."""
        return self.separator + self.target


RowReader = Callable[[str, Mapping[str, Any]], Example | None]
"""Makes a sample of (where the row is, for messages; its fields), or None of an empty text."""


def row_reader(
    input_field: str | None, target_field: str | None, text_field: str | None, template: str | None
) -> RowReader:
    """Return a function that makes samples of rows, from the fields that the user named.

    Raises
    ------
    InputError
        If the fields contradict each other or the template has no ``{input}``. The function itself raises it for a row
        without these fields, or with something else than text in them.
    """
    if text_field is not None:
        if input_field is not None or target_field is not None or template is not None:
            raise InputError(
                f"--text-field {text_field} is language modelling, where there is no input, target or template; leave "
                "--input-field, --target-field and --template out, or --text-field."
            )
        # Data sets of texts mark the ends of paragraphs by empty rows.
        return lambda where, row: None if row.get(text_field) == "" else Example("", _text(where, row, text_field), "")
    chosen = PROMPT if template is None else template
    if chosen != CHAT and "{input}" not in chosen:
        raise InputError(f"--template {chosen!r} has no {{input}} where the input goes; add it, or give {CHAT!r}.")
    first, second = input_field or "input", target_field or "target"
    return lambda where, row: Example(_text(where, row, first), _text(where, row, second), chosen)


def _text(where: str, row: Mapping[str, Any], field: str) -> str:
    """Return the text in a field; `where` says which row it is in messages."""
    value: Any = row
    for name in [field] if field in row else field.split("."):
        if not isinstance(value, Mapping) or name not in value:
            fields = ", ".join(repr(k) for k in row)
            raise InputError(
                f"{where}: no field {field!r} (found: {fields}). Name the fields with --input-field and "
                f"--target-field, or --text-field.{did_you_mean(field, _fields(row))}"
            )
        value = value[name]
    if isinstance(value, str) and value.strip():
        return value
    shown = "empty" if isinstance(value, str) else f"{'null' if value is None else _shortened(value)}, not text"
    remedy = "Fill it or remove the sample"
    if isinstance(value, Mapping) and value:
        remedy = f"It holds fields of its own; name one of {', '.join(_fields(value, f'{field}.'))}"
    elif isinstance(value, (list, tuple)):
        remedy = "Make it one text, or name another field"
    elif value is not None and not isinstance(value, str):
        remedy = f'Write it as text, "{value}", or name another field'
    raise InputError(f"{where}: field {field!r} is {shown}. {remedy}.")


def _shortened(value: object, limit: int = 60) -> str:
    """Return a value as Python writes it, cut after `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _fields(row: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the names of a row's fields; names of nested fields are joined by dots."""
    names = []
    for name, value in row.items():
        names += _fields(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [f"{prefix}{name}"]
    return names
