# SPDX-License-Identifier: Apache-2.0
"""Rules of the architecture that the source itself must obey, without importing it.

A rule is a function of (path, source) that returns its complaints, so that it can be tried on planted faults;
`test_tree_obeys` applies each to the tree.
"""

import ast
import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module imports its own layer or a lower one. A name stands for a module and all that lies below it.
LAYERS = (
    (
        "cumo_kernels.types",
        "cumo_kernels.checks",
        "cumo_kernels.tiling",
        "cumo_kernels.tuned",
        "cumo_kernels.backend",
        "cumo_kernels.activations",
    ),
    ("cumo_kernels.kernels", "cumo_kernels.reference"),
    ("cumo_kernels.ops", "cumo_kernels.inspect*", "cumo_kernels.tune"),
    # reading the published layout: pure functions of names, tensors and files, which configuration and models use
    (
        "cumo.config",
        "cumo.auto",
        "cumo.checkpoints.files",
        "cumo.checkpoints.layout",
        "cumo.checkpoints.lora",
        "cumo.checkpoints.published*",
    ),
    ("cumo.nn",),
    ("cumo.models",),
    ("cumo.checkpoints", "cumo.data"),
    ("cumo.train", "cumo.inference"),
    ("cumo.eval", "cumo.serve", "cumo.demo", "cumo.integrations"),
    ("cumo.cli", "cumo.__main__"),
)
# The packages' own `__init__.py` re-export what lies below them.
PACKAGE_LAYERS = {"cumo_kernels": 2, "cumo": 9}

# What lies within the key never imports the values, not even inside a function.
FORBIDDEN = {
    "cumo_kernels": ("cumo", "transformers", "tests", "benchmarks"),
    "cumo": ("tests", "benchmarks"),
    "cumo.nn": ("transformers",),
}
# Whoever imports these imports Triton, which may be absent: outside of the kernels only inside a function.
NEEDS_TRITON = ("triton", "cumo_kernels.kernels")

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 90
MAX_KERNEL_PARAMETERS = 24

# Not preceded by what makes it the middle of a longer path or of an address.
MACHINE_PATH = re.compile(r"(?<![\w.}/-])/(?:tmp|work|home|root|opt)/")

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


class Import(NamedTuple):
    """One imported name."""

    line: int
    target: str
    """Full name of a module or of a member of one."""
    deferred: bool
    """Importing the module does not carry it out: it stands in a function or under `if TYPE_CHECKING`."""


def within(name: str, module: str) -> bool:
    """`name` is `module` or lies below it."""
    return name == module or name.startswith(module + ".")


def module_name(path: str) -> str:
    """`cumo/nn/moe.py` -> `cumo.nn.moe`, `cumo/nn/__init__.py` -> `cumo.nn`."""
    return ".".join(PurePosixPath(path).with_suffix("").parts).removesuffix(".__init__")


def layer_of(name: str) -> int | None:
    """Layer of a module, or of a member of a module that has one; None if it has none."""
    if name in PACKAGE_LAYERS:
        return PACKAGE_LAYERS[name]
    for layer, patterns in enumerate(LAYERS):
        if any(fnmatchcase(name, pattern) or fnmatchcase(name, pattern + ".*") for pattern in patterns):
            return layer
    return None


def imports_of(path: str, source: str) -> Iterator[Import]:
    """Every import statement, and every `import_module` or `__import__` of a literal name."""
    tree = ast.parse(source, path)
    module = module_name(path)
    package = module if path.endswith("__init__.py") else module.rpartition(".")[0]
    deferred: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, FUNCTION):
            deferred.update(ast.walk(node))
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            deferred.update(below for statement in node.body for below in ast.walk(statement))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            targets = [base if alias.name == "*" else f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            targets = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        else:
            continue
        yield from (Import(node.lineno, target, node in deferred) for target in targets)


def layer_faults(path: str, source: str) -> list[str]:
    """Modules without a layer, and imports that point upwards."""
    own_layer = layer_of(module_name(path))
    if own_layer is None:
        return [f"{path}: {module_name(path)} belongs to no layer"]
    faults = []
    for line, target, _ in imports_of(path, source):
        layer = layer_of(target)
        if layer is None:  # a public name of a package rather than a module of it
            layer = layer_of(target.rpartition(".")[0])
        if layer is not None and layer > own_layer:
            faults.append(f"{path}:{line}: layer {own_layer} imports {target} of layer {layer}")
    return faults


def dependency_faults(path: str, source: str) -> list[str]:
    """Imports that are forbidden whatever the layer, or that have to wait until they are needed."""
    module = module_name(path)
    faults = []
    for line, target, deferred in imports_of(path, source):
        for part, forbidden in FORBIDDEN.items():
            if within(module, part) and any(within(target, name) for name in forbidden):
                faults.append(f"{path}:{line}: {part} must not import {target}")
        if deferred:
            continue
        if not within(module, "cumo_kernels.kernels") and any(within(target, name) for name in NEEDS_TRITON):
            faults.append(f"{path}:{line}: {target} needs Triton, so it may be imported only inside a function")
        if module == "cumo" and any(within(target, name) for name in ("cumo", "transformers")):
            faults.append(f"{path}:{line}: cumo must import {target} lazily: `import cumo.nn` runs this file too")
    return faults


def file_size_faults(path: str, source: str) -> list[str]:
    """Files over budget."""
    lines = len(source.splitlines())
    return [f"{path}: {lines} lines > {MAX_FILE_LINES}"] if lines > MAX_FILE_LINES else []


def lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, less the docstring."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Decorated with `triton.jit`, called or not."""
    decorators = [d.func if isinstance(d, ast.Call) else d for d in function.decorator_list]
    return any(ast.unparse(d) in ("triton.jit", "jit") for d in decorators)


def function_size_faults(path: str, source: str) -> list[str]:
    """Functions and kernels over budget; `tl.constexpr` parameters, being flags and tiles, do not count."""
    faults = []
    for function in ast.walk(ast.parse(source, path)):
        if not isinstance(function, FUNCTION):
            continue
        where = f"{path}:{function.lineno}: {function.name}"
        lines, budget = lines_of_code(function), MAX_FUNCTION_LINES
        if is_kernel(function):
            budget = MAX_KERNEL_LINES
            parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            annotations = [ast.unparse(p.annotation).strip("'\"") if p.annotation else "" for p in parameters]
            count = sum(annotation not in ("tl.constexpr", "constexpr") for annotation in annotations)
            if count > MAX_KERNEL_PARAMETERS:
                faults.append(f"{where} has {count} parameters > {MAX_KERNEL_PARAMETERS}")
        if lines > budget:
            faults.append(f"{where} has {lines} lines > {budget}")
    return faults


def module_level_definitions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Functions and classes of a module, those inside its `if` and `try` blocks too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FUNCTION, ast.ClassDef)):
            yield child
        else:
            yield from module_level_definitions(child)


