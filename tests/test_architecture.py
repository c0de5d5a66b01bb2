"""The house stands as docs/design.md draws it: floors, owners, sizes, words, dependencies.

Every checker takes sources as ``{path below the package: text}`` and returns its complaints as strings. It runs on the
package, where it must have none, and on deliberately bad samples, where it must have the right one.
"""

from __future__ import annotations

import ast
import inspect
import re
import statistics
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import pyro_genmods

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "pyro_genmods"
HALL = {"contract", "mechanism", "distribution", "coordinates"}
ROOMS = {"factorize", "transform", "evolve", "shape"}
UPSTAIRS = {"infer", "diagnostics", "training", "io"}
FLOORS = {"foundation", "hall", "front"} | ROOMS | UPSTAIRS
ABOVE_THE_CELLAR = FLOORS - {"foundation"}

# Third party (longest prefix wins) -> the floors that may use it. What is not listed may be used by nobody.
OWNERS = {
    "torch": FLOORS,
    "torch.distributions": ABOVE_THE_CELLAR,
    "torch.load": set(),
    "torch.save": set(),
    "numpy": ABOVE_THE_CELLAR,
    "pyro": ABOVE_THE_CELLAR,
    "pyro.infer": {"infer"},
    "zuko": {"transform"},
    "scipy": {"transform"},
    "torchsde": {"evolve"},
    "arviz": {"diagnostics"},
    "matplotlib": {"diagnostics"},
    "lightning": {"training"},
    "tqdm": {"training", "infer", "evolve", "shape"},
    "safetensors": {"io"},
    "zarr": {"io"},
    "jaxtyping": {"foundation"},
    "importlib.import_module": {"io"},
    "pickle": set(),
    "marshal": set(),
    "shelve": set(),
}
LAZY_OWNERS = {"matplotlib": {"training"}}  # TrainingHistory.plot
DOORS = {("training", "io"), ("infer", "io")}  # runs are kept by the owner of safetensors and Zarr
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_WORDS = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX)\b|type" + r": ignore")  # in pieces: it reads itself

FILE_LINES, MEDIAN_FILE_LINES, FUNCTION_LINES, SHORT_FUNCTION, POSITIONAL = 400, 200, 60, 30, 6

# Public things without an example of their own, and why.
WITHOUT_EXAMPLE = {
    "foundation/errors.py": "an exception has no use but being raised, and every test of bad input raises one",
    "mechanism.py:Mechanism": "abstract: the skeleton in CONTRIBUTING.md is its example, and runs",
    "contract.py:GenerativeModel": "abstract: the skeleton in CONTRIBUTING.md is its example, and runs",
    "distribution.py:GenerativeDistribution": "made by calling a model: the example of every model shows it",
    "mechanism.py:Density": "an enumeration",
    "mechanism.py:Cost": "a record of two numbers",
    "diagnostics/calibration.py:Coverage": "made by interval_coverage, whose example shows it",
    "coordinates.py:Circular": "the class of the constraint `circular`",
    "coordinates.py:Standardization": "a part of Coordinates, whose example shows it",
}
# Declared dependencies that no file imports, and who uses them.
USED_OTHERWISE = {
    "pytest-xdist": "`-n` in the Makefile",
    "ruff": "`make lint`",
    "beartype": "named as a string to the import hook of tests/conftest.py",
}
IMPORT_NAMES = {"pyro-ppl": "pyro", "scikit-learn": "sklearn"}

Sources = dict[str, str]


class Use(NamedTuple):
    """A dotted name that a file imports, or reaches through an imported module."""

    name: str
    line: int
    lazy: bool


# -- reading ----------------------------------------------------------------------------------------------------------


def read(folder: Path) -> Sources:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*.py"))}


def module_of(path: str) -> str:
    return ".".join([PACKAGE, *Path(path).with_suffix("").parts]).removesuffix(".__init__")


def floor_of(module: str) -> str:
    """Floor of a module of ours; a file without a floor is an error of the plan, not of the file."""
    inside = module.split(".")[1:]
    if not inside:
        return "front"
    if inside[0] in HALL:
        return "hall"
    for floor in {"foundation"} | ROOMS | UPSTAIRS:
        if inside[0] == floor or inside[0].startswith(floor + "_"):
            return floor
    return "nowhere"


