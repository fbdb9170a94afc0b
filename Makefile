# The only place where commands are written down; `make help` lists them.

PYTHON3 ?= python3
VENV := .venv
PYTHON := $(VENV)/bin/python
UV := $(VENV)/bin/uv
STAMP := $(VENV)/.ready
HEAVY := $(VENV)/.heavy

DATA ?=
DATE ?=
PROTOCOL ?=
DATASET := $(or $(DATA),.freshrank/data/simulated)
# One thread per worker: two workers with two threads each wait for one another at every small tensor.
# A file stays whole, for what its tests share, and in the order of tests/conftest.py. The tests start about a hundred
# processes, each of which would compile our modules anew where PYTHONDONTWRITEBYTECODE is set.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo serve stop test test-fast test-slow lint format docs lock images clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv with pinned packages, Triton and Helm; quick when nothing changed

demo: $(STAMP) ## One daily run through Airflow, Kubeflow, Feast and Triton: [DATA=dir] [DATE=yyyy-mm-dd] [PROTOCOL=name]
	$(PYTHON) -m freshrank demo $(if $(DATA),--data "$(DATA)") $(if $(DATE),--date "$(DATE)") \
		$(if $(PROTOCOL),--protocol "$(PROTOCOL)")

serve: $(STAMP) ## Start the local Triton: [DATA=imported dataset]
	$(PYTHON) -m freshrank serve --data "$(DATASET)"

stop: $(STAMP) ## Stop the local Triton: [DATA=imported dataset]
	$(PYTHON) -m freshrank stop --data "$(DATASET)"

test: $(STAMP) $(HEAVY) ## Run the tests, but for the slow ones
	$(PYTEST) -m "not slow"

test-fast: $(STAMP) ## Run the unit tests alone, in less than a minute
	$(PYTEST) -m "not (slow or integration or realdata)"

test-slow: $(STAMP) $(HEAVY) ## Run the tests that take minutes
	$(PYTEST) -m slow

lint: $(STAMP) docs ## Check style, types and documentation
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy freshrank docs/hooks.py
	$(VENV)/bin/lint-imports --no-cache

format: $(STAMP) ## Lay the code out
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(STAMP) ## Build the documentation into site/; a broken link is an error
	$(VENV)/bin/mkdocs build --strict --quiet
	@echo "site/index.html"

# Of runtime.lock are the images of steps and Airflow; of serve.lock is Triton's, whose models need no torch. FuxiCTR is
# in heavy.lock. torch's CUDA companions depend on the build of torch, so the locks leave them to pip (see setup).
RESOLVE = $(UV) pip compile pyproject.toml --quiet --no-header --no-annotate
COMPANIONS := ^(nvidia-|cuda-|triton==)

lock: $(STAMP) ## Resolve requirements/*.lock anew from pyproject.toml, keeping pinned versions that still fit
	$(RESOLVE) --extra orchestrate --output-file requirements/runtime.lock
	echo torch | $(RESOLVE) --extra serve --excludes /dev/stdin --constraint requirements/runtime.lock \
		--output-file requirements/serve.lock
	echo fuxictr | $(RESOLVE) --extra all --extra test --extra docs --excludes /dev/stdin \
		--constraint requirements/runtime.lock --output-file requirements/test.lock
	sed -i -E '/$(COMPANIONS)/d' requirements/runtime.lock requirements/test.lock

# A pushed image also says what it was built from and what is in it; Docker's own store cannot hold that.
images: export REVISION ?= $(shell git rev-parse HEAD)$(shell git diff --quiet HEAD || echo -modified)
images: export CREATED ?= $(shell date -u +%Y-%m-%dT%H:%M:%SZ)
images: ## Build the three images: [REGISTRY=host/path] [VERSION=tag] [PYTHON_IMAGE=base] [TORCH_INDEX=url] [PUSH=1]
	docker buildx bake --file helm/images/docker-bake.hcl $(if $(PUSH),--push --provenance=mode=max --sbom=true,--load)

clean: ## Remove caches and build outputs; .venv and the workspace .freshrank stay
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis local_outputs
	find -L freshrank tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The tests talk to a real Redis, which no Python package carries.
REDIS = command -v redis-server >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	&& apt-get update -qq && apt-get install -qq --yes --no-install-recommends redis-server >/dev/null; } \
	|| echo "setup: redis-server is missing, and the tests of Redis need it; on Debian: apt-get install redis-server"

# Only tests and benches need it: Spark with the Java it runs on, FuxiCTR.
JAVA = command -v java >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	&& apt-get update -qq && apt-get install -qq --yes --no-install-recommends openjdk-17-jre-headless >/dev/null; } \
	|| echo "test: java is missing, and the test of Spark needs it; on Debian: apt-get install openjdk-17-jre-headless"

$(HEAVY): $(STAMP) requirements/heavy.lock
	$(UV) pip install --quiet --python $(PYTHON) --no-deps --compile-bytecode -r requirements/heavy.lock
	@$(JAVA)
	touch $@

# Bytecode is compiled here because every import would do it again where PYTHONDONTWRITEBYTECODE is set.
$(STAMP): pyproject.toml requirements/test.lock requirements/bootstrap.lock requirements/triton.lock
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "setup: $(PYTHON3) is older than 3.11; name another: make setup PYTHON3=python3.11"; exit 1; }
	@$(PYTHON3) -c 'import ensurepip' 2>/dev/null || \
		{ echo "setup: $(PYTHON3) cannot create environments; on Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON3) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet -r requirements/bootstrap.lock
	$(PYTHON) -m pip install --quiet --constraint requirements/test.lock "$$(grep '^torch==' requirements/test.lock)"
	$(UV) pip install --quiet --python $(PYTHON) --no-deps --compile-bytecode -r requirements/test.lock
	$(PYTHON) -m pip install --quiet --no-deps -r requirements/triton.lock
	$(UV) pip install --quiet --python $(PYTHON) --no-deps --editable .
	$(PYTHON) -m compileall -q freshrank
	$(PYTHON) -m pip check | grep -v -e '^nvidia-pytriton ' -e '^No broken requirements' && exit 1 || true
	$(PYTHON) tests/helm_binary.py --dest $(VENV)/bin
	@$(REDIS)
	touch $@
