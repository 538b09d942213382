# `make demo` runs the main job, `make test` the tests; each sets up .venv by itself.

PYTHON ?= python3
PIP = .venv/bin/pip --disable-pip-version-check install --quiet -c constraints.txt

WIRE = $(addprefix tests/service/test_,$(addsuffix .py,access async_client feedback health inference lifecycle limits \
	refusals repository_control shared_memory stopping tls tracing triton_extensions workers))

.PHONY: demo test lint clean

demo: .venv/demo.done
	.venv/bin/python -m examples.demo

# The fast front is the default; what speaks to a server is told again to the other.
test: .venv/test.done lint
	.venv/bin/python -m pytest
	.venv/bin/python -m pytest --front grpc $(WIRE)

lint: .venv/test.done
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/demo.done: .venv/bin/pip pyproject.toml constraints.txt $(shell find protos -name '*.proto')
	@echo "Installing calserve into .venv (about a gigabyte, most of it onnxruntime-gpu) ..."
	$(PIP) -e '.[demo]'
	@touch $@

.venv/test.done: .venv/bin/pip pyproject.toml constraints.txt $(shell find protos -name '*.proto')
	@echo "Installing calserve with its test tools into .venv ..."
	$(PIP) -e '.[test]'
	@touch $@

clean:
	rm -rf .venv demo dist
