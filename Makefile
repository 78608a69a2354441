# make demo    train with a server and clients on this machine (DATASET, NUM_CLIENTS, NUM_ROUNDS, SOURCE can be set)
# make simulate    train many clients on this machine, on Flower's simulation engine (these and ARGS can be set)
# make test    lint, and all tests
# make bench   measure speed and memory beside their references
# make soak    train under a hail of faults, and without
# make deploy INVENTORY=shelf.ini     bring code, bundles and the service to all devices (ARGS, WHEELHOUSE can be set)
# make status, logs, restart, stop    of all clients, likewise with INVENTORY
# make test-arm64    the README's steps for a device, on emulated ARM cores       (these three: as root, on Debian;
# make test-deploy   make deploy to three booted systems, with power cuts          what they fetch or make once is
# make test-interop  clients on Python 3.8, 3.10 and 3.13 beside 3.11              kept in ~/.cache/fl-iot)
# make test-engines  both of Flower's engines, for real                            (with Ray, which is heavy)
# make test-newest   all tests with the newest of what requirements.txt lets in    (6 GB: the newest torch brings CUDA)
# Each sets up .venv first, from python3 and a package registry. SETUP_PYTHON=python3.12 takes another Python.

SETUP_PYTHON ?= python3
PYTHON := .venv/bin/python
INSTALL := @$(PYTHON) -m pip install -qq --disable-pip-version-check --constraint constraints.txt

.PHONY: setup demo simulate test test-engines test-newest bench soak deploy status logs restart stop test-arm64 test-deploy test-interop
export DATASET NUM_CLIENTS NUM_ROUNDS SOURCE

setup: .venv/setup

.venv/setup: requirements.txt constraints.txt
	@$(SETUP_PYTHON) -m venv .venv
	@echo "installing requirements.txt into .venv; the first time this takes a minute or two"
	$(INSTALL) --requirement requirements.txt
	@touch $@

.venv/setup-test: .venv/setup
	$(INSTALL) hypothesis pillow psutil pytest pytest-xdist ruff
	@touch $@

# Ray is for a laptop alone, and heavy: it has an environment of its own.
.venv-simulation/setup: requirements.txt constraints.txt
	@$(SETUP_PYTHON) -m venv .venv-simulation
	@echo "installing requirements.txt and Ray into .venv-simulation; the first time this takes some minutes"
	@.venv-simulation/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt \
		--requirement requirements.txt "flwr[simulation]" hypothesis pillow psutil pytest
	@touch $@

simulate: .venv-simulation/setup
	@.venv-simulation/bin/python deploy/simulate.py --dataset "$(or $(DATASET),CIFAR10)" $(NUM_CLIENTS:%=--num_clients %) \
		$(NUM_ROUNDS:%=--num_rounds %) $(ARGS)

demo: .venv/setup
	@bash deploy/demo.sh

.venv-deploy/setup: deploy/requirements.txt
	@$(SETUP_PYTHON) -m venv .venv-deploy
	@.venv-deploy/bin/python -m pip install -qq --disable-pip-version-check --requirement deploy/requirements.txt
	@touch $@

PLAY = @test -n "$(INVENTORY)" || { echo "make $@ needs INVENTORY=FILE; deploy/inventory.example.ini is one" >&2; exit 2; }; \
	ANSIBLE_CONFIG=deploy/ansible.cfg .venv-deploy/bin/ansible-playbook --inventory "$(INVENTORY)" $(ARGS)
WHEELS = $(if $(WHEELHOUSE),--extra-vars "wheelhouse=$(WHEELHOUSE)")

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

# Most tests wait, for time or for one another. The tests of a file share fixtures, so they stay on one worker.
PARALLEL = --numprocesses 4 --dist loadfile --no-loadscope-reorder

test: .venv/setup-test .venv-deploy/setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check --target-version py38 libs.py data.py nets.py engines.py wire.py client.py
	$(PYTHON) -m pytest $(PARALLEL)

test-engines: .venv-simulation/setup
	.venv-simulation/bin/python -m pytest -s tests/engines/simulation.py tests/engines/deployment.py

test-newest: .venv-deploy/setup
	@$(SETUP_PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install -qq --upgrade --requirement requirements.txt hypothesis pillow psutil pytest pytest-xdist
	.venv-newest/bin/python -m pip list --format freeze
	.venv-newest/bin/python -m pytest $(PARALLEL)
	.venv-newest/bin/python -m pytest -s tests/engines/deployment.py

bench: .venv/setup-test
	$(PYTHON) benchmarks/bench.py

soak: .venv/setup-test
	$(PYTHON) benchmarks/soak.py

test-arm64 test-deploy test-interop: .venv/setup-test .venv-deploy/setup
	$(PYTHON) -m pytest -x -s -rs tests/shelf/$(@:test-%=%).py
