# `make demo` plays the shipped policy, `make test` runs the tests. Both make their own virtual environment first, with
# the exact releases of requirements/locked.txt.
PYTHON ?= python3
VENV ?= .venv
# The demo needs less than the tests do.
ALL := examples,metaworld,app,deployment,serve,dev
FOR_EXAMPLES := $(VENV)/for-examples
FOR_METAWORLD := $(VENV)/for-metaworld
INSTALLED := $(VENV)/installed

# The releases that the other environments have. `make lock` writes the files; TORCH chooses the locked PyTorch.
TORCH ?= torch==2.13.0
LOCKED := requirements/locked.txt
OLDEST := requirements/oldest.txt
COMPILE := .venv-lock/bin/uv pip compile --quiet --upgrade --universal --python-version 3.10 --all-extras --no-header \
	--no-annotate

# Each process takes up to 2 GB. One that has run its tests takes over some of another's. Serial: PARALLEL=
PARALLEL ?= --numprocesses auto --maxprocesses 4 --dist worksteal

# What `make test`, `make test-oldest` and `make test-newest` run: all tests, or for example TESTS="tests/test_loop.py".
TESTS ?=
CORE := $(addprefix tests/test_,auto_classes.py checkpoint.py configuration.py generation.py modeling.py \
	normalization.py processing.py requirements.py runtime.py tokenization.py training.py)
# The tests that draw Meta-World, and are skipped where OSMesa is missing.
METAWORLD_TESTS := tests/test_metaworld.py tests/test_publish.py
# DISCARD=1 removes an environment after its tests: some take 8 GB.
DISCARD ?=

# The plugin is tested with this release of LeRobot, which needs Python 3.12 or newer and PyTorch up to 2.11.
PYTHON_LEROBOT ?= python3.12
TORCH_LEROBOT ?= torch==2.10.0
LEROBOT_VERSION ?= 0.6.1

# SO-101's simulator needs Python 3.12 or newer, and huggingface_hub before 2: the locked one is newer.
PYTHON_SO101 ?= python3.12
SO101_NEXUS ?= so101-nexus==0.10.0 mujoco==3.17.0

.PHONY: demo demo-metaworld demo-so101 test test-all test-oldest test-newest test-lerobot test-so101 core \
	metaworld-tests lock fuzz lint bench clean

demo: $(FOR_EXAMPLES)
	$(VENV)/bin/python examples/evaluate.py --checkpoint checkpoints/pusht-tiny --episodes 10 --seed 1000 --output_dir outputs/demo

# Needs Debian's libosmesa6 where there is no screen.
demo-metaworld: $(FOR_METAWORLD)
	$(VENV)/bin/python examples/evaluate.py --benchmark metaworld --checkpoint checkpoints/metaworld-tiny --tasks \
		door-open drawer-close window-open faucet-close handle-press button-press reach coffee-button \
		--episodes 1 --record 1 --output_dir outputs/demo-metaworld

# Needs OSMesa too, and Python 3.12: PYTHON_SO101 is the interpreter.
demo-so101: .venv-so101/installed
	.venv-so101/bin/python examples/evaluate.py --benchmark so101 --checkpoint checkpoints/so101-tiny \
		--episodes 6 --record 6 --output_dir outputs/demo-so101

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest $(PARALLEL) $(TESTS)

test-all: $(INSTALLED)
	$(VENV)/bin/python -m pytest -m "slow or not slow"

# Other cases each time; hours with FUZZ_CASES=10000.
fuzz: $(INSTALLED)
	FUZZ_CASES=$(or $(FUZZ_CASES),1000) $(VENV)/bin/python -m pytest tests/test_fuzz.py

# The lowest release of everything that pyproject.toml allows.
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest $(PARALLEL) $(TESTS)
	$(if $(DISCARD),rm -rf .venv-oldest)

# The newest release of everything, whatever pyproject.toml allows; of Transformers a pre-release too. Python 3.11 or newer.
test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install "packaging>=24.2" "setuptools>=77.0.1"
	.venv-newest/bin/python requirements/unbounded.py > .venv-newest/newest.txt
	.venv-newest/bin/pip install --upgrade --upgrade-strategy eager -r .venv-newest/newest.txt
	.venv-newest/bin/pip install --no-deps --no-build-isolation --editable .
	.venv-newest/bin/python requirements/newer.py || true
	.venv-newest/bin/python -m pytest $(PARALLEL) $(TESTS)
	$(if $(DISCARD),rm -rf .venv-newest)

test-lerobot: .venv-lerobot/installed
	.venv-lerobot/bin/python -m pytest --config-file lerobot_policy_smolandfast/pyproject.toml lerobot_policy_smolandfast
	$(if $(DISCARD),rm -rf .venv-lerobot)

test-so101: .venv-so101/installed
	.venv-so101/bin/python -m pytest tests/test_so101.py
	$(if $(DISCARD),rm -rf .venv-so101)

# These name tests, for TESTS.
core:
	@echo $(CORE)

metaworld-tests:
	@echo $(METAWORLD_TESTS)

# Writes requirements/ again: the newest releases that pyproject.toml allows, and its floors.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install uv==0.13.9
	echo "$(TORCH)" > .venv-lock/torch.in
	$(COMPILE) pyproject.toml .venv-lock/torch.in --output-file $(LOCKED)
	$(COMPILE) pyproject.toml --resolution lowest-direct --output-file $(OLDEST)

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(INSTALLED)
	$(VENV)/bin/python benchmarks/speed/bench.py
	$(VENV)/bin/python benchmarks/speed/bench_256m.py
	$(VENV)/bin/python benchmarks/speed/bench_training_256m.py

# The files are constraints: what CUDA needs is pinned too, and comes only with a PyTorch that asks for it.
comma := ,
define install
	$(PYTHON) -m venv $(dir $@)
	$(dir $@)bin/pip install --constraint $(1) setuptools
	$(dir $@)bin/pip install --constraint $(1) --no-build-isolation --editable ".[$(2)]"
	touch $@
endef

$(FOR_EXAMPLES): pyproject.toml $(LOCKED)
	$(call install,$(LOCKED),examples)

$(FOR_METAWORLD): pyproject.toml $(LOCKED)
	$(call install,$(LOCKED),examples$(comma)metaworld)

$(INSTALLED): pyproject.toml $(LOCKED)
	$(call install,$(LOCKED),$(ALL))

.venv-oldest/installed: pyproject.toml $(OLDEST)
	$(call install,$(OLDEST),$(ALL))

# The user's way to install, then links in the place of copies, so that a changed file is tested as it is.
.venv-lerobot/installed: pyproject.toml lerobot_policy_smolandfast/pyproject.toml
	$(PYTHON_LEROBOT) -m venv .venv-lerobot
	.venv-lerobot/bin/pip install "$(TORCH_LEROBOT)" "lerobot[training,evaluation,pusht,feetech,grpcio-dep]==$(LEROBOT_VERSION)"
	.venv-lerobot/bin/pip install ".[deployment]" ./lerobot_policy_smolandfast pytest
	.venv-lerobot/bin/pip install --no-deps --editable . --editable ./lerobot_policy_smolandfast
	touch $@

.venv-so101/installed: pyproject.toml
	$(PYTHON_SO101) -m venv .venv-so101
	.venv-so101/bin/pip install "$(TORCH_LEROBOT)" $(SO101_NEXUS) pytest --editable ".[examples]"
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-lock .venv-lerobot .venv-so101 outputs
