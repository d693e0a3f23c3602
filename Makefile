# make setup | demo | test | test-all | lint | bench | bench-train | gpu: all work on a fresh Linux machine with Python >= 3.10.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# quick tests start no process, no service and no whole training run; tests/conftest.py checks that
NOT_QUICK := whole or slow or slurm or interop
PYTEST := $(BIN)/python -m pytest tests
# in two processes with one torch thread each: two threads compete for two cores. Each takes one half of the tests, and
# then of what the other has left: whole files, the longest of them last, left a core idle for minutes
IN_PAIRS := OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist worksteal

.PHONY: setup demo test test-whole test-all lint bench bench-train gpu torture

setup: $(VENV)/.installed

$(VENV)/.installed: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python demo.py

# the quick tests, in minutes
test: setup
	$(IN_PAIRS) -m "not ($(NOT_QUICK))"

# all others; those of a Slurm cluster, which mostly wait for jobs, beside them
test-whole: setup
	log=$$(mktemp); $(PYTEST) -m "slurm or interop" >$$log 2>&1 & beside=$$!; \
	trap 'kill $$beside; exit 1' INT TERM; \
	$(IN_PAIRS) -m "(whole or slow) and not (slurm or interop)"; pairs=$$?; \
	wait $$beside; others=$$?; cat $$log; rm -f $$log; \
	test $$pairs -eq 0 && test $$others -eq 0

# every test once
test-all: test test-whole

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# ROOT: a folder of photographs, for example the ImageNet validation set
bench: setup
	@test -n "$(ROOT)" || { echo "make bench: say where photographs are: make bench ROOT=folder"; exit 2; }
	$(BIN)/pip install --quiet --editable '.[dev,bench]' || echo "not all peers can be installed here"
	$(BIN)/python -m benchmarks.loader --root "$(ROOT)" --results benchmarks/results/loader.json
	$(BIN)/python -m benchmarks.readme

# a training step of every method beside its bare model, on the GPU if there is one; ROOT: as above, or generated images
bench-train: setup
	$(BIN)/python -m benchmarks.train_step $(if $(ROOT),--root "$(ROOT)") --results benchmarks/results/train_step.json

# faults made on purpose, an hour or two of them; QUICK=1: a little of everything, in two minutes;
# MINUTES: at most, of each fault; ONLY: a family, or words of a fault's name; RESULTS: the file
# whose rows are replaced, such as benchmarks/results/reliability.json (tests/torture/__init__.py)
torture: setup
	PYTHONPATH=tests:. $(BIN)/python -m torture $(if $(QUICK),--quick) $(if $(ONLY),--only "$(ONLY)") \
		$(if $(MINUTES),--minutes $(MINUTES)) \
		$(if $(RESULTS),--results "$(RESULTS)")

# the proof that all of it works on a GPU, without network: PART=1, 2 or 3 alone; DATA: a folder that benchmarks.gpu_files
# has written; WHEELS: a folder of wheels of missing packages; OUT: of the results; DEVICE=cpu: next to nothing, on a CPU.
# It uses the python that has torch, or else makes the environment of `make setup`.
DEVICE ?= cuda
gpu:
	@$(PYTHON) -c "import torch" 2>/dev/null || test -x $(BIN)/python || $(MAKE) setup
	@python=$$($(PYTHON) -c "import torch, sys; print(sys.executable)" 2>/dev/null || echo $(BIN)/python); \
	if [ -n "$(WHEELS)" ]; then \
		site=$$(mktemp -d); trap 'rm -rf "$$site"' EXIT; \
		$$python -m pip install --quiet --no-index --no-deps --target "$$site" "$(WHEELS)"/*.whl || exit 2; \
		export PYTHONPATH="$$site$${PYTHONPATH:+:$$PYTHONPATH}"; \
	fi; \
	$$python -m benchmarks.gpu --device $(DEVICE) $(if $(PART),--part $(PART)) \
		$(if $(DATA),--data "$(DATA)") $(if $(OUT),--out "$(OUT)")
