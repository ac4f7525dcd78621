# RoMA pipeline. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Python compiles a module once, not in each of the hundreds of processes of the tests
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt deploy/install.py
	@$(PYTHON) deploy/install.py $(VENV)
	@touch $(READY)

.PHONY: setup
setup: $(READY) ## Create .venv and install everything, versions pinned

.PHONY: demo
demo: $(READY) ## Real data to a registered model: the whole path once
	@$(BIN)/roma-pipeline demo

.PHONY: up
up: $(READY) ## Serve the overview, Dagster and MLflow on 127.0.0.1
	@$(BIN)/roma-pipeline up

.PHONY: test
test: export OMP_NUM_THREADS ?= 1
test: $(READY) lint ## Lint, type-check and run all tests but chaos, four at a time
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

.PHONY: chaos
chaos: $(READY) ## The long fault tests: kills at random moments, servers that die
	$(BIN)/python -m pytest -m chaos

.PHONY: docs
docs: $(READY) ## Build the pages of docs/ into build/docs/index.html
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open build/docs/index.html"

.PHONY: lint
lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: clean
clean: ## Remove .venv and caches; .roma (data, jobs, models) stays
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
