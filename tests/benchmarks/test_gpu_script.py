# SPDX-License-Identifier: Apache-2.0
"""The logic of `benchmarks/gpu.sh`, with a stand-in for Python: every step runs, whatever became of those before it."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.sh"
STEPS = ("about", "compile", "tests", "layer", "tune", "end-to-end", "profile")
STAND_IN = """#!/usr/bin/env bash
echo "python $*"
case "$*" in *"$FAIL"*) [ -n "$FAIL" ] && exit 3;; esac
case "$*" in *"$HANG"*) [ -n "$HANG" ] && sleep 60;; esac
exit 0
"""


def run(tmp_path, *arguments, **environment):
    """Exit status, lines of the status file, and the output."""
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    variables = {"PYTHON": str(stand_in), "OUT": str(tmp_path / "out"), "FAIL": "", "HANG": "", **environment}
    result = subprocess.run(
        ["bash", SCRIPT, *arguments], env={**os.environ, **variables}, capture_output=True, text=True, timeout=50
    )
    status = tmp_path / "out" / "status.txt"
    return result.returncode, status.read_text().splitlines() if status.is_file() else [], result.stdout


def test_a_dry_run_walks_through_every_step(tmp_path):
    code, status, shown = run(tmp_path, "--dry-run")
    assert code == 0
    assert [line.split(":")[0] for line in status] == list(STEPS)
    assert all("exit 0" in line for line in status)
    assert "benchmarks.compile --arch sm_90" in shown
    assert (tmp_path / "out" / "logs" / "tune.txt").read_text().startswith("python -m cumo_kernels.tune --dry-run")


@pytest.mark.parametrize("module", ["benchmarks.compile", "-m pytest", "cumo_kernels.tune"])
def test_a_step_that_fails_stops_no_other_and_shows_in_the_exit_status(module, tmp_path):
    code, status, _ = run(tmp_path, "--dry-run", FAIL=module)
    assert code == 1
    assert [line.split(":")[0] for line in status] == list(STEPS)
    assert sum("exit 3" in line for line in status) == 1


def test_a_step_that_hangs_is_cut_off_and_what_no_time_is_left_for_is_named(tmp_path):
    code, status, _ = run(tmp_path, "--dry-run", HANG="benchmarks.run", DRY_SECONDS="12")
    assert code == 1
    assert status[3].startswith("layer: exit cut off at")
    assert status[4:] == [f"{name}: no time left" for name in STEPS[4:]]


def test_on_a_card_the_tests_come_first_and_the_tuned_tiles_are_measured(tmp_path):
    code, status, shown = run(tmp_path)
    assert code == 0
    names = [line.split(":")[0] for line in status]
    assert names[:2] == ["about", "tests"]
    assert names.index("tune") < names.index("tuned-both-scales--4-images")
    assert "--budget 30 --out" in shown


def test_unknown_arguments_are_refused(tmp_path):
    code, status, _ = run(tmp_path, "--fast")
    assert (code, status) == (2, [])
