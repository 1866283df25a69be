# A fresh clone needs Python 3.11 or newer (with venv and pip) and make; everything else goes into .venv.

PYTHON ?= python3
DEMO ?= demo-output

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DELETE_ON_ERROR:
.PHONY: help demo check test-fast test test-long bench kernels zoo docs lint clean

help:
	@echo "make demo    convert ResNet-50 into $(DEMO)/, show what it saves, load it back and compare"
	@echo "make check   ruff, format and mypy"
	@echo "make test-fast  check, and the tests that are not slow: under 2 minutes, for every edit"
	@echo "make test    check, and all tests: what CI runs"
	@echo "make test-long  what make test leaves out: more CUDA kernels and compiled models (minutes, no GPU)"
	@echo "make bench   time the operator beside its peers (minutes, on a quiet machine)"
	@echo "make kernels compile every CUDA kernel for four architectures and show its registers (no GPU, minutes)"
	@echo "make zoo     plan and convert every architecture of timm and torchvision (no download, an hour or more)"
	@echo "make docs    the documentation site, in site/; fails at a broken link"
	@echo "make clean   remove $(VENV), $(DEMO) and caches"

demo: $(INSTALLED)
	@echo "== ddf-convert convert resnet50 -o $(DEMO)"
	@$(BIN)/ddf-convert convert resnet50 -o $(DEMO) --seed 0 --overwrite --html $(DEMO)/report.html
	@echo
	@echo "== a new process loads $(DEMO) and compares"
	@$(BIN)/python scripts/demo_check.py $(DEMO)

test-fast: check
	@echo "== pytest, the fast tests"
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not long"

test: check
	@echo "== pytest"
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal

test-long: $(INSTALLED)
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal -m long

bench: $(INSTALLED)
	@$(BIN)/ddf-convert bench op

kernels: $(INSTALLED)
	@$(BIN)/python benchmarks/kernels.py

zoo: $(INSTALLED)
	@$(BIN)/python benchmarks/zoo.py --real

# Not --quiet, which hides warnings from --strict too. The theme would announce its successor at every build; mkdocs.yml
# says why it is kept.
docs: $(INSTALLED)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir site
	@echo "site/index.html is the first page; the search needs a server: $(BIN)/python -m http.server --directory site"

lint: check

check: $(INSTALLED)
	@echo "== ruff and mypy"
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet || { echo "run: $(BIN)/ruff format"; exit 1; }
	@$(BIN)/mypy --no-error-summary

# Made again when the versions change, and only then.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed, and $(PYTHON) is older: make PYTHON=python3.12"; exit 1; }
	@echo "== installing into $(VENV) (the first time takes minutes: torch is large)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(DEMO) site .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
