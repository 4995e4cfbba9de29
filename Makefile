# make install | test | lint | demo | clean
# Other Python: make PYTHON=python3.12.  Other folder: make VENV=/path.
# Newest instead of the tested versions: make CONSTRAINTS=

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2

# One process a core trains half as fast again as one process with as many threads. glibc gives large
# tensors back to the system at once and asks for them again; keeping them saves a tenth of the time.
FEW_PAGE_FAULTS := MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
export PIP_CONSTRAINT := $(CONSTRAINTS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install test lint demo clean
.DELETE_ON_ERROR:

install: $(VENV)/.stamp-package

test: install
	@echo "== tests"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)

lint: install
	@echo "== lint"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

demo: install
	@echo "== demo"
	@$(FEW_PAGE_FAULTS) OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --nproc-per-node $(WORKERS) \
		tools/demo.py --output output/demo

# Leaves the environment and your own runs under output/ alone.
clean:
	@echo "== clean"
	@rm -rf output/demo build dist *.egg-info .pytest_cache .ruff_cache
	@find fewshot_d2 tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is touched when its step has succeeded, so a second run has nothing to do.

$(VENV)/.stamp-venv:
	@echo "== virtual environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit("Python must be 3.10 or newer, got %d.%d" % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) must have the venv module (on Debian: apt install python3-venv)"; exit 1; }
	@$(PIP) install -q --upgrade pip setuptools wheel
	@touch $@

$(VENV)/.stamp-torch: $(VENV)/.stamp-venv $(CONSTRAINTS)
	@echo "== torch and torchvision (several GB)"
	@$(PIP) install -q torch torchvision
	@touch $@

$(VENV)/.stamp-detectron2: $(VENV)/.stamp-torch tools/install_detectron2.py
	@echo "== detectron2"
	@$(BIN)/python tools/install_detectron2.py
	@touch $@

$(VENV)/.stamp-package: $(VENV)/.stamp-detectron2 setup.py
	@echo "== fewshot_d2"
	@$(PIP) install -q --no-build-isolation -e ".[test]"
	@touch $@
