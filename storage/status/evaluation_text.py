"""What an evaluation has found, in words: for `ganq status JOB`, the list and `ganq compare`."""

from collections.abc import Iterator, Mapping
from typing import Any

from storage.status.units import clean


def in_short(result: Mapping[str, Any]) -> str:
    """The first metric, and whether the model copies: 'kid 0.0123, no copies'."""
    parts = [f"{key.partition('/')[0]} {_number(one.get('value'))}" for key, one in _metrics(result)[:1]]
    verdict = (result.get("copying") or {}).get("verdict")
    parts += [{"copies": "copies!", "none": "no copies"}.get(str(verdict), "")]
    return ", ".join(part for part in parts if part)


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """All of it, a line each."""
    for key, one in _metrics(result):
        spread = f" ± {_number(one['spread'])}" if one.get("spread") is not None else ""
        least = (
            f"   (real against real: {_number(one['baseline'])})" if one.get("baseline") is not None else ""
        )
        note = f"   {one['note']}" if one.get("note") else ""
        yield f"{key}  {_number(one.get('value'))}{spread}{least}{note}"
    for name in ("precision", "recall"):
        if (share := result.get(name)) is not None:
            yield f"{name}  {share['value']:.2f}   (real against real: {share['baseline']:.2f})"
    if (diversity := result.get("diversity")) is not None:
        yield f"diversity  {diversity:.0%} of that of the real images"
    if copying := result.get("copying"):
        yield f"copies  {copying['summary']}"
    yield from result.get("notes") or ()


def row(result: Mapping[str, Any]) -> dict[str, str]:
    """One row of a table, by what it says."""
    cells = {key: _number(one.get("value")) for key, one in _metrics(result)}
    for name in ("precision", "recall"):
        if one := result.get(name):
            cells[name] = f"{one['value']:.2f}"
    if (diversity := result.get("diversity")) is not None:
        cells["diversity"] = f"{diversity:.0%}"
    if copying := result.get("copying"):
        cells["copies"] = f"{copying['share']:.1%}{' !' if copying['verdict'] == 'copies' else ''}"
    return cells


def _metrics(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    found = result.get("metrics")
    return list(found.items()) if isinstance(found, Mapping) else []


def _number(value: Any) -> str:
    return clean(f"{value:.4g}") if isinstance(value, int | float) else "?"
