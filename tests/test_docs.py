# SPDX-License-Identifier: Apache-2.0
"""The documents are in step with the code, their links lead somewhere and their Python runs; the site builds."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.documents import example_folder, in_example_folder  # noqa: F401

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS]
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", flags=re.DOTALL | re.MULTILINE)


def name_of(path):
    """As it is called in the tree."""
    return path.relative_to(ROOT).as_posix()


def tool(name):
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_commands_are_those_of_the_parsers():
    for package in ("transformers", "accelerate", "fastapi", "triton"):
        pytest.importorskip(package, reason="a command needs it")
    commands = tool("commands")
    assert commands.PAGE.read_text() == commands.page(), "python docs/commands.py writes it"


# Environment variables


def variables_read(path):
    """Names of the environment variables that a Python file reads; an error where a name is computed."""
    tree = ast.parse(path.read_text())
    assignments = (node for node in ast.walk(tree) if isinstance(node, ast.Assign))
    constants = {
        node.targets[0].id: node.value.value
        for node in assignments
        if isinstance(node.value, ast.Constant) and isinstance(node.targets[0], ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            owner, key = ast.unparse(node.value), node.slice
        elif isinstance(node, ast.Call) and node.args:
            owner, _, method = ast.unparse(node.func).rpartition(".")
            owner = "os.environ" if method == "getenv" else owner
            key = node.args[0]
            if method not in ("get", "getenv", "setdefault", "pop"):
                continue
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In):
            owner, key = ast.unparse(node.comparators[0]), node.left
        else:
            continue
        if owner == "os.environ":
            value = key.value if isinstance(key, ast.Constant) else constants.get(ast.unparse(key))
            assert isinstance(value, str), f"{path}:{node.lineno}: {ast.unparse(key)}: which variable?"
            yield value


def table_of(heading):
    """First cells of the table under a heading of docs/environment.md."""
    text = (ROOT / "docs" / "environment.md").read_text()
    body = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", body, flags=re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([A-Z_0-9]+)`", row)]
    assert names, heading
    return names


def python_files():
    """Of the product, its benchmarks, tests and examples."""
    folders = ("cumo", "cumo_kernels", "benchmarks", "tests", "examples", "docs")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_every_variable_that_is_read_has_a_row_and_every_row_is_read():
    read = {name for path in python_files() for name in variables_read(path)}
    assert read == {*table_of("Of this project"), *table_of("Of others, read here")}
    assert not read & {*table_of("Of others, not read here")}


def test_variables_of_the_scripts():
    script = (ROOT / "benchmarks" / "gpu.sh").read_text()
    assert set(re.findall(r"\$\{([A-Z_]+):-", script)) == {*table_of("Of the scripts")}
    told = {*table_of("Of others, not read here"), *table_of("Of this project")}
    exported = re.findall(r"^ *export (.*)$", script, flags=re.MULTILINE)
    exported += re.findall(r"export ([A-Z_]+ :=)|^\t([A-Z_0-9]+=)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    names = {name for line in exported for name in re.findall(r"([A-Z_0-9]{4,}) ?:?=", "".join(line))}
    assert len(names) >= 5
    assert names <= told, names - told


def test_a_variable_is_found_however_it_is_read(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(
        'NAME = "B"\nos.environ["A"]\nos.environ.get(NAME)\nos.getenv("C")\n"D" in os.environ\n'
        'os.environ.setdefault("E", "1")\nos.environ["SET"] = "1"\n{}.get("F")\n'
    )
    assert sorted(variables_read(path)) == ["A", "B", "C", "D", "E"]
    path.write_text("os.environ[name]")
    with pytest.raises(AssertionError, match="which variable"):
        list(variables_read(path))


# Links, and what Markdown would swallow


def anchors_of(path):
    """What links into a page may name: its headings."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub(lambda m: m[0].strip("`"), path.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for path, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", CODE.sub("", page.read_text())):
        if path.startswith("https://"):
            continue
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor[1:] in anchors_of(target), f"{path}{anchor}"
        if page in DOCS and path:
            tool("hooks").resolve(page.relative_to(ROOT / "docs").as_posix(), path)


def test_links_out_of_the_documents_lead_to_pages_of_the_site():
    hooks = tool("hooks")
    assert hooks.resolve("layer.md", "../examples/plain_module.py") == "examples/plain_module.md"
    assert hooks.resolve("reference/nn.md", "../layer.md") == "../layer.md"
    assert hooks.resolve("reference/nn.md", "../../CHANGELOG.md") == "../changelog.md"
    with pytest.raises(ValueError, match="nor a page of the site"):
        hooks.resolve("layer.md", "../cumo/nn/moe.py")
    assert (
        hooks.rewrite("index.md", "[a](../CHANGELOG.md#x) [b](https://c/d.md)")
        == "[a](changelog.md#x) [b](https://c/d.md)"
    )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_nothing_is_taken_for_a_tag(page):
    assert re.findall(r"<[a-zA-Z/][^>\n]*>", CODE.sub("", page.read_text())) == []


# Python


def blocks_of(page):
    """Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def run(page, namespace=None, replace=("", "")):
    """Run the blocks of a page one after the other, as a reader would who pastes them."""
    namespace = {} if namespace is None else namespace
    for block in blocks_of(page):
        exec(compile(block.replace(*replace) if replace[0] else block, page.name, "exec"), namespace)
    return namespace


@pytest.fixture
def vlmeval(monkeypatch):
    """What stands in for VLMEvalKit, as far as a model is registered."""
    modules = {name: ModuleType(name) for name in ("vlmeval", "vlmeval.vlm", "vlmeval.vlm.base", "vlmeval.config")}
    modules["vlmeval.vlm.base"].BaseModel = object
    modules["vlmeval.config"].supported_VLM = {}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "cumo.integrations.vlmeval", raising=False)
    yield modules["vlmeval.config"].supported_VLM
    sys.modules.pop("cumo.integrations.vlmeval", None)


def test_pages_with_python_are_run():
    assert {page.name for page in DOCS if blocks_of(page)} == {"index.md", "layer.md", "serving.md", "evaluation.md"}


@pytest.mark.parametrize("name", ["index", "layer"])
def test_python_of_the_layer(name):
    pytest.importorskip("transformers", reason="one block uses transformers")
    run(ROOT / "docs" / f"{name}.md")


def test_python_of_evaluation(vlmeval):
    pytest.importorskip("transformers")
    run(ROOT / "docs" / "evaluation.md")
    assert list(vlmeval) == ["cumo-mistral-7b"]


@pytest.mark.slow
def test_python_of_serving(in_example_folder, capsys):  # noqa: F811
    for package in ("openai", "fastapi", "uvicorn"):
        pytest.importorskip(package)
    from cumo.inference import CuMoPipeline
    from tests.serve.serving import serving

    checkpoints = in_example_folder / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "cumo-mistral-7b").symlink_to(in_example_folder / "checkpoint")
    with serving(CuMoPipeline.from_pretrained("checkpoint", device="cpu")) as server:
        namespace = run(ROOT / "docs" / "serving.md", replace=("127.0.0.1:8000", server.url.removeprefix("http://")))
    assert namespace["completion"].prompt_tokens > 16
    assert namespace["experts"].shape == namespace["weights"].shape == (2, 2, 4, 4)
    assert "(2, 2, 4, 4)" in capsys.readouterr().out


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built, where what builds it is installed."""
    for package in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(package, reason="the site is built with the extra docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.mark.slow
def test_the_site_asks_nobody_else_for_anything(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) >= 25
    for page in pages:
        loaded = re.findall(r'<(?:script|img|iframe|link)\b[^>]*?(?:src|href)="?(https?:[^"\s>]*)', page.read_text())
        assert loaded == [], page
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert not re.findall(r"(?:@import|url\()[\"' ]*https?:", styles)


@pytest.mark.slow
def test_the_site_shows_formulas_and_examples(site):
    kernels = (site / "kernels.html").read_text()
    assert kernels.count("<math") > 40 and "arithmatex" not in kernels
    api = (site / "reference" / "cumo_kernels.html").read_text()
    assert 'id="cumo_kernels.moe_mlp"' in api and "Raises:" in api
    assert "MoEMLP" in (site / "examples" / "plain_module.html").read_text()
    assert 'id="cumo-train"' in (site / "commands.html").read_text()
