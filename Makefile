# `make demo` and `make test` work on a fresh machine: they make .venv first, and re-running is instant.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TOKENS ?= 65536
# The package as it is imported, for mypy: three of its folders stand beside it.
TYPED := build/typed

.PHONY: demo test chat lint clean
demo: $(READY)
	$(BIN)/retrieval-attn demo --tokens $(TOKENS)

test: $(READY)
	$(BIN)/pytest

chat: $(READY)
	$(BIN)/retrieval-attn chat $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TYPED) && mkdir -p $(TYPED)/retrieval_attn
	ln -s $(foreach f,$(wildcard retrieval_attn/*) index kernels bench,$(CURDIR)/$(f)) $(TYPED)/retrieval_attn
	MYPYPATH=$(TYPED) $(BIN)/mypy --package retrieval_attn

$(READY): setup.cfg pyproject.toml constraints.txt
	@echo "setting up $(VENV) (once; downloads PyTorch and the rest)"
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"retrieval-attn needs Python 3.11 to 3.13, but PYTHON={sys.executable} is {v[0]}.{v[1]}")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
