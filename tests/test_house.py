"""The house rules that can be read off the source: names, arrows of imports, sizes, docstrings."""

import ast
import graphlib
import json
import subprocess
import sys
from pathlib import PurePosixPath

import pytest

from conftest import REPOSITORY

# Standard-library modules of Python 3.10 to 3.15 that the Python of this test may not know: what
# came after 3.10, what became a package, what went.
OTHERS = set('''
    tomllib annotationlib compression profiling concurrent pathlib string
    _android_support _apple_support _ast_unparse _colorize _hmac _interpchannels _interpqueues
    _interpreters _ios_support _opcode_metadata _py_warnings _pydatetime _pylong _pyrepl
    _remote_debugging _suggestions _sysconfig _types _zstd
    aifc asynchat asyncore audioop binhex cgi cgitb chunk crypt distutils imghdr imp lib2to3 mailcap
    msilib nis nntplib ossaudiodev pipes smtpd sndhdr spwd sunau telnetlib uu xdrlib
'''.split())

GROUND = {"arguments", "files"}
LOOPS = GROUND | {"FP_layers", "cifar10", "pruning", "resnet20", "train_utils", "training"}
ARROWS = {  # a module or package of ours: what of ours it may import, beside itself
    "arguments": set(),
    "files": set(),
    "FP_layers": set(),
    "pruning": {"arguments"},
    "resnet20": {"arguments", "FP_layers"},
    "cifar10": GROUND,
    "training": GROUND | {"FP_layers", "cifar10"},
    "train_utils": GROUND | {"pruning", "cifar10", "training"},
    "train_util": {"train_utils"},
    "experiments": LOOPS,
    "model_file": LOOPS | {"experiments"},
    "benchmarks": LOOPS | {"experiments", "model_file", "report"},
    "report": {"files"},
}
FOREIGN = {  # what else the ground may import, beside the standard library
    "arguments": set(),
    "files": set(),
    "FP_layers": {"torch", "numpy"},
    "pruning": {"torch"},
}

LAZY_IMPORTS = {  # (file, function, module): why it is not at the top
    ("experiments/__main__.py", "_run", "experiments"): "torch, which `list` can do without",
    ("model_file/__main__.py", "_export", "model_file.export"): "onnx, for one command of four",
    ("benchmarks/codec.py", "main", "nncodec"): "not among our requirements",
    ("cifar10.py", "_read_batches", "torchvision.datasets"): "only until the data are cached",
    ("cifar10.py", "_from_torchvision", "torchvision.datasets"): "only until the data are cached",
    ("cifar10.py", "_read_npm_archive", "PIL"): "only until the data are cached",
}
MANY_PARAMETERS = {  # the homework's own signatures, with what we added to them
    ("train_utils.py", "finetune"),
    ("FP_layers.py", "FP_Conv.__init__"),
}
# PyTorch's own methods: what they compute stands at the class.
INHERITED = {"forward", "backward", "extra_repr"}


FILES = sorted(str(path.relative_to(REPOSITORY)) for pattern in ("*.py", "*/*.py")
               for path in REPOSITORY.glob(pattern)
               if path.parts[len(REPOSITORY.parts)] not in (".venv", "build", "data"))
SOURCES = [path for path in FILES if not path.startswith("tests/")]
TREES = {path: ast.parse((REPOSITORY / path).read_text()) for path in SOURCES}


