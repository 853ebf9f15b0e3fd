"""The job table of a server, over its REST API: for machines without database, Redis and volume."""
