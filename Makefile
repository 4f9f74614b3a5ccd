# make bench   set up and run the benchmark harness against the reference PyTorch Transformer
# make test    set up and run the tests
# make test-isa   the tests of CPU kernels under each instruction set of this machine, half an hour
# Both work on a fresh machine with Python >= 3.10 and a C++ compiler.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
REPORTS ?= reports
PYTEST_ARGS ?=
BENCH_ARGS ?=
ISA_ARGS ?=

SOURCES := $(shell find csrc -type f) setup.py pyproject.toml tools/cuda_build.py tools/cpp_build.py
INSTALLED := $(VENV)/.requirements
BUILT := $(VENV)/.built
# What measuring on a CPU needs: neither the CUDA C++ kernels nor the emulator, minutes to build.
CPU_BUILT := $(VENV)/.built-cpu
BENCH_SETUP := $(if $(wildcard $(BUILT)),$(BUILT),$(CPU_BUILT))

.PHONY: setup test test-full test-isa test-versions bench bench-full sanitize lint format clean

setup: $(BUILT)

$(INSTALLED): requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

$(BUILT): $(INSTALLED) $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	touch $@

$(CPU_BUILT): $(INSTALLED) $(SOURCES)
	LLMKERN_CUDA=off LLMKERN_EMULATOR=off $(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	touch $@

test: setup
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-full: setup
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Under each instruction set of this machine, ours and torch's; ISA_ARGS="--only avx2" for some.
test-isa: setup
	$(BIN)/python tools/isa_matrix.py --logs $(REPORTS)/isa $(ISA_ARGS) $(PYTEST_ARGS)

# The tests on every torch of llmkern/supported.py; VERSIONS_ARGS="--only 2.9.1 -- -k norm".
test-versions: setup
	$(BIN)/python tools/versions.py $(VERSIONS_ARGS)

bench: $(BENCH_SETUP)
	$(BIN)/python -m llmkern bench --json $(REPORTS)/bench.json --html $(REPORTS)/bench.html $(BENCH_ARGS)

bench-full: $(BENCH_SETUP)
	$(BIN)/python -m llmkern bench --full --json $(REPORTS)/bench-full.json \
		--html $(REPORTS)/bench-full.html $(BENCH_ARGS)

# AddressSanitizer and UndefinedBehaviorSanitizer over the kernel tests, in a build of its own.
sanitize: setup
	$(BIN)/python tools/sanitize.py $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@if command -v clang-format >/dev/null; then \
		git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs clang-format --dry-run -Werror; \
	else echo "clang-format is not here: C++ formatting was not checked"; fi

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs clang-format -i

clean:
	rm -rf build dist $(VENV) .venv-versions $(REPORTS) *.egg-info llmkern/*.so