def module_of(path):
    return ".".join(PurePosixPath(path).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def imported(tree):
    """Return the modules that a tree imports: of `from a import b` a.b if that is one of ours."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (members & MODULES.keys()) or {node.module}
    return found


def top(module):
    return module.partition(".")[0]


def functions(path):
    """Yield (name with its classes, node, whether all of the name is public) of every def."""

    def of(node, prefix, public):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                name, seen = prefix + child.name, public and not child.name.startswith("_")
                yield name, child, seen
                inside = seen and isinstance(child, ast.ClassDef)
                yield from of(child, f"{name}.", inside)
            else:
                yield from of(child, prefix, public)

    return of(TREES[path], "", True)


# ---------------------------------------------------------------- names


def test_no_name_of_ours_is_one_of_the_standard_library():
    """`import gzip` fails on Python 3.14 if the current folder has a compression.py."""
    ours = {PurePosixPath(path).parts[0].removesuffix(".py") for path in FILES}
    # tests/ is on the path too, while they run
    ours |= {PurePosixPath(path).stem for path in FILES if path.startswith("tests/")}
    assert {"train_utils", "experiments", "conftest"} <= ours
    assert not ours & (sys.stdlib_module_names | OTHERS)


# ---------------------------------------------------------------- arrows


def test_every_module_has_its_arrows():
    assert {top(module) for module in MODULES} == ARROWS.keys()


@pytest.mark.parametrize("path", SOURCES)
def test_imports_point_one_way(path):
    here = top(module_of(path))
    modules = {top(module) for module in imported(TREES[path])}
    assert modules & ARROWS.keys() <= ARROWS[here] | {here}
    if here in FOREIGN:
        assert modules - ARROWS.keys() <= FOREIGN[here] | sys.stdlib_module_names


def test_no_circle_of_imports():
    graph = {module: imported(TREES[path]) & MODULES.keys() for module, path in MODULES.items()}
    assert sum(map(len, graph.values())) > 30
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, with the circle


def test_imports_are_at_the_top_save_for_a_reason():
    found = {
        (path, name, module)
        for path in SOURCES
        for name, node, _ in functions(path)
        if not isinstance(node, ast.ClassDef)
        for module in imported_from(node)
    }
    assert found == LAZY_IMPORTS.keys()


def imported_from(function):
    """Return the modules named in the import statements of a function, as they are written."""
    nodes = list(ast.walk(function))
    return {node.module for node in nodes if isinstance(node, ast.ImportFrom)} | {
        alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}


@pytest.mark.parametrize("what", [
    "import experiments.runs",
    "import experiments.results",
    "import training.recipe",
    "from experiments.__main__ import main; main(['list'])",
])
def test_what_needs_no_torch_does_not_wait_for_it(what):
    code = f"{what}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    modules = json.loads(process.stdout.splitlines()[-1])
    assert "training.recipe" in modules and "torch" not in modules


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("path", SOURCES)
def test_sizes_can_be_overlooked(path):
    assert len((REPOSITORY / path).read_text().splitlines()) <= 300
    for name, node, _ in functions(path):
        if not isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno < 40, name
            assert n_parameters(node) <= 8 or (path, name) in MANY_PARAMETERS, name


def n_parameters(function):
    """Return the number of a function's parameters, not counting self."""
    a = function.args
    names = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if p]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def test_exceptions_are_still_needed():
    counted = {(path, name): n_parameters(node) for path in SOURCES
               for name, node, _ in functions(path) if not isinstance(node, ast.ClassDef)}
    assert all(counted[place] > 8 for place in MANY_PARAMETERS)


def test_lines_fit_the_page():
    for path in FILES:
        lines = (REPOSITORY / path).read_text().splitlines()
        assert [n for n, line in enumerate(lines, start=1) if len(line) > 100] == [], path


# ---------------------------------------------------------------- git


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="not a clone")
def test_notebooks_are_compared_by_nbdime_where_it_is_installed():
    told = subprocess.run(["git", "check-attr", "diff", "merge", "--", "hw4.ipynb", "pruning.py"],
                          cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    assert told.splitlines() == [
        "hw4.ipynb: diff: jupyternotebook", "hw4.ipynb: merge: jupyternotebook",
        "pruning.py: diff: unspecified", "pruning.py: merge: unspecified"]


# ---------------------------------------------------------------- make


@pytest.mark.parametrize("target, left", [
    ("clean", {"build/trained/a.resume.pt", "build/again/a.pt", "data/a", ".venv/a", "b.pt"}),
    ("distclean", {"b.pt"})])
def test_what_took_hours_to_train_is_left_by_make_clean(tmp_path, target, left):
    for name in ("build/trained/a.resume.pt", "build/again/a.pt", "build/hw4.ipynb", "a.part",
                 "report.pdf", "handin/report.pdf", "data/a", ".venv/a", "b.pt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    subprocess.run(["make", "-f", REPOSITORY / "Makefile", target], cwd=tmp_path, check=True,
                   capture_output=True)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == left


@pytest.mark.parametrize("arguments, told", [
    (["report", "RETRAIN=1"], ["report.execute --jobs 1 --out build", "report.export"]),
    (["train", "RUN=lab3c_2bit"], ["experiments run lab3c_2bit --into build/trained"]),
    (["train"], ["experiments run all --into build/trained"]),
    (["handin"], ["report.handin --check", "report.execute", "report.handin --from build"])])
def test_make_hands_on_what_it_is_told_in_this_order(arguments, told):
    said = subprocess.run(["make", "--dry-run", *arguments], cwd=REPOSITORY, check=True,
                          capture_output=True, text=True).stdout
    places = [said.find(command) for command in told]
    assert -1 not in places and places == sorted(places)


# ---------------------------------------------------------------- docstrings


@pytest.mark.parametrize("path", SOURCES)
def test_what_is_public_says_what_it_does(path):
    """A function in a function is not; one of a class is, if PyTorch does not say what it does."""
    exported = {name for node in TREES[path].body if isinstance(node, ast.Assign)
                for target in node.targets if ast.unparse(target) == "__all__"
                for name in ast.literal_eval(node.value)}
    assert ast.get_docstring(TREES[path])
    assert [name for name, node, public in functions(path)
            if (public or name in exported) and node.name not in INHERITED
            and not ast.get_docstring(node)] == []
