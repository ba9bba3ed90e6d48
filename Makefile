# Everything a newcomer needs: `make demo` and `make test`.  Both build their own environments.
PYTHON ?= python3
# A Python that jax 0.11 runs on, 3.12 or later: from the path, or one that pyenv keeps off it.
NEWER := python3.12 python3.13 python3 $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3)
PYTHON312 ?= $(firstword $(foreach python,$(NEWER),$(shell \
	$(python) -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $(python))))
BIN := .venv/bin
BIN312 := .venv312/bin
# Two workers: the suite compiles many small programs, each on one core.
PYTEST := -m pytest -q -n 2 --dist worksteal

FUZZ_SECONDS ?= 60

.PHONY: environments fuzz demo test test311 test312 test-interpret test-gpu lint format clean

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test,notebooks]'
	touch $@

.venv312/.installed: pyproject.toml
	$(PYTHON312) -m venv .venv312
	$(BIN312)/python -m pip install --quiet --no-compile --editable '.[test,notebooks]' 'jax>=0.11'
	touch $@

# Two of the three are used by tests alone, which compile the modules that they import.
environments: .venv/.installed .venvpeers/.installed $(if $(PYTHON312),.venv312/.installed)

# The packages that exported checkpoints are read back with; torch keeps out of the other two.
PEERS := tests/peers/requirements.txt tests/peers/requirements-nodeps.txt
.venvpeers/.installed: $(PEERS)
	$(PYTHON) -m venv .venvpeers
	.venvpeers/bin/python -m pip install --quiet --no-compile -r $(word 1,$(PEERS))
	.venvpeers/bin/python -m pip install --quiet --no-compile --no-deps -r $(word 2,$(PEERS))
	touch $@

demo: .venv/.installed
	$(BIN)/python -m jaxquant demo --out demo_output

test: test311 test-interpret

test311: .venv/.installed .venvpeers/.installed
	$(BIN)/python $(PYTEST) -m 'not gpu and not interpret'

# The GPU interpreter and its race detector need jax 0.11, which needs Python 3.12.  CI must have it.
# It blocks a thread per warpgroup: NPROC gives it more threads than this machine may have cores.
test-interpret:
ifeq ($(PYTHON312),)
	@echo "no Python 3.12 found: the GPU interpreter tests (jax >= 0.11) are not run"
	@test -z "$$CI"
else
	$(MAKE) .venv312/.installed
	NPROC=16 $(BIN312)/python $(PYTEST) -m 'interpret and not gpu'
endif

test312: .venv312/.installed .venvpeers/.installed
	XLA_FLAGS=--xla_force_host_platform_device_count=4 NPROC=16 $(BIN312)/python $(PYTEST) -m 'not gpu'

# Worker processes that compile while one of them uses the GPU; needs jax[cuda13] and a Hopper GPU.
test-gpu:
	$(PYTHON) -m pytest -q -m gpu -n 16 --dist worksteal tests/pallas_kernels tests/ops

# Every reader of untrusted files, FUZZ_SECONDS each.
fuzz: .venv/.installed
	$(BIN)/python -m tests.hostile.fuzz $(FUZZ_SECONDS)

lint: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: .venv/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv312 .venvpeers demo_output fuzz_output
