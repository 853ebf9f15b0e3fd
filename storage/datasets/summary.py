"""Counts and remarks about a data set, the same for submit, training, evaluation and `dataset check`."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs.errors import DatasetError
from storage.datasets import names
from storage.datasets.sources import BESIDE, Listing, Skipped

MAX_REASONS, MAX_CLASSES = 4, 12
DARK = 32768
"""Values of 16 bits that stay below make images that are darker than half of white."""
GREY_SHARE = 0.95
FIT = {"crop": "their centre is used", "pad": "black bars are added", "stretch": "they are distorted"}
"""What happens to images that are not square, by the option --fit."""


@dataclass
class Summary:
    """
    Counts of one data set.

    Args:
        images: how many are used.
        reasons: images that are left out, by reason.
        copies: files left out because they have the bytes of another.
        classes: images in each class.
        notes: images that were converted, by what was done.
        grey: images without colour.
        depth: smallest and largest value of images of 16 bits or floats.
        oblong: images that are not square.
    """

    images: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    copies: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    grey: int = 0
    depth: list[float] | None = None
    oblong: int = 0

    def use(self, facts: Mapping[str, Any]) -> None:
        """Count a decoded image."""
        self.images += 1
        self.notes.update(facts["notes"])
        self.grey += bool(facts.get("grey"))
        self.oblong += facts["width"] != facts["height"]
        if (depth := facts.get("depth")) is not None:
            low, high = self.depth or depth
            self.depth = [min(low, depth[0]), max(high, depth[1])]

    def leave_out(self, skipped: Iterable[Skipped]) -> None:
        for one in skipped:
            self.reasons[one.reason] += one.images

    def lines(self, *, white_level: float = 0.0, grey: bool = False, fit: str = "crop") -> list[str]:
        """
        Return what a user should know before training on the images.

        Args:
            white_level, grey, fit: the options that the job has.
        """
        said = []
        if self.classes:
            said.append(f"classes: {describe_classes(self.classes)}")
        if (lost := +self.reasons).total():
            said.append(f"left out: {describe_reasons(lost)}")
        if self.copies:
            said.append(
                f"left out: {_files(self.copies)} with the bytes of another (--keep-duplicates uses them)"
            )
        if self.notes:
            said.append("converted: " + ", ".join(f"{n} × {what}" for what, n in self.notes.most_common(6)))
        if self.oblong:
            said.append(
                f"fit: {self.oblong} of {_files(self.images)} are not square: {FIT[fit]} (--fit {fit})"
                + ("; --fit pad adds black bars, --fit stretch distorts" if fit == "crop" else "")
            )
        if self.depth is not None and not white_level and 0 < self.depth[1] < DARK:
            low, high = self.depth
            said.append(
                f"values of 16 bits reach only from {low:g} to {high:g} of 65535, so these images are dark: "
                f"--white-level {high:g} scales them"
            )
        if self.images and self.grey >= GREY_SHARE * self.images and not grey:
            said.append(
                f"{self.grey} of {self.images} images are grey: --grey makes grey ones without colour fringes"
            )
        return said

    def to_json(self) -> dict[str, Any]:
        """Return the counts for an event or a report; those that are 0 are left away."""
        return {
            name: dict(value) if isinstance(value, Counter) else value
            for name, value in vars(self).items()
            if value
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Summary":
        """
        Return the summary that to_json() wrote.

        Raises:
            TypeError, ValueError: it is none.
        """
        known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        for name in ("reasons", "notes"):
            known[name] = Counter(known.get(name, {}))
        return cls(**known)


def of_listing(listing: Listing) -> Summary:
    """Return what the names alone say; no image is opened."""
    found = Summary(images=len(listing.names))
    found.leave_out(listing.skipped)
    if classes := listing.classes():
        count = Counter(listing.class_of(name) for name in listing.names)
        found.classes = {name: count[name] for name in classes}
    return found


def describe_ignored(ignored: Mapping[str, int]) -> Iterator[str]:
    """Yield lines on the files of Listing.ignored, for a user."""
    by_suffix = Counter({suffix: number for suffix, number in ignored.items() if suffix != BESIDE})
    if by_suffix:
        suffixes = ", ".join(sorted(by_suffix)[:8])
        yield f"{_files(by_suffix.total())}, not images by name ({suffixes})"
    if beside := ignored.get(BESIDE):
        yield f"{beside} images: the folder is that of a generation, of which only images/ is read"


def no_images(listing: Listing) -> DatasetError:
    """Return the error of a source without a single image that is read."""
    others = sum(listing.ignored.values())
    found = Summary()
    found.leave_out(listing.skipped)
    return DatasetError(
        f"there are no images in {listing.source}"
        + (f" ({others} other files)" if others else "")
        + (f"; left out: {describe_reasons(found.reasons)}" if found.reasons else ""),
        hint="give a folder with PNG, JPEG, WebP or AVIF files, or draw some: ganq dataset make DIR",
    )


def require_enough(listing: Listing, used: int, skipped: list[Skipped], max_skip: float) -> None:
    """
    Check that enough images of a data set can be used.

    Raises:
        DatasetError: more images are left out than may be.
    """
    found = Summary()
    found.leave_out(skipped)
    bad = found.reasons.total()
    total = used + bad
    if used and bad <= max_skip * total:
        return
    raise DatasetError(
        f"{bad} of {total} images in {listing.source} cannot be used: {describe_reasons(found.reasons)}",
        hint=f"ganq dataset check {listing.source} lists them"
        + (f"; --max-skip {min(bad / total + 0.01, 1):.2f} skips them" if used else ""),
    )


def describe_reasons(skipped: Mapping[str, int]) -> str:
    """Return '40 × HEIC is not read, 2 × empty file', with a way out where there is one."""
    most = Counter(skipped).most_common(MAX_REASONS)
    told = ", ".join(f"{count} × {reason}" for reason, count in most if count)
    unread = [
        kind
        for kind in dict.fromkeys(names.UNSUPPORTED_SUFFIXES.values())
        if f"{kind} is not read" in skipped
    ]
    return told + (f"; to use {', '.join(unread)}, {names.CONVERT}" if unread else "")


def describe_classes(classes: Mapping[str, int]) -> str:
    """Return '2: cats (40), dogs (38)'."""
    shown = ", ".join(f"{name} ({count})" for name, count in list(classes.items())[:MAX_CLASSES])
    more = len(classes) - MAX_CLASSES
    return f"{len(classes)}: {shown}" + (f" and {more} more" if more > 0 else "")


def _files(count: int) -> str:
    return f"{count} file{'s' * (count != 1)}"
