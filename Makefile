# Everything a person types. `make help` lists it. SCALE is tiny, small or paper.

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
TUNE = $(EXPERIMENTS) tune --scale $(SCALE) $(if $(TRIALS),--trials $(TRIALS)) $(TUNE_OPTIONS)

# Where it is set, as in many containers, each process would compile torch and the others anew: 6 of a run's 11 seconds.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: report test-browser docs package
.PHONY: help setup test lint lock reproduce reproduce-resnet50 reproduce-figure1 reproduce-theory
.PHONY: reproduce-iwslt14 data-libreoffice-help data-ding data-iwslt14
.PHONY: reproduce-dlrm data-flights data-criteo bench-criteo
.PHONY: reproduce-qm9 reproduce-matproj data-qm9 data-matproj bench-schnet-loading
.PHONY: data-fashion-mnist bench bench-curvature bench-estimate gpu tune-resnet50 tune-qm9 tune-matproj tune-iwslt14 tune-dlrm

help:  ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*##  */\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name what; do printf '  %-20s %s\n' "$$name" "$$what"; done

setup: $(STAMP)  ## make .venv with everything that was tested together

$(STAMP): pyproject.toml requirements.lock scripts/set-up.sh
	sh scripts/set-up.sh $(VENV)
	touch $@

test: $(STAMP)  ## run the tests
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(TEST_WORKERS) --dist worksteal

lint: $(STAMP)  ## check the code: ruff, mypy
	$(VENV)/bin/ruff format --check . && $(VENV)/bin/ruff check . && $(VENV)/bin/mypy

reproduce: reproduce-resnet50 reproduce-qm9 reproduce-matproj reproduce-iwslt14 reproduce-dlrm  ## train every task there is, by default at scale tiny, and print the comparison

reproduce-resnet50: $(STAMP)  ## ResNet on images: SCALE=tiny (minutes), small (hours), paper (ImageNet)
	$(EXPERIMENTS) run resnet50-imagenet --scale $(SCALE) --results-dir $(RESULTS) $(RUN_OPTIONS)
	$(EXPERIMENTS) table resnet50-imagenet --scale $(SCALE) --results-dir $(RESULTS)

reproduce-qm9: $(STAMP)  ## SchNet on molecules: SCALE=tiny, small (20,000 of QM9), paper (all of QM9)
	$(if $(filter small paper,$(SCALE)),$(EXPERIMENTS) data qm9)
	$(EXPERIMENTS) $(TRAIN) schnet-qm9 --scale $(SCALE) --results-dir $(RESULTS) $(RUN_OPTIONS)
	$(EXPERIMENTS) table schnet-qm9 --scale $(SCALE) --results-dir $(RESULTS)

reproduce-matproj: $(STAMP)  ## SchNet on crystals: SCALE=tiny, small (3,938 crystals), paper (schnetpack's database)
	$(if $(filter small,$(SCALE)),$(EXPERIMENTS) data materials-project)
	$(EXPERIMENTS) $(TRAIN) schnet-matproj --scale $(SCALE) --results-dir $(RESULTS) $(RUN_OPTIONS)
	$(EXPERIMENTS) table schnet-matproj --scale $(SCALE) --results-dir $(RESULTS)

reproduce-iwslt14: $(STAMP)  ## the Transformer on German-English: SCALE=tiny, small (help pages), paper (IWSLT14)
	$(if $(filter small,$(SCALE)),$(EXPERIMENTS) data libreoffice-help)
	$(EXPERIMENTS) $(TRAIN) transformer-iwslt14 --scale $(SCALE) --results-dir $(RESULTS) $(RUN_OPTIONS)
	$(EXPERIMENTS) table transformer-iwslt14 --scale $(SCALE) --results-dir $(RESULTS)

reproduce-dlrm: $(STAMP)  ## DLRM on clicks: SCALE=tiny, small (flights of 2013), paper (Criteo Kaggle)
	$(if $(filter small,$(SCALE)),$(EXPERIMENTS) data flights)
	$(EXPERIMENTS) $(TRAIN) dlrm-criteo --scale $(SCALE) --results-dir $(RESULTS) $(RUN_OPTIONS)
	$(EXPERIMENTS) table dlrm-criteo --scale $(SCALE) --results-dir $(RESULTS)

tune-resnet50: $(STAMP)  ## search each optimizer's settings with TRIALS trials, and write them into the recipe
	$(TUNE) resnet50-imagenet

tune-qm9: $(STAMP)  ## the same for SchNet on QM9
	$(TUNE) schnet-qm9

tune-matproj: $(STAMP)  ## the same for SchNet on crystals
	$(TUNE) schnet-matproj

