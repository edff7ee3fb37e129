# Everything runs in .venv, made here from constraints/dev.txt; `bench` and `integrations` also make .venv-NAME from
# constraints/NAME.txt, for programs whose packages cannot share it. Only `gpu-check` and `gpu-bench` use the python
# that is there (GPU_PYTHON): a machine with a GPU has its own torch, and may have no network.
PYTHON ?= python3
GPU_PYTHON ?= python3
BIN := .venv/bin
PROTO := protos/dinov3_serving/v1/feature_service.proto

# What the documentation shows or links to.
PAGES := README.md CONTRIBUTING.md SECURITY.md CHANGELOG.md LICENSE docs deploy bench constraints examples protos

.PHONY: install demo test test-fast lint format docs lock bench integrations fuzz fuzz-coverage chaos gpu-check gpu-bench protos clean

install: .venv/installed

.venv/installed: pyproject.toml constraints/dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "dinov3-serving needs Python >= 3.11; $(PYTHON) is $$($(PYTHON) --version). Set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints/dev.txt -e '.[dev]'
	@touch $@

# protoc in an environment of its own: it wants an older protobuf than the server does.
.venv-protoc/installed: constraints/protoc.txt
	$(PYTHON) -m venv .venv-protoc
	.venv-protoc/bin/python -m pip install --quiet -r constraints/protoc.txt
	@touch $@

protos: .venv-protoc/installed
	.venv-protoc/bin/python -m grpc_tools.protoc -Iprotos --python_out=protos --pyi_out=protos --grpc_python_out=protos $(PROTO)

demo: install
	$(BIN)/python examples/demo.py

test: install .venv-protoc/installed
	$(BIN)/python -m pytest -n auto --dist worksteal

# Folders whose tests start no server process and are quick: half a minute on two cores.
FAST := tests/project tests/deploy tests/client tests/server/config tests/server/cli tests/server/engine
NOT_FAST := tests/project/test_python_examples.py tests/project/test_example_types.py \
  $(addprefix tests/client/,bulk pictures torch test_processes.py test_testing_is_real.py)
test-fast: install .venv-protoc/installed
	$(BIN)/python -m pytest -n auto --dist worksteal $(FAST) $(addprefix --ignore ,$(NOT_FAST))

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint protos
	$(BIN)/hadolint Dockerfile
	.ci/buf-breaking

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv-docs/installed: constraints/docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet -r constraints/docs.txt
	@touch $@

.venv-lock/installed: constraints/lock.txt
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet -r constraints/lock.txt
	@touch $@

# Writes constraints/image, what the Dockerfile installs: versions of constraints/dev.txt where it has them, with the hashes
# of all files of each. Versions change only with UPGRADE=--upgrade. torch for the CPU is on an index of its own; where that
# cannot be reached: make lock TORCH_CPU="--find-links FOLDER_WITH_THE_WHEEL".
TORCH_CPU := --torch-backend cpu
UPGRADE :=
COMPILE = .venv-lock/bin/uv pip compile --quiet --python-version 3.11 --generate-hashes --no-annotate $(UPGRADE) \
	--custom-compile-command "make lock" --constraints build/lock/constraints.txt --output-file constraints/image/$(1).txt
lock: .venv-lock/installed
	mkdir -p build/lock
	grep -v '^torch==' constraints/dev.txt > build/lock/constraints.txt
	echo torch > build/lock/excludes.txt
	echo "$$(grep '^torch==' constraints/dev.txt)+cpu" > build/lock/torch-cpu.in
	$(call COMPILE,tools) constraints/image/tools.in
	$(call COMPILE,server) pyproject.toml --extra server --excludes build/lock/excludes.txt
	$(call COMPILE,torch-cuda) constraints/image/torch-cuda.in
	$(call COMPILE,torch-cpu) build/lock/torch-cpu.in $(TORCH_CPU)

# Writes build/site. Fails where a page or an anchor that a link names is missing, or a page is in no menu.
docs: .venv-docs/installed
	rm -rf build/docs build/site
	mkdir -p build/docs
	cp -r $(PAGES) build/docs/
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

bench: install
	$(BIN)/python -m bench

# Runs each of examples/ in an environment of its own, against one server; says what failed and what was skipped.
# EXAMPLES="ray-data daft" runs these alone.
integrations: install
	$(BIN)/python -m tests.integrations $(EXAMPLES)

fuzz: install
	$(BIN)/python -m attack fuzz

# atheris in a folder of its own: nothing else needs it, and its wheels are for some Pythons only.
.venv-atheris/installed: constraints/atheris.txt
	$(BIN)/python -m pip install --quiet --upgrade --target .venv-atheris -r constraints/atheris.txt
	@touch $@

fuzz-coverage: install .venv-atheris/installed
	PYTHONPATH=.venv-atheris:$$PYTHONPATH $(BIN)/python -m attack coverage

chaos: install
	$(BIN)/python -m attack chaos

# gpu-check and gpu-bench need no installation of ours and no network. Beside torch, pytest and psutil they want the plain
# install's packages and the server extra's; a GPU image mostly lacks grpcio-status, grpcio-health-checking,
# grpcio-reflection and googleapis-common-protos: bring their wheels. Where gpu-bench finds no transformers or no C
# compiler (which torch.compile needs), it records what is absent. Its record goes to $OUT where that is set.
gpu-check:
	PYTHONPATH=server:client:protos:.:$$PYTHONPATH $(GPU_PYTHON) -m pytest -c tests/gpu/pytest.ini tests/gpu

gpu-bench:
	PYTHONPATH=server:client:protos:.:$$PYTHONPATH $(GPU_PYTHON) -m bench.gpu

clean:
	rm -rf .venv .venv-* examples/node/node_modules demo-out build dist
