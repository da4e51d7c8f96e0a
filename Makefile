# make train    pretrain on real images, here, now           make lint     formatters, linters, and the docs' links
# make test     the test suite, in minutes                   make bench    the microbenchmark
# make docs     the site, into build/site                    make wheel    a wheel with the CUDA kernels, into dist
#
# make test-kernels   the kernels in depth: in the emulation and Triton's interpreter, under sanitizers, searched for
#                     races, with faults planted, compiled for GPUs that are not here
# make test-fuzz      thousands of random calls against an oracle; BARLOW_FUZZ=100000 tries that many
# make test-all       all three
#
# Each sets up .venv the first time (about 5 GB: PyTorch's ordinary build) and re-uses it afterwards.
# PYTHON=python3.12 make test     takes another interpreter.
# TORCH=2.9 make test             takes another PyTorch than the newest.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PYTEST := $(RUN) -m pytest --numprocesses 2
READY := $(VENV)/.ready
EXTENSION := $(VENV)/.extension

# Idle OpenMP threads sleep instead of spinning: beside another busy program, spinning costs several times the speed.
test test-kernels test-fuzz: export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: train test test-kernels test-fuzz test-all lint format bench docs wheel install-twice compute-sanitizer \
	verify-gpu clean

train: $(READY)
	$(RUN) -m barlow_fused train $(ARGS)

# Everything but the kernels' own tests, of which the most telling take part: CUDA's, and in a run of its own Triton's.
test: $(READY)
	$(PYTEST) -m "not (kernels or fuzz) or telling" $(or $(ARGS),tests)
	$(if $(ARGS),,$(PYTEST) -m telling --kernels interpreter tests/kernels)

test-kernels: $(EXTENSION)
	$(PYTEST) tests/kernels tests/test_build.py -m kernels $(ARGS)
	$(PYTEST) tests/kernels --kernels interpreter $(ARGS)
	$(PYTEST) tests/kernels --kernels sanitized $(ARGS)
	$(PYTEST) tests/kernels --kernels races $(ARGS)

test-fuzz: $(READY)
	$(RUN) -m pytest -m fuzz tests/test_fuzz.py $(ARGS)

test-all: test test-kernels test-fuzz

bench: $(if $(wildcard /dev/nvidiactl),$(EXTENSION),$(READY))
	$(RUN) -m benchmarks $(ARGS)

# Out-of-bounds accesses and races of both backends' kernels; needs a GPU, and compute-sanitizer of the CUDA toolkit. It
# sees the end of a tensor only where PyTorch does not cut tensors out of larger blocks.
compute-sanitizer: $(EXTENSION)
	for backend in cuda triton; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=.:tests/support compute-sanitizer --tool memcheck \
			--report-api-errors no --error-exitcode 1 $(RUN) tests/support/small_shapes_on_gpu.py $$backend || exit 1; \
		PYTHONPATH=.:tests/support compute-sanitizer --tool racecheck --error-exitcode 1 \
			$(RUN) tests/support/small_shapes_on_gpu.py $$backend || exit 1; \
	done

# All that needs a GPU, within nine minutes: leaves a run and a log in benchmarks/results. On a machine that has PyTorch
# and the rest already: make verify-gpu RUN=python3 READY=
verify-gpu: $(READY)
	$(RUN) -m benchmarks verify $(ARGS)

# Every link of a page is checked, and whatever zensical warns of is an error. EXTERNAL_LINKS=1 make docs follows the
# links to other sites, too.
docs: $(READY)
	@$(RUN) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make docs and make lint need Python 3.11 or newer: PYTHON=/path/to/python3, after make clean"; exit 1; }
	$(VENV)/bin/zensical build --clean --strict
	$(VENV)/bin/linkchecker --no-status $(if $(EXTERNAL_LINKS),--check-extern) build/site/index.html

# From the source distribution, as who has nothing else would build it; then tried in an environment that has no nvcc.
# Where there is no nvcc to build it with, one is installed into .venv.
wheel: $(READY)
	$(RUN) barlow_fused/nvcc.py || $(RUN) -m pip install --disable-pip-version-check 'cuda-toolkit[nvcc]'
	rm -rf build/wheel dist
	BARLOW_FUSED_CUDA=1 CUDACXX=$$($(RUN) barlow_fused/nvcc.py) $(RUN) -m build --outdir build/wheel
	PATH=$(VENV)/bin:$$PATH $(RUN) -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcuda*' \
		--wheel-dir dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist
	ls -lh dist
	PYTHON=$(PYTHON) tests/support/try_wheel.sh dist/*.whl

# pip install . twice, with the kernels and without, in an environment of its own.
install-twice: $(READY)
	$(RUN) -m pytest tests/test_build.py -k twice

lint: $(READY) docs
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	git ls-files 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cpp' | xargs --no-run-if-empty $(VENV)/bin/clang-format --dry-run --Werror
	$(VENV)/bin/gersemi --check CMakeLists.txt

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	git ls-files 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cpp' | xargs --no-run-if-empty $(VENV)/bin/clang-format -i
	$(VENV)/bin/gersemi --in-place CMakeLists.txt

# The environment is rebuilt when what it is made from changes; an interrupted set-up starts over.
$(READY): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed, $(PYTHON) is older: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "Python's venv module does not work here; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	BARLOW_FUSED_CUDA=0 $(RUN) -m pip install --disable-pip-version-check -e '.[test,dev]' $(if $(TORCH),'torch==$(TORCH).*')
	@# These pin an old PyTorch or a large stack that their losses do not need: the files alone are enough to compare.
	$(RUN) -m pip install --disable-pip-version-check --no-deps solo-learn==1.0.2 stable-pretraining==0.1.8
	@touch $@

# The CUDA extension, where there is an nvcc: what has not changed is not compiled again.
$(EXTENSION): $(READY) setup.py CMakeLists.txt $(shell find csrc -type f)
	$(RUN) setup.py --quiet build_ext --inplace
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
