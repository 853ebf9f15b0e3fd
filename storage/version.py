"""The version of this ganq, read without importing what is slow."""


def version() -> str:
    """The installed distribution's version."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("ganq")
    except PackageNotFoundError:
        return "0+unknown"
