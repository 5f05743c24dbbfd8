# SPDX-License-Identifier: Apache-2.0
"""Tensors in files: shards of bounded size, read one at a time; what is damaged is named."""

import json

import pytest
import torch
from safetensors.torch import save_file

from cumo.checkpoints.files import Weights, open_file, open_folder, write_shards, written_aside
from tests.numerics import assert_bitwise_equal

INDEX = "model.safetensors.index.json"


def tensors(count=5, size=100):
    """Some of 400 bytes each."""
    return {f"layer.{i}": torch.randn(size) for i in range(count)}


@pytest.mark.parametrize(
    ("limit", "files"), [(10**9, 1), (1000, 3), (800, 3), (799, 5), (1, 5)], ids=["one", "2+2+1", "exact", "-1", "tiny"]
)
def test_shards_have_at_most_the_size_that_was_asked_for(limit, files, tmp_path):
    given = tensors()
    where = write_shards(tmp_path, iter(given.items()), max_shard_bytes=limit)
    assert len(set(where.values())) == files == len(list(tmp_path.glob("*.safetensors")))
    assert (tmp_path / INDEX).is_file() == (files > 1)
    assert_bitwise_equal(dict(open_folder(tmp_path)), given)


def test_no_more_than_a_shard_is_held(tmp_path):
    """The stream is asked for the next tensor only once what does not fit with it has been written."""
    written = []

    def stream():
        for name, tensor in tensors().items():
            written.append(len(list(tmp_path.iterdir())))
            yield name, tensor

    write_shards(tmp_path, stream(), max_shard_bytes=800)
    assert written == [0, 0, 0, 1, 1]


def write_bin_shards(folder, given):
    """Two .bin files and their index."""
    names = list(given)
    parts = {"a.bin": names[:2], "b.bin": names[2:]}
    for file, members in parts.items():
        torch.save({name: given[name] for name in members}, folder / file)
    weight_map = {name: file for file, members in parts.items() for name in members}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_of_either_format_are_read(tmp_path):
    given = tensors()
    write_bin_shards(tmp_path, given)
    assert_bitwise_equal(dict(open_folder(tmp_path)), given)


def cut(path):
    """Half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_truncated_shard_is_named(kind, tmp_path):
    given = tensors()
    if kind == "bin":
        write_bin_shards(tmp_path, given)
        damaged = tmp_path / "b.bin"
    else:
        write_shards(tmp_path, given.items(), max_shard_bytes=800)
        damaged = tmp_path / "model-00002-of-00003.safetensors"
    cut(damaged)
    with pytest.raises(ValueError, match=f"{damaged.name}: expected a whole file of tensors, got a truncated or dam"):
        open_folder(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write_shards(tmp_path, tensors().items(), max_shard_bytes=800)
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00003-of-00003.safetensors: expected a file of tensors, found none"):
        open_folder(tmp_path)


def test_a_shard_with_other_tensors_than_its_index_says(tmp_path):
    write_shards(tmp_path, tensors().items(), max_shard_bytes=800)
    save_file({"layer.4": torch.zeros(1), "stray": torch.zeros(1)}, tmp_path / "model-00001-of-00003.safetensors")
    with pytest.raises(ValueError, match=r"missing \['layer.0', 'layer.1'\], unexpected \['layer.4', 'stray'\]"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        *(
            "{",
            "[]",
            "{}",
            "",
            "[" * 20_000,
            '{"weight_map": []}',
            '{"weight_map": {"a": 1}}',
            '{"weight_map": {"a": ""}}',
        ),
        *('{"weight_map": {"a": "../model.safetensors"}}', '{"weight_map": {"a": "/x"}}', "\x00"),
    ],
    ids=lambda content: content[:40],
)
def test_an_index_that_is_none(content, tmp_path):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ValueError, match=f"{INDEX}: expected (JSON|an object|a weight_map)"):
        open_folder(tmp_path)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(ValueError, match="expected model.safetensors or pytorch_model.bin, whole or with an index"):
        open_folder(tmp_path)


def test_a_bin_file_with_something_else(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "x.bin")
    with pytest.raises(ValueError, match=r"x\.bin: expected a dictionary of tensors, got list"):
        open_file(tmp_path / "x.bin")


def test_joined_files_must_not_contradict_each_other(tmp_path):
    for file, value in (("a.bin", 1.0), ("b.bin", 2.0), ("c.bin", 1.0)):
        torch.save({"w": torch.tensor([value]), file: torch.zeros(1)}, tmp_path / file)
    a, b, c = (open_file(tmp_path / name) for name in ("a.bin", "b.bin", "c.bin"))
    assert set(a.joined(c)) == {"w", "a.bin", "c.bin"}
    with pytest.raises(ValueError, match=r"w: expected one value, got different ones in .*a\.bin and .*b\.bin"):
        a.joined(b)


def test_renamed_tensors_are_found_again(tmp_path):
    given = tensors(3)
    save_file(given, tmp_path / "x.safetensors")
    opened: Weights = open_file(tmp_path / "x.safetensors")
    renamed = opened.renamed({"layer.0": "first", "layer.2": "last"}).renamed({"first": "one", "last": "two"})
    assert_bitwise_equal(dict(renamed), {"one": given["layer.0"], "two": given["layer.2"]})


def test_written_aside_all_or_nothing(tmp_path):
    target = tmp_path / "deep" / "target"
    with pytest.raises(RuntimeError, match="no"), written_aside(target) as folder:
        (folder / "x").write_text("half")
        raise RuntimeError("no")
    assert list((tmp_path / "deep").iterdir()) == []
    (tmp_path / "deep" / ".target.incomplete").mkdir()
    (tmp_path / "deep" / ".target.incomplete" / "left by a process that was killed").touch()
    with written_aside(target) as folder:
        (folder / "x").write_text("whole")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["x"]
    with pytest.raises(ValueError, match="expected a folder that does not exist yet, found one"), written_aside(target):
        pass
    assert (target / "x").read_text() == "whole"
