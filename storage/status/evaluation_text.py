"""Texts for the results of an evaluation, for `ganq status` and `ganq compare`."""

from collections.abc import Iterator, Mapping
from typing import Any

from storage.status.units import clean

MIN_IMAGES = 50
MIN_PRECISION = 0.05
UNINFORMATIVE_KID = 1.0
"""Faces with hardly visible noise have 0.86, black squares 1.80: docs/quality.md."""
COMPARES_NEIGHBOURS = ("precision", "recall", "diversity")
MEANING = {
    "precision": "fraction of generated images that look real",
    "recall": "fraction of real images that the model can generate",
    "diversity": "about 100 % is right, near 0 is mode collapse",
    "swd by side": "distance of the patches at each scale, finest first; the coarse ones are shapes",
    "grain": "noise of flat areas in levels of 255, near the baseline is right",
    "outlines": "strength of edges relative to real images, below 100 % they are blurred or missing",
}


def too_early(result: Mapping[str, Any]) -> str | None:
    """
    Return why precision, recall and diversity of an evaluation say nothing yet; None if they do.

    They compare neighbours among features. Of few images, and of images far from all real ones, a neighbour
    says nothing: precision and recall are 0 and the diversity is that of the artefacts.
    """
    images = result.get("image_count")
    if isinstance(images, int) and images < MIN_IMAGES:
        return f"they need {MIN_IMAGES} images, and there are {images}"
    kid = dict(_metrics(result)).get("kid/effnet-lite0", {}).get("value")
    precision = (result.get("precision") or {}).get("value")
    if isinstance(kid, int | float) and kid > UNINFORMATIVE_KID:
        return "the images are still far from all real ones (kid)"
    if isinstance(precision, int | float) and precision < MIN_PRECISION:
        return "hardly any image is close to a real one yet"
    return None


def uninformative(key: str, value: float | None) -> str | None:
    """Return the warning about a KID so high that it does not rank models; None if it does."""
    if key != "kid/effnet-lite0" or (value or 0.0) <= UNINFORMATIVE_KID:
        return None
    return f"values above {UNINFORMATIVE_KID:g} are not informative: look at the samples"


def in_short(result: Mapping[str, Any]) -> str:
    """Return the first metric and the copy verdict: 'kid 0.0123, no copies'."""
    parts = [f"{key.partition('/')[0]} {_number(m.get('value'))}" for key, m in _metrics(result)[:1]]
    verdict = (result.get("copying") or {}).get("verdict")
    parts += [{"copies": "copies!", "none": "no copies"}.get(str(verdict), "")]
    return ", ".join(part for part in parts if part)


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each finding."""
    for key, metric in _metrics(result):
        spread = f" ± {_number(metric['spread'])}" if metric.get("spread") is not None else ""
        value = metric.get("baseline")
        compared = f"   (baseline, real against real images: {_number(value)})" if value is not None else ""
        note = f"   {metric['note']}" if metric.get("note") else ""
        yield f"{key}  {_number(metric.get('value'))}{spread}{compared}{note}"
        if by_side := _by_side(metric.get("by_side")):
            real = _by_side(metric.get("baseline_by_side"))
            baseline = f"   (baseline: {real}; {MEANING['swd by side']})" if real else ""
            yield f"{key} by side  {by_side}{baseline}"
    early = too_early(result)
    if early is not None and any(result.get(name) is not None for name in COMPARES_NEIGHBOURS):
        yield f"precision, recall, diversity  too early to say: {early}"
    for name in ("precision", "recall"):
        if early is None and (share := result.get(name)) is not None:
            value = _number(share.get("baseline"))
            yield f"{name}  {share['value']:.2f}   (baseline: {value}; {MEANING[name]})"
    if early is None and (value := result.get("diversity")) is not None:
        yield f"diversity  {value:.0%} of the real images' ({MEANING['diversity']})"
    if found := result.get("grain"):
        value = f"(baseline: {_number(found.get('baseline'))}; {MEANING['grain']})"
        yield f"grain  {_number(found.get('value'))}   {value}"
    if (value := result.get("outlines")) is not None:
        yield f"outlines  {value:.0%} of the real images' ({MEANING['outlines']})"
    if copying := result.get("copying"):
        yield f"copies  {copying['summary']}"
    yield from result.get("notes") or ()


def row(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the cells of a table row by column."""
    cells = {}
    for key, metric in _metrics(result):
        cells[key] = _number(metric.get("value"))
        if isinstance(by_side := metric.get("by_side"), Mapping):
            cells[f"{key} by side"] = "/".join(f"{value:.0f}" for value in by_side.values())
    early = too_early(result)
    for name in ("precision", "recall"):
        if early is None and (share := result.get(name)):
            cells[name] = f"{share['value']:.2f}"
    if early is None and (value := result.get("diversity")) is not None:
        cells["diversity"] = f"{value:.0%}"
    if found := result.get("grain"):
        cells["grain"] = _number(found.get("value"))
    if (value := result.get("outlines")) is not None:
        cells["outlines"] = f"{value:.0%}"
    if copying := result.get("copying"):
        cells["copies"] = f"{copying['share']:.1%}{' !' if copying['verdict'] == 'copies' else ''}"
    return cells


def _metrics(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    found = result.get("metrics")
    return list(found.items()) if isinstance(found, Mapping) else []


def _by_side(values: Any) -> str:
    """Return '132 at 96 px, 26 at 48 px'; '' if there are none."""
    if not isinstance(values, Mapping):
        return ""
    return ", ".join(f"{_number(value)} at {side} px" for side, value in values.items())


def _number(value: Any) -> str:
    return clean(f"{value:.4g}") if isinstance(value, int | float) else "?"
