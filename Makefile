# `make demo` and `make test` set up everything they need in .venv.
PYTHON ?= python3
SOURCES := $(shell find nnunet_pdddpm trainers -type f -not -name "*.pyc") setup.cfg setup.py pyproject.toml README.md

.PHONY: demo test lint docs
demo: .venv/installed
	.venv/bin/nnUNetv2_pdddpm_demo -o demo

test: .venv/installed
	.venv/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder

docs: .venv/installed
	.venv/bin/python docs/dev/commands.py
	.venv/bin/python docs/dev/hooks.py
	.venv/bin/python docs/dev/architecture.py
	.venv/bin/python docs/explanation/method.py

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/mypy

# a wheel install: it is the one in which nnU-Net finds the trainers with no environment variable
.venv/installed: $(SOURCES)
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	rm -rf build  # a module that is gone from the sources must not stay in the wheel
	.venv/bin/pip install -q ".[test]"
	touch $@
