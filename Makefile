# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Set-up is redone only when what it depends on has changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

SOURCES := $(shell find csrc -name "*.cpp" -o -name "*.cu" -o -name "*.h")
# In place, without pip: what did not change is not compiled again.
BUILD := $(BIN)/python setup.py -q build_ext --inplace

# The demo compiles for the GPUs that are here, and for none where none is. The tests look at compiled
# CUDA kernels on every machine with nvcc: for those GPUs, else for one architecture, or for what
# TORCH_CUDA_ARCH_LIST asks for.
GPUS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -x '[0-9.]*' | sort -u)
TEST_ARCHITECTURES := $(or $(TORCH_CUDA_ARCH_LIST),$(GPUS),9.0)

# Threads of OpenMP that spin for long while they wait take a busy core from the very thread they wait
# for; those that sleep at once are late on a quiet machine. So they spin for a short while.
export GOMP_SPINCOUNT ?= 1000

# Python compiles what it imports, so pip need not compile all that it installs.
export PIP_NO_COMPILE ?= 1

.PHONY: demo build quick test test-kernels test-families families-table test-cpus test-versions \
	test-builds test-matrix nightly test-peft wheel wheel-aarch64 release-check lint format clean FORCE

demo: $(VENV)/.built_demo
	@echo "The demo starts."
	$(BIN)/python examples/unetr_segmentation.py

# The inner loop: compiles what changed. `make build ISA=avx2` compiles for that instruction set alone,
# which the next build without it makes good, `ONLY=cpu` or `ONLY=cuda` leaves the other library as it is.
build: $(VENV)/.demo
	rm -f $(VENV)/.built_*
	TCUR_ISA='$(ISA)' TCUR_ONLY='$(ONLY)' TORCH_CUDA_ARCH_LIST='$(TEST_ARCHITECTURES)' $(BUILD)

# Values of the kernels of the CPU library, in fp32, by each instruction set that was compiled.
quick: $(VENV)/.tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_isa.py tests/conformance/test_values.py \
		-k 'test_isa or (cpu_ and not float16 and not float64 and not ids)'

# One process for each core, each with one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal
TESTED := $(VENV)/.built_tests $(VENV)/.oldest_peft $(VENV)/.oldest_triton $(VENV)/.quantised

# All tests, but for those of kernels for GPUs that have passed and are as they were.
test: $(TESTED)
	@if $(BIN)/python .ci/kernel_sources.py; then \
		echo "The kernels for GPUs have passed their tests as they are; make test-kernels repeats these."; \
		$(PYTEST) --durations 15 -m 'not matrix and not families and not kernels'; \
	else \
		$(PYTEST) --durations 15; \
	fi

# Tests of the kernels for GPUs, for which no GPU is needed; records that they have passed.
test-kernels: $(TESTED)
	$(PYTEST) --durations 15 -m 'kernels and not matrix'
	$(BIN)/python .ci/kernel_sources.py --record

# Adapters on the models of everybody: all families, with libraries that no other test needs. These lie
# beside the others, because torchvision from PyPI does not load with a torch for CPUs alone.
test-families: $(VENV)/.built_tests $(VENV)/.families
	PYTHONPATH=$(VENV)/families OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 \
		--dist worksteal -m 'families or not families' tests/test_families.py

# Checks all families and writes their table in docs/adapters.md.
families-table: $(VENV)/.built_tests $(VENV)/.families
	PYTHONPATH=$(VENV)/families:tests OMP_NUM_THREADS=1 $(BIN)/python -m families.table

# What depends on roundings: under the older instruction sets of this machine, with 2 and 4 threads.
test-cpus: $(VENV)/.built_tests
	$(BIN)/python tests/cpus.py

# One library under every Python, torch, peft and transformers that is claimed; the table of the README.
test-versions: $(VENV)/.built_tests
	$(BIN)/python tests/versions.py

# Builds for the oldest and the newest torch and some between, each loaded and tested under every later one.
test-builds: $(VENV)/.torch
	$(BIN)/python tests/builds.py

# The checklist of a release: what is done, and what is missing. RUN=1 does what takes long, too.
release-check: $(VENV)/.built_tests
	$(BIN)/python .ci/release.py $(if $(RUN),--run)

# More lengths, ranks, precisions and architectures of the Triton kernels: interpreted, then compiled.
# And what takes long of the CUDA kernels on the CPU.
test-matrix: $(VENV)/.built_tests $(VENV)/.oldest_triton
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m matrix tests/conformance
	$(BIN)/python -m pytest -m matrix tests/test_triton_compile.py tests/test_triton_oldest.py \
		tests/test_cuda_host.py tests/test_sharded.py

# Far more of everything that could go wrong, one program after another: hours. ONLY="calls files"
# chooses. The table of docs/trust.md.
nightly: $(VENV)/.built_tests $(VENV)/.oldest_peft $(VENV)/.oldest_triton $(VENV)/.quantised \
		$(VENV)/.mutation
	$(BIN)/python tests/nightly.py $(if $(ONLY),--only $(ONLY))

