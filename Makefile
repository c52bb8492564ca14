# make check | test | compile | emulate | bench | bench-compare REF=… | gpu
# PYTHON chooses the interpreter; nothing here installs anything.
PYTHON ?= python
REF ?= HEAD~1

.PHONY: check lint test compile emulate bench bench-compare gpu

check: lint test            ## what must be green before a change is handed in

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test:
	$(PYTHON) -m pytest

compile:                    ## every CUDA kernel for every architecture; a table of its resources
	$(PYTHON) -m tests.compile_gate

emulate:                    ## the CUDA kernels on this CPU, against the oracle
	FASTRNN_REQUIRE_EMULATOR=1 $(PYTHON) -m pytest tests/test_emulator.py tests/test_cuda_*.py

bench:                      ## the benchmark suite and the peers found here
	$(PYTHON) -m benchmarks

bench-compare:              ## this tree against another commit
	$(PYTHON) -m benchmarks.compare $(REF)

gpu:                        ## three stages on this machine's GPU: right or wrong, figures, peers, sanitizers
	$(PYTHON) -m benchmarks.gpu
