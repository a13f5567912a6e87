# Each target works from nothing: .venv is made and filled with the pinned versions if it is missing.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test lint table bench clean

demo: $(STAMP)
	$(BIN)/tropd distill

test: $(STAMP)
	$(BIN)/python -m pytest -q

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Hours, resumable: every method on the three small tasks, then the tables of docs/benchmarks.md.
table: $(STAMP)
	test -d build/models/teacher || $(BIN)/python -m tests.benchmarks.astray build/models
	test -d build/models/gap || $(BIN)/python -m tests.benchmarks.gap build/models/gap
	$(BIN)/python -m tests.benchmarks.table --models build/models
	$(BIN)/python -m tests.benchmarks.collapse

# A quarter of an hour: speed and memory, then the tables and pictures of docs/benchmarks.md. A step beside the peer's:
# make bench PEER_PYTHON=path/to/python (an environment that has trl==1.16.0).
bench: $(STAMP)
	$(BIN)/python -m tests.benchmarks.credit_loss
	$(BIN)/python -m tests.benchmarks.step $(if $(PEER_PYTHON),--peer-python $(PEER_PYTHON))
	$(BIN)/python -m tests.benchmarks.growth
	$(BIN)/python -m tests.benchmarks.rollout
	$(BIN)/python -m tests.benchmarks.bucketing
	$(BIN)/python -m tests.benchmarks.report

# torch first and alone: resolved together with the rest, pip may take a CUDA build of several gigabytes.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf .venv
