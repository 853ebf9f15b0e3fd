"""Build, check and submit jobs: what the client and the command line share."""
