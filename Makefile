# `make demo` and `make test` install what they need into .venv and run.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

MATRIX := build/matrix
ENDS := oldest newest

.PHONY: demo test test-matrix lint format docs clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

test: $(INSTALLED)  # as many files at once as there are cores, at most four
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(TESTS)

# The two ends of the supported range of TRL, each in an environment of its own.
test-matrix: $(ENDS:%=$(MATRIX)/%/installed)
	@for end in $(ENDS); do \
		$(MATRIX)/$$end/bin/python -c 'import transformers, trl; \
			print(f"trl {trl.__version__}, transformers {transformers.__version__}")' || exit 1; \
		$(MATRIX)/$$end/bin/python -m pytest tests/test_trl.py || exit 1; \
	done

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p sage_select
	$(BIN)/mypy adapters examples/*.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)
	$(BIN)/python -m sphinx -E -W --keep-going -q docs build/docs
	@echo "build/docs/index.html"

clean:
	rm -rf .venv build runs *.egg-info

$(INSTALLED): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "sage-select needs Python 3.11 or newer; try: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)

$(MATRIX)/%/installed: constraints-oldest.txt pyproject.toml
	test -x $(MATRIX)/$*/bin/python || $(PYTHON) -m venv $(MATRIX)/$*
	$(MATRIX)/$*/bin/python -m pip install --quiet torch==2.13.0
	$(MATRIX)/$*/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
		$(if $(filter oldest,$*),--constraint constraints-oldest.txt) torch==2.13.0 \
		--editable '.[trl]' hypothesis peft pytest pytest-timeout
	touch $@
