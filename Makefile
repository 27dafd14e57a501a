# make report   everything from nothing to report.pdf and further.pdf
# make test     unit tests, and nbval over the notebooks      make check     the quick unit tests
# make notebooks   refresh the stored outputs                 make train     train everything from nothing (RUN=name: one run)
# make handin   the three files to hand in                    make bench     speed against the assigned pipeline
# make results  README's table, figure and small file, from the records and every network as a file
# make lint     style, and known flaws of what is installed   make lock      exact versions from requirements.txt
# make clean    remove what was built; make distclean, trainings, environment and data too

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HOMEWORK := hw4.ipynb true_false.ipynb lab1_sparse_linear.ipynb
NOTEBOOKS := going_further.ipynb $(HOMEWORK)# as many at once as there are cores, so the longest come first
RUN ?= all

# A network allocates and frees the same large tensors batch after batch. Kept in the process instead of handed
# back to the kernel each time, training on a CPU is about a fifth faster, evaluation two fifths; results are the same.
ALLOCATOR := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=68719476736 MALLOC_TOP_PAD_=268435456 GLIBC_TUNABLES=glibc.malloc.hugetlb=1

# Notebooks that retrain write the same files, so they go one after the other.
EXECUTE = $(ALLOCATOR) $(BIN)/python -m report.execute $(if $(RETRAIN),--jobs 1)

.PHONY: report handin test check lint bench results notebooks train data environment lock clean distclean
.DEFAULT_GOAL := report
export STUDENT NETID

environment: $(VENV)/.installed

$(VENV)/.installed: requirements.lock
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.10 or newer, or make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $(PYTHON) is older than Python 3.10; make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) has no venv; on Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --requirement requirements.lock
	@touch $@

data: environment  # whoever reads the file verifies it
	@test -f "$${CIFAR10_ROOT:-data}/cifar10-uint8.npz" || $(BIN)/python -c "import cifar10; cifar10.load()"

report: environment data
	@mkdir -p build
	$(EXECUTE) --out build $(NOTEBOOKS)
	$(BIN)/python -m report.export --from build

handin: environment data
	@$(BIN)/python -m report.handin --check
	@mkdir -p build
	$(EXECUTE) --out build $(HOMEWORK)
	$(BIN)/python -m report.handin --from build

# Two processes with one thread each are faster than one with two; a file's tests, or a notebook, stay together,
# and the longest come first (see tests/conftest.py).
PYTEST = $(ALLOCATOR) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
test: environment data
	$(PYTEST) $(NOTEBOOKS) tests --nbval --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg

check: environment data
	$(PYTEST) tests -m "not slow" -q

lint: environment
	$(BIN)/ruff check .
	$(BIN)/python tests/audit.py

# Versions that are in the lock file stay as long as requirements.txt allows them.
lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet --disable-pip-version-check uv
	build/lock/bin/uv pip compile --universal --python-version 3.10 --no-header --no-annotate requirements.txt -o requirements.lock

notebooks: environment data
	$(EXECUTE) $(NOTEBOOKS)

train: environment data
	$(ALLOCATOR) $(BIN)/python -m experiments run $(RUN) --into build/trained

bench: environment data
	$(ALLOCATOR) $(BIN)/python -m benchmarks.throughput --write README.md
	$(ALLOCATOR) $(BIN)/python -m benchmarks.precision --write README.md

results: environment data
	$(BIN)/python -m experiments.results --write README.md
	$(ALLOCATOR) $(BIN)/python -m benchmarks.sizes

clean:
	rm -rf build/lock build/*.ipynb report.pdf further.pdf handin *.part */*.part checkpoints/ablation/*.part .pytest_cache .ruff_cache .hypothesis __pycache__ */__pycache__

distclean: clean
	rm -rf $(VENV) data build
