# The first use of any target makes the environment; later uses install nothing, until
# requirements.txt or the packaging files change.
#
#   make demo     the main experiment: coupled sparse networks on few labels
#   make test     lint, format, types and tests
#   make slow     the tests that take minutes
#   make lowest   tests of the core on the lowest versions that setup.cfg allows
#   make chaos    runs that are killed, stopped and damaged, some 20 minutes
#   make bench    what sparsity costs: refreshes, steps, memory, compiling
#   make resnets  few labels of CIFAR-10, on a GPU; DATA=directory of prepared TFDS sets
#   make clean    remove the environment and caches; runs are kept

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: env demo test slow lowest chaos bench resnets clean

env: $(INSTALLED)

$(INSTALLED): requirements.txt setup.cfg pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: $(PYTHON) was not found; install Python 3.11 or newer," \
	    "or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: d2sparse needs Python 3.11 or newer, $(PYTHON) is" \
	    "$$($(PYTHON) -V 2>&1); name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) lacks the module venv (or ensurepip); on Debian and" \
	    "Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Installing the environment into .venv (once, a minute or two)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --requirement requirements.txt
	@touch $@

demo: env
	@$(BIN)/python -m experiments.d2_sparse

test: env
	@$(BIN)/python -m ruff check --quiet
	@$(BIN)/python -m ruff format --check --quiet || { \
	  echo "error: unformatted files; run: $(BIN)/ruff format" >&2; exit 1; }
	@$(BIN)/python -m mypy --no-error-summary
	@$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --durations=10

slow: env
	@$(BIN)/python -m pytest -m slow

# Floors 0 to 3 without models and data, in an environment of their own.
LOWEST := jax==0.5.3 jaxlib==0.5.3 optax==0.2.5 numpy==1.26.4 pytest
CORE := tree checks masks distributions scores schedules rules reparam packing transforms

lowest:
	@$(PYTHON) -m venv .venv-lowest
	@.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check $(LOWEST)
	@.venv-lowest/bin/python -m pytest -p no:cacheprovider \
	  $(foreach room,$(CORE),$(wildcard d2sparse/$(room) d2sparse/$(room).py)) \
	  $(foreach room,tree masks patterns schedules scores scores_flow rules freezing,\
	    tests/test_$(room).py)

chaos: env
	@$(BIN)/python tests/chaos --kills=60 --out=docs/chaos.md

bench: env
	@$(BIN)/python -m experiments.benchmark

RESNETS := --dataset=cifar10 --data_dir=$(DATA) --shift=4 --flip --batch_size=100 \
  --steps=1500 --samples_per_class=50,500 --seeds=3 --rounds=3 \
  --methods=dense,rigl,imp,uncoupled_annealed,uncoupled_averaged,d2_sparse

resnets: env
	@$(BIN)/python -m experiments.low_data --workdir=runs/resnet18 --model=resnet18 $(RESNETS)
	@$(BIN)/python -m experiments.low_data --workdir=runs/resnet34 --model=resnet34 $(RESNETS)

clean:
	@rm -rf .venv .venv-lowest .mypy_cache .pytest_cache .ruff_cache build *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
