# Everything here works in a fresh clone: the first target that needs them installs the dependencies into .venv,
# later ones find them there. PYTHON=python3.12 make lab chooses another interpreter (3.11 is the tested one).

PYTHON ?= python3
BIN := .venv/bin
# pip would write bytecode on one core, package by package: left to the end, all cores do it in half the time.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile
BYTECODE := $(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null || true  # some packages hold files that are no Python
ONE_THREAD := OMP_NUM_THREADS=1
OFFLINE := PYTHONPATH=$(CURDIR)/tests/offline:$(CURDIR)/tests/support:$(CURDIR)/notebooks  # no process gets off this machine
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)  # as in a container, where Jupyter asks to be told
PYTEST := $(ONE_THREAD) $(OFFLINE) $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder
# Limits by the clock, for what hangs; what computes too long is noticed by processor time (watch_notebooks).
HANGS := --nbval-cell-timeout 900 --nbval-kernel-startup-timeout 300
NBVAL := -p watch_notebooks --nbval --nbval-current-env $(HANGS) --nbval-sanitize-with tests/sanitize.cfg

.PHONY: help lab test lint unit browser nbval notebooks book models bench gpu clean

help:
	@echo "make lab        open the course in JupyterLab"
	@echo "make test       check everything: style, types, tests, and each notebook run and compared"
	@echo "                its parts: make lint, make unit, make browser, make nbval"
	@echo "make notebooks  build and execute all notebooks from notebooks/course/src"
	@echo "make book       write the course as HTML pages into book/, to read without a kernel"
	@echo "make models     train the models in data/ anew"
	@echo "make bench      measure the kernels on this machine"
	@echo "make gpu        on a GPU: check and time kernels and layers, then run all notebooks there"
	@echo "make clean      remove what these targets made, .venv included"

lab: .venv/course
	$(BIN)/jupyter lab $(AS_ROOT) notebooks/00_start_here.ipynb

# What .github/workflows/ci.yml does in four jobs. Here unit and browser tests are one run: two would leave a core idle
# at the end of each.
test: lint
	$(PYTEST) tests
	$(MAKE) nbval

lint: .venv/tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2
	$(BIN)/python -m course.builder --check

unit: .venv/tests
	$(PYTEST) tests --ignore tests/browser

browser: .venv/tests
	$(PYTEST) tests/browser

nbval: .venv/tests
	$(PYTEST) notebooks $(NBVAL)

notebooks: .venv/tests
	$(BIN)/python -m course.builder

book: .venv/tests
	$(BIN)/python -m course.builder.book

models: .venv/course
	$(BIN)/dsa train pretrain --out data/base
	$(BIN)/dsa train indexer data/base --out data/warmed
	$(BIN)/dsa train indexer data/warmed --sparse --out data/sparse
	$(BIN)/python -m course.experiments.rl_base_model --out data/novice

bench: .venv/tests
	$(ONE_THREAD) $(BIN)/dsa bench cpu --shape s2
	$(ONE_THREAD) $(BIN)/python -m course.experiments.rejected_variants
	$(ONE_THREAD) $(BIN)/dsa bench decode
	$(ONE_THREAD) $(BIN)/dsa bench beside-transformers
	$(ONE_THREAD) $(BIN)/dsa bench indexer-loss

# Under ten minutes for the kernels, each against its target, and about as much for layers of true width; then the
# notebooks that draw what was found are made anew, and all of them must run here as they do without a GPU.
gpu: .venv/tests
	$(BIN)/python -c "from dsa.bench.gpu.__main__ import need_gpu; need_gpu()"
	$(BIN)/dsa bench gpu --out data/measurements/gpu_kernels.json --replace
	$(BIN)/dsa bench full-width --out data/measurements/true_width.json --replace
	$(BIN)/python -m course.builder 08_kernels 10_full_model_on_a_gpu 09_cost_curves
	$(ONE_THREAD) $(OFFLINE) $(BIN)/pytest notebooks $(NBVAL)

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find dsa notebooks tests -name __pycache__ -prune -exec rm -rf {} +

# torch goes first and by its exact version: on its own pip settles for a build that is configured or already there,
# while a list with open ends may add gigabytes of CUDA.
define install
	@echo "installing what is needed into .venv: one to three minutes, the first time only"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) $$(grep '^torch==' requirements.txt)
	$(PIP) $(1)
	echo "$(CURDIR)/notebooks" > "$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')/course.pth"
	$(BYTECODE)
endef

.venv/course: requirements.txt pyproject.toml
	$(call install,-r requirements.txt)
	touch $@

.venv/tests: requirements.txt pyproject.toml tests/requirements.txt
	$(call install,-r requirements.txt -r tests/requirements.txt)
	touch .venv/course $@
