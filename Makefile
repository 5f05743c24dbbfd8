# Each target first makes the virtual environment it needs: .venv holds the newest supported set of dependencies,
# .venv-oldest the oldest. Either is made anew when one of the files that define it has changed.

PYTHON ?= python3
WORKERS ?= auto
ARCHITECTURES ?= sm_80 sm_90 sm_100

NEWEST := .venv/.installed
OLDEST := .venv-oldest/.installed
PIP_INSTALL := bin/python -m pip --disable-pip-version-check --quiet --quiet install
PYTEST := bin/python -m pytest

.PHONY: help demo test test-oldest golden check bench inspect docs clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14
	@echo 'Variables: PYTHON=$(PYTHON), WORKERS=$(WORKERS) (test processes), ARCHITECTURES="$(ARCHITECTURES)"'

test: $(NEWEST) ## the whole test suite
	.venv/$(PYTEST) --numprocesses $(WORKERS)

test-oldest: $(OLDEST) ## the fast tests on the oldest supported dependencies
	.venv-oldest/$(PYTEST) --numprocesses $(WORKERS) -m "not slow"

# The test processes take every core already: more than one torch thread in each would only contend for them.
test test-oldest: export OMP_NUM_THREADS := 1

demo: $(NEWEST) ## the whole pipeline in minutes: training from nothing, controls, a report in runs/demo
	.venv/bin/cumo demo

golden: $(NEWEST) ## agreement with the reference data (CUMO_GOLDEN_DIR names another folder of it)
	.venv/$(PYTEST) tests/golden

check: $(NEWEST) ## lint, format, types, architecture
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/$(PYTEST) tests/test_architecture.py

bench: $(NEWEST) ## the microbenchmarks
	.venv/$(PYTEST) benchmarks --benchmark-only

inspect: $(NEWEST) ## compile every kernel for ARCHITECTURES, without a GPU; fail where registers spill
	.venv/bin/python -m cumo_kernels.inspect --arch $(ARCHITECTURES) --fail-on-spill

docs: $(NEWEST) ## the documentation as a site, in site/; fails on a link that leads nowhere
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict
	@echo "site/index.html"

clean: ## remove everything that the other targets made, the environments too
	rm -rf .venv .venv-oldest build dist site *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(NEWEST): constraints.txt
$(NEWEST): EXTRAS := triton,train,serve,demo,dev,docs
$(OLDEST): constraints-oldest.txt
$(OLDEST): EXTRAS := triton,train,serve,demo,dev
$(NEWEST) $(OLDEST): %/.installed: pyproject.toml setup.py
	$(PYTHON) -m venv --clear $*
	$*/$(PIP_INSTALL) --constraint $(filter constraints%,$^) setuptools
	$*/$(PIP_INSTALL) --constraint $(filter constraints%,$^) --no-build-isolation --editable '.[$(EXTRAS)]'
	touch $@
