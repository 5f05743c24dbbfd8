# SPDX-License-Identifier: Apache-2.0
"""Every command line of the README and the documents is one: its options, recipes, targets and files exist."""

import importlib.util
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Of others; what stands behind them is theirs.
FOREIGN = {"accelerate", "break", "done", "echo", "for", "hf", "lmms_eval", "python", "scontrol", "srun", "vllm"}
STARTS = re.compile(r"(?:cumo|python3? -m|make|bash|pip|torchrun|hf|for|echo|lmms_eval|vllm)\b")
# Folders that commands write.
WRITTEN = {"benchmarks/results"}
# A word of a command that stands for whatever the reader puts there.
ANYTHING = re.compile(r"\.\.\.|\$stage")


class Line(NamedTuple):
    """A simple command, and where it is from."""

    page: str
    words: tuple[str, ...]

    def __str__(self):
        return f"{self.page}: {shlex.join(self.words)}"


def commands_of(text):
    """Simple commands of shell text: words up to an operator, without comments, `do` and variables that are set."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.wordchars += "[]{}:@$%,+"
        words = []
        for word in [*lexer, ";"]:
            if word in ("|", "||", "&&", ";", "&"):
                while words and (words[0] == "do" or re.fullmatch(r"[A-Z_]+=.*", words[0])):
                    words.pop(0)
                if words:
                    yield tuple(words)
                words = []
            else:
                words.append(word)


def lines_of_blocks():
    """Commands of the fenced blocks that are shell."""
    for page in PAGES:
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE):
            if language in ("", "bash", "sh") and STARTS.match(block):
                yield from (Line(page.relative_to(ROOT).as_posix(), words) for words in commands_of(block))


def spans():
    """Code within sentences: (page, text)."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for span in re.findall(r"`([^`]+)`", text):
            yield page.relative_to(ROOT).as_posix(), " ".join(span.split())


def lines_of_spans():
    """Commands within sentences, which may lack arguments."""
    for page, span in spans():
        if STARTS.match(span) and " " in span:
            yield from (Line(page, words) for words in commands_of(span))


BLOCK_LINES = list(lines_of_blocks())
SPAN_LINES = list(lines_of_spans())


@cache
def parsers():
    """Every command of ours by what is typed."""
    spec = importlib.util.spec_from_file_location("docs_commands", ROOT / "docs" / "commands.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.parsers()


def ours(words):
    """The command of ours that a line runs, and its arguments; None if it runs none."""
    words = list(words)
    if words[0] == "torchrun":
        begin = words.index("-m") if "-m" in words else words.index("--no-python") if "--no-python" in words else None
        if begin is None:
            return None
        words = words[begin + 1 :]
    if words[:2] in (["python", "-m"], ["python3", "-m"]):
        words = words[2:]
        if words[0] != "cumo":
            return (f"python -m {words[0]}", words[1:]) if words[0].split(".")[0] != "pytest" else None
    return (" ".join(words[:2]), words[2:]) if words[0] == "cumo" else None


def options_of(parser):
    """Strings that its options go by."""
    return {option for action in parser._actions for option in action.option_strings}


def check_recipe(arguments):
    """Recipe and overrides are ones: the recipe is read and built as training would."""
    from cumo.train import load_recipe, shipped

    words = [word for word in arguments if not word.startswith("--")]
    if not words:
        return
    names = [words[0].replace("$stage", stage) for stage in ("pretrain", "prefinetune", "instruct")]
    for name in dict.fromkeys(names):
        if name in ("own.yaml", "NAME") or name.startswith("runs/"):
            name = "mistral-7b/finetune-lora"  # stands for one of the reader's
        assert name in shipped(), name
        overrides = [word for word in words[1:] if word != "key=value"]
        load_recipe(name, [word.replace("=...", "=a/folder") for word in overrides])


def needs_everything():
    """Parsers of all commands import what they need."""
    for package in ("transformers", "accelerate", "fastapi", "triton"):
        pytest.importorskip(package, reason="a command needs it")


def refuse(message):
    """In the place of a parser's way to end the process."""
    raise AssertionError(message)


@pytest.mark.parametrize("line", BLOCK_LINES, ids=str)
def test_command_of_a_block_parses(line, monkeypatch):
    words = line.words
    if words[0] == "make":
        assert set(words[1:]) <= targets()
    elif words[0] == "bash":
        assert (ROOT / words[1]).is_file()
        assert set(words[2:]) <= {"--dry-run"}
    elif words[0] == "pip":
        check_extras(words)
    elif (command := ours(words)) is None:
        assert words[0] in FOREIGN | {"torchrun"}, f"{words[0]}: whose command is it?"
    else:
        needs_everything()
        name, arguments = command
        assert name in parsers(), name
        parser = parsers()[name]
        monkeypatch.setattr(parser, "error", refuse)
        parser.parse_intermixed_args([ANYTHING.sub("x", word) for word in arguments])
        if name == "cumo train":
            check_recipe(arguments)


@pytest.mark.parametrize("line", dict.fromkeys(SPAN_LINES), ids=str)
def test_command_of_a_sentence_is_one(line):
    words = line.words
    if words[0] == "make":
        assert words[1] in targets()
    elif words[0] == "bash":
        assert (ROOT / words[1]).is_file()
    elif (command := ours(words)) is not None:
        needs_everything()
        name, arguments = command
        if name.endswith(("COMMAND", "NAME")):
            return
        assert name in parsers(), name
        assert {word for word in arguments if word.startswith("-")} <= options_of(parsers()[name]) | {"--help"}
        if name == "cumo train":
            check_recipe(arguments)


@cache
def targets():
    """Targets of the Makefile."""
    return set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def check_extras(words):
    """Extras that a line installs are those of the package."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        for names in re.findall(r"^(?:\.|cumo)\[(.*)\]$", word):
            assert set(names.split(",")) <= extras.keys(), word


def test_makefile_is_told_in_full():
    told = {word for line in BLOCK_LINES if line.words[0] == "make" for word in line.words[1:]}
    told |= {line.words[1] for line in SPAN_LINES if line.words[0] == "make"}
    assert targets() - told == {"clean"}


def test_options_that_sentences_name_exist():
    needs_everything()
    known = set().union(*(options_of(parser) for parser in parsers().values()))
    named = {(page, span.split("=")[0].split()[0]) for page, span in spans() if re.match(r"--[a-z]", span)}
    foreign = {"--model_args", "--no-deps", "--benchmark-autosave", "--benchmark-compare", "--vision_tower_dir"}
    assert len(named) > 20
    assert {name for name in named if name[1] not in known | foreign} == set()


def test_files_that_sentences_name_exist():
    named = {
        (page, span)
        for page, span in spans()
        if re.fullmatch(r"(?:cumo|cumo_kernels|benchmarks|tests|docs|examples)/[\w./*-]*", span)
    }
    assert len(named) > 40
    named = {name for name in named if name[1].rstrip("/") not in WRITTEN}
    assert [(page, span) for page, span in sorted(named) if not list(ROOT.glob(span.rstrip("/")))] == []


def test_names_of_the_package_in_sentences_exist():
    pytest.importorskip("transformers")
    missing = []
    for page, span in spans():
        if not re.fullmatch(r"(?:cumo|cumo_kernels|ck)(?:\.[A-Za-z_]\w*)+", span) or span.endswith(".py"):
            continue
        parts = span.replace("ck.", "cumo_kernels.", 1).split(".") if span.startswith("ck.") else span.split(".")
        if not resolves(parts):
            missing.append((page, span))
    assert missing == []


def resolves(parts):
    """Whether a dotted name is a module or a member of one."""
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        try:
            thing = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:  # an optional dependency is absent
                return True
            continue
        for attribute in parts[end:]:
            if not hasattr(thing, attribute):
                return False
            thing = getattr(thing, attribute)
        return True
    return False


def test_faults_are_found(monkeypatch):
    needs_everything()
    for words in (("cumo", "eval", "--nope"), ("cumo", "nope"), ("make", "nope"), ("pip", "install", ".[nope]")):
        with pytest.raises(AssertionError):
            test_command_of_a_block_parses(Line("", words), monkeypatch)
    with pytest.raises(ValueError, match="nope"):
        check_recipe(["mistral-7b/instruct", "optimizer.nope=1"])
    assert list(commands_of("A=1 cumo x y=[1,2] # z\nfor i in a; do b | c || d\ndone")) == [
        ("cumo", "x", "y=[1,2]"), ("for", "i", "in", "a"), ("b",), ("c",), ("d",), ("done",),
    ]  # fmt: skip


def test_enough_is_checked():
    assert len(BLOCK_LINES) > 45 and len(SPAN_LINES) > 20
