# Everything runs in .venv, which the first target that needs it makes. Another Python: make clean, then PYTHON=...

PYTHON ?= python3
PYTEST_ARGS ?=
JOBS ?= 2
BENCH_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt

# Node.js comes as a Python package, so that every machine builds the page with the same one.
NPM := PATH="$(abspath $(BIN)):$$PATH" npm
NODE_MODULES := web/node_modules/.package-lock.json

.PHONY: help compare test test-distributed test-instruction-sets sanitize fuzz bench bench-gpu evidence \
    evidence-again page docs format clean

help:
	@echo "make compare   install into $(VENV), compare Batch Norm and Layer Norm, write compare.html"
	@echo "make test      install into $(VENV), check format, lint and types, run examples and tests, JOBS=2 at a time"
	@echo "make sanitize  run the tests of the kernels with every access and operation checked; NORMWISE_CPU names others"
	@echo "make fuzz      try random norms, shapes, types, layouts and values for FUZZ_MINUTES=10"
	@echo "make test-distributed  try SyncBatchNorm on more processes and more random splits"
	@echo "make test-instruction-sets  run the tests of the kernels on the older instruction sets, all of them"
	@echo "make bench     time every norm beside its peers on an idle machine; shorter: BENCH_ARGS=--quick, others: --help"
	@echo "make bench-gpu  the same on a GPU, in 7 minutes, with the PYTHON of the machine"
	@echo "make evidence  run every experiment anew, an hour, and write docs/evidence.md; evidence-again: with other seeds"
	@echo "make page      check and build the page from web/ into src/normwise/explain/page.html"
	@echo "make docs      build the documentation into build/docs: static files, with the page to try"
	@echo "make format    format the code and repair what the linter can"
	@echo "make clean     remove $(VENV) and everything else that was made"

compare: $(VENV)/installed-lab
	$(BIN)/normwise compare --html compare.html
	$(BIN)/normwise compare digits

# One step of `make test`: $(call step,its name,its command,what to do if it fails)
step = echo "== $(1)"; $(2) || { echo "make test: $(1) failed; $(3)." >&2; exit 1; }

test: $(VENV)/installed-dev $(NODE_MODULES)
	@for tool in ruff mypy pytest clang-format; do \
	    $(BIN)/$$tool --version >/dev/null 2>&1 || \
	    { echo "make test: $$tool is missing in $(VENV); run 'make clean', then 'make test'." >&2; exit 1; }; \
	done
	@$(call step,ruff format --check,$(BIN)/python -m ruff format --check .,run 'make format')
	@$(call step,ruff check,$(BIN)/python -m ruff check .,run 'make format' and repair the rest by hand)
	@$(call step,clang-format,$(BIN)/clang-format --dry-run --Werror csrc/*,run 'make format')
	@$(call step,mypy,$(BIN)/python -m mypy,repair the types above)
	@$(call step,svelte-check,$(NPM) run --silent --prefix web check,repair the types above)
	@$(call step,mkdocs,$(BIN)/mkdocs build --quiet --strict,repair the links above)
	@for script in examples/*.py; do \
	    $(call step,$$script,$(BIN)/python $$script >$(VENV)/example.log 2>&1 || { cat $(VENV)/example.log; false; },its output is above); \
	done
	@$(call step,pytest,$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS),the failures are above)

# One library, with GCC's address and undefined behaviour sanitizers. They must be loaded before Python, and libstdc++ with
# them, else the first exception of C++ finds nobody to throw it. Python itself ends without freeing: no search for leaks.
SANITIZED := build/sanitize
sanitize: $(VENV)/installed-dev
	@$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DNORMWISE_SANITIZE=ON -DCMAKE_CXX_COMPILER=$(CXX) \
	    -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPython3_EXECUTABLE=$(abspath $(BIN)/python) >$(VENV)/sanitize.log
	@cpu=$${NORMWISE_CPU:-$$($(BIN)/python -c 'from normwise.kernels import usable; print(usable()[0])')} && \
	$(BIN)/cmake --build $(SANITIZED) --target normwise_$$cpu && \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	NORMWISE_MEMORY_MB=0 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	NORMWISE_CPU=$(SANITIZED)/libnormwise_$$cpu.so \
	$(BIN)/python -m pytest --capture=sys $(PYTEST_ARGS) tests/test_kernels.py tests/test_contract.py tests/test_fuzz.py

FUZZ_MINUTES ?= 10
# More processes than fit a short test, and more random splits
test-distributed: $(VENV)/installed-dev
	NORMWISE_PROCESSES="4 7" $(BIN)/python -m pytest $(PYTEST_ARGS) tests/test_sync_batch_norm.py tests/test_torchrun.py \
	    tests/test_faults.py tests/test_sharded.py tests/test_replicas.py

# `make test` runs a third of these on each
test-instruction-sets: $(VENV)/installed-dev
	@for cpu in $$($(BIN)/python -c 'from normwise.kernels import usable; print(*usable()[1:])'); do \
	    echo "== $$cpu"; NORMWISE_CPU=$$cpu $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS) \
	        tests/test_contract.py tests/test_kernels.py || exit 1; \
	done

fuzz: $(VENV)/installed-dev
	@$(BIN)/python tests/test_fuzz.py $(FUZZ_MINUTES)

bench: $(VENV)/installed-bench
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

# On a machine with a GPU and its own build of torch: PYTHON there is what it has, and nothing is installed.
bench-gpu:
	PYTHONPATH=src $(PYTHON) -m benchmarks.gpu $(BENCH_ARGS)

# $(call experiments,first seed,folder): JOBS at a time, each with one thread, the longest first. An interrupted run goes
# on; a finished one takes the place of what docs/evidence held. Lower seeds are for trying things out.
experiments = { echo language_model; $(BIN)/normwise lab list | cut -d ' ' -f 1 | grep -vx language_model; } | \
    OMP_NUM_THREADS=1 xargs -P $(JOBS) -I NAME \
    $(BIN)/normwise lab run NAME --seed-base $(1) --results $(2) >/dev/null

evidence: $(VENV)/installed-dev
	$(call experiments,2000,build/evidence)
	@mkdir -p docs/evidence && mv build/evidence/* docs/evidence
	$(BIN)/python docs/write_evidence.py

evidence-again: $(VENV)/installed-dev
	$(call experiments,3000,build/evidence-again)
	@mkdir -p docs/evidence/again && mv build/evidence-again/*.json docs/evidence/again && rm -r build/evidence-again
	$(BIN)/python docs/write_evidence.py

$(NODE_MODULES): web/package-lock.json | $(VENV)/installed-dev
	@cd web && $(NPM) ci --silent && touch node_modules/.package-lock.json

# Static files, which any host can serve and which work from disk; --strict fails on a link that leads nowhere.
docs: $(VENV)/installed-dev
	@$(BIN)/mkdocs build --quiet --strict
	@$(BIN)/normwise compare --html build/docs/try.html 2>/dev/null >&2

page: $(NODE_MODULES)
	@$(NPM) run --silent --prefix web check
	@$(NPM) run --silent --prefix web build -- --logLevel warn
	@cp build/page/index.html src/normwise/explain/page.html

format: $(VENV)/installed-dev
	$(BIN)/clang-format -i csrc/*
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis web/node_modules compare.html

SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)

$(VENV)/installed-lab: $(SOURCES) | $(VENV)/made
	@$(call install,lab)

$(VENV)/installed-dev: $(SOURCES) | $(VENV)/made
	@$(call install,lab$(comma)dev)

$(VENV)/installed-bench: $(SOURCES) | $(VENV)/made
	@$(call install,bench)

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
