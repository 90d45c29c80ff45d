# make demo [TASK=mlm|causal] [SIZE=full|smoke]   from raw text to a student that paid less
# make test                                       the default test suite, within five minutes on two cores
# make test-multinode                             jobs over pdsh and ssh on two hosts of namespaces; needs root
# make test-slurm                                 jobs on a Slurm of this machine's own; needs root, slurm-wlm and munge
# make test-faults                                the promises of docs/reliability.md with their figures
# make check                                      ruff, mypy, the order of the rooms and the tests: what CI runs
# make docs                                       the docs site, in site/
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TASK   ?= mlm
SIZE   ?= full

.PHONY: install demo test test-slow test-multinode test-slurm test-faults lint check docs clean

install: $(VENV)/.installed

# torch first: with any looser requirement pip would bring several GB of CUDA packages along.
$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e '.[demo,dev,docs,mpi]'
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install --quiet --no-deps -c constraints.txt triton
	touch $@

demo: install
	$(BIN)/python tools/demo.py --task $(TASK) --size $(SIZE)

test: install
	$(BIN)/python -m pytest

test-slow: install
	$(BIN)/python -m pytest -m slow

test-multinode: install
	$(BIN)/python -m pytest -n 0 -m 'multinode and not slow' tests/multinode

test-slurm: install
	$(BIN)/python -m pytest -n 0 -m slurm tests/slurm

test-faults: install
	$(BIN)/python tools/fault_matrix.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

docs: install
	$(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf $(VENV) build site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
