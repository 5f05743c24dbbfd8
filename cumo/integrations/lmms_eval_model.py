# SPDX-License-Identifier: Apache-2.0
"""The model class for lmms-eval, in a module of its own because its base class is lmms-eval's."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from cumo.inference import CuMoPipeline
from cumo.integrations.lmms_eval import answer


class CuMoChat(lmms):  # type: ignore[misc]
    """CuMo as a model of lmms-eval, on `CuMoPipeline`; with `accelerate launch`, a copy on each GPU.

    Args:
        pretrained: folder in this package's layout or the published one, or a name on the hub.
        device: device of the model; by default the GPU of this process, or the CPU where there is none.
        dtype: "auto" for the dtype of the checkpoint, "float32", "bfloat16" or "float16".
        batch_size: number of requests with equal settings that are answered together.
        options: further arguments of `CuMoPipeline.from_pretrained`: `quantization`, `revision`, ...

    Raises:
        ValueError: an argument or the checkpoint is invalid.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,  # noqa: ARG002  lmms-eval gives it to every model
        **options: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size: expected a positive integer, got {batch_size!r}")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if device is None:
            device = str(self.accelerator.device) if torch.cuda.is_available() else "cpu"
        self.batch_size = int(batch_size)
        self.pipeline = CuMoPipeline.from_pretrained(pretrained, device=device, dtype=dtype, **options)

    @property
    def model(self) -> torch.nn.Module:
        """The CuMo model."""
        return self.pipeline.model

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer the requests and return the answers in their order."""

        def document(task: str, split: str, doc_id: int) -> Any:
            return self.task_dict[task][split][doc_id]

        with tqdm(total=len(requests), desc="cumo", unit="request", disable=self.rank != 0) as progress:
            return answer(self.pipeline, requests, document, self.batch_size, progress.update)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not supported: CuMo is evaluated by what it generates."""
        raise NotImplementedError(f"loglikelihood: expected a task that generates, got {len(requests)} of another kind")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported: what a round asks depends on the task's own code."""
        raise NotImplementedError(f"expected a task of one round, got {len(requests)} requests of several")
