# Each target is a command that a person could type.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A pip requirement for Detectron2, for example
#   make env DETECTRON2='git+https://github.com/facebookresearch/detectron2.git'
# Empty: the build pinned in requirements-detectron2.txt.
DETECTRON2 ?=

.PHONY: env demo test test-full test-gpu mutants lint bench docs clean

env: $(VENV)/installed

$(VENV)/installed: requirements.txt requirements-detectron2.txt setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or later is needed, and $(PYTHON) is %d.%d: choose one with PYTHON=..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements.txt
ifeq ($(DETECTRON2),)
	# The pinned wheel is tagged for Python 3.10 because of a C++ part that is not used here.
	$(BIN)/pip install -q --upgrade --no-deps --only-binary=:all: --implementation cp \
	  --python-version 310 --abi none --platform any -r requirements-detectron2.txt \
	  --target "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
else
	$(BIN)/pip install -q --no-build-isolation '$(DETECTRON2)'
endif
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	@touch $@

demo: env
	$(BIN)/python -W ignore tools/digits.py

# A process for each core, and a thread for each process.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test: env
	$(PYTEST)

test-full: env
	$(PYTEST) -m 'not gpu'

test-gpu: env
	$(BIN)/python -m pytest -n 4 -m gpu

mutants: env
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: env
	$(BIN)/python tools/benchmark.py assignment

# The site, in site/. Broken links and anchors are errors.
docs: env
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean
	@echo "Open site/index.html; its search needs a server: $(BIN)/python -m http.server -d site"

# Not output/, where trainings lie.
clean:
	rm -rf $(VENV)
