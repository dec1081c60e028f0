# What a reader runs. Every target builds .venv first if it is not there.
#
#   PYTHON=python3.12     the interpreter that .venv is made from (3.11 to 3.13)
#   TORCH_INDEX=URL       where else pip looks for torch: give a CPU index on Linux without a GPU
#   VENV=no               build nothing, use PYTHON and the packages that it has
#   ARGS="..."            passed on, for example: make tour ARGS="--part attention"

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=

INSTALL = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

ifeq ($(VENV),no)
RUN := $(PYTHON)
READY :=
BROWSER :=
else
RUN := $(VENV)/bin/python
READY := $(VENV)/ready
BROWSER := $(VENV)/browser-ready
endif

# The oldest Triton that the kernels are compiled with, beside the one that constraints.txt names.
OLD_TRITON := 3.6.0
OLD := build/triton-$(OLD_TRITON)

.PHONY: help tour test lint lab check check-old bench notebooks mutants verify

help:
	@echo "make tour       run every chapter's claim on the base model and write report/index.html"
	@echo "make test       lint, types and tests"
	@echo "make lab        JupyterLab on the notebooks"
	@echo "make check      compile every kernel for three GPUs, no GPU needed, and inspect the machine code"
	@echo "make check-old  the same with the oldest Triton that is supported"
	@echo "make bench      time every kernel beside its peer (needs a GPU)"
	@echo "make notebooks  execute the notebooks and write them"
	@echo "make mutants    change the exercises' solutions a little at a time: do their tests notice?"
	@echo "make verify     everything, at length: an hour or more"

tour: $(READY)
	$(RUN) -m chapters tour $(ARGS)

test: lint
	$(RUN) -m pytest $(ARGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath "$$($(RUN) -c 'import sys; print(sys.executable)')"

lab: $(READY)
	PYTHONPATH="$(CURDIR)" $(RUN) -m jupyterlab notebooks $(ARGS)

check: $(READY)
	$(RUN) -m kernels check $(ARGS)

check-old: $(OLD)/ready
	PYTHONPATH="$(CURDIR)/$(OLD)" $(RUN) -m kernels check $(ARGS)

bench: $(READY)
	$(RUN) -m kernels bench $(ARGS)

notebooks: $(READY)
	$(RUN) notebooks/build.py $(ARGS)

mutants: $(READY)
	$(RUN) -m chapters mutants $(ARGS)

verify: lint $(BROWSER)
	$(RUN) -m pytest -m "" --profile thorough
	$(RUN) notebooks/build.py --no-write
	$(RUN) -m kernels check
	$(MAKE) check-old
	$(RUN) -m chapters tour --full
	$(RUN) -m chapters mistakes

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v <= (3, 13) and \
	"minitfm needs Python 3.11 to 3.13, and $(PYTHON) is %d.%d: name another, as in make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e ".[dev,notebooks]"
	@touch $@

$(VENV)/browser-ready: $(VENV)/ready
	$(INSTALL) -e ".[browser]"
	@touch $@

$(OLD)/ready: $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --target $(OLD) triton==$(OLD_TRITON)
	@touch $@
