"""User names in the job table: account names of the system, also those of directory services."""

import os

MAX_USER_NAME = 64  # width of the column in the job table
USER_HINT = "letters, digits, blanks and signs that can be shown, on one line"


def user_name(account: str) -> str:
    """
    Return the user name of an account, independent of the locale and the Unicode form.

    A name that is too long is shortened and gets a digest, so that it remains unique.
    """
    if account.isascii():
        name = account
    else:
        import unicodedata

        name = unicodedata.normalize("NFC", _decoded(account))
    if len(name) > MAX_USER_NAME:
        import hashlib

        digest = hashlib.sha256(name.encode(errors="replace")).hexdigest()[:8]
        name = f"{name[: MAX_USER_NAME - len(digest) - 1]}~{digest}"
    return name


def _decoded(account: str) -> str:
    """Undo the locale's decoding: the system stores bytes, which are UTF-8 almost everywhere."""
    try:
        return os.fsencode(account).decode()
    except UnicodeEncodeError:
        return account  # it was not decoded from bytes of this locale
    except UnicodeDecodeError:
        return account if account.isprintable() else os.fsencode(account).decode("latin-1")


def is_user_name(name: str) -> bool:
    """Return whether the job table can store and terminals can show this name; '*' means every user."""
    return 0 < len(name) <= MAX_USER_NAME and name.isprintable() and name == name.strip() and name != "*"


def this_account() -> str:
    """Return the user name of the account that runs this process."""
    import getpass

    try:
        name = user_name(getpass.getuser().strip())
    except (KeyError, OSError):  # a container whose user has no name
        name = ""
    shown = "".join(letter if letter.isprintable() else "_" for letter in name)
    return shown if is_user_name(shown) else f"uid{os.getuid()}"
