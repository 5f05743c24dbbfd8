# SPDX-License-Identifier: Apache-2.0
"""The benchmark runner: what is wrong gets no time, what is right gets a row that says where it comes from."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import layers, run
from benchmarks.gate import Gate, results_of
from benchmarks.measure import Ceilings, Timing
from benchmarks.operations import LAYER, OPERATIONS
from benchmarks.variants import MissingVariantError, Variant, of_layer
from benchmarks.workloads import CPU, GPU, PASSES, Workload, make_layer
from cumo_kernels.inspect import Case

CPU_DEVICE = torch.device("cpu")
BIASED = Workload(Case("biased", 60, 2, 4, 16, 24, 8, "quick_gelu", False, True, 20))
GATED = Workload(Case("gated", 33, 3, 5, 16, 24, 16, "silu", True, False, None), skewed=True)
CEILINGS = Ceilings(flops=1e11, bytes=1e10)


def bench(operation=LAYER, workload=BIASED, passes=PASSES, **variants):
    """A bench with further variants, and its rows by variant."""
    operation = replace(operation, variants={**operation.variants, **variants})
    inputs = make_layer(workload, torch.float32, CPU_DEVICE)
    made = run.Bench(operation, inputs, passes, CEILINGS, 0.0)
    return {
        name: list(made.rows(name, variant))
        for name, variant in operation.variants.items()
        if name != "compiled_reference"  # takes half a minute to compile
    }


@pytest.mark.parametrize("workload", [BIASED, GATED], ids=lambda w: w.name)
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=lambda o: o.name)
def test_every_variant_that_runs_here_is_right_and_timed(operation, workload):
    for name, rows in bench(operation, workload).items():
        statuses = {row["status"] for row in rows}
        if operation.variants[name].kind == "peer":
            assert statuses <= {"ok", "missing"}, rows
        else:
            assert statuses == {"ok"}, rows
            assert [row["pass"] for row in rows] == list(PASSES)
            assert all(float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"]) for row in rows)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised within torch.compile
def test_the_compiled_reference_is_right():
    inputs = make_layer(BIASED, torch.float32, CPU_DEVICE)
    assert Gate(LAYER.exact, inputs, backward=False).judge(LAYER.variants["compiled_reference"].prepare).passed


def off_by(inputs, change):
    """Our layer with something done to the output."""
    return change(layers.exact(inputs))


def wrong_gradient(y):
    """y, whose gradient is a thousandth too large."""
    return 1.001 * y - 0.001 * y.detach()


PLANTED = {
    "scaled": lambda y: y * 1.001,
    "nan in one place": lambda y: torch.cat([y[:-1], y[-1:] * torch.nan]),
    "one token missing": lambda y: torch.cat([y[:-1], torch.zeros_like(y[-1:])]),
    "other shape": lambda y: y[:-1],
    "wrong gradient only": wrong_gradient,
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_wrong_variant_gets_no_time(fault):
    planted = Variant(of_layer(lambda inputs: off_by(inputs, PLANTED[fault])))
    (row,) = bench(planted=planted)["planted"]
    if fault == "other shape":  # autograd refuses it already
        assert row["status"] == "failed"
    else:
        assert row["status"] == "wrong" and "is off by" in row["reason"]
    assert not row["p50_ms"] and not row["tflops"]


def test_a_variant_that_fails_or_is_missing_says_so_and_ours_may_not_fail():
    def fail(_inputs):
        raise RuntimeError("no such kernel")

    def missing(_inputs):
        raise MissingVariantError("it is not here")

    rows = bench(failing=Variant(of_layer(fail)), missing=Variant(of_layer(missing), "peer"))
    assert [(r["status"], r["reason"]) for r in rows["failing"]] == [("failed", "RuntimeError: no such kernel")]
    assert [(r["status"], r["reason"]) for r in rows["missing"]] == [("missing", "it is not here")]
    with pytest.raises(RuntimeError, match="no such kernel"):
        bench(ours=Variant(of_layer(fail), "ours"))


def test_bfloat16_is_held_against_eager_in_bfloat16():
    inputs = make_layer(BIASED, torch.bfloat16, CPU_DEVICE)
    gate = Gate(LAYER.exact, inputs, backward=True)
    verdict = gate.judge(of_layer(layers.sorted_loop))
    assert verdict.passed and 1e-4 < verdict.allowed < 0.05
    assert not gate.judge(of_layer(lambda given: off_by(given, lambda y: y * 1.05))).passed


@pytest.mark.parametrize("workload", [BIASED, GATED], ids=lambda w: w.name)
def test_arithmetic_is_that_of_the_matrix_products(workload):
    inputs = make_layer(workload, torch.float32, CPU_DEVICE)
    for backward, which in ((False, "forward"), (True, "both")):
        call = LAYER.variants["sorted_loop"].prepare(inputs)
        with FlopCounterMode(display=False) as counter:
            results_of(call, backward)
        assert counter.get_total_flops() == workload.layer_flops(which)
    assert workload.layer_flops("backward") == 2 * workload.layer_flops("forward")


def test_least_bytes_of_a_forward_are_those_of_its_tensors():
    inputs = make_layer(BIASED, torch.float32, CPU_DEVICE)
    tensors = (inputs.x_TD, inputs.w1_EFD, inputs.w2_EOF, inputs.b1_EF, inputs.b2_EO, inputs.dy_TO)
    assert BIASED.layer_bytes("forward", 4) == sum(tensor.nbytes for tensor in tensors)
    one = Workload(Case("one token", 1, 2, 8, 4, 4, 4, "silu", False, False, None))
    assert one.layer_bytes("forward", 2) == 2 * (2 * 2 * 16 + 8), "experts without tokens are not read"


def test_skewed_routing_is_skewed_and_choices_are_distinct():
    for workload in (GATED, BIASED):
        expert_TK = workload.expert_choice(torch.Generator().manual_seed(0))
        assert all(len(set(row)) == workload.case.K for row in expert_TK.tolist())
    counts = Workload(GATED.case._replace(T=2000), skewed=True).expert_choice(torch.Generator()).flatten().bincount()
    assert counts[0] > 1.3 * counts[-1]


def test_workloads_have_names_of_their_own():
    names = [workload.name for workload in (*GPU, *CPU)]
    assert len(set(names)) == len(names)


def test_the_command_writes_rows_with_their_origin(tmp_path, capsys):
    arguments = ["--device", "cpu", "--quick", "--op", "combine", "--shape", "mixtral, 1 token", "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    assert run.main(arguments) == 0
    (path,) = tmp_path.glob("*.csv")
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert len(rows) == 2 * 2 * len(PASSES), "a second run appends"
    assert all(row["torch"] == torch.__version__ and row["device"] and row["time"] for row in rows)
    assert len(json.loads(path.with_suffix(".json").read_text())) == 2 * len(PASSES)
    shown = capsys.readouterr().out
    assert "% of floor" in shown and "combine: Mixtral, 1 token, width / 8, float32" in shown


def test_the_command_lists_and_refuses(capsys):
    assert run.main(["--list"]) == 0
    assert "scattermoe (peer)" in capsys.readouterr().out
    assert run.main(["--device", "cpu", "--shape", "nothing like it"]) == 2
    assert "--shape: expected part of a workload's name" in capsys.readouterr().err


def timed_on_a_card(monkeypatch, events, graph, floor_ms):
    """Rows of a forward and a backward as on a card, where variants take these milliseconds by each method; those that
    `graph` leaves out cannot be captured."""
    monkeypatch.setattr(run, "peak_bytes", lambda *_: None)
    monkeypatch.setattr(run, "count_launches", lambda *_: None)
    monkeypatch.setattr(
        run, "timings_of", lambda f, _, *rest, real=run.timings_of, **options: real(f, CUDA, *rest, **options)
    )
    inputs = make_layer(BIASED, torch.float32, CPU_DEVICE)
    variants = {
        name: Variant(of_layer(layers.sorted_loop), "ours" if name == "cumo" else "baseline") for name in events
    }
    ceilings = Ceilings(1e30, LAYER.bytes(BIASED, "forward", 4) / floor_ms * 1e3)
    made = run.Bench(replace(LAYER, variants=variants), inputs, ("forward", "backward"), ceilings, 0.0)
    rows = []
    for name, variant in variants.items():
        monkeypatch.setattr(run, "time_call", lambda *_, name=name: Timing(*[events[name]] * 3, 10, "events"))
        replayed = Timing(*[graph[name]] * 3, 10, "graph") if name in graph else None
        monkeypatch.setattr(run, "time_replay", lambda *_, replayed=replayed: replayed)
        rows += made.rows(name, variant)
    return rows


CUDA = torch.device("cuda")
EVENTS, GRAPH = {"cumo": 0.28, "quick": 0.14, "slow": 0.56, "syncs": 0.84}, {"cumo": 0.1, "quick": 0.12, "slow": 0.5}


def test_short_work_is_timed_by_both_methods_and_compared_within_each(monkeypatch):
    rows = timed_on_a_card(monkeypatch, EVENTS, GRAPH, floor_ms=0.05)
    timed = {(row["pass"], row["method"], row["variant"]): row["p50_ms"] for row in rows}
    assert {key for key in timed if key[:2] == ("forward", "graph")} == {("forward", "graph", name) for name in GRAPH}
    for which in ("forward", "backward"):
        assert {key[2] for key in timed if key[:2] == (which, "events")} == set(EVENTS)
    assert not any(method == "graph" for which, method, _ in timed if which == "backward")
    shown = [line.split() for line in run.summary(rows).splitlines() if line.startswith("forward")]
    ratios = {(method, name): ratio for _, method, name, _, _, _, ratio, *_ in shown}
    assert ratios == {
        ("events", "cumo"): "1.00", ("events", "quick"): "0.50", ("events", "slow"): "2.00",
        ("events", "syncs"): "3.00",
        ("graph", "cumo"): "1.00", ("graph", "quick"): "1.20", ("graph", "slow"): "5.00",
    }  # fmt: skip


def test_long_work_is_timed_by_events_alone(monkeypatch):
    rows = timed_on_a_card(monkeypatch, EVENTS, GRAPH, floor_ms=0.6)
    assert {row["method"] for row in rows} == {"events"}


def test_pictures_keep_methods_apart(monkeypatch):
    pytest.importorskip("matplotlib")
    from benchmarks.plots import draw_bars

    rows = [row | {"workload": CPU[0].name} for row in timed_on_a_card(monkeypatch, EVENTS, GRAPH, floor_ms=0.05)]
    axes = draw_bars(rows, "layer").axes[0]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["forward\n(events)", "forward\n(graph)", "backward\n(events)"]
    heights = [round(bar.get_height(), 2) for bar in axes.patches]
    assert heights == [1.0, 0.5, 2.0, 3.0, 1.0, 1.2, 5.0, 1.0, 0.5, 2.0, 3.0]


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.plots import ceilings_of, draw

    rows = [row | {"workload": CPU[0].name} for rows in bench(passes=("forward", "both")).values() for row in rows]
    assert [path.stat().st_size > 10_000 for path in draw(rows, CEILINGS, tmp_path / "x")] == [True, True]
    assert {path.name for path in tmp_path.iterdir()} == {"x-bars-layer.png", "x-roofline.png"}
    assert ceilings_of(rows).flops > 0
