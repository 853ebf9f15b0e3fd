"""Option types that are stricter than click's own, and say in plain words what is wrong."""

from typing import Any

import click


class NamedPath(click.Path):
    """A path that is not empty: `--out "$UNSET"` would mean the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value).strip():
            self.fail("it is empty; name a path, or . for the current folder", param, ctx)
        return super().convert(value, param, ctx)
