"""What a job table can hold as text."""


def require_text(value: str, what: str = "") -> None:
    """
    Refuse bytes that are no text in the locale; Python carries those of arguments and paths as surrogates.

    Args:
        what: begins the error, e.g. the option's name and a blank.

    Raises:
        SpecError: it would be accepted, and could not be shown or evaluated.
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        from jobs.errors import SpecError  # not before it is needed: each command asks

        shown = value.encode(errors="replace").decode()
        raise SpecError(
            f"{what}{shown!r} is not UTF-8", hint="job tables hold text only: rename the file or folder"
        ) from None
