"""Webhooks: what may be reached, what is sent, and who sends it; storage/db/webhooks.py has the rows."""
