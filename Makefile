# TinyBERT from first principles. `make` alone lists what there is.
# Works with GNU Make 3.81 (macOS) and later; the recipes are plain sh.

# The Python that .venv is made with; empty: the newest of those that the pins are tested with, else python3.
PYTHON ?=
# The extra index with torch's CPU build (Linux without a GPU); see the top of requirements.txt.
TORCH_INDEX ?=
LAB_ARGS ?=
PYTEST_ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed

# Tests and lessons run as many at a time as there are cores, each on its share of the threads.
JOBS := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)

.DEFAULT_GOAL := help
.PHONY: help setup lab test test-fast test-lowest fuzz mutants mutation gpu-lessons coverage audit distill notebooks results ablations stage1 structured bench colab pins clean

help: ## list these commands
	@awk 'BEGIN { FS = ":.*## " } /^[a-z0-9-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## make .venv with everything in it (once; a few minutes)

$(STAMP): requirements.txt pyproject.toml
	@python="$(PYTHON)"; test -n "$$python" || for p in python3.13 python3.12 python3.11 python3.10 python3 python; do \
		"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { python=$$p; break; }; done; \
	python=$${python:-python3}; \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "The course needs Python 3.10 or newer, and '$$python' is $$("$$python" --version 2>&1 | head -n 1); install a newer one, or name it: make setup PYTHON=/path/to/python3" >&2; exit 1; }; \
	$(BIN)/python -c 'import pip' 2>/dev/null && exit; \
	"$$python" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "'$$python' cannot make virtual environments; on Debian and Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; }; \
	echo "Making .venv with $$("$$python" --version) ..."; "$$python" -m venv --clear .venv
	@echo "Installing the packages of requirements.txt (a few minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --prefer-binary \
		$(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") -r requirements.txt || { \
		echo "The packages could not be installed: see pip's lines above; without internet, with a full disk, or with a Python or system that they are not made for (README), mend that and say 'make setup' again." >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@$(BIN)/tinylib fetch minilm-l6 || echo "The teacher's weights are not here yet; the lessons fetch them when they are first needed."
	@touch $@
	@echo "Ready. Next: make lab"

lab: setup ## open the course in JupyterLab (more options: make lab LAB_ARGS="--no-browser --port=8899")
	@root=; test "$$(id -u)" = 0 && root=--allow-root; \
	exec $(BIN)/python -m jupyterlab $$root --ServerApp.root_dir="$(CURDIR)" \
		--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb $(LAB_ARGS)

test: setup ## run everything that CI checks: ruff, pytest, every lesson from top to bottom
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 TINYLIB_TYPECHECK=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not alone" $(PYTEST_ARGS)
	TINYLIB_TYPECHECK=1 $(BIN)/python -m pytest -m alone $(PYTEST_ARGS)
	$(BIN)/python notebooks/tools/check.py -- $(PYTEST_ARGS)

test-fast: setup ## run pytest without the slow tests and without the lessons
	OMP_NUM_THREADS=1 TINYLIB_TYPECHECK=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile \
		-m "not slow and not network and not browser and not alone" $(PYTEST_ARGS)

fuzz: setup ## readers, loaders and the command line against files and words made to break them (ten minutes; MINUTES=1 for one)
	OMP_NUM_THREADS=1 TINYLIB_TYPECHECK=1 TINYLIB_FUZZ_MINUTES=$(or $(MINUTES),10) $(BIN)/python -m pytest -q -p no:xdist tests/test_fuzz.py

mutants: setup ## the exercise checks against learners' mistakes: a table of wrong answers refused, right ones accepted
	cd tests && ../$(BIN)/python -m mutants

coverage: setup ## lines of tinylib that the tests run, in one process (half an hour; fails below 90 %)
	$(BIN)/python -m coverage erase
	OMP_NUM_THREADS=1 TINYLIB_TYPECHECK=1 $(BIN)/python -m coverage run -m pytest -q -p no:xdist $(PYTEST_ARGS) \
		-m "not network and not browser and not alone" --ignore=tests/test_setup.py --ignore=tests/test_notebooks.py
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --sort=cover --skip-covered --fail-under=90

test-lowest: ## the fast tests with the oldest packages that pyproject.toml allows, torch excepted, in .venv-lowest
	@python="$(PYTHON)"; OMP_NUM_THREADS=1 TINYLIB_TYPECHECK=1 "$${python:-python3}" notebooks/tools/lowest.py -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

gpu-lessons: setup ## the lessons in the gpu tier, beside a GPU played on the CPU (hours; some: make gpu-lessons LESSONS=notebooks/06_*.ipynb)
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m lessons_on_gpu $(abspath $(wildcard $(LESSONS)))

mutation: setup ## mutation tests of the ten most important functions: a table of mistakes that the tests notice (half an hour)
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m mutation $(TARGETS)

audit: setup ## known vulnerabilities of the pinned packages (needs internet; exit code 3: the service did not answer)
	@$(BIN)/python notebooks/tools/audit.py

distill: setup ## run the whole job headless: teach, distil, prune, evaluate; prints the table
	$(BIN)/python -m tinylib.job --out runs/movie_reviews

notebooks: setup ## for maintainers: run all lessons in place (some: make notebooks LESSONS=notebooks/04_*.ipynb)
	$(BIN)/python notebooks/tools/run.py $(LESSONS)

results: setup ## for maintainers: measure the course's students over three seeds (an hour or more; resumable)
	$(BIN)/python benchmarks/students.py

ablations: setup ## for maintainers: what each part of the recipe is worth, over three seeds (hours; resumable)
	$(BIN)/python benchmarks/ablations.py

stage1: setup ## for maintainers: what makes general distillation better at equal cost, over three seeds (hours; resumable)
	$(BIN)/python benchmarks/stage1.py

structured: setup ## for maintainers: the student without heads, neurons or layers, over three seeds (an hour or more; resumable)
	$(BIN)/python benchmarks/structured.py

bench: setup ## for maintainers: speed beside other tools, on a machine that does nothing else (25 minutes)
	$(BIN)/python benchmarks/speed.py

colab: setup ## for maintainers: stamp the repository's address: make colab REPO=owner/name TAG=v1
	$(BIN)/python notebooks/tools/colab.py stamp $(if $(REPO),--repo "$(REPO)") $(if $(TAG),--tag "$(TAG)")

pins: setup ## for maintainers: rewrite requirements.txt from pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/python notebooks/tools/pins.py

clean: ## remove .venv, runs and caches (the weights' cache stays: see tinylib doctor)
	rm -rf .venv .venv-lowest .venv-audit .coverage* runs build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
