# make setup   a virtual environment in .venv, with bin/lesa-ray
# make demo    set-up, then the main job on a small model made here
# make test    set-up, then the tests, but for those that take longest
# make test-all  the same, and those that take longest
# make lint    set-up, then ruff and mypy
PYTHON ?= python3
EXTRAS ?= dev
comma := ,
READY := .venv/.ready-$(subst $(comma),-,$(EXTRAS))

.PHONY: setup demo test test-all lint clean
.DELETE_ON_ERROR:

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "lesa-ray needs Python 3.11 or newer; set PYTHON=")'
	@echo "setting up .venv (minutes the first time)"
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

demo: setup
	.venv/bin/python -m pipelines.demo --out demo

test: setup
	.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not thorough'

test-all: setup
	.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

clean:
	rm -rf .venv demo
