"""What the chapters of the job store share."""

from storage.db.engine import Database


class Store:
    """A chapter of the job store; JobStore is all of them."""

    def __init__(self, database: Database) -> None:
        self.database = database
