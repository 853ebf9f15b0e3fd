"""A job as a request that gives an equal spec: a command, TOML, Python or JSON."""

import json
import shlex
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ganq.submission.options import INTERNAL
from ganq.submission.train import NETWORKS
from jobs.durations import in_words
from jobs.errors import SpecError
from jobs.kinds import kind_named
from jobs.specs import TrainSpec, option_of
from storage.datasets.sources import FIELDS as READING

if TYPE_CHECKING:
    from storage.db.queries import Queries
    from storage.db.rows import Job

FORMATS = ("command", "toml", "python", "json")
TOML_NAMES = {"continue_from": "continue", "source": "from"}
RESET = {"init_netg": None, "init_netd": None, "init_from": None, "stop_after": None}


def describe(
    job: "Job",
    queries: "Queries",
    form: str,
    *,
    written: Callable[[str, Any], Any] = lambda name, value: value,
) -> str:
    """
    Return a request that submits a job with the same options and name.

    Options that the recipe, or the job that it refers to, gives by itself are left out.

    Args:
        form: one of FORMATS.
        written: returns the value of an option as it is to be given.

    Raises:
        SpecError: a shard or an import, which is not submitted.
    """
    if job.part_of is not None:
        raise SpecError(f"job {job.id} is a shard of job {job.part_of}", hint=f"ganq show {job.part_of}")
    if kind_named(job.kind).runner is None:
        raise SpecError(
            f"job {job.id} is an {job.kind}, which is not submitted", hint="ganq import does it again"
        )
    spec = kind_named(job.kind).spec_class().from_json(job.spec).to_json()
    parent = spec.get("continue_from")
    base = queries.get(parent).spec if parent is not None else None
    given = options_of(job.kind, spec, base)
    given = {name: written(name, value) for name, value in given.items()}
    labels = queries.labels_of([job.id]).get(job.id)
    extras = {name: value for name, value in (("note", job.note), ("labels", labels)) if value}
    return render(job.kind, {**given, **_job_options(job), **extras}, form, _comments(job))


def options_of(kind: str, spec: Mapping[str, Any], parent: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """
    Return the options that differ from what a new job has by itself.

    Args:
        parent: the spec of the run that a training continues.
    """
    always: tuple[str, ...] = ()
    if kind == "train":
        if spec["continue_from"] is not None:
            base = {**(parent or {}), **RESET}
            always = ("continue_from",)
        else:
            # The recipe's defaults at this size; the size is printed if it is not the default.
            base = TrainSpec.create(recipe=spec["recipe"], data="", size=spec["size"]).to_json()
            base["size"] = TrainSpec.model_fields["size"].default
            always = ("data", "recipe")
        if spec["init_from"] is not None:
            always += tuple(name for name in NETWORKS if name in spec)
    else:
        cls = kind_named(kind).spec_class()
        base = {name: field.default for name, field in cls.model_fields.items()} | cls.of_new
        always = ("source",) if kind == "generate" else ("data", "size", *READING)
    plain = json.loads(json.dumps(dict(base), default=str))
    found = {
        name: value
        for name, value in spec.items()
        if (name in always or name not in plain or value != plain[name]) and name not in INTERNAL
    }
    if kind == "evaluate":
        subject = found.pop("source", None), found.pop("path", None)
        found = {"subject": subject[0] if subject[0] is not None else subject[1], **found}
    return {name: value for name, value in found.items() if value is not None}


def _job_options(job: "Job") -> dict[str, Any]:
    kind = kind_named(job.kind)
    options: dict[str, Any] = {"name": job.name, "time_limit": None}
    if job.own_priority != kind.priority:
        options["priority"] = job.own_priority
    if job.queue != "default":
        options["queue"] = job.queue
    if kind.preemptible and not job.preemptible:
        options["no_preempt"] = True
    if job.time_limit_s is not None:
        options["time_limit"] = in_words(job.time_limit_s)
    return {name: value for name, value in options.items() if value is not None}


def _comments(job: "Job") -> list[str]:
    """Return facts about the job that are not options."""
    from storage.version import version

    lines = [f"job {job.id}, {job.state}; printed by ganq {version()}"]
    inputs, build = job.inputs or {}, (job.result or {}).get("build")
    for key, what in (("fingerprint", "data set"), ("checkpoint_id", "checkpoint")):
        if key in inputs:
            lines.append(f"{what} of this job: {inputs[key]}")
    if isinstance(build, dict):
        lines.append("build: " + ", ".join(f"{name} {value}" for name, value in sorted(build.items())))
    return [" ".join(line.split()) for line in lines]


def render(kind: str, options: Mapping[str, Any], form: str, comments: "list[str]") -> str:
    """Return options in one of FORMATS; it ends with a newline."""
    if form == "json":
        job = {"kind": kind, **{_toml_name(name): _value(name, value) for name, value in options.items()}}
        return json.dumps({"comment": comments, "job": [job]}, indent=2, ensure_ascii=False) + "\n"
    marks = [f"# {line}" for line in comments]
    if form == "toml":
        rows = [
            f"{_toml_name(name)} = {_toml(_value(name, value))}"
            for name, value in {"kind": kind, **options}.items()
        ]
        return "\n".join([*marks, "[[job]]", *rows]) + "\n"
    if form == "python":
        rows = [f"    {name}={_python(name, value)}," for name, value in options.items()]
        return "\n".join([*marks, "import ganq", "", f"job = ganq.connect().{kind}(", *rows, ")"]) + "\n"
    words = [f"ganq submit {kind}"]
    for name, value in options.items():
        if name == "labels":
            words += [f"--label={shlex.quote(f'{key}={one}')}" for key, one in value.items()]
            continue
        if name == "reader":
            if value != TrainSpec.of_new["reader"]:
                marks.append(f"# reader {value} is that of ganq 0.2 and has no option: use --as toml")
            continue
        words.append(_flag(kind, name, value))
    return "\n".join([*marks, " \\\n  ".join(words)]) + "\n"


def _toml_name(name: str) -> str:
    return TOML_NAMES.get(name) or option_of(name)[2:]


def _value(name: str, value: Any) -> Any:
    """Return a value as it is written in a job file."""
    if name == "seeds":
        return ",".join(f"{first}-{last}" if last != first else f"{first}" for first, last in value)
    if name in ("augment", "progressive") and not value:
        return "none"
    return list(value) if isinstance(value, tuple) else value


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{_toml(key)} = {_toml(one)}' for key, one in value.items())} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value)


def _python(name: str, value: Any) -> str:
    return repr(_value(name, value))


def _flag(kind: str, name: str, value: Any) -> str:
    """Return the option of the command line."""
    value = _value(name, value)
    if name == "subject":
        return shlex.quote(str(value))
    flag = {"continue_from": "--continue", "source": "--from"}.get(name) or option_of(name)
    if isinstance(value, bool):
        return flag if value else flag.replace("--", "--no-", 1)
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    # With =, because a value may begin with a dash.
    return f"{flag}={shlex.quote(text)}"
