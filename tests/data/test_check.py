# SPDX-License-Identifier: Apache-2.0
"""Every planted fault is found, with its file and line."""

import json

import pytest

from cumo.data import DataSource, check_data
from tests.data.samples import llava


@pytest.fixture
def sources(files):
    """Three files, of which two have faults, and the faults as (file, line, row, id, reason)."""
    good = files.picture("good.png")
    raw = (files.folder / good).read_bytes()
    (files.folder / "cut.png").write_bytes(raw[: len(raw) // 2])
    (files.folder / "text.png").write_text("no picture")
    clean = files.json([llava(images=[good], id="c0"), llava(id="c1")], "clean.json")
    faulty = files.jsonl(
        [
            llava(id="0"),
            llava(images=["absent.png"], id="1"),
            llava(images=["cut.png"], id="2"),
            llava(images=["text.png"], id="3"),
            '{"id": "4", ',
            "",
            llava(answer=" ", id="6"),
            {"id": "7", "conversations": llava()["conversations"][:1] * 2},
            llava("<image>", id="8"),
            llava("q" * 200, id="9"),
            llava(images=[good], id="10"),
        ],
        "faulty.jsonl",
    )
    listed = files.json([llava(id="l0"), llava(answer="", id="l1"), llava(id="l2")], "listed.json")
    text = (files.folder / "listed.json").read_text()
    line = 1 + text[: text.index('"l1"') - 10].count("\n")
    path = faulty.path
    expected = [
        (path, 2, 2, "1", "absent.png': expected a file, found none"),
        (path, 3, 3, "2", "cut.png': cannot be decoded"),
        (path, 4, 4, "3", "text.png': cannot be decoded"),
        (path, 5, 5, None, "broken JSON"),
        (path, 7, 6, "6", "expected an answer to 'q', got an empty one"),
        (path, 8, 7, "7", "expected gpt to speak next"),
        (path, 9, 8, "8", "got 0 for 1"),
        (path, 10, 9, "9", "expected at most max_length=200 tokens"),
        (listed.path, line, 2, "l1", "got an empty one"),
    ]
    return [clean, faulty, listed], expected


@pytest.mark.parametrize("workers", [0, 2])
def test_every_planted_fault(sources, processor, workers):
    sources, expected = sources
    report = check_data(sources, processor, "llava_v1", 200, workers=workers, progress=False)
    assert [(fault.file, fault.line, fault.row, fault.sample_id) for fault in report.faults] == [
        entry[:4] for entry in expected
    ]
    for fault, (*_, reason) in zip(report.faults, expected, strict=True):
        assert reason in fault.reason
    assert (report.files, report.rows, len(report.lengths)) == (3, 15, 6)
    assert (report.text_rows, report.images) == (4, 2)
    assert report.tokens == sum(report.lengths) and 0 < report.trained_tokens < report.tokens
    text = str(report)
    assert "15 rows of 3 files: 9 faults" in text and "good: 6 rows (4 without pictures), 2 pictures" in text
    assert f"{sources[1].path}:2: row 2, sample '1': " in text


def test_files_of_which_nothing_can_be_read(files, processor):
    broken = files.folder / "broken.json"
    broken.write_text(json.dumps([llava(), llava()], indent=1)[:-5])
    sources = [
        DataSource(str(broken)),
        DataSource(str(files.folder / "absent.json")),
        files.json([llava()], "good.json"),
    ]
    report = check_data(sources, processor, progress=False)
    assert [(fault.file, fault.row) for fault in report.faults] == [(str(broken), 0), (sources[1].path, 0)]
    assert report.faults[0].line > 1 and "ends within" in report.faults[0].reason
    assert str(report.faults[1]) == f"{sources[1].path}: expected a .json or .jsonl file, found none"
    assert report.rows == 1


def test_what_sampling_leaves_out_is_not_looked_at_but_all_that_chance_may_take(files, processor):
    path = files.jsonl([llava(), llava(), llava(answer="")]).path
    assert not check_data([DataSource(path, sampling="first:2")], processor, progress=False).faults
    assert len(check_data([DataSource(path, sampling="random:1")], processor, progress=False).faults) == 1
    assert len(check_data([DataSource(path, weight=0.1)], processor, progress=False).faults) == 1
    report = check_data([DataSource(path, sampling="first:5")], processor, progress=False)
    assert "expected at least 5 rows" in report.faults[0].reason