# peft's own tests with tCUR, from the checkout that PEFT names; the table of docs/peft.md.
test-peft: $(VENV)/.peft_own
	$(VENV)/peft_own/bin/python tests/peft_own.py $(PEFT)

# The wheel and the sdist of a release, in dist: built, audited, and tried in bare environments of each
# of PYTHONS. With nvcc it takes minutes for the kernels for GPUs, which CUDA=0 leaves out.
CUDA ?= 1
PYTHONS ?= $(BIN)/python
wheel: $(VENV)/.wheel_tools
	$(BIN)/python tests/make_wheel.py --tools $(VENV)/wheel_tools --cuda $(CUDA) --pythons $(PYTHONS)

# The same for aarch64, by a cross compiler and an emulator.
wheel-aarch64: $(VENV)/.wheel_tools
	$(BIN)/python tests/wheel_aarch64.py $(VENV)/wheel_tools

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')
	$(BIN)/mypy

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')

clean:
	rm -rf $(VENV) build *.egg-info tcur_kernels/*.so

# torch comes first and alone: it is pinned, and the package is built against it without isolation,
# because a build environment of its own would fetch another torch.
$(VENV)/.torch: constraints.txt
	@echo "Set-up, 1 of 2: torch."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch numpy setuptools ninja safetensors
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml setup.py constraints.txt
	@echo "Set-up, 2 of 2: the kernels are compiled for this machine, a minute or two on two cores."
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[demo]'
	touch $@

# Those of the last build, so that others are another build.
$(VENV)/.architectures: FORCE | $(VENV)/.torch
	@echo '$(TEST_ARCHITECTURES)' | cmp -s - $@ || echo '$(TEST_ARCHITECTURES)' > $@

# torch for CUDA brings its Triton, and takes no other. The build for CPUs brings none.
TRITON = $(shell $(BIN)/python -c "from importlib.metadata import requires as r; \
	print('' if any(one.startswith('triton') for one in r('torch')) else '-c tests/newest_triton.txt')")

$(VENV)/.tests: $(VENV)/.demo $(VENV)/.architectures tests/newest_triton.txt
	@echo "Set-up of the tests: with nvcc, CUDA kernels for $(TEST_ARCHITECTURES)."
	TORCH_CUDA_ARCH_LIST='$(TEST_ARCHITECTURES)' \
		$(PIP) install -q -c constraints.txt $(TRITON) --no-build-isolation -e '.[test]'
	touch $@

# After an edit below csrc, pip has nothing to do.
$(VENV)/.built_demo: $(SOURCES) | $(VENV)/.demo
	$(BUILD)
	touch $@

$(VENV)/.built_tests: $(SOURCES) $(VENV)/.architectures | $(VENV)/.tests
	TORCH_CUDA_ARCH_LIST='$(TEST_ARCHITECTURES)' $(BUILD)
	touch $@

$(VENV)/.families: tests/families/requirements.txt $(VENV)/.torch
	rm -rf $(VENV)/families
	$(PIP) install -q --no-deps --target $(VENV)/families -r $<
	touch $@

# Beside the newest, for tests/test_peft_oldest.py and tests/test_triton_oldest.py.
$(VENV)/.oldest_%: tests/oldest_%.txt $(VENV)/.torch
	rm -rf $(VENV)/oldest_$*
	$(PIP) install -q --no-deps --target $(VENV)/oldest_$* -r $<
	touch $@

# Beside the others, for tests/quantisers.py.
$(VENV)/.quantised: tests/quantised.txt $(VENV)/.torch
	rm -rf $(VENV)/quantised
	$(PIP) install -q --no-deps --target $(VENV)/quantised -r $<
	touch $@

# Beside the others, for tests/pymutants: of a mutation tool its operators alone.
$(VENV)/.mutation: tests/pymutants/requirements.txt $(VENV)/.torch
	rm -rf $(VENV)/mutation
	$(PIP) install -q --no-deps --target $(VENV)/mutation -r $<
	touch $@

# An environment of its own, which sees the packages of the tests.
$(VENV)/.peft_own: tests/peft_own.txt $(VENV)/.tests
	$(BIN)/python -m venv $(VENV)/peft_own
	$(BIN)/python -c "import site; print(*site.getsitepackages())" > \
		$$($(VENV)/peft_own/bin/python -c "import site; print(site.getsitepackages()[0])")/tests.pth
	$(VENV)/peft_own/bin/python -m pip --disable-pip-version-check install -q -r $<
	touch $@

$(VENV)/.wheel_tools: tests/make_wheel.txt $(VENV)/.torch
	rm -rf $(VENV)/wheel_tools
	$(PIP) install -q --no-deps --target $(VENV)/wheel_tools -r $<
	touch $@

$(VENV)/.lint: $(VENV)/.torch
	$(PIP) install -q -c constraints.txt ruff clang-format mypy
	touch $@
