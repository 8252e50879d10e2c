# make demo, make test: both install what they need into .venv first.
VENV := .venv
PYTHON ?= python3
MODEL ?= demo
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

.PHONY: setup demo test test-long lint proto clean

setup: $(VENV)/.ready
	@:

$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "installing into $(VENV) (the first time takes minutes: torch is large)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints.txt -e '.[test]'
	@touch $@
	@echo "installed; next: make demo, or $(BIN)/kvferry serve demo"

demo: setup
	@$(BIN)/kvferry demo --model $(MODEL)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

test: lint
	@$(BIN)/pytest -m 'not long'

test-long: setup
	@$(BIN)/pytest

# Stubs are checked in. An older generator is used on purpose: its code runs with protobuf 6 and 7.
proto: setup
	$(PYTHON) -m venv build/proto
	build/proto/bin/pip install -qq 'grpcio-tools==1.73.1'
	build/proto/bin/python -m grpc_tools.protoc -I kvferry/common/proto=common/proto \
		--python_out=build --pyi_out=build --grpc_python_out=build kvferry/common/proto/worker.proto
	cp build/kvferry/common/proto/* common/proto/

clean:
	rm -rf $(VENV) build *.egg-info
