# What one types while working here. Each target runs in the environment that is active.
.PHONY: test slow lint types docs bench

test:  # the fast tests
	pytest

slow:  # whole runs, kills, several processes; three at a time, since many of them wait
	pytest -n 3 -m slow -k 'not digits_quality'
	pytest -n 0 -m slow tests/test_main.py -k digits_quality  # alone, or its threads wait for other tests

lint: types  # style, types, scripts, words
	ruff check .
	ruff format --check .
	shellcheck .ci/run launch/*.sh
	python -m tests.words
	python -m tests.texture

types:
	mypy

docs:  # the site, strictly; needs '.[docs]'
	mkdocs build --quiet --strict

bench:  # the digits' parts; OUT is where the tables go
	python -m sphere_ar_jax.benchmark --config=configs/digits.py --output=$(or $(OUT),bench)
