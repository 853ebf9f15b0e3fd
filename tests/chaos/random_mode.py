"""
The random mode: real workers on real jobs, and faults drawn from a seed.

    make chaos SEED=1 SECONDS=90 DATABASE=postgres
    PYTHONPATH=tests python -m chaos.random_mode --seed 1 --seconds 90 --database sqlite [--guards-off NAME]

What is checked when: after every fault, and every second, the table in one snapshot and
every file that the snapshot points to (chaos.invariants); every second the processes.
At the end all is mended, the workers work off what waits, and then: every accepted job
has ended; trainings of one spec have equal bits, and generations of one spec from equal
trainings equal images, those that ran undisturbed before the first fault among them;
`ganq gc` leaves nothing behind; all workers have gone when told to.

Exit code 1 on any violation, with the seed and what was done last.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict, deque
from pathlib import Path
from typing import Any

from chaos.faults import Faults
from chaos.invariants import ENDS, Memory, View, look, table_violations, unfinished
from chaos.invariants_volume import check_volume, leftovers, runners, two_runners, unequal_trainings
from chaos.load import PICTURES, TRAININGS, Load
from chaos.stage import Stage, fresh_folder

from storage.datasets.synthetic import make_faces

HEAL_S = 240.0
"""Jobs that wait when the faults end must have ended after so long."""
LEAVE_S = 60.0
"""So long may an idle worker take to leave when it is told to."""
LAST_SHOWN = 15
EXPLAINED = {"CRASH_LOOP", "DEPENDENCY_FAILED"}
"""Codes of failures that kills alone can bring about."""


class Chaos:
    """One run with one seed."""

    def __init__(self, stage: Stage, seed: int, *, undisturbed: bool = True) -> None:
        self.stage = stage
        self.seed = seed
        faces = make_faces(stage.folder / "faces", count=40, size=24)
        self.load = Load(stage, faces, random.Random(f"{seed} load"))
        self.faults = Faults(stage, random.Random(f"{seed} faults"))
        self.rng = random.Random(f"{seed} times")
        self.memory = Memory()
        self.found: dict[str, float] = {}
        """Violation → seconds after the start when it was first seen."""
        self.first: list[str] = []
        """What was done before the first of them."""
        self.last: deque[str] = deque(maxlen=LAST_SHOWN)
        self.checks = 0
        self.seen_runners: dict[str, set[int]] = {}
        self.began = time.monotonic()
        self.undisturbed = undisturbed

    # --- the run --------------------------------------------------------------------------

    def run(self, seconds: float) -> None:
        if self.undisturbed:
            self._calm()
        for name in self.stage.names:
            self.stage.start(name)
        self.began = time.monotonic()
        ends = self.began + seconds
        next_job = next_fault = next_look = self.began
        while (now := time.monotonic()) < ends:
            self.faults.tend()
            if now >= next_job:
                self._note(self.load.step())
                next_job = now + self.rng.uniform(0.2, 1.0)
            if now >= next_fault:
                did = self.faults.act()
                self._note(did)
                next_fault = now + self.rng.uniform(0.3, 1.8)
                if did:
                    next_look = now
            if now >= next_look:
                self.check()
                next_look = time.monotonic() + 1.0
            time.sleep(0.05)
        self._end()

    def _calm(self) -> None:
        """Run every kind of job once without faults: the reference for the others."""
        self.stage.start("calm", GANQ_FAILPOINTS="")
        trained = [self.load.train(which).id for which in range(len(TRAININGS))]
        for which in range(len(PICTURES)):
            self.load.generate(which, trained[which % len(trained)], after=True)
        self._until_ended(HEAL_S)
        self.stage.workers["calm"].send_signal(signal.SIGTERM)
        self.stage.workers.pop("calm").wait(60)
        self.check()

    def _end(self) -> None:
        self._note("mend everything")
        self.faults.heal()
        self.load.release_all()
        self._until_ended(HEAL_S)
        self.check()
        for name in self.stage.names:
            worker = self.stage.workers[name]
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM)
        for name in self.stage.names:
            try:
                self.stage.workers[name].wait(LEAVE_S)
            except subprocess.TimeoutExpired:
                self._violates([f"I2: worker {name} has not left {LEAVE_S:.0f} s after SIGTERM"])
        deadline = time.monotonic() + 5
        while self.stage.alive() and time.monotonic() < deadline:
            time.sleep(0.2)
        if self.stage.alive():
            print(self.stage.dump())
        left = [f"{one.pid} {' '.join(one.cmdline()[-3:])}" for one in self.stage.alive()]
        if left:
            self._violates([f"I9: processes of workers that have gone are still there: {left}"])
        view = look(self.stage.database)
        self.memory = Memory()
        self.check()
        self._violates(unfinished(view, {*self.load.accepted, *view.jobs}))
        self._violates(unequal_trainings(view, self.stage.volume))
        self._violates(unequal_pictures(view))
        self._violates(unexplained(view))
        self._violates(self._needless_losses(view))
        self._violates(leftovers(self.stage.database, self.stage.volume))
        self.check()

    def _needless_losses(self, view: View) -> list[str]:
        """I2: only faults cause lost attempts, and each at most one per worker."""
        counts = self.faults.counts
        most = (
            counts["kills"]
            + counts["drains"]
            + len(self.stage.names) * (counts["stops"] + counts["restarts"])
        )
        lost = sum(one.outcome == "lost" for each in view.attempts.values() for one in each)
        return [f"I2: {lost} attempts were lost, the faults explain at most {most}"] if lost > most else []

    def _until_ended(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.faults.tend() if self.stage.workers.keys() & set(self.stage.names) else None
            if all(row.state in ENDS for row in look(self.stage.database).jobs.values()):
                return
            time.sleep(0.3)

    # --- looking --------------------------------------------------------------------------

    def check(self) -> None:
        """Check all invariants that hold at any moment."""
        if not self.stage.database_up:
            return
        view = look(self.stage.database)
        found = list(table_violations(view, secrets=self._secrets()))
        found += check_volume(self.stage.database, self.stage.volume, view, self.memory, self._secrets())
        now = runners(self.stage.volume)
        found += two_runners(self.seen_runners, now)
        self.seen_runners = now
        self.checks += 1
        self._violates(found)

    def _secrets(self) -> list[str]:
        return [self.stage.postgres.password] if self.stage.postgres is not None else []

    def _violates(self, found: list[str]) -> None:
        for one in found:
            if one not in self.found:
                self.found[one] = time.monotonic() - self.began
                self.first = self.first or list(self.last)

    def _note(self, what: str | None) -> None:
        if what is not None:
            self.last.append(f"{time.monotonic() - self.began:6.1f} s  {what}")
            if "-v" in sys.argv:
                print(self.last[-1], flush=True)

    # --- telling --------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        view = look(self.stage.database)
        attempts = [one for each in view.attempts.values() for one in each]
        outcomes = Counter(one.outcome for one in attempts)
        rescued = [
            one.ended_at - self.faults.killed[one.pid]
            for one in attempts
            if one.pid in self.faults.killed and one.outcome == "lost"
        ]
        return {
            "seed": self.seed,
            "database": "sqlite" if self.stage.postgres is None else "postgres",
            "jobs": len(view.jobs),
            "states": dict(Counter(row.state for row in view.jobs.values())),
            "attempts": len(attempts),
            "kills": self.faults.counts["kills"],
            "stops": self.faults.counts["stops"],
            "restarts": self.faults.counts["restarts"],
            "drains": self.faults.counts["drains"],
            "rescues": outcomes["lost"],
            "crashes": outcomes["crashed"],
            "releases": outcomes["requeued"],
            "people": dict(self.load.counts),
            "slowest_rescue_s": round(max(rescued, default=0.0), 2),
            "checks": self.checks,
            "violations": len(self.found),
            "tracebacks": sum(tracebacks(self.stage).values()),
        }


# --- what only the end shows --------------------------------------------------------------------


def unequal_pictures(view: View) -> list[str]:
    """I5: equal trainings and equal parameters give equal images, byte for byte, whatever happened."""
    made: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row in view.jobs.values():
        if row.kind == "generate" and row.state == "succeeded" and row.part_of is None:
            source = view.jobs[row.spec["source"]].spec
            wish = {key: value for key, value in row.spec.items() if key not in ("source", "shard_size")}
            key = json.dumps([source, wish], sort_keys=True)
            made[key][row.result["manifest_sha256"]].append(row.id)
    return [
        f"I5: generations of one wish differ: {list(ids.values())}" for ids in made.values() if len(ids) > 1
    ]


def unexplained(view: View) -> list[str]:
    """I10: kills and stops fail a job only by CRASH_LOOP."""
    return [
        f"I10: job {row.id} has failed with {row.error_code}: {row.error_message}"
        for row in view.jobs.values()
        if row.state == "failed" and row.error_code not in EXPLAINED
    ]


def tracebacks(stage: Stage) -> Counter[str]:
    """Return uncaught exceptions from all logs of workers, by their last line and the message before."""
    found: Counter[str] = Counter()
    for name in [*stage.names, "calm"]:
        before, *blocks = stage.log(name).split("Traceback (most recent call last):")
        for block in blocks:
            # The first line that is not indented; a killed process may not have written it.
            ends = [line for line in block.splitlines()[1:] if line and not line[0].isspace()]
            last = ends[0][:160] if ends else f"cut off: …{block.strip()[-160:]}"
            message = before.strip().rpartition("\n")[2][-200:]
            if "WorkerLostError" not in block:  # what Celery says when its pool's process is killed
                found[f"{last} ({message})"] += 1
            before = block
    return found


def tell(chaos: Chaos, facts: dict[str, Any]) -> None:
    width = max(map(len, facts))
    for name, value in facts.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        print(f"  {name.replace('_', ' '):{width}}  {shown}")
    for line, times in tracebacks(chaos.stage).most_common(10):
        print(f"  not caught {times} times: {line}")
    if chaos.found:
        print(f"\nseed {chaos.seed}: {len(chaos.found)} violations")
        for what, at in list(chaos.found.items())[:50]:
            print(f"  {at:6.1f} s  {what}")
        print("before the first of them:")
        for line in chaos.first:
            print(f"  {line}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="random_mode", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--database", choices=("sqlite", "postgres"), default="sqlite")
    parser.add_argument("--guards-off", default="", help="guards that the workers do without")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the facts there")
    parser.add_argument("--keep", action="store_true", help="leave the table, the volume and the logs")
    parser.add_argument("-v", action="store_true", help="say everything that is done")
    options = parser.parse_args(arguments)
    folder = fresh_folder()
    try:
        with Stage(
            folder,
            postgres=options.database == "postgres",
            guards_off=options.guards_off,
            workers=options.workers,
        ) as stage:
            chaos = Chaos(stage, options.seed)
            chaos.run(options.seconds)
            facts = chaos.summary() | {"guards_off": options.guards_off or "none"}
            tell(chaos, facts)
            if options.json:
                reported = {**facts, "found": chaos.found, "not_caught": dict(tracebacks(stage))}
                options.json.write_text(json.dumps(reported, indent=1) + "\n")
        return 1 if chaos.found else 0
    finally:
        if options.keep:
            print(f"everything is in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
