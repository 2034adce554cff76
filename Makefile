# Every target is plain lines that also work typed by hand. `make help` lists them.
SHELL := /bin/bash
.PHONY: help demo clean-demo setup test quick unit simulate exhaustive mutants bench bench-short cluster-tools fmt fuzz golden clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

# What the demo runs, always built by these very words: cargo unites the features of the packages it is asked for, so
# another choice of packages would compile their dependencies anew. Built as the tests build, in a third of the time of
# a release and with all assertions: the demo shows that nothing is lost, not how fast it is.
DEMO_BUILD := cargo build -p lamina-operator -p lamina-storage-node -p lamina-csi-node -p lamina-demo
DEMO := $${CARGO_TARGET_DIR:-target}/debug/lamina-demo

demo: setup ## a real Kubernetes, PostgreSQL on a 2-copy volume, a storage server killed: nothing lost (leaves it up)
	./e2e/cluster/build-tools.sh
	$(DEMO_BUILD)
	$(DEMO) run

clean-demo: ## remove the demo's cluster, its state and its images; fails by name if anything is left
	[ -x $(DEMO) ] || $(DEMO_BUILD)
	$(DEMO) clean

setup: ## install what builds and tests need from Debian's packages (root; idempotent)
	./e2e/setup.sh

test: setup ## everything: style, lints, unit tests, simulator, processes, a real Kubernetes; the skipped are named and counted
	./e2e/test.sh

quick: ## format, lints and tidy checks only (what fails first in CI)
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo test -q -p lamina-e2e --test tidy

unit: ## unit and process tests of the workspace
	cargo test --workspace

simulate: ## five minutes of fresh seeds in the deterministic simulator (SECONDS_TO_RUN=300)
	cargo run --profile sim -p lamina-e2e --features mutants --bin simulate -- --seconds $${SECONDS_TO_RUN:-300}

exhaustive: ## one trouble of each kind at each event of each start state; BUDGET=2 tries pairs (SECONDS_TO_RUN=1800)
	cargo run --profile sim -p lamina-e2e --features mutants --bin simulate -- --exhaustive --budget $${BUDGET:-1} --seconds $${SECONDS_TO_RUN:-1800}

mutants: ## deliberate protocol mistakes, one at a time: the simulator's oracles must find each (about 10 minutes)
	cargo run --profile sim -p lamina-e2e --features mutants --bin mutants -- --threads 2

bench: ## volumes beside qemu-nbd, nbdkit and the raw disk as ratios, and what replication costs (40 minutes; keep the machine quiet)
	cargo build --release -p lamina-operator -p lamina-storage-node -p lamina-csi-node -p lamina-bench
	target/release/lamina-bench run --output target/bench.md $(BENCH)
	target/release/lamina-bench replication --output target/replication.md $(REPLICATION)
	LAMINA_PAGES=10000000 cargo test --release -q -p lamina-storage-node --lib many_pages -- --nocapture

bench-short: ## the benchmark for a minute, with debug programs: only that it works
	cargo build -p lamina-operator -p lamina-storage-node -p lamina-csi-node -p lamina-bench
	target/debug/lamina-bench run --short

cluster-tools: ## build etcd, Kubernetes, containerd, runc and the CSI sidecars from Go modules, once (about 10 minutes)
	./e2e/cluster/build-tools.sh

fuzz: ## fuzz the decoders of wire, control messages and devices (SECONDS_TO_RUN=600 each, two at a time)
	./fuzz/run.sh $${SECONDS_TO_RUN:-600}

fmt: ## format the tree
	cargo fmt --all

golden: ## write the golden files anew (CRD manifests, wire frames, disk records)
	UPDATE_GOLDEN=1 cargo test -q -p lamina-crds --test golden
	UPDATE_GOLDEN=1 cargo test -q -p lamina-protocol --test golden
	UPDATE_GOLDEN=1 cargo test -q -p lamina-storage-node --lib golden
	UPDATE_GOLDEN=1 cargo test -q -p lamina-fuzz --test corpus

clean: ## remove build output
	cargo clean
