# `make demo` plays the shipped policy, `make test` runs the tests. Both make their own virtual environment first.
PYTHON ?= python3
# Any PyTorch from 2.5 on will do, for example TORCH="torch" for the newest.
TORCH ?= torch==2.13.0
VENV ?= .venv
INSTALLED := $(VENV)/installed

# The plugin is tested with these releases of LeRobot, which need Python 3.12 or newer and PyTorch up to 2.10.
# Each takes some 8 GB; DISCARD_LEROBOT=1 removes an environment after its tests, before the next is made.
PYTHON_LEROBOT ?= python3.12
DISCARD_LEROBOT ?=
TORCH_LEROBOT ?= torch==2.10.0
LEROBOT_VERSIONS ?= 0.5.1 0.6.1

.PHONY: demo test test-all test-lerobot fuzz lint bench bench-more clean
.PRECIOUS: .venv-lerobot-%/installed

demo: $(INSTALLED)
	$(VENV)/bin/python examples/eval_pusht.py --checkpoint checkpoints/pusht-tiny --episodes 10 --seed 1000 --output_dir outputs/demo

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest

test-all: $(INSTALLED)
	$(VENV)/bin/python -m pytest -m "slow or not slow"

# Other cases each time; hours with FUZZ_CASES=10000.
fuzz: $(INSTALLED)
	FUZZ_CASES=$(or $(FUZZ_CASES),1000) $(VENV)/bin/python -m pytest tests/test_fuzz.py

test-lerobot: $(LEROBOT_VERSIONS:%=test-lerobot-%)

test-lerobot-%: .venv-lerobot-%/installed
	.venv-lerobot-$*/bin/python -m pytest --config-file lerobot_policy_smolandfast/pyproject.toml lerobot_policy_smolandfast
	$(if $(DISCARD_LEROBOT),rm -rf .venv-lerobot-$*)

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(INSTALLED)
	$(VENV)/bin/python benchmarks/bench.py
	$(VENV)/bin/python benchmarks/bench_256m.py
	$(VENV)/bin/python benchmarks/bench_training_256m.py

# Half an hour: what takes minutes to compile, and more ways to train.
bench-more: $(INSTALLED)
	$(VENV)/bin/python benchmarks/bench_256m.py --compiled --rounds 9
	$(VENV)/bin/python benchmarks/bench_training_256m.py --more

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install "$(TORCH)"
	$(VENV)/bin/pip install --editable ".[examples,app,dev]"
	touch $@

# The user's way to install, then links in the place of copies, so that a changed file is tested as it is.
.venv-lerobot-%/installed: pyproject.toml lerobot_policy_smolandfast/pyproject.toml
	$(PYTHON_LEROBOT) -m venv .venv-lerobot-$*
	.venv-lerobot-$*/bin/pip install "$(TORCH_LEROBOT)" "lerobot[training,evaluation,pusht]==$*"
	.venv-lerobot-$*/bin/pip install ./lerobot_policy_smolandfast pytest
	.venv-lerobot-$*/bin/pip install --no-deps --editable . --editable ./lerobot_policy_smolandfast
	touch $@

clean:
	rm -rf $(VENV) .venv-lerobot-* outputs
