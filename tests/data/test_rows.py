# SPDX-License-Identifier: Apache-2.0
"""Where rows lie in files, whatever their layout, and what is wrong with broken files."""

import io
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cumo.data import rows as rows_module
from cumo.data.rows import DataFileError, RowIndex, iterate_rows
from tests.data.samples import llava

TRICKY = ['brackets }]{[ and "quotes"', "back\\slash\\", '\\"', "new\nline, comma", "ünïcödé 🐱", ""]
LAYOUTS = [{"indent": 1}, {"indent": None}, {"separators": (",", ":")}, {"ensure_ascii": False, "indent": "\t"}]


def scan(text, suffix=".json"):
    raw = text if isinstance(text, bytes) else text.encode()
    return list(iterate_rows(Path("data" + suffix), io.BytesIO(raw)))


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 22])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rows_of_a_list_are_found_whatever_its_layout(monkeypatch, chunk, layout):
    monkeypatch.setattr(rows_module, "CHUNK", chunk)
    expected = [llava(text, "a" + text, id=index) for index, text in enumerate(TRICKY)] + [{}, [], [[1], {"a": {}}]]
    text = "\n \n" + json.dumps(expected, **layout) + "\n\n"
    found = scan(text)
    assert [json.loads(row.raw) for row in found] == expected
    raw = text.encode()
    for row in found:
        assert raw[row.offset : row.offset + len(row.raw)] == row.raw
        assert row.line == 1 + raw[: row.offset].count(b"\n")


scalars = st.none() | st.integers() | st.text(max_size=9)
values = st.recursive(scalars, lambda v: st.lists(v) | st.dictionaries(st.text(max_size=3), v), max_leaves=6)


@settings(max_examples=50)
@given(st.lists(st.dictionaries(st.text(), values), max_size=4), st.sampled_from(LAYOUTS), st.integers(1, 30))
def test_rows_of_any_list(expected, layout, chunk):
    before, rows_module.CHUNK = rows_module.CHUNK, chunk
    try:
        assert [json.loads(row.raw) for row in scan(json.dumps(expected, **layout))] == expected
    finally:
        rows_module.CHUNK = before


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_rows_of_lines(end):
    lines = ['{"a": 1}', "", "  ", '{"b": "\u2028"}', '{"c":']
    found = scan(end.join(lines), ".jsonl")
    assert [(row.line, row.raw.strip().decode()) for row in found] == [(1, lines[0]), (4, lines[3]), (5, lines[4])]


def test_a_byte_order_mark_is_no_part_of_a_row():
    for suffix, text in ((".json", '[{"a": 1}, {"b": 2}]'), (".jsonl", '{"a": 1}\n{"b": 2}')):
        raw = b"\xef\xbb\xbf" + text.encode()
        found = scan(raw, suffix)
        assert [json.loads(row.raw) for row in found] == [{"a": 1}, {"b": 2}]
        assert all(raw[row.offset : row.offset + len(row.raw)] == row.raw for row in found)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", 1, "ends without a list"),
        ('{"a": 1}\n{"a": 2}', 1, "expected a list of rows; a file with a row on each line is to end in .jsonl"),
        ('"a"', 1, "expected a list of rows"),
        ('[{"a": 1},\n {"a":', 2, "ends within a row"),
        ('[{"a": 1},\n {"a": "b}]', 2, "ends within a row"),
        ('[{"a": 1}\n,', 1, "ends within the list"),
        ('[{"a": 1}\n {"a": 2}]', 2, "with a comma between two, got b'{' after 1"),
        ('[{"a": 1},\n]', 2, "with a comma between two, got b',]' after 1"),
        ('[{"a": 1},,\n{}]', 2, "with a comma between two"),
        ('[{"a": 1},\n"b"]', 2, "expected objects"),
        ("[1,\n2]", 2, "expected objects"),
        ('[{"a": 1}]\n\n[{"b": 2}]', 3, "expected nothing after the list"),
        ('[{"a": 1}]\nx', 1, "expected nothing after the list"),
        ("x[{}]", 1, "expected a list of rows"),
    ],
)
def test_broken_lists(text, line, message):
    with pytest.raises(DataFileError, match="data.json:") as raised:
        scan(text)
    assert message in str(raised.value)
    assert raised.value.line == line


def test_a_quote_that_swallows_the_rest_of_a_file(monkeypatch):
    monkeypatch.setattr(rows_module, "CHUNK", 100)
    monkeypatch.setattr(rows_module, "MAX_ROW", 1000)
    text = json.dumps([{"a": "b" * 90}] * 100, indent=1)
    assert len(scan(text)) == 100
    for broken in ('[\n{"a: 1}' + ", {}" * 500 + "]", '[\n{"a": {"b": 1}' + ", {}" * 500 + "]"):
        with pytest.raises(DataFileError, match="data.json:2: expected rows of at most 1000 bytes"):
            scan(broken)


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_index(files, form):
    rows = [llava("question " * index, images=["a.png"] * (index % 3), id=index) for index in range(10)]
    index = RowIndex(Path(getattr(files, form)(rows).path), lambda sample: len(sample.turns[0]["value"]))
    assert len(index) == 10 and not index.faults
    assert index.image_counts.tolist() == [number % 3 for number in range(10)]
    for number in (7, 0, 3):
        assert index.read(number).turns == rows[number]["conversations"]
        assert index.sample_id(number) == number
        assert index.lengths[number] == len(rows[number]["conversations"][0]["value"])


def test_bad_rows_are_noted_and_the_rest_is_read(files):
    path = Path(files.jsonl([llava(), '{"id": 1, "conversations": [}', llava(id=2), "[]"]).path)
    index = RowIndex(path, lambda _: 1)
    assert sorted(index.faults) == [1, 3]
    assert index.faults[1].startswith("broken JSON: Expecting value")
    assert index.read(2).id == 2
    assert [index.sample_id(row) for row in (1, 2, 3)] == [None, 2, None]
    latin = files.folder / "latin.jsonl"
    latin.write_bytes(json.dumps(llava("caf?")).encode().replace(b"?", b"\xe9"))
    assert "expected UTF-8, got byte 0xe9" in RowIndex(latin, lambda _: 1).faults[0]


def test_only_the_first_rows_are_read_if_no_more_are_wanted(files):
    path = Path(files.jsonl([llava(), llava(), "broken"]).path)
    index = RowIndex(path, lambda _: 1, limit=2)
    assert len(index) == 2 and not index.faults


@pytest.mark.parametrize("content", [None, "", "\n\n", "[]"], ids=["absent", "empty", "blank", "empty-list"])
def test_files_without_rows(tmp_path, content):
    path = tmp_path / ("data.json" if content == "[]" else "data.jsonl")
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataFileError, match=r"data.jsonl?: expected (rows, got none|a .json or .jsonl file)"):
        RowIndex(path, lambda _: 1)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_memory_does_not_grow_with_the_size_of_rows(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(rows_module, "CHUNK", 1 << 14)
    row = json.dumps(llava("x" * 10_000))
    path = tmp_path / f"data{suffix}"
    path.write_text("\n".join([row] * 300) if suffix == ".jsonl" else f"[{','.join([row] * 300)}]")
    RowIndex(path, lambda _: 1)  # what is imported or cached at the first time does not count
    tracemalloc.start()
    try:
        assert len(RowIndex(path, lambda _: 1)) == 300
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size / 10
