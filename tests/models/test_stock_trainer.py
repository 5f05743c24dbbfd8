# SPDX-License-Identifier: Apache-2.0
"""The Trainer of transformers as it comes: passes of a step, evaluation with metrics."""

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="CuMo is built on transformers")
pytest.importorskip("accelerate", reason="Trainer needs it")

from transformers import Trainer, TrainingArguments

from tests.models.tiny import IMAGE, PATCHES, tiny_model


class Samples(torch.utils.data.Dataset):
    """Eight, each with a picture and six tokens to learn."""

    def __init__(self):
        self.ids = torch.cat([torch.tensor([[1, *[IMAGE] * PATCHES]] * 8), torch.randint(3, 49, (8, 6))], dim=1)
        self.pixels = torch.randn(8, 3, 12, 12)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index], "pixel_values": self.pixels[index]}


class SteadyTrainer(Trainer):
    """In the order of the data; keeps the norms of the gradients."""

    norms = ()

    def _get_train_sampler(self, train_dataset=None):  # noqa: ARG002
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def _get_grad_norm(self, *args, **kwargs):
        norm = super()._get_grad_norm(*args, **kwargs)
        self.norms = (*self.norms, float(norm))
        return norm


def trainer(model, samples, folder, batch=2, passes=1, **options):
    """One step of no length."""
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=passes,
        max_steps=1,
        learning_rate=0.0,
        max_grad_norm=1e9,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    return SteadyTrainer(model=model, args=args, train_dataset=samples, eval_dataset=samples, **options)


def test_a_step_is_the_same_however_many_passes_it_has(tmp_path):
    torch.manual_seed(0)
    model, samples = tiny_model(), Samples()
    found = []
    for batch, passes in ((8, 1), (2, 4), (1, 8)):
        each = trainer(copy.deepcopy(model), samples, tmp_path, batch, passes)
        found.append((each.train().training_loss, *each.norms))
    assert len(found[0]) == 2, "one step has one norm"
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_metrics_are_given_logits_and_labels(family, tmp_path):
    torch.manual_seed(0)
    model, samples = tiny_model(text_type=family), Samples()
    seen = []

    def metrics(prediction):
        seen.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"accuracy": 0.5}

    result = trainer(model, samples, tmp_path, compute_metrics=metrics).evaluate()
    assert seen == [((8, 16, 50), (8, 16))]
    assert result["eval_accuracy"] == 0.5 and np.isfinite(result["eval_loss"])
