"""Labels of jobs: 'project=faces'. A key identifies a label; its value may be any line of text."""

import re
from collections.abc import Iterable, Mapping

from jobs.errors import SpecError

KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}")
MAX_VALUE = 256
MAX_LABELS = 32
HINT = "e.g. project=faces; a key has letters, digits, '.', '_', '/' and '-', at most 63"


def check_label(key: str, value: str) -> tuple[str, str]:
    """
    Return a label that is safe in a table and on a terminal.

    Raises:
        SpecError: the key or the value is not valid.
    """
    if not KEY.fullmatch(key):
        raise SpecError(f"{key[:70]!r} cannot be the key of a label", hint=HINT)
    if len(value) > MAX_VALUE or not value.isprintable():
        raise SpecError(
            f"the value of label {key} is not one line of at most {MAX_VALUE} characters", hint=HINT
        )
    return key, value


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """
    Return labels of a new job.

    Raises:
        SpecError: one is not valid, or has no value; or there are too many.
    """
    if len(labels) > MAX_LABELS:
        raise SpecError(f"a job has at most {MAX_LABELS} labels")
    for key, value in labels.items():
        check_label(key, value)
        if not value:
            raise SpecError(f"label {key} has no value", hint=HINT)
    return dict(labels)


def read_label(text: str) -> tuple[str, str]:
    """
    Return (key, value) of 'key=value'.

    Raises:
        SpecError: it has another form.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise SpecError(f"{text[:70]!r} is not a label", hint=HINT)
    return check_label(key.strip(), value.strip())


def read_filters(texts: Iterable[str]) -> tuple[tuple[str, str | None], ...]:
    """
    Return (key, value) of each 'key=value', and (key, None) of each 'key', which any value matches.

    Raises:
        SpecError: one has another form.
    """
    return tuple(
        read_label(text) if "=" in text else (check_label(text.strip(), "")[0], None) for text in texts
    )
