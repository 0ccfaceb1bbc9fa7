# Everything happens in .venv, which make fills once and again whenever pyproject.toml changes.
# All paths are relative, so that the repository may lie in a folder with spaces in its name.
#
#   make lab          open the workbook
#   make test         every check there is
#   make notebooks    run all notebooks and store their outputs in normal form
#   make links        write the repository's public address into the documents
#   make bench        measure the explorers
#   make clean        remove what the above has made
#
# PYTHON=/path/to/python3 chooses another Python; remove .venv first if it was made with an older one.

PYTHON ?=
PYTHONS := $(or $(PYTHON),python3.14 python3.13 python3.12 python3.11 python3)
BIN := .venv/bin
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
DOCUMENTS := README.md $(wildcard docs/*.md)

# What a user has configured for IPython or matplotlib must not change stored outputs; nor may the message that
# matplotlib prints while it first lists the fonts.
test unit nbval notebooks .venv/test.stamp: export IPYTHONDIR := $(CURDIR)/.venv/ipython
test unit nbval notebooks .venv/test.stamp: export MPLCONFIGDIR := $(CURDIR)/.venv/matplotlib

.PHONY: lab test lint unit nbval browser notebooks links bench clean

lab: .venv/lab.stamp
	$(BIN)/kvmlab lab

# Two stages at a time: the browser and the notebooks' kernels wait for each other often.  Each stage shows what it has
# printed when it ends; a make that cannot do that lets their lines mix.
TOGETHER := -j2 $(and $(filter output-sync,$(.FEATURES)),--output-sync=target)

test: .venv/test.stamp
	$(MAKE) --no-print-directory $(TOGETHER) unit lint nbval browser

lint: .venv/test.stamp
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

# A process a CPU.  A file stays in one of them, since its tests share what they have computed.
unit: .venv/test.stamp
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --ignore tests/test_browser.py

# Strict: every stored output is compared. In one process, because nbval's cells share a kernel.
nbval: .venv/test.stamp
	$(if $(NOTEBOOKS),$(BIN)/python -m pytest --nbval --nbval-current-env notebooks,@echo "no notebooks yet")

browser: .venv/test.stamp
	$(BIN)/python -m pytest tests/test_browser.py

notebooks: .venv/test.stamp
	$(BIN)/python tests/workbook/notebooks.py run

links: .venv/lab.stamp
	$(BIN)/python tests/workbook/links.py $(DOCUMENTS)

bench: .venv/test.stamp
	@for script in tests/bench/*.py; do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

clean:
	rm -rf .venv build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# What is installed is compiled when it is first imported: most of it never is.

# JupyterLab asks on first start whether it may fetch news; the question covers part of the workbook.
NO_NEWS := jupyter-labextension disable "@jupyterlab/apputils-extension:announcements"

.venv/lab.stamp: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable ".[lab]"
	@$(BIN)/$(NO_NEWS) 2>/dev/null
	@touch $@

.venv/test.stamp: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable ".[lab,test]"
	@$(BIN)/$(NO_NEWS) 2>/dev/null
	@$(BIN)/python -c "import matplotlib.font_manager"
	@touch .venv/lab.stamp $@

# The first Python that is new enough and can make an environment; a name that exists may still not run.
.venv/bin/python:
	@for python in $(PYTHONS); do \
	    "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	    echo "making .venv with $$("$$python" --version)"; \
	    exec "$$python" -m venv --clear .venv; \
	done; \
	echo "kvmlab needs Python 3.11 or later with its venv module, and found none." >&2; \
	echo "Tried: $(PYTHONS)" >&2; \
	echo "Install one (Debian, Ubuntu: apt install python3 python3-venv) or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; \
	exit 2