def uses(path: str, source: str) -> list[Use]:
    """Everything a file imports, relative imports resolved, and every dotted name reached through such an import."""
    module = module_of(path)
    package = module if path.endswith("__init__.py") else module.rpartition(".")[0]
    found, bound = [], {}
    for node, lazy in _walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                found.append(Use(alias.name, node.lineno, lazy))
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{base}.{alias.name}"
                found.append(Use(f"{base}.{alias.name}", node.lineno, lazy))
    for node, lazy in _walk(ast.parse(source)):
        root, _, rest = _dotted(node).partition(".")
        if rest and root in bound:
            found.append(Use(f"{bound[root]}.{rest}", node.lineno, lazy))
    return found


def _walk(node: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes, with whether they run only when a function is called."""
    yield node, lazy
    inner = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, inner)


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:n]) for n in range(len(parts), 0, -1))


def _functions(source: str) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """Every function, with whether it is a method whose first parameter needs no annotation."""
    for node in ast.walk(ast.parse(source)):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                static = any(_dotted(d) == "staticmethod" for d in child.decorator_list)
                yield child, isinstance(node, ast.ClassDef) and not static


def _function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of signature and body; the docstring is prose."""
    lines = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node) is not None:
        lines -= node.body[0].end_lineno - node.body[0].lineno + 1
    return lines


# -- checkers ---------------------------------------------------------------------------------------------------------


def module_graph(sources: Sources) -> dict[str, set[str]]:
    """Module -> modules of ours that it imports (lazily or not)."""
    modules = {module_of(path) for path in sources}
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for path, source in sources.items():
        for use in uses(path, source):
            target = next((prefix for prefix in _prefixes(use.name) if prefix in modules), None)
            if target and target != module_of(path):
                graph[module_of(path)].add(target)
    return graph


def check_star(sources: Sources) -> list[str]:
    complaints = []
    for module, targets in sorted(module_graph(sources).items()):
        floor = floor_of(module)
        if floor == "nowhere":
            complaints.append(f"{module} stands on no floor")
        for target in sorted(targets):
            other = floor_of(target)
            fine = floor == "front" or other in {floor, "foundation"} or (other == "hall" and floor != "foundation")
            if not fine and (floor, other) not in DOORS:
                complaints.append(f"{module} ({floor}) imports {target} ({other})")
    return complaints


def check_cycles(sources: Sources) -> list[str]:
    graph, done, complaints = module_graph(sources), set(), []

    def visit(module: str, trail: tuple[str, ...]) -> None:
        if module in trail:
            complaints.append(" -> ".join([*trail[trail.index(module) :], module]))
        elif module not in done:
            for target in sorted(graph[module]):
                visit(target, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())
    return complaints


def check_owners(sources: Sources) -> list[str]:
    complaints = []
    for path, source in sources.items():
        floor = floor_of(module_of(path))
        for use in uses(path, source):
            owner = next((prefix for prefix in _prefixes(use.name) if prefix in OWNERS), None)
            root = use.name.split(".")[0]
            if owner is None and (root in sys.stdlib_module_names or root == PACKAGE):
                continue
            allowed = OWNERS.get(owner, set()) | (LAZY_OWNERS.get(owner, set()) if use.lazy else set())
            if floor not in allowed:
                complaints.append(f"{path}:{use.line}: {use.name} belongs to {sorted(allowed) or 'nobody'}")
    return complaints


def check_sizes(sources: Sources) -> list[str]:
    files = {path: source.count("\n") for path, source in sources.items()}
    lines = {
        f"{path}:{node.lineno} {node.name}": _function_lines(node)
        for path, source in sources.items()
        for node, _ in _functions(source)
    }
    complaints = [f"{path} has {n} lines" for path, n in files.items() if n > FILE_LINES]
    complaints += [f"{name} has {n} lines" for name, n in lines.items() if n > FUNCTION_LINES]
    if statistics.median(files.values()) > MEDIAN_FILE_LINES:
        complaints.append(f"half the files are longer than {MEDIAN_FILE_LINES} lines")
    long = [name for name, n in lines.items() if n >= SHORT_FUNCTION]
    if len(long) > 0.1 * len(lines):
        complaints.append(f"{len(long)} of {len(lines)} functions have {SHORT_FUNCTION} lines or more: {long}")
    return complaints


