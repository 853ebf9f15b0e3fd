# Two commands from a bare checkout: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test chaos random cluster cluster-test lint builtin-faces bench screenshots docs clean lock

$(STAMP): requirements-dev.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("ganq needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r requirements-dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

install: $(STAMP)

# Draws faces, trains on them and generates through the queue; leaves all of it in ./demo.
demo: $(STAMP)
	$(BIN)/ganq demo --home demo

# Half of the time the tests wait for processes: two files at a time take half as long. In the
# order of their folders: by default xdist begins with the files of many tests, which are quick, and is left
# with one that takes minutes. A short name for their folder, because sockets lie in it.
TEST_PROCESSES ?= 2

test: $(STAMP) lint
	folder=$$(mktemp -d) && $(BIN)/python -m pytest -m "not tier2 and not tier3" -n $(TEST_PROCESSES) \
	  --dist loadfile --no-loadscope-reorder --durations 25 --cov --cov-report= --basetemp "$$folder/t"; code=$$?; rm -rf "$$folder"; exit $$code

SEED ?= 1
SECONDS ?= 90
DATABASE ?= sqlite

# Minutes of faults, one after the other, then at random; tests/chaos/README.md tells more.
chaos: $(STAMP)
	$(BIN)/python -m pytest -m tier2
	$(MAKE) random

# One run of the random mode: make random SEED=1 SECONDS=90 DATABASE=postgres GUARDS_OFF=finish_fence
random: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m chaos.random_mode --seed $(SEED) --seconds $(SECONDS) --database $(DATABASE) --guards-off "$(GUARDS_OFF)"

# Several hosts in namespaces of their own: needs root and Linux. tests/cluster/README.md tells more.
cluster-test: $(STAMP)
	$(BIN)/python -m pytest tests/cluster

JOBS ?= 200
PARTITIONS ?= 10
LOSSES ?= 10

# One run: make cluster SEED=1 JOBS=200 PARTITIONS=10 LOSSES=10 DATABASE=postgres
cluster: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m cluster.run --seed $(SEED) --jobs $(JOBS) --partitions $(PARTITIONS) \
	  --losses $(LOSSES) --database $(DATABASE) -v

# Two runs of mypy, because benchmarks/ imports as tests.services what the tests import as services.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks
	$(BIN)/lint-imports

# Every page in Debian's Chromium, light and dark, narrow and wide: look at them.
SCREENSHOTS ?= screenshots

screenshots: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m browser.screenshots --out $(SCREENSHOTS)

# The networks of --init-from builtin:faces, from the four styles that are CC0: half an hour to an hour, on the
# workers of GANQ_HOME (ganq up). SHA256 in ganq/builtin/__init__.py then names the new file.
BUILTIN ?= faces

builtin-faces: $(STAMP)
	for style in lorelei notionists open-peeps critters; do \
	  $(BIN)/ganq dataset make $(BUILTIN)/$$style --style $$style --count 2000 || exit 1; done
	$(BIN)/ganq submit train --data $(BUILTIN) --ngf 32 --epochs 20 --stop-after 15epochs --metric none --seed 0 --name faces --wait
	$(BIN)/ganq push faces --to ganq/builtin/faces --checkpoint 15 --image-licence 'CC0 1.0' --force
	sha256sum ganq/builtin/faces/model.safetensors

bench: $(STAMP)
	$(BIN)/python -m benchmarks

docs: $(STAMP)
	$(BIN)/python -m cli.reference

EXTRAS := --extra local --extra faces --extra onnx --extra video --extra judge --extra metrics --extra notify --extra tensorboard --extra wandb --extra hub
COMPILE := uv pip compile pyproject.toml $(EXTRAS) --universal --python-version 3.11 --generate-hashes --upgrade

# requirements.lock is what an installation needs, requirements-dev.lock adds what the tests need.
lock:
	$(COMPILE) -o requirements.lock
	$(COMPILE) --group dev -c requirements.lock -o requirements-dev.lock

clean:
	rm -rf demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
