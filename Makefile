# The verbs of the book. Narrow them:  make book CHAPTERS="dr_grpo" PROFILE=smoke SEED=1
# VENV= names an environment that several checkouts share; its packages are installed once.
VENV     ?= .venv
CHAPTERS ?=
PROFILE  ?= cpu
SEED     ?= 0
SEEDS    ?= 0
EDITION  ?= executed
WORKFLOW ?= local
JOBS     ?=
CHAPTER  ?=
FROM     ?=

SHELL   := /bin/bash
HERE    := $(CURDIR)
PY      := $(VENV)/bin/python
RUN     := $(PY) -m readrun
SIZES   := --seed $(SEED) --seeds $(SEEDS)
WHICH   := --chapters "$(CHAPTERS)"
KEY     := $(shell cat pyproject.toml constraints.txt | cksum | tr ' ' '-')
STAMP   := $(VENV)/.readrun-$(KEY)
# the first interpreter that is new enough
PYTHON  ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

# this checkout's code, whichever checkout the environment was made by
export PYTHONPATH := $(HERE)/lib$(if $(PYTHONPATH),:$(PYTHONPATH))
unexport PROFILE SEED SEEDS CHAPTERS

.PHONY: help book test lab record merge sweep compare grade new pair mutants lint clean setup
.DEFAULT_GOAL := help

help:
	@echo "make book      execute what changed, build book/_build/html/index.html   (EDITION=recorded: execute nothing)"
	@echo "make test      all tests, and every notebook in the smoke profile"
	@echo "make lab       JupyterLab with paired notebooks"
	@echo "make record    run chapters in the gpu profile, write their records      (needs a CUDA GPU)"
	@echo "make sweep     SEEDS=5 PROFILE=cpu: seeds x chapters x profiles           (WORKFLOW=slurm: on a cluster)"
	@echo "make compare   CHAPTER=x: this machine's run beside the record"
	@echo "make grade     every chapter by its rubric, after running the tests that the rubrics name"
	@echo "make new       CHAPTER=x: a chapter from the template"
	@echo "make mutants   planted faults, and the tests that find them"
	@echo "make lint      ruff, mypy, notebook pairs;  make clean: remove what can be made again"
	@echo 'Narrow them: CHAPTERS="a b" PROFILE=smoke|cpu|gpu SEED=0 SEEDS=3; VENV=folder: a shared environment'

setup: $(STAMP)

$(STAMP):
	@if ! "$(PY)" -m pip --version >/dev/null 2>&1; then \
	  if [ -z "$(PYTHON)" ]; then echo "Read & Run needs Python 3.11 or newer; none was found. PYTHON=/path/to/python names one." >&2; exit 1; fi; \
	  "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11, which Read & Run needs." >&2; exit 1; }; \
	  "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no ensurepip, so it cannot make an environment. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
	  echo "Setting up $(VENV): once, a few minutes."; \
	  "$(PYTHON)" -m venv "$(VENV)"; \
	fi
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all]"
	@rm -f $(VENV)/.readrun-*
	@touch $@

book: $(STAMP)
	@$(RUN) --with-parent book $(WHICH) --profile $(PROFILE) $(SIZES) --edition $(EDITION) --workflow $(WORKFLOW) --jobs "$(JOBS)"

test: export OMP_NUM_THREADS := 1
test: export READRUN_PROFILE := smoke
test: export READRUN_HEADLESS := 1
test: $(STAMP)
	@$(RUN) nbval $(WHICH)
	@$(PY) -m pytest -n 2 --dist loadfile --nbval-lax --nbval-current-env tests build/nbval $(PYTEST)

lab: $(STAMP)
	$(RUN) pair
	$(PY) -m jupyter lab notebooks

record: $(STAMP)
	@set -e; for slug in $(or $(CHAPTERS),$$(cd notebooks && ls [!_]*.py | sed 's/\.py$$//')); do \
	  $(RUN) --with-parent record $$slug $(SIZES) --out build/$$slug/gpu/record; \
	  $(RUN) --with-parent merge $$slug build/$$slug/gpu/record $(SIZES); \
	done

merge: $(STAMP)
	@$(RUN) merge $(CHAPTER) $(FROM) $(SIZES)

sweep: $(STAMP)
	@$(RUN) --with-parent sweep $(WHICH) --profile "$(PROFILE)" $(SIZES) --workflow $(WORKFLOW) --jobs "$(JOBS)"

compare: $(STAMP)
	@$(RUN) compare $(CHAPTER)

grade: $(STAMP)
	@$(RUN) grade $(WHICH) --collect

new: $(STAMP)
	@$(RUN) new $(CHAPTER)

pair: $(STAMP)
	@$(RUN) pair

mutants: $(STAMP)
	@OMP_NUM_THREADS=1 $(PY) tests/mutants/run.py $(CHAPTERS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(RUN) pair --check
	$(RUN) check

clean:
	rm -rf build book/_build .snakemake .pytest_cache .mypy_cache .ruff_cache .hypothesis
