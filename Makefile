# Everything a person types. `make help` lists it. SCALE is tiny, small, small-wide (the second round), small-long or paper.

SCALE ?= tiny
VENV := .venv
PYTHON := $(VENV)/bin/python
# Written last, so that a set-up that was interrupted is done again.
STAMP := $(VENV)/.set-up
EXPERIMENTS := $(PYTHON) -m experiments
# Your own runs stay apart from the recorded ones in results/, which would count as finished.
RESULTS ?= build/results
# E.g. RUN_OPTIONS="--epochs 1 --seed 1".
RUN_OPTIONS ?=
# What `make report` reads; the page is in its folder `report`.
REPORT ?= results
# Models that small gain nothing from a second thread: two are trained side by side instead.
TRAIN = $(if $(filter tiny,$(SCALE)),sweep,run)
# How many processes share the tests.
TEST_WORKERS ?= 2
# For `make gpu`.
MINUTES ?= 25
# How many trials an optimizer, by default the recipe's number; e.g. TUNE_OPTIONS="--optimizer adam".
TRIALS ?=
TUNE_OPTIONS ?=
# What `make challenge` puts to the test, and how.
OPTIMIZER ?=
CHALLENGE_OPTIONS ?=
TUNE = $(EXPERIMENTS) tune --scale $(SCALE) $(if $(TRIALS),--trials $(TRIALS)) $(TUNE_OPTIONS)

# Where it is set, as in many containers, each process would compile torch and the others anew: 6 of a run's 11 seconds.
unexport PYTHONDONTWRITEBYTECODE

# Tasks and datasets by the short names of `make reproduce-qm9`, `make tune-qm9` and `make data-matproj`.
TASKS := resnet50 qm9 matproj iwslt14 dlrm gpt
TASK_resnet50 := resnet50-imagenet
TASK_qm9 := schnet-qm9
TASK_matproj := schnet-matproj
TASK_iwslt14 := transformer-iwslt14
TASK_dlrm := dlrm-criteo
TASK_gpt := gpt-text
DATA_matproj := materials-project
# A scale without its suffix: small of small-wide.
SIZE = $(firstword $(subst -, ,$(SCALE)))
# What a task fetches first, by scale.
FETCH_qm9_small := qm9
FETCH_qm9_paper := qm9
FETCH_matproj_small := materials-project
FETCH_iwslt14_small := libreoffice-help
FETCH_dlrm_small := flights
FETCH_gpt_small := django-docs
# Its runs use both threads themselves.
TRAIN_resnet50 := run
SOLVERS := ngplus-blocks ngplus-dense ngplus-low-rank ngplus-sketched
BENCHES := curvature schnet-loading criteo estimate
BENCH_curvature := bench.curvature_step
BENCH_schnet-loading := bench.loading.schnet_loading
BENCH_criteo := bench.loading.criteo_reader
BENCH_estimate := estimate.check

.DEFAULT_GOAL := help
.PHONY: help setup test test-browser lint lock reproduce reproduce-figure1 reproduce-theory data-iwslt14 force
.PHONY: bench challenge docs gpu package report $(TASKS:%=reproduce-%) $(TASKS:%=tune-%) $(BENCHES:%=bench-%)

help:  ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*##  */\1\t/p; s/^## \([^:]*\): */\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name what; do printf '  %-18s %s\n' "$$name" "$$what"; done

setup: $(STAMP)  ## make .venv with everything that was tested together

$(STAMP): pyproject.toml requirements.lock scripts/set-up.sh
	sh scripts/set-up.sh $(VENV)
	touch $@

test: $(STAMP)  ## run the tests
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(TEST_WORKERS) --dist worksteal

lint: $(STAMP)  ## check the code: ruff, pydoclint, mypy
	$(VENV)/bin/ruff format --check . && $(VENV)/bin/ruff check . && $(VENV)/bin/pydoclint -q ngplus experiments && $(VENV)/bin/mypy

reproduce: $(TASKS:%=reproduce-%)  ## train every task, by default at scale tiny, and print the comparisons

## reproduce-TASK: resnet50, qm9, matproj, iwslt14, dlrm, gpt: SCALE=tiny (minutes), small, paper
$(TASKS:%=reproduce-%): reproduce-%: $(STAMP)
	$(if $(FETCH_$*_$(SIZE)),$(EXPERIMENTS) data $(FETCH_$*_$(SIZE)))
	$(EXPERIMENTS) $(or $(TRAIN_$*),$(TRAIN)) $(TASK_$*) --scale $(SCALE) --results-dir $(RESULTS) $(RUN_OPTIONS)
	$(EXPERIMENTS) table $(TASK_$*) --scale $(SCALE) --results-dir $(RESULTS)

