"""The version of this ganq, read without importing what is slow."""

from functools import cache


@cache  # reading the distribution's metadata takes a tenth of what a small job takes
def version() -> str:
    """Return the installed distribution's version, as of the first call in this process."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("ganq")
    except PackageNotFoundError:
        return "0+unknown"
