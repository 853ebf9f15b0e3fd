"""The builds that computed the shards of a generation: if they differ, so may the last bits of images."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jobs.context import StoredImage
from jobs.device import differences

Build = Mapping[str, Any]


def distinct(builds: Iterable[Build | None]) -> list[Build]:
    """Return the different builds, in the order of the shards; of old shards none is known."""
    found: list[Build] = []
    for one in builds:
        if one is not None and one not in found:
            found.append(one)
    return found


def facts(builds: Sequence[Build | None]) -> dict[str, Any]:
    """
    Return what the job's result says of the builds.

    Args:
        builds: jobs.device.build_fingerprint() for each shard.
    """
    found = distinct(builds)
    shards = [{**one, "shards": builds.count(one)} for one in found]
    return {"builds": shards, "bit_exact": len(found) < 2}


def difference(builds: Sequence[Build]) -> str:
    """Return how the other builds differ from the first, for a person."""
    first, *others = builds
    return "; ".join(", ".join(differences(first, one)) for one in others)


def numbers(builds: Sequence[Build | None], found: Sequence[Build]) -> list[int | None]:
    """Return the number of each shard's build in the result's `builds`; None where all are the same."""
    return [None if len(found) < 2 or one is None else found.index(one) for one in builds]


def marked(made: Iterable[StoredImage], number: int | None) -> Iterator[StoredImage]:
    """Yield images whose lines in the manifest have the number of their build."""
    for one in made:
        yield one if number is None else replace(one, record={**one.record, "build": number})
