"""
`ganq submit … --sweep FIELD=VALUES`: one job for each combination of the values.

    --sweep lr-g=1e-4,2e-4 --sweep seed=0-9     20 jobs, named base-0 … base-19
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from cli.ui import output
from jobs.errors import SpecError
from jobs.renamed import FIELDS

if TYPE_CHECKING:
    from cli.session import Session
    from cli.submit.options import SubmitOptions
    from jobs.specs import Spec
    from storage.db.store.sweeps import Sweep

MOST = 10_000  # storage.db.store.sweeps.MOST_IN_A_SWEEP, whose import --dry-run does without
RANGE = re.compile(r"([0-9]{1,12})-([0-9]{1,12})")


def combinations(
    spec: "type[Spec]", texts: Sequence[str], given: Mapping[str, Any], *, never: Sequence[str]
) -> list[dict[str, Any]]:
    """
    The fields that change, for each job of a sweep, the last field fastest.

    Args:
        texts: 'FIELD=VALUES', as they were typed.
        given: fields that were typed as options.
        never: fields that a sweep cannot change.

    Raises:
        SpecError: an unknown field, one that was given twice, a value that it cannot have, too many.
    """
    axes: dict[str, list[Sequence[str]]] = {}
    for one in texts:
        told, equals, values = one.partition("=")
        name = _field(told.strip().lstrip("-"), spec)
        if not equals or not values.strip():
            raise SpecError(f"--sweep {one[:60]!r} names no values", hint="e.g. --sweep lr-g=1e-4,2e-4")
        if name not in spec.model_fields or name in never:
            raise SpecError(
                f"--sweep {told[:40]!r}: {_why_not(name, spec)}",
                hint=_meant(name, spec, never),
            )
        if name in axes or name in given:
            where = "an option and in --sweep" if name in given else "two --sweep"
            raise SpecError(f"{_flag(name)} is given twice, as {where}", hint="use one of the two")
        axes[name] = [_expand(part.strip()) for part in values.split(",")]
    number = math.prod(sum(map(len, values)) for values in axes.values())
    if number > MOST:
        raise SpecError(
            f"this sweep is {number:,} jobs, and one holds {MOST:,} at most",
            hint="leave values away, or submit it as several sweeps",
        )
    typed = [
        [(name, _value(spec, name, text)) for part in values for text in part]
        for name, values in axes.items()
    ]
    for name, axis in zip(axes, typed, strict=True):
        if len({str(value) for _, value in axis}) < len(axis):
            raise SpecError(f"--sweep {_flag(name)[2:]} names a value twice", hint="name each once")
    return [dict(combination) for combination in itertools.product(*typed)]


def accept_sweep(
    session: "Session",
    specs: "Sequence[Spec]",
    wish: "SubmitOptions",
    *,
    after: Sequence[int] = (),
) -> int:
    """
    Commit all jobs of a sweep, or none, and ring; say so, and wait if that is wished.

    Returns:
        The exit code.

    Raises:
        JobNotFoundError, SpecError: a job in --after does not exist or has failed; a job would be split.
    """
    import secrets

    from cli.submit.notify import best_effort
    from jobs.kinds import SPEC_VERSION, kind_named
    from storage.db.store.sweeps import sweep_id
    from worker.celery_bridge.notify_job import MOST_NOTIFIED

    if any(spec.split() for spec in specs):
        raise SpecError(
            "a sweep cannot hold jobs that are split in parts", hint="raise --shard-size above --count"
        )
    kind = kind_named(specs[0].kind)
    submit_key = wish.submit_key or secrets.token_hex(16)
    base = wish.name or sweep_id(submit_key)
    known = wish.submit_key is not None and any(session.queries.counts(sweep=sweep_id(submit_key)).values())
    sweep = session.store.submit_sweep(
        [spec.to_json() for spec in specs],
        names=[f"{base}-{place}" for place in range(len(specs))],
        submit_key=submit_key,
        kind=kind.name,
        spec_version=SPEC_VERSION,
        user=wish.user or session.settings.user,
        queue=wish.queue,
        priority=kind.priority if wish.priority is None else wish.priority,
        after=[*dict.fromkeys(after)],
        held=wish.held,
        preemptible=kind.preemptible and not wish.no_preempt,
        time_limit_s=wish.time_limit,
        ringing=MOST_NOTIFIED,
    )
    with best_effort(f"sweep {sweep.id}"):
        _tell(session, sweep, specs, base, wish, known=known)
    if not wish.wait:
        return 0
    from cli.ui.follow import exit_code_of, follow

    code = exit_code_of(*follow(session, sweep.job_ids, quiet=wish.as_json))
    if wish.as_json:
        output.print_json(_facts(session, sweep, base))
    return code


def _tell(
    session: "Session",
    sweep: "Sweep",
    specs: "Sequence[Spec]",
    base: str,
    wish: "SubmitOptions",
    *,
    known: bool,
) -> None:
    """Say that a sweep is accepted, and ring for it whether or not that can be said."""
    from cli.submit.notify import ring
    from worker.celery_bridge.notify_job import MOST_NOTIFIED

    first, last = sweep.job_ids[0], sweep.job_ids[-1]
    try:
        if not wish.as_json:
            accepted = "accepted earlier under this key" if known else "accepted"
            about = f"{output.count(len(specs), 'job')} of kind {specs[0].kind} {accepted}"
            click.echo(f"sweep {sweep.id} ({base}): {about}, {first} to {last}")
    finally:
        for one in session.queries.get_many(sweep.job_ids[:MOST_NOTIFIED]):
            if one.id == first:
                ring(session, one)
            else:
                _ring_quietly(session, one.id, one.queue)
    if wish.wait:
        return
    if wish.as_json:
        output.print_json(_facts(session, sweep, base))
    else:
        click.echo(f"  → ganq status --sweep {base}, ganq wait --sweep {base}, ganq cancel --sweep {base}")


def _facts(session: "Session", sweep: "Sweep", base: str) -> dict[str, Any]:
    counts = session.queries.counts(sweep=sweep.id)
    return {"sweep": sweep.id, "name": base, "jobs": list(sweep.job_ids), "states": counts}


def _ring_quietly(session: "Session", job_id: int, queue: str) -> None:
    from worker.celery_bridge.notify import ring

    ring(
        session.settings, job_id, queue, session.database.installation
    )  # the dispatcher rings again for what was not heard


def told(changes: Sequence[Mapping[str, Any]]) -> str:
    """'20 jobs: lr-g (2 values) × seed (10 values)', for --dry-run."""
    axes = {name: len({str(one[name]) for one in changes}) for name in changes[0]}
    shown = " × ".join(f"{_flag(name)[2:]} ({output.count(n, 'value')})" for name, n in axes.items())
    return f"{output.count(len(changes), 'job')}: {shown}"


def _expand(part: str) -> Sequence[str]:
    """'0-9' is ten values, counted before they are made; anything else is one."""
    found = RANGE.fullmatch(part)
    if found is None:
        return (part,)
    low, high = int(found[1]), int(found[2])
    if high < low:
        raise SpecError(f"--sweep: the range {part} runs backwards", hint=f"e.g. {high}-{low}")
    return _Texts(range(low, high + 1))


class _Texts(Sequence[str]):
    """A range of numbers, as they would be typed."""

    def __init__(self, numbers: range) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: Any) -> Any:
        return str(self.numbers[place])


def _value(spec: "type[Spec]", name: str, text: str) -> Any:
    try:
        return click.types.convert_type(_option_type(spec, name)).convert(text, None, None)
    except click.BadParameter as exc:
        raise SpecError(
            f"--sweep {_flag(name)[2:]}: {exc.message.rstrip('.')}", hint="values are separated by commas"
        ) from None


def _option_type(spec: "type[Spec]", name: str) -> Any:
    from cli.submit.spec_options import option_type
    from cli.ui.params import RenamedChoice
    from jobs.recipes import RECIPES

    if name == "recipe":
        return RenamedChoice(RECIPES, field=name)
    return option_type(spec.model_fields[name], name)


def _field(told: str, spec: "type[Spec]") -> str:
    """The field that an option's name means, or what would be its name."""
    meant = {_flag(name)[2:]: name for name in spec.model_fields}
    name = meant.get(told, told.replace("-", "_"))
    return FIELDS.get(name, name)


def _flag(name: str) -> str:
    from jobs.specs import option_of

    return option_of(name)


def _why_not(name: str, spec: "type[Spec]") -> str:
    return "cannot be swept" if name in spec.model_fields else "there is no such field"


def _meant(name: str, spec: "type[Spec]", never: Sequence[str]) -> str:
    """What was perhaps meant, or where to look."""
    from difflib import get_close_matches

    near = get_close_matches(name, [one for one in spec.model_fields if one not in never], n=3, cutoff=0.5)
    look = f"ganq submit {spec.kind} --help lists the options"
    return f"{', '.join(_flag(one)[2:] for one in near)}? {look}" if near else look
