# `make demo` plays the shipped policy, `make test` runs the tests. Both make their own virtual environment first.
PYTHON ?= python3
# Any PyTorch from 2.5 on will do, for example TORCH="torch" for the newest.
TORCH ?= torch==2.13.0
VENV ?= .venv
INSTALLED := $(VENV)/installed

.PHONY: demo test test-all fuzz lint bench clean

demo: $(INSTALLED)
	$(VENV)/bin/python examples/eval_pusht.py --checkpoint checkpoints/pusht-tiny --episodes 10 --seed 1000 --output_dir outputs/demo

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest

test-all: $(INSTALLED)
	$(VENV)/bin/python -m pytest -m "slow or not slow"

# Other cases each time; hours with FUZZ_CASES=10000.
fuzz: $(INSTALLED)
	FUZZ_CASES=$(or $(FUZZ_CASES),1000) $(VENV)/bin/python -m pytest tests/test_fuzz.py

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(INSTALLED)
	$(VENV)/bin/python benchmarks/bench.py

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install "$(TORCH)"
	$(VENV)/bin/pip install --editable ".[examples,app,dev]"
	touch $@

clean:
	rm -rf $(VENV) outputs
