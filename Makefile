# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Set-up is redone only when what it depends on has changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

BUILD_INPUTS := pyproject.toml setup.py constraints.txt $(shell find csrc -name "*.cpp" -o -name "*.cu" -o -name "*.h")

.PHONY: demo test test-matrix lint format clean

demo: $(VENV)/.installed
	$(BIN)/python examples/unetr_segmentation.py

test: $(VENV)/.installed $(VENV)/.oldest_peft $(VENV)/.oldest_triton
	$(BIN)/python -m pytest

# More lengths, ranks and precisions of the Triton kernels: interpreted, then compiled.
test-matrix: $(VENV)/.installed
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m matrix tests/interpreted
	$(BIN)/python -m pytest -m matrix tests/test_triton_compile.py

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
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch numpy setuptools pybind11 ninja safetensors
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(BUILD_INPUTS)
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[demo,test]'
	touch $@

# Beside the newest, for tests/test_peft_oldest.py and tests/test_triton_oldest.py.
$(VENV)/.oldest_%: tests/oldest_%.txt $(VENV)/.torch
	rm -rf $(VENV)/oldest_$*
	$(PIP) install -q --no-deps --target $(VENV)/oldest_$* -r $<
	touch $@

$(VENV)/.lint: $(VENV)/.torch
	$(PIP) install -q -c constraints.txt ruff clang-format mypy
	touch $@
