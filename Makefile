# serve and test set everything up by themselves on Debian with Python 3.11 or newer, venv, make and git.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Which torch build: extra pip arguments, e.g. TORCH_PIP_ARGS="--index-url https://download.pytorch.org/whl/cu130".
# Left empty, a machine without nvidia-smi gets the CPU build and any other the registry's default.
TORCH_PIP_ARGS ?=
TORCH ?= torch>=2.11,<2.14
TORCH_CPU ?= torch==2.13.0+cpu
# make serve: PORT, GRPC_PORT and ADMIN_PORT reach pdserve through the environment, however they were given to make.
SERVE_ARGS ?=
# make test-gpu: the interpreter that has the CUDA build of torch.
GPU_PYTHON ?= python3
# make fuzz: inputs per parser; there are fifteen.
FUZZ_RUNS ?= 100000
BIN := .venv/bin

.PHONY: serve test test-slow test-k8s control-plane check gpu-wheels test-gpu bench-gpu bench-gpu-kv fuzz bench manifests protos metrics-table clean

serve: .venv/.serve
	$(BIN)/pdserve serve $(SERVE_ARGS)

test: .venv/.dev check build/promtool
	$(BIN)/python -m pytest -m "not gpu and not slow and not k8s"

test-slow: .venv/.dev
	$(BIN)/python -m pytest -m "slow and not gpu and not k8s" || [ $$? -eq 5 ] # 5: no test is marked slow

# In the cluster of KUBECONFIG, in namespaces that the tests make and delete; without it, on the control plane below.
test-k8s: .venv/.dev
	$(BIN)/python -m pip install --quiet --editable ".[k8s]"
	$(BIN)/python -m pytest -m k8s tests/k8s

# A real Kubernetes control plane for test-k8s, built once into the user's cache; needs root on Debian 12.
control-plane: .venv/.dev
	tests/k8s/build_control_plane.sh "$$($(BIN)/python -m tests.k8s.binaries)"

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python protos/generate.py --check
	$(BIN)/python -m deploy.generate --check

# Evaluates the alert rules in tests. Debian's package is unpacked here, not installed; where it cannot be had, those
# tests say so.
build/promtool:
	mkdir -p build/prometheus
	if command -v promtool >/dev/null; then ln -sf "$$(command -v promtool)" $@; else \
	  cd build/prometheus && \
	  { apt-get download --quiet prometheus || { apt-get update --quiet && apt-get download --quiet prometheus; }; } && \
	  dpkg-deb --extract prometheus_*.deb . && ln -sf prometheus/usr/bin/promtool ../promtool; \
	fi || echo "without promtool: the alert rules are only parsed" >&2

# On a machine that reaches a package index: what `make test-gpu` installs where there is none, for CPython 3.12.
gpu-wheels: .venv/.torch
	$(BIN)/python -m tests.gpu.wheels build/wheels

# Needs torch with CUDA, Triton, NumPy, safetensors, transformers and pytest; the rest comes from build/wheels.
build/gpu-site: $(wildcard build/wheels/*.whl)
	mkdir -p $@
	if [ -n "$^" ]; then $(GPU_PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --target $@ $^; fi
	touch $@

# Nine minutes at most; what each test told until then is printed whatever happens.
test-gpu: build/gpu-site
	PYTHONPATH=.:kernels:build/gpu-site $(GPU_PYTHON) -m tests.gpu.run

# Ten minutes at most; what was measured until then is in the JSON whatever happens.
bench-gpu: build/gpu-site
	PYTHONPATH=.:kernels:build/gpu-site $(GPU_PYTHON) -m benchmarks.gpu.run --out $(or $(OUT),build)/gpu.json

# Transfers, digest and host tier; needs the wheels of `make gpu-wheels`.
bench-gpu-kv: build/gpu-site
	PYTHONPATH=.:kernels:build/gpu-site $(GPU_PYTHON) -m benchmarks.gpu.kv --out $(or $(OUT),build)/gpu_kv.json

# Coverage-guided; FUZZ_RUNS inputs for each parser of peers' bytes. What breaks one is left in build/.
fuzz: .venv/.dev
	$(BIN)/python -m pip install --quiet --editable ".[fuzz]"
	mkdir -p build
	set -e; for target in $$($(BIN)/python -m tests.fuzz.run --list); do \
	  echo "== $$target"; $(BIN)/python -m tests.fuzz.run $$target -runs=$(FUZZ_RUNS) -verbosity=0 -artifact_prefix=build/; \
	done

# llama-cpp-python is compiled here; where that fails, the others are measured without it.
bench: .venv/.dev
	$(BIN)/python -m pip install --quiet --editable ".[bench]" || \
	  echo "without llama.cpp: its package needs a C++ compiler and CMake" >&2
	$(BIN)/python -m benchmarks.cpu
	$(BIN)/python -m benchmarks.handoff

manifests: .venv/.dev
	$(BIN)/python -m deploy.generate

protos: .venv/.dev
	$(BIN)/python protos/generate.py

metrics-table: .venv/.dev
	$(BIN)/python -m pdserve.telemetry.metrics_table > docs/metrics.md

# torch first and by itself: whatever build it is, the rest keeps it (docs/dependencies.md).
.venv/.torch:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "pdserve needs Python 3.11 or newer: set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "installing into .venv; the first time takes a minute or two"
	"$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	if [ -n "$(TORCH_PIP_ARGS)" ] || command -v nvidia-smi >/dev/null; then \
	  $(BIN)/python -m pip install --quiet $(TORCH_PIP_ARGS) "$(TORCH)"; \
	else \
	  $(BIN)/python -m pip install --quiet "$(TORCH_CPU)" 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --index-url https://download.pytorch.org/whl/cpu "$(TORCH_CPU)"; \
	fi
	touch $@

.venv/.serve: .venv/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[nixl,ray]"
	touch $@

.venv/.dev: .venv/.serve pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[nixl,ray,dev]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
