"""
The study's work: draw, time, train, evaluate, each step once, through a queue that stays.

Everything is submitted under a key that says what it is, so the same command again goes
on where the last one stopped: what was accepted before is found, not done anew.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.quality.cells import Cell
from benchmarks.stack import Queue
from jobs.kinds import SPEC_VERSION, kind_named
from jobs.specs import EvaluateSpec, GenerateSpec, Spec, TrainSpec
from jobs.states import JobState
from storage.db.rows import Job
from worker.celery_bridge.notify import try_notify

CALIBRATION_IMAGES = 4096
"""Images that D sees in the run that tells how fast a recipe is here."""
EVALUATIONS = 10
"""Checkpoints with a metric in each run."""
CHOICES: dict[str, dict[str, Any]] = {
    "as they come": {"count": 2000},
    "--keep 2000 --of 8000": {"keep": 2000, "of": 8000},
    "--reject 0.5": {"count": 2000, "reject": 0.5},
    "--truncation 1.5": {"count": 2000, "truncation": 1.5},
    "--truncation 1": {"count": 2000, "truncation": 1.0},
    "--noise-std 0.8": {"count": 2000, "noise_std": 0.8},
}
"""Ways to ask one model for 2,000 images."""


class Study:
    """
    One study in a folder: its data sets, its queue, its rates.

    Args:
        work: kept between runs.
        minutes: wall time of each training.
        samples: generated images that are evaluated.
    """

    def __init__(self, work: Path, queue: Queue, *, minutes: float, samples: int) -> None:
        self.work = work
        self.queue = queue
        self.minutes = minutes
        self.samples = samples

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Train and evaluate one cell; returns its facts."""
        trained = self.train(cell)
        assert trained.result is not None
        best = self.evaluate(trained, "best")
        last = self.evaluate(trained, "last")
        return {
            "style": cell.style,
            "pictures": cell.images,
            "recipe": cell.variant,
            "seed": cell.seed,
            "minutes": self.minutes,
            "job": trained.id,
            "seconds": trained.result["seconds"],
            "images": trained.result["images"],
            "epochs": trained.spec["epochs"],
            "best": best,
            "last": last,
            "grid": str(self.grid(cell, trained)),
        }

    # --- data ------------------------------------------------------------------------------

    def faces(self, style: str, count: int, seed: int = 0) -> Path:
        """Draw faces, which depend only on the seed."""
        from storage.datasets.synthetic import make_faces

        folder = self.work / "faces" / f"{style}-{count}-{seed}"
        if not folder.is_dir():
            part = folder.with_name(f"{folder.name}.part")
            make_faces(part, style=style, count=count, size=96, seed=seed)
            part.rename(folder)
        return folder

    # --- jobs ------------------------------------------------------------------------------

    def begin(self, cell: Cell) -> None:
        """Accept the training of a cell, and wait for nothing."""
        self._accepted(*self._training(cell))

    def train(self, cell: Cell) -> Job:
        """Train for `minutes` on this machine."""
        return self._done(*self._training(cell))

    def _training(self, cell: Cell) -> tuple[str, TrainSpec]:
        data = str(self.faces(cell.style, cell.images))
        batch = TrainSpec.create(**cell.spec(data, 1, 1)).batch
        per_epoch = cell.images // batch
        batches = self.rate(cell) * 60 * self.minutes / batch
        epochs = max(1, round(batches / per_epoch))
        spec = TrainSpec.create(**cell.spec(data, epochs, max(1, epochs // EVALUATIONS)))
        return f"{cell.key}-{self.minutes:g}min", spec

    def take_rates(self, given: Mapping[str, float]) -> None:
        """Use rates of another machine instead of measuring."""
        if given:
            self._rates.write_text(json.dumps({**self._known(), **given}, indent=1))

    @property
    def _rates(self) -> Path:
        return self.work / "rates.json"

    def _known(self) -> dict[str, float]:
        rates: dict[str, float] = json.loads(self._rates.read_text()) if self._rates.exists() else {}
        return rates

    def rate(self, cell: Cell) -> float:
        """Return this recipe's images per second: given, or measured once in a short run."""
        rates = self._known()
        if cell.variant not in rates:
            data = str(self.faces(cell.style, cell.images))
            epochs = max(2, CALIBRATION_IMAGES // cell.images)
            spec = TrainSpec.create(**cell.spec(data, epochs, epochs))
            result = self._done(f"rate-{cell.key}-{time.time():.0f}", spec).result
            assert result is not None
            rates[cell.variant] = result["images_per_s"]
            self._rates.write_text(json.dumps(rates, indent=1))
        return rates[cell.variant]

    def evaluate(self, trained: Job, which: str) -> dict[str, Any]:
        """Compute metrics of a checkpoint against the images that it was trained on."""
        spec = EvaluateSpec.create(
            source=trained.id,
            checkpoint=which,
            data=trained.spec["data"],
            size=trained.spec["size"],
            count=self.samples,
            search=self.samples,
        )
        return self._measured(f"evaluate-{which}-{trained.id}", spec)

    def choices(self, cell: Cell) -> list[dict[str, Any]]:
        """Measure each selection method on one model; the cell's training must have ended."""
        trained = self.train(cell)
        found = []
        for name, options in CHOICES.items():
            made = self._done(
                f"choice-{name}-{trained.id}",
                GenerateSpec.create(source=trained.id, seed=2, grid=0, **options),
            )
            spec = EvaluateSpec.create(
                source=made.id, data=trained.spec["data"], size=trained.spec["size"], count=2000, search=2000
            )
            about = {"style": cell.style, "pictures": cell.images, "recipe": cell.variant}
            found.append(
                {**about, "seed": cell.seed, "choice": name, **self._measured(f"judge-{made.id}", spec)}
            )
        return found

    def _measured(self, name: str, spec: EvaluateSpec) -> dict[str, Any]:
        done = self._done(name, spec)
        assert done.result is not None
        found = {key.split("/")[0]: one for key, one in done.result["metrics"].items()}
        return {
            "epoch": (done.inputs or {}).get("checkpoint", {}).get("epoch"),
            **{name: one["value"] for name, one in found.items()},
            **{f"{name}_floor": one["baseline"] for name, one in found.items()},
            "precision": done.result["precision"]["value"],
            "recall": done.result["recall"]["value"],
            "variety": done.result.get("diversity"),
            "copying": done.result["copying"]["verdict"],
            "copied_share": done.result["copying"]["share"],
        }

    def grid(self, cell: Cell, trained: Job) -> Path:
        """64 samples of the best checkpoint, the same latents for every recipe."""
        spec = GenerateSpec.create(source=trained.id, count=64, seed=1)
        done = self._done(f"grid-{trained.id}", spec)
        return self.queue.attempt(done) / "grids" / "grid-0000.png"

    def _done(self, name: str, spec: Spec) -> Job:
        """Submit, or find what was submitted before, and wait for its end."""
        job = self._accepted(name, spec)
        while not (job := self.queue.queries.get(job.id)).state.terminal:
            time.sleep(0.5)
        if job.state is not JobState.SUCCEEDED:
            raise RuntimeError(f"job {job.id} ({name}) {job.state}: {job.error_message}")
        return job

    def _accepted(self, name: str, spec: Spec) -> Job:
        """Return the job under a key of name and request: a new job, or that of an earlier run."""
        kind = kind_named(spec.kind)
        text = json.dumps([name, spec.to_json()], sort_keys=True)
        job = self.queue.store.submit(
            kind=spec.kind,
            spec=spec.to_json(),
            spec_version=SPEC_VERSION,
            submit_key=hashlib.sha256(text.encode()).hexdigest(),
            user="study",
            name=f"q-{name}"[:64],
            priority=kind.priority,
            preemptible=kind.preemptible,  # so that an evaluation need not wait for a training's end
            will_notify=True,
        )
        if not job.state.terminal:
            try_notify(self.queue.settings, job.id, job.queue, self.queue.database.installation)
        return job


def shown(cell: Cell, facts: Mapping[str, Any]) -> str:
    """Return one line about a finished cell."""
    best, last = facts["best"], facts["last"]
    return (
        f"{cell.key}: {facts['seconds'] / 60:.1f} min, {facts['images']:,} images; "
        f"KID best {best['kid']:.4f}, last {last['kid']:.4f}"
    )