tune-iwslt14: $(STAMP)  ## the same for the Transformer
	$(TUNE) transformer-iwslt14

tune-dlrm: $(STAMP)  ## the same for DLRM
	$(TUNE) dlrm-criteo

# Many small matrices: a second thread makes these slower.
reproduce-figure1: $(STAMP)  ## Figure 1: the generalized Fisher information beside the empirical one
	OMP_NUM_THREADS=1 $(PYTHON) -m experiments.theory.figure1

reproduce-theory: $(STAMP)  ## the theorems, the errata and the cost comparison, as experiments
	OMP_NUM_THREADS=1 $(PYTHON) -m experiments.theory

data-fashion-mnist: $(STAMP)  ## fetch Fashion-MNIST, for SCALE=small; once, then no network is needed
	$(EXPERIMENTS) data fashion-mnist

data-libreoffice-help: $(STAMP)  ## fetch the German and English help pages of LibreOffice
	$(EXPERIMENTS) data libreoffice-help

data-ding: $(STAMP)  ## fetch the example sentences of the Ding dictionary
	$(EXPERIMENTS) data ding

data-qm9: $(STAMP)  ## fetch all of QM9, 104 MB, and parse it, for SCALE=small and paper
	$(EXPERIMENTS) data qm9

data-matproj: $(STAMP)  ## fetch 3,938 crystals of the Materials Project, for SCALE=small
	$(EXPERIMENTS) data materials-project

data-flights: $(STAMP)  ## fetch the flights out of New York in 2013
	$(EXPERIMENTS) data flights

data-criteo: $(STAMP)  ## make data/criteo/train.txt of Criteo Kaggle ready: once, then runs map it from disk
	$(EXPERIMENTS) data criteo

data-iwslt14: $(STAMP)  ## make IWSLT14 ready: RAW=de-en.tgz, the folder in it, or one of fairseq-preprocess
	$(PYTHON) -m experiments.data.iwslt14_archive $(RAW)

bench-curvature: $(STAMP)  ## what building the curvature of resnet50 costs beside a forward and backward
	$(PYTHON) -m experiments.bench.curvature

bench-schnet-loading: $(STAMP)  ## what loading adds to a training step of SchNet
	$(PYTHON) -m experiments.bench.schnet_loading

bench: $(STAMP)  ## what a step costs under each optimizer, on the four models
	$(PYTHON) -m experiments.bench.steps
	$(PYTHON) -m experiments.bench.steps --model resnet50-32 --optimizer ngplus
	$(PYTHON) -m experiments.bench.steps --model dlrm-sparse --optimizer adagrad ngplus-adagrad ngplus-adagrad-32-samples --rounds 60
	$(PYTHON) -m experiments.bench.rows
	$(PYTHON) -m experiments.bench.convolution_memory
	$(PYTHON) -m experiments.bench.own_work
	$(PYTHON) -m experiments.bench.chart

bench-estimate: $(STAMP)  ## whether `python -m experiments estimate` predicts what a run takes; OPTIONS=--cpu-time on a busy machine
	$(PYTHON) -m experiments.estimate.check $(OPTIONS)

bench-criteo: $(STAMP)  ## how fast Criteo's log is read, on a made file of 5 million lines, and in how much memory
	$(PYTHON) -m experiments.bench.criteo_reader

report: $(STAMP)  ## build results/report/index.html from the records: REPORT=results is the folder it reads
	$(EXPERIMENTS) verdicts --short --results-dir $(REPORT)
	$(EXPERIMENTS) report --results-dir $(REPORT)

docs: $(STAMP)  ## build the documentation in build/docs; a warning is an error
	$(VENV)/bin/sphinx-build -E -W --keep-going -q docs build/docs

package: $(STAMP)  ## build wheel and sdist in dist/, and check them
	$(VENV)/bin/uv build --clear && $(VENV)/bin/uvx twine check --strict dist/*

test-browser: $(STAMP)  ## test the report in Debian's chromium, headless
	chromium=$$(sh scripts/chromium.sh) && CHROMIUM=$$chromium OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m browser tests/browser

gpu: $(STAMP)  ## everything that wants a GPU, in one call: tests, benches, SchNet at the paper's scale (MINUTES=25)
	$(PYTHON) -m experiments.bench.gpu --minutes $(MINUTES)

lock: $(STAMP)  ## write down the newest set of packages that fits pyproject.toml
	$(VENV)/bin/uv pip compile pyproject.toml --all-extras --universal --python-version 3.12 --no-annotate --no-header --no-emit-index-url -o requirements.lock --upgrade
