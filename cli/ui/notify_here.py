"""Notify the person at this machine: the terminal's bell, and the desktop where there is one."""

import shutil
import subprocess
import sys
from contextlib import suppress

TITLE = "ganq"
WITHIN_S = 5.0
SCRIPT = ("on run argv", "display notification (item 2 of argv) with title (item 1 of argv)", "end run")
"""Of macOS; the text is an argument, so that no character of it is code."""


def notify_here(text: str) -> None:
    """Ring the bell of the terminal, if there is one, and show a notification; a failure is ignored."""
    if sys.stderr.isatty():
        with suppress(OSError):
            sys.stderr.write("\a")
            sys.stderr.flush()
    if (program := shutil.which("notify-send")) is not None:
        command = [program, "--app-name", TITLE, "--", TITLE, text]
    elif (program := shutil.which("osascript")) is not None:
        command = [program, *(part for line in SCRIPT for part in ("-e", line)), TITLE, text]
    else:
        return
    with suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=WITHIN_S,
            check=False,
        )
