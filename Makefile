# The two commands: `make lab` and `make test`. Everything else is for people who write chapters.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell command -v $(p) 2>/dev/null)))
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help lab test notebooks export bench peers gpu decode clean
help:            ## this list
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

lab: $(STAMP)    ## install what is missing and open the tour in JupyterLab
	@$(PY) tools/install.py start
	$(PY) -m jupyter lab nbs/00_start_here.ipynb $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_ARGS)

test: $(STAMP)   ## install what is missing and run every check
	@$(PY) tools/install.py wait
	$(PY) tools/check.py

notebooks: $(STAMP)  ## run notebooks top to bottom and save clean outputs (NB=path for one)
	@$(PY) tools/install.py wait
	$(PY) tools/run_notebooks.py $(NB)

export: $(STAMP) ## write the package from the notebooks
	nbdev_export && nbdev_clean

bench: $(STAMP)  ## measure this machine; results go to benchmarks/results/<device>/
	@$(PY) tools/install.py wait
	$(PY) -m benchmarks.decode $(BENCH_ARGS)

peers: $(STAMP)  ## environments of their own for the engines that benchmarks/peers.py compares with (NAME=vllm for one)
	$(PY) tools/peers.py $(NAME)

# Such a machine often brings a torch of its own and cannot build the environment: then its Python does.
GPU_PY = $(or $(and $(wildcard $(STAMP)),$(PY)),$(shell \
	for p in python3 python $(PYTHON); do $$p -c "import torch" 2>/dev/null && { echo $$p; break; }; done))
gpu:             ## on a machine with an NVIDIA GPU: the CUDA tests, then kernels and training steps; results as for bench
	@py="$(GPU_PY)"; test -n "$$py" || { echo "No Python here has torch: run make lab first"; exit 1; }; set -ex; \
	"$$py" -m benchmarks.cuda_tests; "$$py" -m benchmarks.kernels --dry; "$$py" -m benchmarks.kernels; \
	"$$py" -m benchmarks.training

decode:          ## on such a machine: the embedded model against its peers, and decode steps with and without a graph
	@py="$(GPU_PY)"; test -n "$$py" || { echo "No Python here has torch: run make lab first"; exit 1; }; set -ex; \
	"$$py" -m benchmarks.decode --device cuda $(BENCH_ARGS); "$$py" -m benchmarks.graphs

$(STAMP): settings.ini setup.py constraints.txt tools/install.py
	@test -n "$(PYTHON)" || { echo "No Python found: install Python 3.11, 3.12 or 3.13, or run make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) tools/install.py $(VENV)
	@touch $@

clean:           ## remove the environment and build leftovers
	rm -rf $(VENV) build dist *.egg-info
