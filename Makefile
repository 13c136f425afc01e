# make demo                 set up, then the whole job on synthetic speech (make demo CORPUS=emodb: on real speech)
# make test                 set up, then lint, types and tests
# make clean                remove the virtual environment and the demo's files

PYTHON ?= python3
# The version that is tested.
TORCH ?= torch==2.13.0
CORPUS ?= synthetic

# The two halves of the tests take as long as each other and run side by side, half an hour's work in a quarter.
DESK_TESTS ?= tests/sertool tests/models tests/deploy training/sertool
DEVICE_TESTS ?= tests/edge_runtime tests/end_to_end tests/tools edge_runtime/edge_runtime

BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: setup demo test clean

setup: $(INSTALLED)

# torch goes first and alone, so that nothing that depends on it can choose another build. The CPU build (+cpu) is taken
# wherever pip is told of one (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS: PyTorch's site names its index of CPU wheels); the
# general index has none for x86-64, and its build brings several GB of CUDA libraries.
$(INSTALLED): pyproject.toml edge_runtime/pyproject.toml models/emodb/pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; name one with: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || \
		{ echo "python3-venv is missing; on Debian run: apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/pip install --quiet "$(TORCH)+cpu" 2>/dev/null || \
		{ echo "no CPU build of $(TORCH) where pip looks; taking the general one"; \
		$(BIN)/pip install --quiet "$(TORCH)"; }
	$(BIN)/pip install --quiet -e "edge_runtime[onnx,mic]" -e ".[dev]" -e models/emodb
	# For its model file alone; what else it depends on is of no use here.
	$(BIN)/pip install --quiet --no-deps "silero-vad>=6,<7"
	@touch $@

demo: setup
	@$(BIN)/python tools/demo.py --corpus $(CORPUS)

test: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@$(BIN)/python -m pytest -o cache_dir=.pytest_cache/desk $(DESK_TESTS) > .venv/desk.log 2>&1 & desk=$$!; \
	$(BIN)/python -m pytest -o cache_dir=.pytest_cache/device $(DEVICE_TESTS); device=$$?; \
	wait $$desk; desk=$$?; cat .venv/desk.log; exit $$((desk | device))

clean:
	rm -rf .venv demo