def check_signatures(sources: Sources) -> list[str]:
    complaints = []
    for path, source in sources.items():
        for node, bound in _functions(source):
            where, a = f"{path}:{node.lineno} {node.name}", node.args
            positional = [*a.posonlyargs, *a.args][1 if bound else 0 :]
            everything = [*positional, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
            complaints += [f"{where}: {arg.arg} is not annotated" for arg in everything if arg.annotation is None]
            if node.returns is None:
                complaints.append(f"{where}: the result is not annotated")
            if len(positional) > POSITIONAL:
                complaints.append(f"{where}: {len(positional)} positional parameters")
    return complaints


def public_definitions(source: str) -> dict[str, str]:
    """Public classes and functions of a file -> docstring: those of ``__all__``, or those without underscore."""
    tree = ast.parse(source)
    exported = None
    for node in tree.body:
        if isinstance(node, ast.Assign) and _dotted(node.targets[0]) == "__all__":
            exported = set(ast.literal_eval(node.value))
    return {
        node.name: ast.get_docstring(node) or ""
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and (not node.name.startswith("_") if exported is None else node.name in exported)
    }


def exported_names(sources: Sources) -> set[str]:
    """What users import: the names in ``__all__`` of the package and of its folders."""
    doors = [ast.parse(source) for path, source in sources.items() if path.endswith("__init__.py")]
    assignments = [node for tree in doors for node in tree.body if isinstance(node, ast.Assign)]
    return {name for a in assignments if _dotted(a.targets[0]) == "__all__" for name in ast.literal_eval(a.value)}


def check_docstrings(sources: Sources) -> list[str]:
    """A chapter in every file, a docstring for every shared name, an example for what users or two floors import."""
    complaints, exported = [], exported_names(sources)
    for path, source in sources.items():
        if not ast.get_docstring(ast.parse(source)):
            complaints.append(f"{path} has no chapter: its module docstring is missing")
        shared = "/" not in path or path.startswith("foundation/")
        for name, text in public_definitions(source).items():
            needed = (shared or name in exported) and not {path, f"{path}:{name}"} & set(WITHOUT_EXAMPLE)
            if not text:
                complaints.append(f"{path}:{name} has no docstring")
            elif needed and not re.search(r"Examples?:\s+>>> ", text):
                complaints.append(f"{path}:{name} has no example")
    return complaints


def check_words(sources: Sources) -> list[str]:
    return [
        f"{path}:{number}: {line.strip()}"
        for path, source in sources.items()
        for number, line in enumerate(source.splitlines(), 1)
        if FORBIDDEN_WORDS.search(line)
    ]


def check_calls(sources: Sources) -> list[str]:
    complaints = []
    for path, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and _dotted(node.func) in FORBIDDEN_CALLS:
                complaints.append(f"{path}:{node.lineno}: {_dotted(node.func)}()")
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                complaints.append(f"{path}:{node.lineno}: bare except")
    return complaints


CHECKERS = [
    check_star,
    check_cycles,
    check_owners,
    check_sizes,
    check_signatures,
    check_docstrings,
    check_words,
    check_calls,
]

LONG_FUNCTION = "def f() -> int:\n    x = 0\n" + "    x += 1\n" * 60 + "    return x\n"
DOCUMENTED = 'def f() -> int:\n    """' + "prose\n    " * 80 + '"""\n    return 1\n'

BAD = [
    (
        check_star,
        {"foundation/a.py": "from ..contract import Cost", "contract.py": ""},
        "foundation.a (foundation)",
    ),
    (check_star, {"shape/a.py": "from ..transform import b", "transform/b.py": ""}, "imports pyro_genmods.transform.b"),
    (check_star, {"shape/a.py": "import pyro_genmods.transform.b", "transform/b.py": ""}, "imports pyro_genmods.tran"),
    (
        check_star,
        {"infer/a.py": "def f():\n    from ..transform.flow import Flow", "transform/flow.py": ""},
        "(infer) i",
    ),
    (check_star, {"infer/a.py": "from .. import Flow", "__init__.py": ""}, "imports pyro_genmods (front)"),
    (check_star, {"diagnostics/a.py": "from ..infer import b", "infer/b.py": ""}, "(diagnostics) imports"),
    (check_star, {"io.py": "from . import training", "training.py": ""}, "io (io) imports pyro_genmods.training"),
    (check_star, {"helpers.py": ""}, "stands on no floor"),
    (
        check_cycles,
        {"io.py": "from .io_b import x", "io_b.py": "def f():\n    from . import io"},
        "io -> pyro_genmods.io_b ->",
    ),
    (check_owners, {"infer/a.py": "import zuko"}, "infer/a.py:1: zuko belongs to ['transform']"),
    (check_owners, {"shape/a.py": "from pyro import infer"}, "pyro.infer belongs to ['infer']"),
    (check_owners, {"shape/a.py": "import pyro\n\nx = pyro.infer.NUTS"}, "shape/a.py:3: pyro.infer.NUTS"),
    (check_owners, {"foundation/a.py": "from torch.distributions import Normal"}, "torch.distributions.Normal"),
    (check_owners, {"training.py": "import matplotlib.pyplot as plt"}, "matplotlib.pyplot"),
    (check_owners, {"io.py": "import torch as t\n\nx = t.load('x')"}, "torch.load belongs to nobody"),
    (check_owners, {"io.py": "from pickle import loads"}, "pickle.loads belongs to nobody"),
    (check_owners, {"shape/a.py": "import sklearn.datasets"}, "sklearn.datasets belongs to nobody"),
    (check_sizes, {"io.py": "x = 1\n" * 401}, "io.py has 401 lines"),
    (check_sizes, {"io.py": LONG_FUNCTION}, "io.py:1 f has 63 lines"),
    (check_sizes, {"io.py": LONG_FUNCTION.replace("    x += 1\n" * 30, "", 1)}, "1 of 1 functions"),
    (check_sizes, {"io.py": "x = 1\n" * 201}, "longer than 200"),
    (check_signatures, {"io.py": "def f(x) -> int: ..."}, "f: x is not annotated"),
    (check_signatures, {"io.py": "def f(**kwargs) -> int: ..."}, "f: kwargs is not annotated"),
    (check_signatures, {"io.py": "class A:\n    def f(self): ..."}, "f: the result is not annotated"),
    (
        check_signatures,
        {"io.py": "def f(a: int, b: int, c: int, d: int, e: int, f: int, g: int) -> int: ..."},
        "7 positional",
    ),
    (check_docstrings, {"io.py": "x = 1"}, "io.py has no chapter"),
    (check_docstrings, {"io.py": '"""Chapter."""\n\n\nclass A: ...'}, "io.py:A has no docstring"),
    (check_docstrings, {"io.py": '"""Chapter."""\n\n\ndef f():\n    """One."""'}, "io.py:f has no example"),
    (
        check_docstrings,
        {"a/b.py": '"""B."""\ndef f(): """One."""', "a/__init__.py": '__all__ = ["f"]'},
        "f has no example",
    ),
    (check_words, {"io.py": "x = 1  # TO" + "DO: more"}, "io.py:1"),
    (check_words, {"io.py": "x = 1  # type" + ": ignore"}, "io.py:1"),
    (check_calls, {"io.py": "x = eval('1')"}, "eval()"),
    (check_calls, {"io.py": "try:\n    x = 1\nexcept:\n    x = 2"}, "bare except"),
]

GOOD: Sources = {
    "__init__.py": "from .transform import Flow",
    "foundation/a.py": "import torch\nfrom . import b",
    "foundation/b.py": "",
    "contract.py": "from pyro.distributions import Normal\nfrom .foundation.a import f",
    "transform/__init__.py": "from .flow import Flow",
    "transform/flow.py": "import zuko\nfrom ..contract import Normal",
    "infer/guides.py": "import pyro\nfrom pyro.infer import NUTS\nfrom ..contract import x\n\npyro.infer.SVI",
    "training.py": "from .io import save\n\n\ndef plot() -> None:\n    import matplotlib.pyplot\n",
    "io.py": DOCUMENTED,
}


@pytest.mark.parametrize("checker", CHECKERS, ids=lambda c: c.__name__)
def test_the_package_has_no_complaint(checker):
    assert "\n".join(checker(read(ROOT / PACKAGE))) == ""


@pytest.mark.parametrize(("checker", "sources", "complaint"), BAD)
def test_a_checker_sees_a_bad_sample(checker, sources, complaint):
    assert any(complaint in line for line in checker(sources)), checker(sources)


@pytest.mark.parametrize("checker", [check_star, check_cycles, check_owners, check_sizes, check_signatures])
def test_a_checker_accepts_a_good_sample(checker):
    assert checker(GOOD) == []


def test_every_checker_has_a_bad_sample():
    assert {checker for checker, _, _ in BAD} == set(CHECKERS)


def test_exemptions_are_few_and_needed():
    sources = read(ROOT / PACKAGE)
    for entry in WITHOUT_EXAMPLE:
        path, _, name = entry.partition(":")
        definitions = public_definitions(sources[path])
        texts = [definitions[name]] if name else list(definitions.values())
        assert all(">>>" not in text for text in texts), f"{entry} has an example: no exemption needed"
    assert len(WITHOUT_EXAMPLE) <= 9


@pytest.mark.parametrize("folder", ["tests", "tutorials", "benchmarks", "docs"])
def test_nothing_is_left_to_do_elsewhere(folder):
    assert check_words(read(ROOT / folder)) == []


# -- what is declared, and what is used -------------------------------------------------------------------------------


def _declared() -> tuple[set[str], set[str]]:
    """Names of the declared dependencies: at run time, and in extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    name = re.compile(r"[\w.-]+")
    return {name.match(d)[0] for d in project["dependencies"]}, {name.match(d)[0] for d in extras}


def _third_parties(*folders: str) -> set[str]:
    found = {
        use.name.split(".")[0]
        for folder in folders
        for path, source in read(ROOT / folder).items()
        for use in uses(path, source)
    }
    ours = {PACKAGE, "", "tests", "benchmarks"} | {
        path.stem for folder in folders for path in (ROOT / folder).glob("*.py")
    }
    return found - set(sys.stdlib_module_names) - ours


def test_every_declared_dependency_is_used():
    runtime, extras = _declared()
    imported = _third_parties(PACKAGE, "tests", "tutorials", "benchmarks", "docs")
    unused = {d for d in runtime | extras if IMPORT_NAMES.get(d, d) not in imported}
    assert unused == set(USED_OTHERWISE)


def test_tools_are_called_where_it_is_said():
    makefile, conftest = (ROOT / "Makefile").read_text(), (ROOT / "tests" / "conftest.py").read_text()
    assert "/ruff check" in makefile
    assert "pytest -n" in makefile
    assert '"beartype.beartype"' in conftest


def test_every_import_is_declared():
    runtime, extras = _declared()
    runtime = {IMPORT_NAMES.get(d, d) for d in runtime}
    extras = {IMPORT_NAMES.get(d, d) for d in extras}
    assert _third_parties(PACKAGE) - runtime == {"jaxtyping"}, "jaxtyping alone is optional (foundation/shapes.py)"
    assert _third_parties("tutorials", "tests", "benchmarks", "docs") <= runtime | extras


def test_every_dependency_is_pinned():
    pins = re.findall(r"^([\w.-]+)==\S+$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    pinned = {name.lower().replace("_", "-") for name in pins}
    runtime, extras = _declared()
    assert runtime | extras <= pinned
    assert "+" not in "".join(pins), "a local version resolves on one machine only"


# -- what the front door promises -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", pyro_genmods.__all__)
def test_public_names_are_documented(name):
    thing = getattr(pyro_genmods, name)
    assert inspect.getdoc(thing)
    pages = (ROOT / "README.md").read_text() + (ROOT / "docs" / "design.md").read_text()
    assert re.search(rf"\b{name}\b", pages), f"{name} is public, and neither README.md nor docs/design.md names it"


def test_public_names_are_few():
    assert len(pyro_genmods.__all__) == len(set(pyro_genmods.__all__)) <= 30


def test_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == pyro_genmods.__version__
    assert f"## [{pyro_genmods.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert (ROOT / PACKAGE / "py.typed").exists()


def test_the_commit_hooks_use_the_pinned_ruff():
    pinned = re.search(r"^(ruff==\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)[1]
    assert set(re.findall(r"ruff==[\d.]+", (ROOT / ".pre-commit-config.yaml").read_text())) == {pinned}
