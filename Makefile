# Everything runs in .venv, which the first target that needs it makes. Another Python: make clean, then PYTHON=...

PYTHON ?= python3
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt

.PHONY: help compare test format clean

help:
	@echo "make compare   install into $(VENV), compare Batch Norm and Layer Norm, write compare.html"
	@echo "make test      install into $(VENV), check format, lint and types, run examples and tests"
	@echo "make format    format the code and repair what the linter can"
	@echo "make clean     remove $(VENV) and everything else that was made"

compare: $(VENV)/installed-lab
	$(BIN)/normwise compare --html compare.html
	$(BIN)/normwise compare digits

# One step of `make test`: $(call step,its name,its command,what to do if it fails)
step = echo "== $(1)"; $(2) || { echo "make test: $(1) failed; $(3)." >&2; exit 1; }

test: $(VENV)/installed-dev
	@for tool in ruff mypy pytest; do \
	    $(BIN)/python -m $$tool --version >/dev/null 2>&1 || \
	    { echo "make test: $$tool is missing in $(VENV); run 'make clean', then 'make test'." >&2; exit 1; }; \
	done
	@$(call step,ruff format --check,$(BIN)/python -m ruff format --check .,run 'make format')
	@$(call step,ruff check,$(BIN)/python -m ruff check .,run 'make format' and repair the rest by hand)
	@$(call step,mypy,$(BIN)/python -m mypy,repair the types above)
	@for script in examples/*.py; do \
	    $(call step,$$script,$(BIN)/python $$script >$(VENV)/example.log 2>&1 || { cat $(VENV)/example.log; false; },its output is above); \
	done
	@$(call step,pytest,$(BIN)/python -m pytest $(PYTEST_ARGS),the failures are above)

format: $(VENV)/installed-dev
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis compare.html

SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)

$(VENV)/installed-lab: $(SOURCES) | $(VENV)/made
	@$(call install,lab)

$(VENV)/installed-dev: $(SOURCES) | $(VENV)/made
	@$(call install,lab$(comma)dev)

# torch comes first, and nothing is built in isolation, so that the kernels meet the torch that they will run with.
comma := ,
define install
	echo "Installing into $(VENV); the first time takes a few minutes." >&2
	@$(INSTALL) scikit-build-core cmake ninja torch
	@$(INSTALL) --no-build-isolation --editable '.[$(1)]'
	@touch $@
endef

$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	    { echo "make: normwise needs Python 3.10 or newer; $(PYTHON) is '$$($(PYTHON) --version 2>&1)'; name another, as in 'make PYTHON=python3.12'." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "make: $(PYTHON) must have the venv module; it has not; install it (Debian: apt install python3-venv)." >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@
