# demo, test, test-unit, test-long, test-cpus, check, docs, bench: each makes and reuses .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO ?= demo
SIZE ?= 4096
RUN := $(BIN)/outsize
# Without compiled files every process of a test would compile the package, and pytest every test, again.
export PYTHONDONTWRITEBYTECODE :=
# Tests side by side, some of which wait; each process takes up to 2 GB.
JOBS ?= 3
# More options of pytest, and which tests.
PYTEST ?=
TESTS ?= tests
# Instruction sets that `make test-cpus` limits engines to; what this machine lacks changes nothing.
CPUS ?= AVX2 AVX512_CORE AVX512_CORE_BF16

.PHONY: setup demo test test-unit test-long test-cpus check format docs bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,docs]"
	@touch $@

demo: $(STAMP)
	$(RUN) sample $(DEMO) --size $(SIZE) --seed 42 --overwrite
	$(RUN) plan $(DEMO)/scene.zarr
	$(RUN) segment $(DEMO)/scene.zarr $(DEMO)/map.zarr --overwrite
	$(RUN) evaluate $(DEMO)/map.zarr $(DEMO)/labels.zarr
	$(RUN) export $(DEMO)/map.zarr $(DEMO)/map.tif --overwrite
	$(RUN) export $(DEMO)/map.zarr $(DEMO)/map.png --overwrite
	@echo "Look at $(DEMO)/map.png; open $(DEMO)/map.tif in QGIS."

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not long" $(PYTEST) $(TESTS)

test-unit: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m unit $(PYTEST) $(TESTS)

test-long: $(STAMP)
	$(BIN)/python -m pytest -m long $(PYTEST) $(TESTS)

# The same on the other kinds of CPU that this one can play: oneDNN, OpenVINO and torch each have a limit of their own.
test-cpus: $(STAMP)
	set -e; for isa in $(CPUS); do \
		case $$isa in AVX2) aten=avx2;; *) aten=avx512;; esac; echo "== $$isa"; \
		ONEDNN_MAX_CPU_ISA=$$isa OV_CPU_MAX_ISA=$$isa ATEN_CPU_CAPABILITY=$$aten \
		$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not long" $(PYTEST) $(TESTS); \
	done

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# The site: open site/index.html; it needs no server and asks no other host.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	mkdir -p bench
	$(BIN)/python -m outsize.tests.benchmarks.segment --json bench/8192.json
	$(BIN)/python -m outsize.tests.benchmarks.segment --size 2048 --peers --json bench/2048.json
	$(BIN)/python -m outsize.tests.benchmarks.figures bench/*.json --folder bench

clean:
	rm -rf $(VENV) build dist site *.egg-info $(DEMO)
