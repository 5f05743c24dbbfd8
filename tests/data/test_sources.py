# SPDX-License-Identifier: Apache-2.0
"""Sources and mixtures: which rows are taken, how often, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from cumo.data import DataSource, read_sources


def select(rows, seed=0, **fields):
    return DataSource("data.json", **fields).select(rows, np.random.default_rng(seed)).tolist()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ("all", [*range(10)]),
        ("first:3", [0, 1, 2]),
        ("end:3", [7, 8, 9]),
        ("first:25%", [0, 1, 2]),
        ("end:15%", [8, 9]),
        ("first:100%", [*range(10)]),
        ("end:10", [*range(10)]),
    ],
)
def test_sampling(sampling, expected):
    assert select(10, sampling=sampling) == expected


@pytest.mark.parametrize(("sampling", "count"), [("random:30", 30), ("random:12.5%", 13)])
def test_random_sampling_depends_on_the_seed_alone(sampling, count):
    drawn = [select(100, seed, sampling=sampling) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for rows in drawn:
        assert len(set(rows)) == count and rows == sorted(rows) and set(rows) <= set(range(100))


def test_weights():
    assert select(4, weight=2) == [0, 1, 2, 3] * 2
    half, again, other = (select(100, seed, weight=0.5) for seed in (0, 0, 1))
    assert half == again != other and len(set(half)) == 50
    more = select(10, weight=1.5, sampling="end:4")
    assert more[:4] == [6, 7, 8, 9] and len(more) == 6 and len(set(more[4:])) == 2 and set(more[4:]) <= {6, 7, 8, 9}


def test_more_rows_than_there_are():
    with pytest.raises(ValueError, match="data.json: expected at least 11 rows for sampling 'end:11', got 10"):
        select(10, sampling="end:11")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "data.csv"}, "path: expected a file that ends in .json or .jsonl, got 'data.csv'"),
        ({"path": 3}, "path: expected a string"),
        ({"image_folder": None}, "image_folder: expected a string, got None"),
        *[
            ({"sampling": value}, "sampling: expected all, first:N")
            for value in ("last:3", "first", "first:0", "first:-1", "random:0%", "end:101%", "first:1.5", "all:3", None)
        ],
        *[({"weight": value}, "weight: expected a positive number") for value in (0, -1, "2", float("nan"), True)],
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        DataSource(**{"path": "data.json", **fields})


def test_a_data_file_is_a_source(tmp_path):
    assert read_sources("some/data.json") == [DataSource("some/data.json")]
    (source,) = read_sources(tmp_path / "data.jsonl")
    assert source.folder == tmp_path
    assert DataSource("some/data.json", image_folder="pictures").folder == Path("pictures")


def test_mixture(tmp_path):
    pytest.importorskip("yaml", reason="mixtures are YAML")
    path = tmp_path / "mixture.yaml"
    path.write_text(
        f"""
        datasets:
          - json_path: a.json
            sampling_strategy: first:10%
            image_folder: pictures
          - json_path: {tmp_path.as_posix()}/sub/b.jsonl
            weight: 2
            sampling_strategy:
        """
    )
    first, second = read_sources(path)
    assert first == DataSource(str(tmp_path / "a.json"), str(tmp_path / "pictures"), "first:10%")
    assert second == DataSource(str(tmp_path / "sub" / "b.jsonl"), weight=2)
    assert second.folder == tmp_path / "sub"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mixture.yaml: expected a list under datasets"),
        ("datasets: []", "expected a list under datasets"),
        ("datasets: [{json_path: a.json}]\nother: 1", "expected a list under datasets and nothing else"),
        ("datasets: [", "mixture.yaml: expected YAML"),
        ("datasets: [a.json]", r"mixture.yaml: datasets\[0\]: expected json_path"),
        ("datasets: [{path: a.json}]", r"datasets\[0\]: expected json_path"),
        ("datasets: [{json_path: a.json}, {json_path: b.json, repeat: 2}]", r"datasets\[1\]: .*got \['repeat'\]"),
        ("datasets: [{json_path: a.json, weight: 0}]", r"datasets\[0\]: weight: expected a positive number, got 0"),
        ("datasets: [{json_path: a.json, image_folder: 3}]", r"datasets\[0\]: image_folder: expected a string, got 3"),
    ],
)
def test_bad_mixtures(tmp_path, text, message):
    pytest.importorskip("yaml", reason="mixtures are YAML")
    path = tmp_path / "mixture.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_sources(path)


def test_what_is_no_data(tmp_path):
    with pytest.raises(ValueError, match="path: expected a .json, .jsonl or .yaml file, got 'data.parquet'"):
        read_sources("data.parquet")
    with pytest.raises(FileNotFoundError):
        read_sources(tmp_path / "absent.yaml")