def docstring_faults(path: str, source: str) -> list[str]:
    """Public functions and classes without a docstring."""
    return [
        f"{path}:{definition.lineno}: {definition.name} has no docstring"
        for definition in module_level_definitions(ast.parse(source, path))
        if not definition.name.startswith("_") and not ast.get_docstring(definition)
    ]


def machine_path_faults(path: str, source: str) -> list[str]:
    """Lines that name a folder of somebody's machine."""
    lines = enumerate(source.splitlines(), start=1)
    return [f"{path}:{number}: {match[0]}" for number, line in lines if (match := MACHINE_PATH.search(line))]


def python_files(*folders: str) -> list[Path]:
    """Every Python file of the tree below `folders`, of which some may not exist."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def text_files() -> list[Path]:
    """Code, documentation and configuration."""
    folders = ("cumo_kernels", "cumo", "tests", "benchmarks", "docs", "examples", ".ci")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    paths += [path for pattern in ("*.py", "*.md", "*.toml", "*.txt", "Makefile") for path in ROOT.glob(pattern)]
    return sorted(path for path in paths if "__pycache__" not in path.parts and b"\0" not in path.read_bytes())


def product_files() -> list[Path]:
    """The modules of both packages."""
    return python_files("cumo_kernels", "cumo")


RULES: dict[Callable[[str, str], list[str]], Callable[[], list[Path]]] = {
    layer_faults: product_files,
    dependency_faults: product_files,
    file_size_faults: lambda: python_files("cumo_kernels", "cumo", "tests", "benchmarks"),
    function_size_faults: product_files,
    docstring_faults: product_files,
    machine_path_faults: text_files,
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_tree_obeys(rule):
    paths = RULES[rule]()
    assert ROOT / "cumo_kernels/__init__.py" in paths, "the tree was not found"
    faults = [fault for path in paths for fault in rule(path.relative_to(ROOT).as_posix(), path.read_text("utf-8"))]
    assert not faults, "\n".join(faults)


def kernel(lines: int = 1, parameters: int = 0, constexprs: int = 0, decorator: str = "triton.jit") -> str:
    """A kernel of that many lines, of which the `def` is one."""
    names = [f"p{i}" for i in range(parameters)] + [f"C{i}: tl.constexpr" for i in range(constexprs)]
    return f"@{decorator}\ndef f({', '.join(names)}):\n" + '    """Two\n    lines."""\n' + "    pass\n" * (lines - 1)


PLANTED_FAULTS = [
    (layer_faults, "cumo/nn/moe.py", "from cumo.models.clip import Clip", "layer 4 imports cumo.models.clip.Clip of"),
    (layer_faults, "cumo/nn/moe.py", "from cumo import models", "imports cumo.models of layer 5"),
    (layer_faults, "cumo/nn/moe.py", "from cumo import CuMoConfig", "imports cumo.CuMoConfig of layer 9"),
    (layer_faults, "cumo/nn/moe.py", "from ..models import clip", "imports cumo.models.clip of layer 5"),
    (layer_faults, "cumo/nn/__init__.py", "from ..models import clip", "imports cumo.models.clip of layer 5"),
    (layer_faults, "cumo/data/x.py", "def f():\n    import cumo.train.loop", "x.py:2: layer 6 imports cumo.train.loop"),
    (layer_faults, "cumo/config.py", "import_module('cumo.eval')", "layer 3 imports cumo.eval of layer 8"),
    (layer_faults, "cumo_kernels/types.py", "import cumo_kernels", "layer 0 imports cumo_kernels of layer 2"),
    (layer_faults, "cumo_kernels/reference.py", "from .ops import permute", "imports cumo_kernels.ops.permute of"),
    (layer_faults, "cumo_kernels/utils.py", "", "cumo_kernels.utils belongs to no layer"),
    (layer_faults, "cumo/nnx/a.py", "", "cumo.nnx.a belongs to no layer"),
    (dependency_faults, "cumo_kernels/ops/moe.py", "def f():\n    import cumo", "cumo_kernels must not import cumo"),
    (dependency_faults, "cumo_kernels/tune.py", "import transformers.utils", "must not import transformers.utils"),
    (dependency_faults, "cumo/nn/moe.py", "from transformers import X", "cumo.nn must not import transformers.X"),
    (dependency_faults, "cumo/cli.py", "import tests.oracles", "cumo must not import tests.oracles"),
    (dependency_faults, "cumo_kernels/inspect.py", "import benchmarks", "must not import benchmarks"),
    (dependency_faults, "cumo_kernels/tiling.py", "try:\n    import triton\nexcept E:\n    pass", "needs Triton"),
    (dependency_faults, "cumo_kernels/ops/moe.py", "from ..kernels import combine", "needs Triton"),
    (dependency_faults, "cumo/__init__.py", "from cumo.models import CuMo", "must import cumo.models.CuMo lazily"),
    (file_size_faults, "tests/test_x.py", "\n" * 401, "401 lines > 400"),
    (function_size_faults, "cumo/a.py", "class A:\n  def f(self):\n" + "    pass\n" * 60, "f has 61 lines > 60"),
    (function_size_faults, "cumo/a.py", "async def f():\n" + "    pass\n" * 60, "f has 61 lines > 60"),
    (function_size_faults, "cumo_kernels/kernels/a.py", kernel(lines=91), "f has 91 lines > 90"),
    (function_size_faults, "cumo_kernels/kernels/a.py", kernel(parameters=25), "f has 25 parameters > 24"),
    (function_size_faults, "cumo_kernels/kernels/a.py", kernel(lines=61, decorator="jitter"), "f has 61 lines > 60"),
    (docstring_faults, "cumo/a.py", "try:\n    def f(): pass\nfinally:\n    pass", "a.py:2: f has no docstring"),
    (docstring_faults, "cumo/a.py", "class A:\n    x = 1", "A has no docstring"),
    (machine_path_faults, "docs/a.md", "one\n`cd /" + "home/me`", "a.md:2: /" + "home/"),
]

INNOCENT = [
    (layer_faults, "cumo/nn/moe.py", "import torch, cumo_kernels\nfrom cumo.config import C\nfrom . import losses"),
    (layer_faults, "cumo_kernels/backend.py", "from cumo_kernels import types\nfrom cumo_kernels.checks import check"),
    (layer_faults, "cumo_kernels/inspect_report.py", "from cumo_kernels.kernels import combine"),
    (layer_faults, "cumo/__init__.py", "LAZY = {'A': 'cumo.models'}\nif TYPE_CHECKING:\n    from cumo.cli import main"),
    (dependency_faults, "cumo/__init__.py", "if TYPE_CHECKING:\n    from cumo.models import CuMo"),
    (dependency_faults, "cumo/__init__.py", "def __getattr__(name):\n    return import_module('cumo.models')"),
    (dependency_faults, "cumo/models/cumo.py", "import transformers, cumo_kernels"),
    (dependency_faults, "cumo_kernels/kernels/a.py", "import triton\nfrom cumo_kernels.kernels import epilogues"),
    (dependency_faults, "cumo_kernels/ops/a.py", "def f():\n    import triton\n    from cumo_kernels.kernels import a"),
    (file_size_faults, "cumo/a.py", "\n" * 400),
    (function_size_faults, "cumo/a.py", 'def f():\n    """One\n    two."""\n' + "    pass\n" * 59),
    (function_size_faults, "cumo_kernels/kernels/a.py", kernel(lines=90, parameters=24, constexprs=9)),
    (function_size_faults, "cumo_kernels/kernels/a.py", kernel(lines=90, decorator="triton.jit(noinline=True)")),
    (docstring_faults, "cumo/a.py", "def _f(): pass\nclass A:\n    'A.'\n    def f(self): pass\ndef g():\n    'g'"),
    (machine_path_faults, "docs/a.md", "https://example.org/" + "home/page, src/" + "work/a.py, {folder}/" + "tmp/a"),
]


@pytest.mark.parametrize(("rule", "path", "source", "complaint"), PLANTED_FAULTS)
def test_rule_finds_planted_fault(rule, path, source, complaint):
    faults = rule(path, source)
    assert len(faults) == 1
    assert complaint in faults[0]


@pytest.mark.parametrize(("rule", "path", "source"), INNOCENT)
def test_rule_lets_pass(rule, path, source):
    assert rule(path, source) == []
