"""Result files: one JSON file per benchmark and day, and a table of the newest of each."""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.measure import Ratio

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch", "torchvision", "numpy", "pillow", "fpng", "celery", "redis", "sqlalchemy", "psycopg", "click",
)  # fmt: skip


def circumstances() -> dict[str, Any]:
    """Return hardware, versions and commit, without the name of the machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "hardware": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "memory_gib": round(memory / 2**30, 1),
            "gpu": _gpu(),
        },
        "versions": {"python": platform.python_version(), "linux": platform.release()} | _packages(),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "changed_files": len(_git("status", "--porcelain", "--untracked-files=no").splitlines()),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "?")


def _gpu() -> str | None:
    try:
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().replace("\n", ", ") or None


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip()


def write(name: str, explained: str, ratios: list[Ratio], raw: dict[str, Any], others: float | None) -> Path:
    """
    Write results/<name>-<date>.json, then results/README.md.

    Args:
        others: median fraction of CPU time that other processes used.
    """
    now = datetime.now(UTC)
    path = RESULTS / f"{name}-{now:%Y-%m-%d}.json"
    RESULTS.mkdir(exist_ok=True)
    facts = {
        "name": name,
        "at": f"{now:%Y-%m-%dT%H:%M:%SZ}",
        **circumstances(),
        "others": None if others is None else round(others, 3),
        "explained": explained,
        "ratios": [one.to_json() for one in ratios],
        "values": _rounded(raw),
    }
    path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    (RESULTS / "README.md").write_text(table())
    return path


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value


def newest() -> dict[str, dict[str, Any]]:
    """Return the newest result of each benchmark, by name."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        facts = json.loads(path.read_text())
        if "name" in facts and facts["at"] > found.get(facts["name"], {"at": ""})["at"]:
            found[facts["name"]] = facts
    return dict(sorted(found.items()))


def for_readme() -> str:
    """Return the lines with a bar, as the README's table."""
    lines = ["| what | beside | of | ratio | must | |", "|---|---|---|---|---|---|"]
    for name, facts in newest().items():
        for one in facts["ratios"]:
            if one["met"] is None:
                continue
            # The name of the benchmark is not repeated if a line begins with it.
            what = one["what"] if one["what"].startswith(name) else f"{name}: {one['what']}"
            met = "✓" if one["met"] else "✗ short"
            ratio = f"{one['median']:.2f}"
            lines.append(f"| {what} | {one['against']} | {one['metric']} | {ratio} | {one['bar']} | {met} |")
    return "\n".join(lines)


def table() -> str:
    """Return the newest result of each benchmark, as Markdown."""
    lines = [
        "# Results",
        "",
        "Made by `make bench`. Each ratio is the median of the rounds' own ratios, with their quartiles;",
        "A/A is the peer against itself one round later, which shows how much of that is the machine.",
        "",
        "Made by hand: studies of [image quality](quality-study.md) and [performance](performance-study.md),",
        "and [fault runs](fault-runs.md).",
        "",
    ]
    for name, facts in newest().items():
        lines += _section(name, facts)
    return "\n".join(lines).rstrip() + "\n"


def _section(name: str, facts: dict[str, Any]) -> list[str]:
    hardware, versions = facts["hardware"], facts["versions"]
    about = ", ".join(f"{key} {value}" for key, value in versions.items())
    changed = f" with {facts['changed_files']} changed files" if facts["changed_files"] else ""
    others = "" if facts["others"] is None else f", others took {facts['others']:.0%} of the processors"
    lines = [
        f"## {name}",
        "",
        facts["explained"],
        "",
        "| what | against | of | ratio | quartiles | A/A | value | peer | must | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in facts["ratios"]:
        aa = (
            "–"
            if one["aa_median"] is None
            else f"{one['aa_median']:.2f} ({one['aa_low']:.2f}–{one['aa_high']:.2f})"
        )
        met = {True: "✓", False: "✗ short", None: ""}[one["met"]]
        spread = "–" if one["aa_median"] is None else f"{one['low']:.2f}–{one['high']:.2f}"
        lines.append(
            f"| {one['what']} | {one['against']} | {one['metric']} | **{one['median']:.2f}** "
            f"| {spread} | {aa} | {one['value']:.4g} | {one['peer_value']:.4g} | {one['bar']} | {met} |"
        )
    return [
        *lines,
        "",
        f"{facts['at']}, commit {facts['commit']}{changed}; {hardware['cpu']}, {hardware['cores']} cores, "
        f"{hardware['memory_gib']} GiB{others}; {about}.",
        "",
    ]


if __name__ == "__main__":
    # python -m benchmarks.report: write results/README.md; --readme: print the README's table.
    if "--readme" in sys.argv:
        print(for_readme())
    else:
        (RESULTS / "README.md").write_text(table())
