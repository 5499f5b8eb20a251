# Every target makes .venv with the pinned packages first, once; later calls reuse it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# GPU=1 installs faiss-gpu in place of faiss-cpu
EXTRA := $(if $(GPU),gpu,cpu)
STAMP := $(VENV)/.installed-$(EXTRA)
CONFIG ?= demo.toml
# ARGS="--name sasrec-id --set train.epochs=3" goes to the command
HLLM := $(BIN)/hllm
RUN = $(HLLM) $(1) --config $(CONFIG) $(ARGS)

.DEFAULT_GOAL := help
.PHONY: $(shell grep -oE '^[a-z-]+:' Makefile | tr -d :)

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-17s %s\n", $$1, $$2}'

$(STAMP): constraints.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.installed-*
	@echo "installing the pinned packages into $(VENV), about two minutes" >&2
	@$(if $(GPU),$(BIN)/python -m pip uninstall -qy faiss-cpu >&2,true)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRA),demo,test]' >&2
	@touch $@

install: $(STAMP) ## make .venv with the pinned packages (GPU=1: faiss-gpu)

demo: $(STAMP) ## the whole pipeline on MovieLens-100K, from nothing; its last line is compare-runs' JSON
	@$(HLLM) demo --config $(CONFIG) $(ARGS)

data: $(STAMP) ## prepare-data: check, quarantine, order (CONFIG=your.toml here and below)
	@$(call RUN,prepare-data)

import-checkpoint: $(STAMP) ## towers from a checkpoint of the paper's code (CONFIG=official-1b.toml)
	@$(call RUN,import-checkpoint)

tune-items: $(STAMP) ## stage I: tune the Item LLM with a small user tower
	@$(call RUN,tune-items)

embed-items: $(STAMP) ## embed new and changed items, publish a snapshot
	@$(call RUN,embed-items)

train-user: $(STAMP) ## stage II: train the user tower on the cache
	@$(call RUN,train-user)

train-ranker: $(STAMP) ## a ranker on clicks and what was shown (ARGS="--set ranker.fusion=early")
	@$(call RUN,train-ranker)

evaluate-ranker: $(STAMP) ## AUC and log loss of the ranker, with intervals
	@$(call RUN,evaluate-ranker)

rank: $(STAMP) ## click probabilities (ARGS="--user ID --items id,id")
	@$(call RUN,rank)

build-index: $(STAMP) ## FAISS index over the snapshot
	@$(call RUN,build-index)

evaluate: $(STAMP) ## full-catalog recall and NDCG with intervals
	@$(call RUN,evaluate)

compare-runs: $(STAMP) ## one table of all evaluated runs
	@$(call RUN,compare-runs)

recommend: $(STAMP) ## recommend (ARGS="--user ID" or "--items id,id")
	@$(call RUN,recommend)

embed-users: $(STAMP) ## the vector of every user whose history or tower is new
	@$(call RUN,embed-users)

export-users: $(STAMP) ## the newest user vectors as float32 lists (ARGS="--out FILE.parquet")
	@$(call RUN,export-users)

refresh: $(STAMP) ## one night, promoted or held (CONFIG=nightly.toml; ARGS=--dry-run)
	@$(call RUN,refresh)

releases: $(STAMP) ## what was released (ARGS=list, show, promote, rollback)
	@$(HLLM) releases $(or $(ARGS),list) --config $(CONFIG)

forget-user: $(STAMP) ## take a user out of everything in the store, for good (ARGS="--user ID")
	@$(call RUN,forget-user)

mlflow-ui: $(STAMP) ## runs and releases in a browser, on this machine alone (STORE=folder)
	@$(BIN)/mlflow ui --host 127.0.0.1 --backend-store-uri $${MLFLOW_TRACKING_URI:-sqlite:///$(or $(STORE),store)/mlflow.db}

paper-table: $(STAMP) ## DATA=FOLDER: the paper's comparison on it, resumable; hours (ARGS="--budget-minutes 10")
	@$(HLLM) paper-table --config paper-table.toml $(if $(DATA),--data $(DATA)) $(ARGS)

bench-seeds: $(STAMP) ## the demo's runs over three seeds, paired difference tuned - frozen
	@$(HLLM) bench seeds --config $(CONFIG) $(ARGS)

bench-grid: $(STAMP) ## the grid for sasrec-id and tuned-cache on validation, after the demo
	@$(HLLM) bench grid --config $(CONFIG) $(ARGS)

bench-embed: $(STAMP) ## the Ray job against its encoder, the roofline and sentence-transformers, after make data
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRA),demo,test,bench]' >&2
	@$(HLLM) bench embed --config $(CONFIG) $(ARGS)

bench-train: $(STAMP) ## training speed against RecTools' and RecBole's SASRec, stage I's tokens, memory (DATA=FOLDER)
	@$(HLLM) bench train --config $(if $(DATA),paper-table.toml --data $(DATA),$(CONFIG)) $(ARGS)

bench-cache: $(STAMP) ## a plan of 10M items, and opening 1M x 384 against np.load (20 GB of disk)
	@$(HLLM) bench cache --config $(CONFIG) $(ARGS)

bench-ingest: $(STAMP) ## 20M interactions and 2M items from gz CSV against polars' bare scan (2 GB of disk)
	@$(HLLM) bench ingest --config $(CONFIG) $(ARGS)

bench-retrieve: $(STAMP) ## exact and ANN search against FAISS flat and torch, 100k vectors (ARGS="--set bench.vectors=1000000": 1M)
	@$(HLLM) bench retrieve --config $(CONFIG) $(ARGS)

bench-evaluate: $(STAMP) ## a whole evaluation against the bare score-and-top-k and RecBole's full sort (1.5 GB)
	@$(HLLM) bench evaluate --config $(CONFIG) $(ARGS)

bench-fortnight: $(STAMP) ## DATA=FOLDER: 14 nights of it with faults, resumable; an hour with amazon2014-beauty
	@$(HLLM) bench fortnight --config fortnight.toml $(if $(DATA),--data $(DATA)) $(ARGS)

bench-rank: $(STAMP) ## what a candidate costs under late and early fusion, against a bare inner product
	@$(HLLM) bench rank --config $(CONFIG) $(ARGS)

bench-gpu: $(STAMP) ## both towers of a 1B shape on one GPU: tokens/s and MFU, against sentence-transformers
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRA),demo,test,bench]' >&2
	@$(HLLM) bench gpu $(ARGS)

bench-scale: $(STAMP) ## bytes and hours of 10M and 100M items, 100M users on 1, 8, 64 GPUs (ARGS="--set bench.rates.embed_tokens=...")
	@$(HLLM) bench scale --config $(CONFIG) $(ARGS)

test: $(STAMP) ## the fast tests, several at once (ARGS="-n0 -k NAME": some, in one process)
	@$(BIN)/python -m pytest -q -m "not slow and not gpu" -n auto --maxprocesses 4 --dist worksteal $(ARGS)

test-all: $(STAMP) ## every test that this machine can run
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRA),demo,test,peers]' >&2
	@$(BIN)/python -m pytest -q $(ARGS)

lint: $(STAMP) ## ruff
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(STAMP) ## mypy
	@$(BIN)/mypy
