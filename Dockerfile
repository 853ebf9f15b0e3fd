# One image for workers, the migration and commands. BASE is any image with Python ≥ 3.11 and its venv module.
ARG BASE=python:3.13-slim-bookworm

# The libraries, by hash; nearly all of the image, and rebuilt only when the lock changes.
FROM ${BASE} AS libraries
COPY requirements.lock /tmp/requirements.lock
RUN python3 -m venv /opt/ganq \
    && /opt/ganq/bin/pip install --no-cache-dir --require-hashes --only-binary :all: -r /tmp/requirements.lock \
    && rm /tmp/requirements.lock

FROM libraries AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ganq_entry.py ./
COPY cli cli
COPY ganq ganq
COPY web web
COPY worker worker
COPY storage storage
COPY jobs jobs
# The locked setuptools builds it: nothing is fetched here.
RUN /opt/ganq/bin/pip wheel --no-index --no-deps --no-build-isolation --wheel-dir /wheel .

FROM libraries
COPY --from=wheel /wheel /wheel
RUN /opt/ganq/bin/pip install --no-cache-dir --no-index --no-deps /wheel/*.whl \
    && install --directory --owner=10001 --group=10001 /volume
# GANQ_HOME holds nothing that matters here: the table is in Postgres, the files on the volume.
# The user has no home, and the root file system may be read-only: caches go to /tmp.
ENV PATH=/opt/ganq/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    GANQ_HOME=/tmp/ganq \
    GANQ_VOLUME=/volume
USER 10001:10001
ENTRYPOINT ["ganq"]
CMD ["worker"]
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s CMD ["ganq", "health"]
