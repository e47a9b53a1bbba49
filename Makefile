# make demo   see it work: an S3, a model, a mount, a load
# make test   lint, types and all tests
# Both install what is missing first (see .ci/setup).

.PHONY: setup demo lint test docs lock

setup:
	@./.ci/setup

demo: setup
	@PYTHONPATH=tests .venv/bin/python bench/demo.py

lint: setup
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@.venv/bin/mypy

# Most of a test is waiting, so more run at once than there are processors.
JOBS ?= $(shell expr 3 \* $$(nproc))
test: lint
	@./.ci/s3-servers
	@./.ci/tests $(JOBS)

# Mutation tests of the unit tests: make mutants PACKAGE=blocks SAMPLE=20. Hours for a whole package.
.PHONY: mutants
mutants: setup
	@for package in $(or $(PACKAGE),blocks prefetch cache fetch pagecache store); do \
	    .venv/bin/python .ci/mutants $$package || exit; done

# The references of options and metrics, made from the tables in the code.
docs: setup
	@.venv/bin/python docs/make_options.py
	@.venv/bin/python docs/make_metrics.py
	@.venv/bin/python docs/make_refusals.py
	@.venv/bin/python docs/make_models.py

# Newest versions that fit pyproject.toml, pinned with the hashes of their files; needs the tool uv.
LOCK = uv pip compile --universal --python-version 3.11 --generate-hashes --no-annotate --no-header -q
lock:
	$(LOCK) pyproject.toml --all-extras -U -o constraints.txt
	$(LOCK) pyproject.toml --extra csi --extra otel --extra verify -c constraints.txt \
	    -U -o constraints/image.txt
	$(LOCK) --group build -U -o constraints/build.txt
	$(LOCK) --group release -c constraints.txt -U -o constraints/release.txt

# Known vulnerabilities of what constraints.txt and constraints/ pin.
.PHONY: audit
audit:
	@./.ci/audit

# A mount's life on S3 servers that others wrote, more than in `make test`: see docs/S3.md. The first
# run takes minutes to build some of them.
.PHONY: s3-matrix
s3-matrix: setup
	@./.ci/s3-servers --all
	@LAZYFS_S3_MATRIX=1 .venv/bin/python -m pytest -rs tests/mount/test_servers.py

# Faulty S3, kills, dropped pages, forgotten inodes and 256 readers at once: `make soak SECONDS=3600`.
.PHONY: soak
soak: setup
	@.venv/bin/python tests/soak.py $(or $(SECONDS),120)

# 1 to 1,024 threads fault at once, with each policy of --prefetch, with and without a disk: two
# minutes or more.
.PHONY: faults
faults: setup
	@LAZYFS_FAULTS=1 .venv/bin/python -m pytest -v tests/mount/test_many_faults.py

# lazyfs beside a download and other mounts, on this machine: `make bench` takes 35 minutes,
# `make bench RUN=quick` seven; PEERS=all compiles Mountpoint for S3 first. Needs root.
.PHONY: bench
bench: setup
	@./bench/install
	@.venv/bin/python bench/run.py $(or $(RUN),standard) $(ARGS)

# The image, on a base made by debootstrap, its SBOM, and a try of it. Needs root; the SBOM, Go.
.PHONY: image
image: setup
	@SBOM=$${SBOM-build/image/lazyfs.cdx.json} ./deploy/image.sh
	@.venv/bin/python -m pytest tests/deploy/test_image.py

# What a release consists of, into dist/VERSION: see deploy/release.sh. Needs root and Go.
.PHONY: release release-test
release: setup
	@./deploy/release.sh

# The release on fresh trees of Debian bookworm and trixie: see docs/TESTING.md. Needs root.
release-test: setup
	@LAZYFS_RELEASE=1 .venv/bin/python -m pytest -rs -p no:xdist tests/release $(ARGS)

# deploy/kubernetes, from the chart; needs helm, which is built if there is Go.
.PHONY: manifests
manifests:
	@./deploy/render.sh

# A real Kubernetes on this machine, the chart in it, and the scenarios of tests/cluster: see
# docs/TESTING.md. `make cluster ARGS='-k inline'` runs some of them; `make cluster KEEP=1` keeps it
# up until `make cluster-down`. Needs root and Go.
.PHONY: cluster cluster-down
cluster: setup
	@KEEP=$(KEEP) .venv/bin/python tests/cluster/main.py run $(ARGS)

cluster-down:
	@.venv/bin/python tests/cluster/main.py down

# Loaders that others wrote (vLLM, transformers, diffusers, ...) on real mounts: see docs/LOADERS.md.
# Needs root, strace, and 7 GB of disk for the loaders; `make loaders ARGS='--rounds 1 -k runai'`;
# ARGS=--write puts the results into that page.
.PHONY: loaders
loaders: setup
	@./.ci/s3-servers
	@./tests/loaders/install
	@.venv/bin/python tests/loaders/main.py $(ARGS)
