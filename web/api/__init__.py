"""The REST API `/api/v1`: the calls of the command line over HTTP. It only ever grows."""
