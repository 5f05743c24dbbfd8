# SPDX-License-Identifier: Apache-2.0
"""The tuner: what it tries is legal, what is wrong or slower is not taken, and the table says where a tile is from."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from cumo_kernels import inspect, tiling, tune, tuned
from cumo_kernels.inspect import CASES, SHARED_BYTES, Case
from cumo_kernels.tiling import GemmTile, Target
from cumo_kernels.tuned import Key

INFERENCE = Case("inference", 12, 2, 3, 16, 32, 16, "gelu", False, True, None)
TRAINING = INFERENCE._replace(name="training", T=tune.DECODE_TOKENS + 1)
H200 = Target.cuda(90, 132)


def key(**changes):
    """Of a large GEMM on sm_90."""
    usual = {"arch": 90, "dtype": "bfloat16", "kind": "forward", "n": 1024, "k": "1024", "transposed": False}
    return Key(**{**usual, "experts": "8", "rows": "more", **changes})


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


def search(layers, cost, seconds=10**6):
    """A search in which a layer takes as long as `cost` says of the tiles in use."""
    layers = layers if isinstance(layers, list) else [layers]

    def timer(run):
        with tiling.use_tiles({}) as asked:
            run()
        return sum(cost(asked_key, tile) for asked_key, tile in asked.items())

    lines = []
    made = tune.Search(layers, timer, seconds, lines.append, Clock())
    made.run()
    return made, lines


def test_what_is_faster_is_found(layer):
    made, _ = search(layer, lambda k, tile: 10.0 - 3 * (tile.BLOCK_M == 16 and k.n == 16) - (tile.GROUP_M == 3))
    assert {k.n: (tile.BLOCK_M, tile.GROUP_M) for k, tile in made.found.items()} == {32: (32, 3), 16: (16, 3)}
    first_ms, best_ms = tune.total_ms(made.timed)
    assert best_ms < first_ms


def layers_of_one_key(device, monkeypatch):
    """Two layers that differ in nothing but their number of tokens, within a step."""
    monkeypatch.setattr(tune, "CHOICES", {"GROUP_M": (2, 3)})
    return [tune.Layer(INFERENCE._replace(name=f"{T}", T=T), torch.float32, device) for T in (6, 12)]


@pytest.mark.parametrize(("gain_of_the_other", "taken"), [(-2.0, True), (-4.0, False)])
def test_a_tile_of_several_layers_has_to_be_faster_in_sum(gain_of_the_other, taken, device, monkeypatch):
    layers = layers_of_one_key(device, monkeypatch)
    running = []
    monkeypatch.setattr(
        tune.Layer, "run", lambda layer, run=tune.Layer.run: running.append(layer.case.name) or run(layer)
    )

    def cost(_, tile):
        gain = {"6": gain_of_the_other, "12": 3.0}[running[-1]]
        return 10.0 - gain * (tile.GROUP_M == 3)

    made, lines = search(layers, cost, seconds=50)
    assert not any("no gain" in line for line in lines), "what is slower in sum is not even taken at first"
    assert all(made.users(key) == made.timed for key in made.timed[0].tiles)
    assert {tile.GROUP_M for tile in made.found.values()} == ({3} if taken else set())
    for entry in tune.entries_of(made, device):
        assert entry["layers"] == {
            "6": {"pass": "forward", "before_ms": 20.0, "after_ms": 24.0},
            "12": {"pass": "forward", "before_ms": 20.0, "after_ms": 14.0},
        }
        assert entry["gain_of_layers"] == round(40 / 38, 4)


def test_a_layer_without_the_key_is_neither_timed_nor_named(device, monkeypatch):
    monkeypatch.setattr(tune, "CHOICES", {"GROUP_M": (2, 3)})
    cases = [INFERENCE, INFERENCE._replace(name="wider", F=48)]
    made, _ = search([tune.Layer(case, torch.float32, device) for case in cases], lambda *_: 1.0)
    by_width = {
        key.n: [timed.layer.case.name for timed in made.users(key)] for timed in made.timed for key in timed.tiles
    }
    assert by_width == {32: ["inference"], 48: ["wider"], 16: ["inference", "wider"]}


def test_layers_that_share_a_key_are_one_group():
    keys = {"a": [1, 2], "b": [3], "c": [4], "d": [2, 4], "e": []}
    cases = [INFERENCE._replace(name=name) for name in keys]
    groups = tune.groups_of(cases, lambda case: keys[case.name])
    assert [[case.name for case in group] for group in groups] == [["b"], ["a", "c", "d"], ["e"]]


def test_no_gemms_of_the_layers_tuned_by_default_share_a_key():
    target, cases = inspect.TARGETS["sm_90"], [case for case in CASES if case.name in tune.parse([]).layers]
    assert len(cases) == 4
    keys = {case.name: inspect.layer_tiles(case, target, torch.bfloat16, backward=True) for case in cases}
    assert [len(of_case) for of_case in keys.values()] == [6] * 4, "products of forward and backward"
    assert tune.groups_of(cases, lambda case: keys[case.name]) == [[case] for case in cases]


@pytest.mark.parametrize("arch", sorted(SHARED_BYTES))
def test_every_known_architecture_has_legal_neighbours(arch):
    tile = GemmTile(64, 64, 64, num_warps=4, num_stages=2)
    found = list(tune.neighbours(tile, key(arch=arch)))
    largest = max((t.BLOCK_M + t.BLOCK_N) * t.BLOCK_K * 2 * t.num_stages for t in found)
    assert found and largest <= SHARED_BYTES[arch]


def test_an_unknown_architecture_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"^arch: expected the card at hand or one of sm_80, .*sm_121, got sm_130$"):
        tune.is_legal(GemmTile(64, 64, 64, num_warps=4, num_stages=2), key(arch=130))


@pytest.mark.parametrize(
    ("card", "arch", "expected"),
    [
        pytest.param((13, 0), 130, 64 << 10, id="unknown"),
        pytest.param((9, 0), 90, 64 << 10, id="known, and asked all the same"),
        pytest.param((9, 0), 80, SHARED_BYTES[80], id="another than the one compiled for"),
    ],
)
def test_the_card_at_hand_is_asked_for_its_shared_memory(card, arch, expected, monkeypatch):
    properties = SimpleNamespace(major=card[0], minor=card[1], shared_memory_per_block_optin=64 << 10)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    assert tune.shared_bytes(arch) == expected


def test_a_layer_for_training_is_timed_with_its_backward(device, monkeypatch):
    monkeypatch.setattr(tune, "CHOICES", {"GROUP_M": (3,)})
    made, _ = search(tune.Layer(TRAINING, torch.float32, device), lambda k, _: 1.0 + (k.kind == "wgrad"))
    assert {k.kind for timed in made.timed for k in timed.tiles} == {"forward", "dact", "wgrad"}
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
    tile = tiling.gemm_tile(H200, torch.bfloat16, rows * 4, 4, 1024, kind, 1024)
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
    gemm = {"dtype": torch.bfloat16, "rows": 4000, "num_experts": 4, "n": 1024, "kind": "forward", "k": 1024}
    usual = tiling.gemm_tile(H200, **gemm)
    with tiling.use_tiles({key(): tile}):
        for same in ({}, {"rows": 9000}, {"k": 600}, {"num_experts": 2}):
            assert tiling.gemm_tile(H200, **gemm | same) == tile, same
        for other in (
            {"rows": 2048},  # 512 rows per expert are of the step before
            {"n": 1056},
            {"k": 512},
            {"k": 1025},
            {"kind": "wgrad"},
            {"dtype": torch.float16},
            {"transposed": True},
            {"num_experts": 9, "rows": 9000},
        ):
            assert tiling.gemm_tile(H200, **gemm | other) != tile, other
    assert tiling.gemm_tile(H200, **gemm) == usual


def test_tables_are_merged_and_sorted(tmp_path):
    path = tmp_path / "table.json"

    def entry(n, side):
        return {**key(n=n)._asdict(), "tile": asdict(GemmTile(side, 64, 32, 4, 2)), "card": "a card"}

    assert tune.write_table(path, [entry(2048, 64), entry(64, 64)]) == []
    assert tune.write_table(path, [entry(2048, 128)]) == [entry(2048, 64)], "what is replaced is told"
    found = tuned.read_entries(path)
    assert [(e["n"], e["tile"]["BLOCK_M"], e["card"]) for e in found] == [(64, 64, "a card"), (2048, 128, "a card")]


def gemm_tile_in_a_process(path):
    """What a fresh process chooses that is told of a table."""
    code = (
        "import torch\nfrom cumo_kernels import tiling\n"
        "print(tiling.gemm_tile(tiling.Target.cuda(90, 132), torch.bfloat16, 4000, 4, 1024, 'forward', 1024).BLOCK_M)"
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
        assert {"card", "torch", "triton", "gain_of_layers", "layers"} <= entry.keys()


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
