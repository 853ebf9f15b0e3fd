"""Write a model as a folder that can be shared: weights, configuration, samples and a model card."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ganq.session import Session
from jobs.errors import ConfigError, NotFoundError
from storage.version import version
from storage.volume.durable import make_folder, write_bytes, write_json

if TYPE_CHECKING:
    from storage.db.rows import Checkpoint, Job

CARD, SAMPLES = "README.md", "samples"
FORMAT = 1
CARD_TEMPLATE = """---
license: other
tags: [gan, ganq, unconditional-image-generation]
---

# {name}

A generator of {size}×{size} images, trained with ganq.

{samples}
{facts}

## Generate images

```sh
ganq import . --name {name}
ganq submit generate --from {name} --count 64 --wait
ganq submit generate --from {name} --seeds 7 --wait    # image 7, equal for equal builds
```
"""


@dataclass(frozen=True)
class Shared:
    """A folder that was written."""

    folder: Path
    files: tuple[str, ...]
    checkpoint: "Checkpoint"


def write_model(
    session: Session, job: "Job", folder: Path, *, checkpoint: str, licence: str, force: bool = False
) -> Shared:
    """
    Write model.safetensors, config.json, samples and a model card with what the job table records.

    Args:
        checkpoint: best, last, or an epoch.
        licence: of the training images, in words.
        force: replace the files of an earlier push.

    Raises:
        NotFoundError: the job has no generator, or no such checkpoint.
        ConfigError: the folder is not empty.
        CheckpointCorruptError: the checkpoint's files differ from what was registered.
        StorageError: the folder cannot be written.
    """
    from jobs.kinds import kind_named
    from storage.results.attempts import sample_files
    from storage.volume.checkpoints import FACTS, GENERATOR
    from storage.volume.durable import read_verified
    from storage.weights.model_folder import CONFIG, MODEL

    if not kind_named(job.kind).makes_model:
        raise NotFoundError(
            f"job {job.id} is of kind {job.kind} and has no generator", hint="give a training or an import"
        )
    chosen = session.queries.choose_checkpoint(job.id, checkpoint)
    path = session.generator_volume(chosen).root / chosen.path
    model = read_verified(path, GENERATOR, chosen.manifest_sha256)
    meta = json.loads(read_verified(path, FACTS, chosen.manifest_sha256))
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not force)):
        raise ConfigError(f"{folder} is not empty", hint="--force replaces the files of an earlier push")
    make_folder(folder / SAMPLES)
    written: list[str] = []
    samples = [
        (epoch, file)
        for epoch, file in sample_files(session.record_volume(job), job.id)
        if epoch <= chosen.epoch
    ]
    for epoch, file in samples[-1:]:
        written.append(f"{SAMPLES}/epoch-{epoch:04d}.png")
        write_bytes(folder / written[-1], file.read_bytes())
    write_bytes(folder / MODEL, model)
    config = {
        "format": FORMAT,
        "arch": meta["arch"],
        "classes": meta.get("classes", []),
        "epoch": chosen.epoch,
        "recipe": meta.get("recipe"),
        "model_sha256": hashlib.sha256(model).hexdigest(),
        "checkpoint": chosen.manifest_sha256,
        "ganq": version(),
    }
    write_json(folder / CONFIG, config)
    facts = "\n".join(f"- {one}" for one in _facts(session, job, chosen, meta, licence))
    name = job.name or f"{job.kind}-{job.id}"
    shown = "".join(f"![samples of epoch {samples[-1][0]}]({one})\n" for one in written)
    card = CARD_TEMPLATE.format(name=name, size=meta["arch"]["size"], samples=shown, facts=facts)
    write_bytes(folder / CARD, card.encode())
    return Shared(folder, (MODEL, CONFIG, CARD, *written), chosen)


def _facts(
    session: Session, job: "Job", checkpoint: "Checkpoint", meta: dict[str, Any], licence: str
) -> "list[str]":
    """Return what the job table records of a model, as lines of its card."""
    result = job.result or {}
    found = [f"checkpoint: epoch {checkpoint.epoch:,} of job {job.id}, SHA-256 {checkpoint.manifest_sha256}"]
    if job.kind == "train":
        found.append(f"recipe: {job.spec.get('recipe')}, seed {job.spec.get('seed')}")
        details = [event.detail or {} for event in session.queries.events(job.id) if event.type == "dataset"]
        if details:
            from storage.datasets.summary import Summary

            summary = Summary.from_json(details[-1])
            lost = f"{(+summary.reasons).total():,} unusable, {summary.copies:,} copies"
            found.append(f"training images: {summary.images:,}; left out: {lost}")
        found.append(f"fingerprint of the decoded images: {meta.get('fingerprint', 'not known')}")
    found.append(f"licence of the training images: {licence}")
    if classes := meta.get("classes"):
        found.append(f"classes: {', '.join(map(str, classes))}")
    metric = result.get("metric") or {}
    if checkpoint.metric is not None:
        key, baseline = metric.get("key", meta.get("metric_key", "metric")), metric.get("baseline")
        compared = "" if baseline is None else f" (real images against real images: {baseline:.4g})"
        found.append(f"{key}: {checkpoint.metric:.4g}{compared}; lower is better")
    found.append(f"copies of training images: {_copies(session, job)}")
    if build := meta.get("build"):
        found.append(f"build: torch {build.get('torch')}, {build.get('device')}")
    return found


def _copies(session: Session, job: "Job") -> str:
    """Return the verdict of the newest evaluation of the model."""
    from jobs.states import JobState
    from storage.db.queries import Filter

    for one in session.queries.stream(Filter(states=(JobState.SUCCEEDED,), kind="evaluate", after_id=job.id)):
        if one.spec.get("source") == job.id and (copying := (one.result or {}).get("copying")):
            return f"{copying.get('summary') or copying.get('verdict')} (job {one.id})"
    return f"not tested (ganq submit evaluate {job.name or job.id})"
