# SPDX-License-Identifier: Apache-2.0
"""The published way to compute the vision side, as a baseline: the same embeddings and losses from the same weights."""

import csv

import pytest
import torch

pytest.importorskip("transformers", reason="CuMo is built on transformers")

from benchmarks import end_to_end
from benchmarks.published_style import image_features
from tests.models.tiny import tiny_model
from tests.numerics import relative_error


def test_the_published_way_computes_the_same():
    model = tiny_model(text_type="llama")
    model.vision_tower.config.keep_unused_layers = True  # its losses are of all blocks
    pixels = torch.randn(3, 3, 12, 12)
    ours, published = model.get_image_features(pixels), image_features(model, pixels)
    assert relative_error(published.embeddings, ours.embeddings) <= 1e-5
    for part in ("vision_losses", "connector_losses"):
        for kind in ("balance", "z"):
            assert relative_error(getattr(getattr(published, part), kind), getattr(getattr(ours, part), kind)) <= 1e-5


@pytest.mark.parametrize("case", end_to_end.CASES)
def test_every_case_runs_in_both_ways(case):
    for variant in end_to_end.VARIANTS:
        row = end_to_end.measure("tiny", case, variant, 1, "cpu", "fp32", 0.0)
        assert float(row["rate"]) > 0 and row["unit"] == ("images/s" if "vision" in case else row["unit"])


@pytest.mark.slow
def test_the_command_writes_rows(tmp_path, capsys):
    assert end_to_end.main(["--cases", "vision", "--budget", "0", "--device", "cpu", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.csv")
    assert [row["variant"] for row in csv.DictReader(path.read_text().splitlines())] == list(end_to_end.VARIANTS)
    assert "images/s" in capsys.readouterr().out


def test_variants_that_disagree_have_no_times(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(end_to_end, "disagreement", lambda _rows: 1.0)
    monkeypatch.setattr(end_to_end, "ProcessPoolExecutor", InThisProcess)
    assert end_to_end.main(["--cases", "vision", "--budget", "0", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "the variants disagree by 1.0e+00: no times" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


class InThisProcess:
    """Stands in for the pool of processes."""

    def __init__(self, *_arguments, **_options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_arguments):
        return None

    def submit(self, function, *arguments):
        self.result = lambda: function(*arguments)
        return self
