# SPDX-License-Identifier: Apache-2.0
"""The tuner: what it tries is legal, what is wrong or slower is not taken, and the table says where a tile is from."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from cumo_kernels import tiling, tune, tuned
from cumo_kernels.inspect import Case
from cumo_kernels.tiling import GemmTile, Target
from cumo_kernels.tuned import Key

INFERENCE = Case("inference", 12, 2, 3, 16, 32, 16, "gelu", False, True, None)
TRAINING = INFERENCE._replace(name="training", T=tune.DECODE_TOKENS + 1)
H200 = Target.cuda(90, 132)


def key(**changes):
    """Of a large GEMM on sm_90."""
    return Key(**{"arch": 90, "dtype": "bfloat16", "kind": "forward", "n": 1024, "rows": "more", **changes})


@pytest.fixture
def layer(device, monkeypatch):
    """A small layer of inference; few candidates, since the interpreter is slow."""
    monkeypatch.setattr(tune, "CHOICES", {"BLOCK_M": (16, 32), "GROUP_M": (2, 3)})
    return tune.Layer(INFERENCE, torch.float32, device)


class Clock:
    """Time that passes by one second whenever somebody looks."""

    def __init__(self):
        self.now = 0

    def __call__(self):
        self.now += 1
        return self.now


def search(layer, cost, seconds=10**6):
    """A search in which a layer takes as long as `cost` says of the tiles in use."""

    def timer(run):
        with tiling.use_tiles({}) as asked:
            run()
        return sum(cost(asked_key, tile) for asked_key, tile in asked.items())

    lines = []
    made = tune.Search(layer, timer, seconds, lines.append, Clock())
    made.run()
    return made, lines


def test_what_is_faster_is_found(layer):
    made, _ = search(layer, lambda k, tile: 10.0 - 3 * (tile.BLOCK_M == 16 and k.n == 16) - (tile.GROUP_M == 3))
    assert {k.n: (tile.BLOCK_M, tile.GROUP_M) for k, tile in made.found.items()} == {32: (32, 3), 16: (16, 3)}
    assert made.best_ms < made.first_ms


def test_a_layer_for_training_is_timed_with_its_backward(device, monkeypatch):
    monkeypatch.setattr(tune, "CHOICES", {"GROUP_M": (3,)})
    made, _ = search(tune.Layer(TRAINING, torch.float32, device), lambda k, _: 1.0 + (k.kind == "wgrad"))
    assert {k.kind for k in made.keys} == {"forward", "dact", "wgrad"}
    assert made.found == {}


def test_a_difference_below_the_noise_is_none(layer):
    made, _ = search(layer, lambda _, tile: 100.0 - 0.2 * (tile.GROUP_M == 3))
    assert made.found == {}


def test_what_is_wrong_is_not_taken_however_fast(layer, monkeypatch):
    run = tune.Layer.run

    def spoilt(self):
        with tiling.use_tiles({}) as asked:
            results = run(self)
        if any(tile.BLOCK_M == 16 for tile in asked.values()):
            results[-1] = results[-1] + 0.01 * results[-1].norm()
        return results

    monkeypatch.setattr(tune.Layer, "run", spoilt)
    made, lines = search(layer, lambda _, tile: 1.0 if tile.BLOCK_M == 16 else 10.0)
    assert made.found == {}
    assert any(line.startswith("wrong") for line in lines)


def test_what_cannot_be_compiled_is_not_taken(layer, monkeypatch):
    run = tune.Layer.run

    def failing(self):
        with tiling.use_tiles({}) as asked:
            results = run(self)
        if any(tile.GROUP_M == 3 for tile in asked.values()):
            raise RuntimeError("out of resource: shared memory")
        return results

    monkeypatch.setattr(tune.Layer, "run", failing)
    made, lines = search(layer, lambda _, tile: 1.0 if tile.GROUP_M == 3 else 10.0)
    assert made.found == {}
    assert any(line.startswith("failed") and "RuntimeError" in line for line in lines)


def test_a_gain_that_is_gone_when_timed_again_is_given_up(layer):
    last = {"seconds": 0}

    def cost(_, tile):
        last["seconds"] += 1
        return 5.0 if tile.GROUP_M == 3 and last["seconds"] < 20 else 10.0

    made, lines = search(layer, cost, seconds=12)
    assert made.found == {}
    assert "is no gain over 20.000 ms, timed once more" in lines[-1]


def test_nothing_is_tried_after_the_deadline(layer):
    made, lines = search(layer, lambda _, tile: 10.0 - (tile.GROUP_M == 3), seconds=3)
    assert 0 < len(lines) <= 4
    assert len(made.found) <= 1


@pytest.mark.parametrize("kind", tiling.GEMM_KINDS)
@pytest.mark.parametrize("rows", [4, 60, 5000])
def test_neighbours_are_legal_and_differ_in_one_field(kind, rows):
    tile = tiling.gemm_tile(H200, torch.bfloat16, rows * 4, 4, 1024, kind)
    found = list(tune.neighbours(tile, key(kind=kind)))
    assert found
    for other in found:
        assert sum(a != b for a, b in zip(asdict(tile).values(), asdict(other).values(), strict=True)) == 1
        assert tune.is_legal(other, key(kind=kind))
        assert other.BLOCK_M == tile.BLOCK_M if tile.SWAP else other.BLOCK_M >= 64


@pytest.mark.parametrize(
    "changes",
    [{"num_stages": 5}, {"BLOCK_M": 256}, {"SLICES": 32}, {"num_warps": 4}, {"programs_per_sm": 2}],
    ids=lambda c: next(iter(c)),
)
def test_tiles_that_cannot_be(changes):
    tile = GemmTile(128, 256, 64, num_warps=8, num_stages=3, SLICES=4)
    assert tune.is_legal(tile, key())
    assert not tune.is_legal(replace(tile, **changes), key())


def test_a_tuned_tile_is_used_within_its_step_and_for_nothing_else():
    tile = GemmTile(64, 64, 32, num_warps=4, num_stages=2)
    usual = tiling.gemm_tile(H200, torch.bfloat16, 4000, 4, 1024, "forward")
    with tiling.use_tiles({key(): tile}):
        assert tiling.gemm_tile(H200, torch.bfloat16, 4000, 4, 1024, "forward") == tile
        assert tiling.gemm_tile(H200, torch.bfloat16, 9000, 4, 1024, "forward") == tile
        for rows, n, kind, dtype in (
            (2048, 1024, "forward", torch.bfloat16),  # 512 rows per expert are of the step before
            (4000, 1056, "forward", torch.bfloat16),
            (4000, 1024, "wgrad", torch.bfloat16),
            (4000, 1024, "forward", torch.float16),
        ):
            assert tiling.gemm_tile(H200, dtype, rows, 4, n, kind) != tile
    assert tiling.gemm_tile(H200, torch.bfloat16, 4000, 4, 1024, "forward") == usual


def test_tables_are_merged_and_sorted(tmp_path):
    path = tmp_path / "table.json"

    def entry(n, side):
        return {**key(n=n)._asdict(), "tile": asdict(GemmTile(side, 64, 32, 4, 2)), "card": "a card"}

    tune.write_table(path, [entry(2048, 64), entry(64, 64)])
    tune.write_table(path, [entry(2048, 128)])
    found = tuned.read_entries(path)
    assert [(e["n"], e["tile"]["BLOCK_M"], e["card"]) for e in found] == [(64, 64, "a card"), (2048, 128, "a card")]


def gemm_tile_in_a_process(path):
    """What a fresh process chooses that is told of a table."""
    code = (
        "import torch\nfrom cumo_kernels import tiling\n"
        "print(tiling.gemm_tile(tiling.Target.cuda(90, 132), torch.bfloat16, 4000, 4, 1024, 'forward').BLOCK_M)"
    )
    return subprocess.run(
        [sys.executable, "-c", code], env={"CUMO_TUNED_TILES": str(path), "PATH": ""}, capture_output=True, text=True
    )


def test_the_environment_names_a_table(tmp_path):
    path = tmp_path / "table.json"
    tune.write_table(path, [{**key()._asdict(), "tile": asdict(GemmTile(64, 64, 32, 4, 2))}])
    assert gemm_tile_in_a_process(path).stdout == "64\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a table of tuned tiles"),
        ("{", "expected a table of tuned tiles"),
        ("{}", "expected a list, got dict"),
        ('[{"arch": 90}]', "entry 0: expected the keys"),
        (json.dumps([{**key()._asdict(), "tile": {"side": 3}}]), "tile: expected the fields of GemmTile"),
    ],
    ids=["absent", "broken", "object", "incomplete", "other fields"],
)
def test_what_is_no_table_is_an_error_at_import(content, message, tmp_path):
    path = tmp_path / "table.json"
    if content is not None:
        path.write_text(content)
    result = gemm_tile_in_a_process(path)
    assert result.returncode != 0 and message in result.stderr


def test_the_shipped_table_is_legal():
    for entry in tuned.read_entries(tuned.SHIPPED):
        assert tune.is_legal(GemmTile(**entry["tile"]), tuned.key_of(entry)), entry
        assert {"card", "torch", "triton", "gain_of_layer", "layer"} <= entry.keys()


@pytest.mark.slow
def test_candidates_compile_without_a_gpu(tmp_path):
    """In a process of its own: here the interpreter is on."""
    command = [sys.executable, "-m", "cumo_kernels.tune", "--dry-run", "--layers", "connector, 8 tokens"]
    result = subprocess.run(
        [*command, "--budget", "1"], env={"PATH": "", "HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "reg     0 B spilled  forward n=4096 GemmTile(" in result.stdout


def test_the_command_refuses_the_interpreter(capsys):
    assert tune.main([]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
