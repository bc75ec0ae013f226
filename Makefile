# make demo    run a real distillation on this machine, including its setup, in about 10 minutes;
#              override settings with: make demo ARGS="seed=1"
# make test    run linters, unit tests, and integration tests with real Ray and real vLLM

PYTHON_BIN := .venv/bin

.PHONY: demo test lint unit integration setup setup-dev

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
	OMP_NUM_THREADS=1 timeout 300 $(PYTHON_BIN)/python -m pytest tests/unit -n 2 --dist loadfile

integration: setup-dev
	timeout 3000 $(PYTHON_BIN)/python -m pytest tests/integration
