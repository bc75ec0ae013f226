# make demo    run a real distillation on this machine, including its setup, in about 10 minutes;
#              override settings with: make demo ARGS="seed=1"
# make bench   measure the speed of each part against a peer, and compare with benchmarks/*.json;
#              choose some with: make bench NAMES="rollout push"
# make test    run linters, unit tests, and tests with real Ray and real vLLM, in some of which actors are killed
# make chaos   let the processes of one real run fail about fifty times, and print what that cost, in about an hour
# make audit   look the pinned packages up in a database of known vulnerabilities

PYTHON_BIN := .venv/bin

.PHONY: demo test bench lint unit integration chaos audit setup setup-dev

demo: setup
	@$(PYTHON_BIN)/python -m deploy.demo $(ARGS)

test: lint unit integration

setup:
	@deploy/setup.sh

setup-dev:
	@deploy/setup.sh dev

lint: setup-dev
	$(PYTHON_BIN)/ruff check .
	$(PYTHON_BIN)/ruff format --check .
	$(PYTHON_BIN)/lint-imports
	$(PYTHON_BIN)/pyright

unit: setup-dev
	OMP_NUM_THREADS=1 timeout 900 $(PYTHON_BIN)/python -m pytest tests/unit -n 2 --dist loadfile

audit: setup
	timeout 420 $(PYTHON_BIN)/python -m deploy.dependency_audit

integration: setup-dev
	timeout 4500 $(PYTHON_BIN)/python -m pytest tests/integration tests/chaos -n 2 --dist loadfile --durations=15

chaos: setup-dev
	$(PYTHON_BIN)/python -m tests.chaos.soak

# One benchmark after the other; a stored result, where there is one, is the baseline. All run, even if one fails.
bench: setup
	@failed=; for name in $(or $(NAMES),$$($(PYTHON_BIN)/distill bench | cut -d' ' -f1)); do \
	    stored=benchmarks/$$name.json; [ -f $$stored ] || stored=; \
	    echo "bench: $$name"; \
	    $(PYTHON_BIN)/distill bench $$name --json runs/bench/$$name.json $${stored:+--baseline $$stored} \
	        || failed="$$failed $$name"; \
	done; [ -z "$$failed" ] || { echo "bench: failed:$$failed" >&2; exit 1; }
