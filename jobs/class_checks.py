"""Checks of the classes of a data set or model, without torch, so that the command line can use them."""

from collections.abc import Mapping, Sequence

from jobs.errors import DatasetError, SpecError

MIN_IMAGES_PER_CLASS = 2
"""Per class: from a single image nothing can be learned but that image."""
SHOWN = 20


def no_classes() -> DatasetError:
    return DatasetError(
        "--conditional needs classes, and these images have none",
        hint="give each class a folder of its own (faces/happy/…, faces/sad/…), or omit --conditional",
    )


def require_enough(images: Mapping[str, int]) -> None:
    """
    Check that each class has enough images.

    Args:
        images: their number, of each class.

    Raises:
        DatasetError: a class has too few images.
    """
    few = {name: count for name, count in images.items() if count < MIN_IMAGES_PER_CLASS}
    if few:
        name, count = next(iter(few.items()))
        more = f" ({len(few) - 1} more like it)" if len(few) > 1 else ""
        raise DatasetError(
            f"the class {name[:80]!r} has {count or 'no'} image{'s' if count != 1 else ''}{more}",
            hint="add images, or move its folder out of the data set: a single one can only be copied; "
            "images that another class has, too, are left out without --keep-duplicates",
        )


def unknown_class(name: str, classes: Sequence[str]) -> SpecError:
    """Return the error for a class that a model does not have."""
    if not classes:
        return SpecError(
            "--class needs a model that was trained with classes",
            hint="omit it, or train with --conditional on folders of classes",
        )
    more = f" and {len(classes) - SHOWN} more" if len(classes) > SHOWN else ""
    return SpecError(
        f"--class {name[:80]!r} is not a class of this model",
        hint=f"classes: {', '.join(classes[:SHOWN])}{more}",
    )


def other_classes(job_id: int | None, its: int, mine: int) -> SpecError:
    """Return the error for a run that starts from networks with another number of classes; 0: none."""
    return SpecError(
        f"the networks of job {job_id} know {its or 'no'} classes, and {mine or 'none'} are requested",
        hint="--data with as many folders of images as there, or start from another job",
    )
