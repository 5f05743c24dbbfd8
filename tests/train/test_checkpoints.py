# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints are whole, which is the latest, and which are removed."""

import json

import pytest

from cumo.train import checkpoints


def write(folder, step, size=10):
    """A checkpoint of two files, as training writes it."""
    aside = checkpoints.aside_of(folder, step)
    (aside / "part").mkdir(parents=True)
    (aside / "model").write_bytes(b"x" * size)
    (aside / "part" / "shard").write_bytes(b"y" * size)
    return checkpoints.publish(aside, folder, step)


def damage(checkpoint, how):
    if how == "cut off":
        (checkpoint / "model").write_bytes(b"x")
    elif how == "missing":
        (checkpoint / "part" / "shard").unlink()
    elif how == "no manifest":
        (checkpoint / "manifest.json").unlink()
    elif how == "half a manifest":
        (checkpoint / "manifest.json").write_text('{"step": 3, "fi')
    else:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "step": 99}))


def test_a_whole_one(tmp_path):
    checkpoint = write(tmp_path, 12)
    assert checkpoint == tmp_path / "checkpoint-12" and checkpoints.step_of(checkpoint) == 12
    assert checkpoints.fault_of(checkpoint) is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-12"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut off", "model has 1 of 10 bytes"),
        ("missing", "part/shard is missing"),
        ("no manifest", "there is no manifest.json"),
        ("half a manifest", "manifest.json is damaged"),
        ("another's", "manifest.json is that of step 99"),
    ],
)
def test_incomplete_ones_are_neither_gone_on_from_nor_counted(tmp_path, caplog, how, message):
    write(tmp_path, 3)
    write(tmp_path, 20)
    damage(write(tmp_path, 100), how)
    assert checkpoints.latest(tmp_path).name == "checkpoint-20", "by number, not by name"
    assert f"checkpoint-100: left out, since it is incomplete: {message}" in caplog.text
    checkpoints.rotate(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-20"]
    write(tmp_path, 100)  # the step is done again
    assert checkpoints.latest(tmp_path).name == "checkpoint-100"


def test_the_only_good_one_stays(tmp_path):
    write(tmp_path, 1)
    damage(write(tmp_path, 2), "missing")
    damage(write(tmp_path, 3), "cut off")
    checkpoints.rotate(tmp_path, 1)
    assert checkpoints.latest(tmp_path).name == "checkpoint-1"


def test_the_newest_stay(tmp_path):
    for step in (9, 10, 11):
        write(tmp_path, step)
    checkpoints.rotate(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11"]


def test_what_was_left_aside_is_removed_and_nothing_else(tmp_path):
    kept = write(tmp_path, 5)
    for name in (".checkpoint-6.incomplete", ".checkpoint-4.removed", ".other", "checkpoint-final"):
        (tmp_path / name).mkdir()
    checkpoints.tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other", kept.name, "checkpoint-final"]


def test_no_folder_no_checkpoint(tmp_path):
    assert checkpoints.latest(tmp_path / "absent") is None
    assert checkpoints.latest(tmp_path) is None
    checkpoints.tidy(tmp_path / "absent")
