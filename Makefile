# The only two commands a newcomer needs: make demo, make test. Both make .venv and install what they need.
PYTHON ?= python3
BIN := .venv/bin
# a file's tests stay in one process, for they share what is slow to make
PYTEST := pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# losses, codec, stream and config: a minute, while one works on them
FAST := tests/losses tests/config tests/data/test_codebook.py tests/data/test_codec.py tests/data/test_stream.py

.PHONY: demo test fast lint check cluster-test cluster-test-fast cluster-programs clean

demo: .venv/installed
	$(BIN)/megakd demo

test: .venv/installed
	$(BIN)/$(PYTEST)

fast: .venv/installed
	$(BIN)/$(PYTEST) -m 'not ranks' $(FAST)

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# jobs of Slurm, and launches over ssh, on two hosts that this machine makes of itself; docs/launching.md, "Limits"
CLUSTER := MEGAKD_TEST_CLUSTER=1 $(BIN)/$(PYTEST) --numprocesses 3 tests/test_cluster_faults.py tests/test_cluster.py \
  tests/test_hosts.py

cluster-test: .venv/installed cluster-programs
	$(CLUSTER) --durations=10

# three minutes of them
cluster-test-fast: .venv/installed cluster-programs
	$(CLUSTER) -m brief

# tests skip where a program is missing; as root this installs the programs
PACKAGES := iproute2 munge openmpi-bin openssh-server pdsh slurm-wlm
cluster-programs:
	@type ip munged mpirun sshd pdsh slurmctld >/dev/null 2>&1 || [ "$$(id -u)" != 0 ] || \
	  { echo "installing $(PACKAGES)" && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(PACKAGES); } || \
	  echo "not installed: $(PACKAGES)"

# `make check test` runs the tests once
check: lint test

# the pins first, then MegaKD and all its extras within their ranges, which must not ask for anything else
PINS := requirements.txt requirements-dev.txt
.venv/installed: $(PINS) pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(addprefix --requirement ,$(PINS))
	$(BIN)/pip install --quiet --disable-pip-version-check $(addprefix --constraint ,$(PINS)) --editable '.[dev]'
	touch $@

# of demo/ only what `make demo` put there
clean:
	rm -rf .venv demo/kd demo/ce
	rmdir demo 2>/dev/null || true
