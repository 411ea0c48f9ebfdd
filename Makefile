# make demo   set up .venv if needed; ten views of a real face vote, then plain and voting networks learn toy faces
# make test   set up .venv if needed, then lint, types and the tests (under 7 minutes on 2 cores)
# make test-slow   the examples in README, docs and docstrings, and the slow tests (20 minutes)
# make test-all   both, and every family of timm on real images (an hour and a half)

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo docs docs-serve check test test-pages test-slow test-zoo test-all test-oldest clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e ".[timm,fer,detect,app,serve,onnx,docs,dev,tools]"
	touch $@

demo: setup
	$(BIN)/python examples/fer48/demo.py --out runs/demo
	$(BIN)/python examples/fer48/compare.py --sites none layer1 --train-views 2 --seeds 0 --width 8 --batch 32 --epochs 6 --out runs/demo

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest -n auto tests

test-pages: setup
	$(BIN)/python -m pytest -q -n auto --dist loadfile README.md docs cropvote  # a page in order: its examples build on one another

test-slow: test-pages
	$(BIN)/python -m pytest -m slow -n auto tests

test-zoo: setup
	$(BIN)/python -m pytest -m zoo -n auto

test-all: test test-slow test-zoo

# the library on the oldest Python and the oldest packages that pyproject.toml allows
OLDEST ?= python3.10
CORE := views voting oracle surgery calls reading misuse probe memo copying strange_models arguments plans hazards lost_splits stopping costs suggesting company tracking checks aligned config
test-oldest: setup
	$(OLDEST) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet hypothesis matplotlib "numpy<2" pytest pytest-xdist scikit-image sybil \
	  $$($(BIN)/python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	  print(*(d.replace('>=', '==') for d in p['dependencies'] + p['optional-dependencies']['timm']))")
	.venv-oldest/bin/python -m pytest -n auto -p no:cacheprovider $(CORE:%=tests/test_%.py)

docs: setup
	$(BIN)/python -m mkdocs build --strict

docs-serve: setup
	$(BIN)/python -m mkdocs serve

clean:
	rm -rf .venv .venv-oldest runs build dist site
