# syntax=docker/dockerfile:1
# One image for workers, migrations and commands. BASE is any Python ≥ 3.11 image.
ARG BASE=python:3.13-slim-bookworm
FROM ${BASE} AS build
WORKDIR /src
COPY requirements.lock ./
RUN python3 -m venv /opt/ganq \
    && /opt/ganq/bin/pip install --no-cache-dir --require-hashes --only-binary :all: -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY cli cli
COPY worker worker
COPY storage storage
COPY jobs jobs
RUN /opt/ganq/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM ${BASE}
COPY --from=build /opt/ganq /opt/ganq
# GANQ_HOME holds nothing that matters here: the table is in Postgres, the files on the volume.
ENV PATH=/opt/ganq/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    GANQ_HOME=/tmp/ganq \
    GANQ_VOLUME=/volume
USER 10001:10001
VOLUME /volume
ENTRYPOINT ["ganq"]
CMD ["worker"]
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s CMD ["ganq", "health"]
