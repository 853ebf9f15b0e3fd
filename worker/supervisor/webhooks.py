"""
Deliver webhooks where no server of the page does.

A worker starts `ganq webhook deliver` only for what has waited: libraries for HTTP and TLS stay out of the
supervisor, and a receiver that hangs cannot delay heartbeats. It takes the leases first, so that of many
workers one starts it.
"""

import logging
import secrets
import signal
import subprocess

from storage.db.engine import Database
from storage.db.webhooks import Webhooks
from storage.settings import Settings
from worker.host.embedded_redis import worker_command
from worker.host.process import bound_to_this
from worker.webhooks.targets import channels

log = logging.getLogger("ganq.webhooks")

WAITED_S = 5.0
"""A server of the page delivers within a second or two."""


class DelivererStarter:
    """Starts the process that delivers, when there is something to deliver and nobody does."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self.webhooks = Webhooks(database)
        self.settings = settings
        self.channels = channels(settings)
        self.process: subprocess.Popen[bytes] | None = None

    def tick(self) -> None:
        """Start the process if need be; it exits when nothing is left to deliver."""
        if self.settings.webhook_delivery == "off" or (
            self.process is not None and self.process.poll() is None
        ):
            return
        owner = secrets.token_hex(16)
        due = self.webhooks.due(owner, self.channels, for_s=WAITED_S)
        leased = [one for one in due if self.webhooks.lease(one, owner, self.channels) is not None]
        if not leased:
            return
        command = worker_command("webhook", "deliver", "--exit-when-idle", "--owner", owner)
        self.process = subprocess.Popen(
            bound_to_this(signal.SIGTERM, command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the supervisor's is a pipe of messages
            start_new_session=True,
        )
        log.info("started process %s to deliver webhooks", self.process.pid)