## tune-TASK: search each optimizer's settings, TRIALS each, and write them into the recipe
$(TASKS:%=tune-%): tune-%: $(STAMP)
	$(TUNE) $(TASK_$*)

# Many small matrices: a second thread makes these slower.
reproduce-figure1: $(STAMP)  ## Figure 1: the generalized and the empirical Fisher information
	OMP_NUM_THREADS=1 $(PYTHON) -m experiments.theory.figure1

reproduce-theory: $(STAMP)  ## the theorems, the errata and the cost comparison, as experiments
	OMP_NUM_THREADS=1 $(PYTHON) -m experiments.theory

## data-NAME: fetch a dataset, or make it ready; `python -m experiments list` has the names
data-%: $(STAMP) force
	$(EXPERIMENTS) data $(or $(DATA_$*),$*)

data-iwslt14: $(STAMP)  ## make IWSLT14 ready: RAW=de-en.tgz, its folder, or one of fairseq-preprocess
	$(PYTHON) -m experiments.tasks.transformer.iwslt14_archive $(RAW)

bench: $(STAMP)  ## what a step costs under each optimizer, on the four models
	$(PYTHON) -m experiments.bench.steps --model resnet50 --rounds 3 --also $(SOLVERS)
	$(PYTHON) -m experiments.bench.steps --model resnet50-32 --optimizer ngplus
	$(PYTHON) -m experiments.bench.steps --model schnet
	$(PYTHON) -m experiments.bench.steps --model transformer --rounds 2
	$(PYTHON) -m experiments.bench.steps --model dlrm --rounds 12 --also ngplus-adagrad-32-samples
	$(PYTHON) -m experiments.bench.steps --model dlrm-sparse --optimizer adagrad ngplus-adagrad ngplus-adagrad-32-samples --rounds 60
	OMP_NUM_THREADS=1 $(PYTHON) -m experiments.bench.steps --model gpt --rounds 9 --optimizer adamw ngplus-adamw ngplus-adamw-batch muon "kfac (ngplus.baselines)" "soap (pytorch-optimizer)" "shampoo (pytorch-optimizer)"
	$(PYTHON) -m experiments.bench.rows
	$(PYTHON) -m experiments.bench.convolution_memory
	$(PYTHON) -m experiments.bench.own_work
	$(PYTHON) -m experiments.bench.own_work --model linear-8 --optimizer sgd-foreach sgd ngplus ngplus-foreach --intervals 20
	$(PYTHON) -m experiments.bench.own_work --model linear-64 --optimizer sgd-foreach sgd ngplus ngplus-foreach --intervals 50
	$(PYTHON) -m experiments.bench.cost_chart

## bench-NAME: curvature, schnet-loading, criteo (reading its log), estimate (is it right?)
$(BENCHES:%=bench-%): bench-%: $(STAMP)
	$(PYTHON) -m experiments.$(BENCH_$*) $(OPTIONS)

# E.g. OPTIMIZER=pytorch_optimizer:Lion CHALLENGE_OPTIONS="--tasks schnet-qm9 --search lr=1e-4:1e-2:log".
challenge: $(STAMP)  ## put OPTIMIZER (package.module:Class, ./file.py:Class) to the test
	$(EXPERIMENTS) challenge $(OPTIMIZER) --scale $(SCALE) $(CHALLENGE_OPTIONS)

report: $(STAMP)  ## build results/report/index.html from the records in REPORT=results
	$(EXPERIMENTS) verdicts --short --results-dir $(REPORT)
	$(EXPERIMENTS) report --results-dir $(REPORT)

docs: $(STAMP)  ## build the documentation in build/docs; a warning is an error
	$(VENV)/bin/sphinx-build -E -W --keep-going -q docs build/docs

package: $(STAMP)  ## build the optimizer's and the suite's packages in dist/, and check them
	$(VENV)/bin/uv build --clear && $(VENV)/bin/uv build --wheel suite -o dist && $(VENV)/bin/uvx twine check --strict dist/*

test-browser: $(STAMP)  ## test the report in Debian's chromium, headless
	chromium=$$(sh scripts/chromium.sh) && CHROMIUM=$$chromium OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m browser tests/browser

gpu: $(STAMP)  ## all that needs a GPU: tests, benches, SchNet at the paper's scale (MINUTES=25)
	$(PYTHON) -m experiments.bench.gpu --minutes $(MINUTES)

lock: $(STAMP)  ## write down the newest set of packages that fits pyproject.toml
	$(VENV)/bin/uv pip compile pyproject.toml --extra all --extra dev --extra docs --universal --python-version 3.12 --no-annotate --no-header --no-emit-index-url -o requirements.lock --upgrade
