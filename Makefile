# Both main targets work on a fresh machine that has nothing but Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two at once, each file in one of them: its fixtures are made once. In the order of conftest.py,
# the longest first; xdist's own begins with the files of the most tests.
XDIST := -n 2 --dist loadfile --no-loadscope-reorder
PYTEST := $(BIN)/python -m pytest $(XDIST)
export JAX_PLATFORMS ?= cpu
# Each of the many processes that the tests start would compile ptjax's source again.
unexport PYTHONDONTWRITEBYTECODE

# The releases of transformers whose behaviour the fixtures record.
ORACLES := 4 5
TRANSFORMERS_4 := 4.57.6
TRANSFORMERS_5 := 5.24.0

.PHONY: quickstart test test-all test-lowest wheels constraints faults mutation lint oracle docs trackers rehearse notebooks

quickstart: $(VENV)/installed  ## tune a prompt on the shipped backbone, on CPU
	$(BIN)/python -m ptjax.train --gin_file=quickstart.gin

# TESTS="tests/models tests/cli" runs these folders alone.
test: $(VENV)/installed-dev  ## everything but the markers slow, oracle, tpu, cuda, shared
	$(PYTEST) $(TESTS)

test-all: $(VENV)/installed-oracle  ## everything
	$(PYTEST) --durations=40 --durations-min=10 -m "$(shell $(BIN)/python tests/markers.py)"

wheels: $(VENV)/installed-dev  ## the wheel alone, on each Python from 3.11 to 3.13 that is here
	$(PYTEST) -n 0 -m slow tests/project/test_wheel.py

# After .ci/run: what its environments hold, and what Python 3.12 would.
constraints: $(VENV)/installed-oracle  ## writes constraints.txt
	for version in 3.12 3.13; do $(MAKE) VENV=.venv-$$version PYTHON=python$$version \
	  .venv-$$version/installed-dev || exit; done
	$(BIN)/python .ci/constraints.py $(BIN)/python .venv-3.12/bin/python .venv-3.13/bin/python \
	  > constraints.new && mv constraints.new constraints.txt

# Outside CI: with the oldest release of each direct dependency that pyproject.toml allows.
test-lowest: .venv-lowest/installed  ## the quickstart and the tests with the oldest releases
	$(<D)/bin/python -m ptjax.train --gin_file=quickstart.gin --gin.MODEL_DIR="'$(<D)/quickstart'"
	$(<D)/bin/python -m pytest $(XDIST)

faults: $(VENV)/installed-dev  ## the tests notice the faults of tests/faults
	$(BIN)/python tests/faults/run.py

# Outside CI, for it takes long. ROOMS="data training" tries these alone.
mutation: $(VENV)/installed-mutation  ## how many random faults the tests of each room notice
	$(BIN)/python tests/mutation/run.py $(ROOMS)

# Outside CI, which reads tests/fixtures/transformers. Each script runs under both releases, the
# older one first: what that one wrote, the newer one may read.
oracle: $(ORACLES:%=.venv-oracle-%/installed)  ## record what transformers 4 and 5 give
	set -e; for script in $(sort $(wildcard tests/oracles/record_*.py)); do \
	  for release in $(ORACLES); do .venv-oracle-$$release/bin/python "$$script"; done; \
	done

lint: $(VENV)/installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && \
	$(BIN)/pyright --pythonpath $(BIN)/python && \
	$(BIN)/shellcheck -x tpu_scripts/*.sh tpu_scripts/*.sbatch findings/*.sh benchmarks/*.sh \
	  benchmarks/on_gpu/*.sh .ci/run

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[report]' && touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' && touch $@ $(VENV)/installed

$(VENV)/installed-oracle: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,oracle,plan,plan-gpu]' && touch $@

$(VENV)/installed-mutation: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,mutation]' && touch $@

.venv-oracle-%/installed:
	$(PYTHON) -m venv $(@D) && $(@D)/bin/python -m pip install --quiet --disable-pip-version-check \
	  transformers==$(TRANSFORMERS_$*) torch==2.13.0 sentencepiece protobuf && touch $@

.venv-lowest/installed: pyproject.toml | $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv && \
	$(BIN)/uv venv --quiet --clear --python 3.11 $(@D) && \
	$(BIN)/uv pip install --quiet --python $(@D) --resolution lowest-direct -e '.[dev]' && touch $@

# In an environment of its own, for it needs nothing of ptjax: the API page is read from the source.
docs: .venv-docs/installed  ## the documentation as a site, in site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(<D)/bin/mkdocs build --strict

.venv-docs/installed: Makefile
	$(PYTHON) -m venv $(@D) && $(@D)/bin/python -m pip install --quiet --disable-pip-version-check \
	  mkdocs==1.6.1 mkdocs-material==9.8.2 mkdocstrings-python==2.0.11 ruff==0.17.6 && touch $@

# Outside CI: the packages are large, and nothing else needs them.
trackers: .venv-trackers/installed  ## the trackers with the real wandb and MLflow, offline
	$(<D)/bin/python -m pytest -m trackers -W default tests/trackers

.venv-trackers/installed: pyproject.toml
	$(PYTHON) -m venv $(@D) && $(@D)/bin/python -m pip install --quiet --disable-pip-version-check \
	  -e '.[dev,wandb,mlflow]' mlflow && touch $@

# Outside CI, before a machine with a GPU is used: it must work there the first time.
rehearse: $(VENV)/installed-oracle  ## the benchmarks for GPUs with toy sizes on a CPU
	$(PYTEST) -m rehearsal

notebooks: $(VENV)/installed-dev  ## executes the notebook of examples/ and writes its outputs into it
	$(BIN)/python tests/notebooks.py
