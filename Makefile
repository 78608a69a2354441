# make setup         set up .venv, which each of these does first where it is
#                    missing: some minutes, from python3 and a package registry
#                    (SETUP_PYTHON=python3.12 takes another Python)
# make demo          train with a server and clients on this machine
#                    (DATASET, NUM_CLIENTS, NUM_ROUNDS, SOURCE can be set; ARGS has
#                    flags of server.py; SLOWDOWN="1 1 2 4" makes boards slower)
# make simulate      train many clients on this machine, on Flower's simulation
#                    engine (these and ARGS can be set)
# make deploy        bring code, bundles and the service to all devices
#                    (INVENTORY=shelf.ini; ARGS, WHEELHOUSE can be set)
# make status        which clients run on them (with INVENTORY, like the next)
# make logs          what these print
# make restart       restart them
# make stop          stop them (VERBOSE=1 shows all that Ansible says)
# make test          lint, and all tests: about 8 minutes on 2 idle cores
# make bench         measure speed and memory beside their references: minutes
# make soak          train under a hail of faults, and without: about 5 minutes
# make test-engines  both of Flower's engines, for real: about 4 minutes, and
#                    Ray, which is heavy, to download
# make test-newest   all tests with the newest of what requirements.txt lets in:
#                    6 GB to download, as the newest torch brings CUDA
# make test-arm64    the README's steps for a device, on emulated ARM cores
# make test-deploy   make deploy to three booted systems, with power cuts
# make test-interop  clients on Python 3.8, 3.10 and 3.13 beside 3.11
#                    (these three: many minutes, as root, on Debian; what they
#                    fetch or make once is kept in ~/.cache/fl-iot)

SETUP_PYTHON ?= python3
PYTHON := .venv/bin/python
VENV = @SETUP_PYTHON="$(SETUP_PYTHON)" bash deploy/make_venv.sh
ifneq ($(dir $(lastword $(MAKEFILE_LIST))),./)
$(error run make in the suite's folder, or as make -C FOLDER)
endif

.PHONY: help setup demo simulate test test-engines test-newest bench soak deploy status logs restart stop test-arm64 test-deploy test-interop
export DATASET NUM_CLIENTS NUM_ROUNDS SOURCE SLOWDOWN ARGS VERBOSE INSECURE

help:
	@sed -n '/^$$/q; s/^# //p' $(MAKEFILE_LIST)

setup: .venv/setup

.venv/setup: requirements.txt constraints.txt
	$(VENV) .venv --constraint constraints.txt --requirement requirements.txt
	@touch $@

.venv/setup-test: .venv/setup
	@$(PYTHON) -m pip install -qq --disable-pip-version-check --constraint constraints.txt \
		hypothesis pillow psutil pytest pytest-xdist ruff
	@touch $@

# Ray is for a laptop alone, and heavy: it has an environment of its own.
.venv-simulation/setup: requirements.txt constraints.txt
	$(VENV) .venv-simulation --constraint constraints.txt --requirement requirements.txt "flwr[simulation]" hypothesis pillow psutil pytest
	@touch $@

SIMULATE = --dataset "$(or $(DATASET),CIFAR10)" $(NUM_CLIENTS:%=--num_clients %) $(NUM_ROUNDS:%=--num_rounds %) $(ARGS)

simulate:
	@$(SETUP_PYTHON) deploy/check_simulation.py $(SIMULATE)
	@$(MAKE) --no-print-directory .venv-simulation/setup
	@.venv-simulation/bin/python deploy/simulate.py $(SIMULATE)

demo: .venv/setup
	@bash deploy/demo.sh

.venv-deploy/setup: deploy/requirements.txt
	$(VENV) .venv-deploy --requirement deploy/requirements.txt
	@touch $@

PLAY = @test -n "$(INVENTORY)" || { echo "make $@ needs INVENTORY=FILE; deploy/inventory.example.ini is one" >&2; exit 2; }; \
	test -e "$(INVENTORY)" || { echo "make $@: there is no inventory $(INVENTORY)" >&2; exit 2; }; \
	ANSIBLE_CONFIG=deploy/ansible.cfg .venv-deploy/bin/ansible-playbook --inventory "$(INVENTORY)" $(ARGS)
WHEELS = $(if $(WHEELHOUSE),--extra-vars '{"wheelhouse": "$(WHEELHOUSE)"}')

deploy: .venv-deploy/setup
	$(PLAY) $(WHEELS) deploy/deploy.yml

status: .venv-deploy/setup
	$(PLAY) --tags status deploy/manage.yml

logs: .venv-deploy/setup
	$(PLAY) --tags logs deploy/manage.yml

restart: .venv-deploy/setup
	$(PLAY) --tags restart deploy/manage.yml

stop: .venv-deploy/setup
	$(PLAY) --tags stop deploy/manage.yml

$(if $(filter test,$(MAKECMDGOALS)),$(info all tests take about 8 minutes on 2 idle cores))

# Most tests wait, for time or for one another. The tests of a file share fixtures, so they stay on one worker.
PARALLEL = --numprocesses 4 --dist loadfile --no-loadscope-reorder

test: .venv/setup-test .venv-deploy/setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check --target-version py38 libs.py data.py nets.py engines.py client.py \
		plumbing/__init__.py plumbing/common plumbing/device
	$(PYTHON) -m pytest $(PARALLEL)

test-engines: .venv-simulation/setup
	.venv-simulation/bin/python -m pytest -s tests/engines/simulation.py tests/engines/deployment.py

test-newest: .venv-deploy/setup
	$(VENV) .venv-newest --upgrade --requirement requirements.txt hypothesis pillow psutil pytest pytest-xdist
	.venv-newest/bin/python -m pip list --format freeze
	.venv-newest/bin/python -m pytest $(PARALLEL)
	.venv-newest/bin/python -m pytest -s tests/engines/deployment.py

bench: .venv/setup-test
	$(PYTHON) benchmarks/bench.py

soak: .venv/setup-test
	$(PYTHON) benchmarks/soak.py

test-arm64 test-deploy test-interop: .venv/setup-test .venv-deploy/setup
	$(PYTHON) -m pytest -x -s -rs tests/shelf/$(@:test-%=%).py
