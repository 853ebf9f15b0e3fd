"""Base class of specs, and the types and checks that several of them share."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from jobs.errors import SpecError
from jobs.renamed import renamed
from jobs.text import require_text

if TYPE_CHECKING:
    from jobs.specs.generate import GenerateSpec

MAX_COUNT = 100_000_000
MIN_SIZE = 16
"""Smallest side of the images of a training, in pixels."""
MAX_SEED = 2**63 - 1

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

FEATURE_NETWORKS = ("effnet-lite0", "effnet-lite2", "random")

OPTIONS = {"class_name": "class"}
"""Options of fields with another name: `class` is a keyword of Python."""

Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
SampleIndex = Annotated[int, Field(ge=0, lt=MAX_COUNT)]
WhiteLevel = Annotated[float, Field(ge=0, le=2**32, allow_inf_nan=False)]
UnpackedGb = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Fit = Literal["crop", "pad", "stretch"]
READER = 2
"""Version of the rules by which a data set is read: storage/datasets/names.py."""
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def check_name(name: str) -> str:
    """
    Return a name that is safe in a path, a shell and a table.

    Raises:
        SpecError: it is not safe; a name of digits would be ambiguous with an id.
    """
    if not NAME_PATTERN.fullmatch(name) or name.isdigit():
        raise SpecError(
            f"{name[:70]!r} cannot be a name",
            hint="use letters, digits, '.', '_' and '-', at most 64, not digits alone",
        )
    return name


def check_checkpoint(which: str) -> str:
    """
    Return the name of a checkpoint.

    Raises:
        SpecError: it is neither `best`, `last` nor a number of epochs.
    """
    if which not in ("best", "last") and not re.fullmatch(r"[0-9]{1,9}", which):
        raise SpecError(
            f"--checkpoint {which[:40]!r} is not a checkpoint",
            hint="use best, last, or a number of epochs (ganq checkpoints JOB lists them)",
        )
    return which


CheckpointSelector = Annotated[str, AfterValidator(check_checkpoint)]


DOUBLINGS = range(1, 8)
"""Sides are 8 or 12 times a power of two with these exponents: 16 to 1536 pixels."""
PATCH_SIZES = (2, 3, 4, 6, 8)


def size_plan(size: int, patch_size: int = 0) -> tuple[int, int]:
    """
    Return how the layers reach an image size from 4×4.

    Args:
        patch_size: side of the square of pixels that one position of the last layer makes; 0: 3 or 2, by
            the size.

    Returns:
        (doublings k, patch size p): 4·2^k·p is the size. For 96: (3, 3), as in the tutorial.

    Raises:
        SpecError: no number of doublings gives the size; the hint names what does.
    """
    for k in DOUBLINGS:
        for patch in (patch_size,) if patch_size else (3, 2):
            if patch in PATCH_SIZES and size == 4 * patch * 2**k:
                return k, patch
    possible = sorted(side * 2**k for side in (8, 12) for k in DOUBLINGS)
    if size in possible:
        fitting = [patch for patch in PATCH_SIZES if any(size == 4 * patch * 2**k for k in DOUBLINGS)]
        raise SpecError(
            f"--patch-size {patch_size} does not fit images of {size}×{size}",
            hint=f"--patch-size {' or '.join(map(str, fitting))} fits, or omit it",
        )
    near = sorted(sorted(possible, key=lambda other: abs(other - size))[:2])
    raise SpecError(
        f"images of {size}×{size} cannot be made: the layers double 4×4, or triple it once",
        hint=f"--size {near[0]} or --size {near[1]} work (all: {', '.join(map(str, possible))})",
    )


def check_quarter(option: str, size: int, patch_size: int = 0) -> None:
    """
    Check that there are networks for a quarter of the side.

    Raises:
        SpecError: a quarter is less than the smallest side.
    """
    smallest = 8 * (patch_size or 2)
    if size < 4 * smallest:
        patches = f" with --patch-size {patch_size}" if patch_size else ""
        raise SpecError(
            f"{option}: a quarter of --size {size} is less than {smallest} pixels, "
            f"the smallest side{patches}",
            hint=f"--size {4 * smallest} or more, or omit {option}",
        )


def check_feature_network(name: str, sha256: str | None) -> None:
    """
    Check the options of a feature network.

    Raises:
        SpecError: neither a built-in network nor a file with its SHA-256.
    """
    named = name in FEATURE_NETWORKS
    if named and sha256 is not None:
        raise SpecError(f"--feature-sha256 applies to a file, and {name} is not a file", hint="omit it")
    if not named and sha256 is None:
        raise SpecError(
            f"--feature-network {name[:200]} is not built in",
            hint=f"{' or '.join(FEATURE_NETWORKS)}; a weight file also needs --feature-sha256 "
            "(sha256sum FILE prints it)",
        )


def option_of(field: str) -> str:
    """Return the option of a field: '--lr-g' of lr_g."""
    return "--" + OPTIONS.get(field, field.replace("_", "-"))


def difference(field: str, mine: Any, its: Any) -> str:
    """Return a text for an option that differs from that of the earlier run."""
    option = option_of(field)
    if isinstance(mine, bool):
        on, off = option, option.replace("--", "--no-", 1)
        return f"{on if mine else off} (it has {on if its else off})"
    return f"{option} {_typed(mine)} (it has {_typed(its)})"


def _typed(value: Any) -> str:
    return (",".join(map(str, value)) or "none") if isinstance(value, list | tuple) else str(value)


class Spec(BaseModel):
    """Base of all specs: immutable, without unknown fields, from and to JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ClassVar[str]
    of_new: ClassVar[dict[str, Any]] = {}
    """Values for new specs of fields whose default applies to stored specs without the field."""

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, data: Any) -> Any:
        return renamed(data) if isinstance(data, dict) else data

    @classmethod
    def create(cls, **given: Any) -> Self:
        """
        Validate the options of a user; None means 'not given'.

        Raises:
            SpecError: it names the option and the problem in one line.
        """
        for name, value in given.items():
            if isinstance(value, str):  # a path may have been made absolute from any folder
                require_text(value, f"{option_of(name)} ")
        try:
            return cls.model_validate({**cls.of_new, **{k: v for k, v in given.items() if v is not None}})
        except ValidationError as exc:
            raise _in_one_line(exc) from exc

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """
        Read a spec from the job table.

        Raises:
            SpecError: it was written by a version with other fields.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as exc:
            raise _in_one_line(exc) from exc

    def split(self) -> "Sequence[GenerateSpec]":
        """Return the specs of the shards; empty if the job is not split."""
        return ()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON, from which from_json() makes an equal spec."""
        return self.model_dump(mode="json")


def _in_one_line(exc: ValidationError) -> SpecError:
    first = exc.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, SpecError):
        return cause
    option = option_of(str(first["loc"][0])) if first["loc"] else "spec"
    what = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = f" (given: {str(given)[:60]})" if not isinstance(given, dict) else ""
    line = f"{option}: {what[0].lower()}{what[1:]}{shown}"
    return SpecError("".join(letter if letter.isprintable() else "?" for letter in line))
