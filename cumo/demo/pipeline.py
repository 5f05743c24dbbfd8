# SPDX-License-Identifier: Apache-2.0
"""The stages of the demo, one after the other; one that is done is not done again."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from cumo.checkpoints.assemble import assemble_checkpoint
from cumo.checkpoints.files import written_aside
from cumo.demo import clip, dataset, evaluate, language, scenes
from cumo.demo.settings import Settings
from cumo.inference import CuMoPipeline
from cumo.models.processor import CuMoProcessor
from cumo.train import Recipe, run_stage

SETTINGS, RESULTS, REPORT = "demo.json", "results.json", "report.html"
DATA, PARTS, ASSEMBLED, ANSWERS = "data", "pretrained", "assembled", "answers"
# Stages of training: those of the table, in their order, and the controls.
STAGES = ("pretrain", "prefinetune", "instruct")
DENSE, WITHOUT_AUX = "instruct-dense", "instruct-without-aux"
KNOWN = {SETTINGS, RESULTS, REPORT, DATA, PARTS, ASSEMBLED, ANSWERS, *STAGES, DENSE, WITHOUT_AUX}


class Outcome(NamedTuple):
    """The result of a stage."""

    name: str
    steps: int
    loss: float
    """Mean over the last tenth of the steps; of the language model's, without auxiliary losses, where it takes part."""
    accuracy: float | None
    """Over all questions of the test; None for the two parts, which cannot be asked."""
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The result as in results.json."""
        return self._asdict()


def claim(out: Path, settings: Settings) -> None:
    """Make `out` the folder of this run, or find that it is already.

    Raises:
        ValueError: it holds something else, or a run with other settings; nothing is changed then.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: expected a folder, got {out}, which is a file")
    found = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    unknown = [name for name in found if name not in KNOWN and not name.startswith(".")]
    if unknown or (found and SETTINGS not in found):
        raise ValueError(f"--out: expected an empty folder or one of an earlier run, got {out} with {unknown or found}")
    path = out / SETTINGS
    if path.is_file():
        try:
            earlier = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"--out: expected the settings of an earlier run in {path}, got {error}") from error
        if earlier != settings.to_dict():
            changed = sorted(key for key, value in settings.to_dict().items() if earlier.get(key) != value)
            raise ValueError(f"--out: expected a run with these settings, got {out}, which differs in {changed}")
        return
    out.mkdir(parents=True, exist_ok=True)
    aside = out / f".{SETTINGS}"
    aside.write_text(json.dumps(settings.to_dict(), indent=2) + "\n")
    aside.replace(path)


class Demo:
    """A run in its folder.

    Args:
        out: see `claim`.
        settings: what to do.
    """

    def __init__(self, out: Path, settings: Settings) -> None:
        claim(out, settings)
        self.out, self.settings = out, settings
        self.outcomes: list[Outcome] = []
        self._pipelines: dict[str, CuMoPipeline] = {}

    def run(self) -> dict[str, Any]:
        """All stages, and their answers; the content of results.json."""
        transformers_logging.disable_progress_bar()
        out, settings = self.out, self.settings
        digits = scenes.load_digits(settings.seed)
        if not (out / DATA).is_dir():
            say("data: drawing pictures")
            dataset.write(out / DATA, digits, settings)
        parts = out / PARTS
        self._part("language", settings.text_steps, lambda folder: language.pretrain(folder, settings))
        tokenizer = AutoTokenizer.from_pretrained(parts / "language")
        self._part("clip", settings.clip_steps, lambda folder: clip.pretrain(folder, digits, tokenizer, settings))
        self._assemble()
        self.outcomes += [self._train(name) for name in STAGES]
        control, without_aux = self._train(DENSE), self._train(WITHOUT_AUX)
        blank = self._answers("instruct", "blank", out / DATA / dataset.BLANK)
        load = self._load("instruct")
        answers = {name: self._answers(name) for name in (*STAGES, DENSE, WITHOUT_AUX)}
        trained = [*self.outcomes, control, without_aux]
        results = {
            "settings": settings.to_dict(),
            "questions": len(dataset.read_test(out / DATA)),
            "stages": [outcome.to_dict() for outcome in self.outcomes],
            "accuracy_by_kind": {name: found["by_kind"] for name, found in answers.items()},
            "blank_pictures": {"accuracy": blank["accuracy"], "by_kind": blank["by_kind"]},
            "control": control.to_dict(),
            "without_aux": without_aux.to_dict(),
            "expert_load": load["after"],
            "expert_load_before": load["before"],
            "expert_load_without_aux": self._load(WITHOUT_AUX)["after"],
            "seconds": sum(outcome.seconds for outcome in trained)
            + sum(found["seconds"] for found in (*answers.values(), blank)),
        }
        _write_json(out / RESULTS, results)
        return results

    def _part(self, name: str, steps: int, pretrain: Callable[[Path], float]) -> None:
        """A part that other models download."""
        folder = self.out / PARTS / name
        if not folder.is_dir():
            began = time.perf_counter()
            (self.out / PARTS).mkdir(exist_ok=True)
            with written_aside(folder) as aside:
                loss = pretrain(aside)
                _write_json(aside / "result.json", {"loss": loss, "seconds": time.perf_counter() - began})
        result = json.loads((folder / "result.json").read_text())
        self.outcomes.append(Outcome(name, steps, result["loss"], None, result["seconds"]))

    def _assemble(self) -> None:
        """Encoder, a new connector and language model in one checkpoint, whose prompts have no system prompt."""
        folder, settings = self.out / ASSEMBLED, self.settings
        parts = self.out / PARTS
        if folder.is_dir():
            return
        plain = self.out / PARTS / ASSEMBLED
        if not plain.is_dir():
            assemble_checkpoint(parts / "clip", parts / "language", plain, scales=settings.scales, seed=settings.seed)
        processor = CuMoProcessor.from_pretrained(plain)
        processor.chat_template = language.chat_template()
        processor.save_pretrained(plain)
        plain.rename(folder)

    def recipe(self, name: str) -> Recipe:
        """The recipe of a stage of training, as `cumo train` takes it."""
        settings = self.settings
        stage = "instruct" if name in (DENSE, WITHOUT_AUX) else name
        before = {"pretrain": ASSEMBLED, "prefinetune": "pretrain/final", "instruct": "prefinetune/final"}[stage]
        recipe: dict[str, Any] = {
            "stage": stage,
            "model": str(self.out / before),
            "output_dir": str(self.out / name),
            "data": {
                "path": str(self.out / DATA / (dataset.CAPTIONS if stage == "pretrain" else dataset.QUESTIONS)),
                "max_length": 256,
                "workers": 0,
                "group_by_modality_length": False,  # batches of one length would be batches of one kind of question
            },
            "train": {"vision": stage != "pretrain" and settings.vision_lr},
            "optimizer": {"lr": getattr(settings, f"{stage}_lr"), "betas": [0.9, 0.98]},
            "schedule": {"name": "cosine", "warmup": 0.1},
            "batch": {"global_batch_size": settings.batch, "per_device_batch_size": settings.batch},
            "steps": getattr(settings, f"{stage}_steps"),
            "precision": "fp32",
            "gradient_checkpointing": False,
            "seed": settings.seed,
        }
        if stage == "instruct" and name != DENSE:
            recipe["upcycle"] = {
                "vision": settings.experts,
                "connector": settings.experts,
                "top_k": settings.top_k,
                "seed": settings.seed,
            }
            with_aux = name != WITHOUT_AUX
            recipe["aux"] = {"balance": settings.balance * with_aux, "z": settings.z * with_aux}
        return Recipe.from_dict(recipe)

    def _train(self, name: str) -> Outcome:
        say(f"{name}: training")
        result = run_stage(self.recipe(name))
        losses = [record["lm_loss"] for record in self.log(name) if record["step"] > 0.9 * result.steps]
        return Outcome(name, result.steps, sum(losses) / len(losses), self._answers(name)["accuracy"], result.seconds)

    def log(self, name: str) -> list[dict[str, Any]]:
        """Read the log of a stage of training, a record for each step."""
        return [json.loads(line) for line in (self.out / name / "log.jsonl").read_text().splitlines()]

    def example(self) -> Path:
        """A picture of the test."""
        return dataset.read_test(self.out / DATA)[0].picture

    def pipeline(self, name: str) -> CuMoPipeline:
        """The trained model of a stage."""
        if name not in self._pipelines:
            self._pipelines = {name: CuMoPipeline.from_pretrained(self.out / name / "final")}  # one at a time
        return self._pipelines[name]

    def _answers(self, stage: str, name: str | None = None, picture: Path | None = None) -> dict[str, Any]:
        """Answers of a stage's model, kept in a file."""
        path = self.out / ANSWERS / f"{name or stage}.json"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            questions = dataset.read_test(self.out / DATA)
            began = time.perf_counter()
            found = evaluate.answer(self.pipeline(stage), questions, f"{name or stage}: answers", picture)
            _write_json(path, {**found._asdict(), "seconds": time.perf_counter() - began})
        return json.loads(path.read_text())

    def _load(self, stage: str) -> dict[str, Any]:
        """Load of the experts of a stage, before and after its training, over the pictures of the test."""
        path = self.out / ANSWERS / f"{stage}-load.json"
        if not path.is_file():
            pictures = sorted({question.picture for question in dataset.read_test(self.out / DATA)})
            before = CuMoPipeline.from_pretrained(self.out / stage / "start")
            _write_json(
                path,
                {
                    "before": evaluate.expert_load(before, pictures),
                    "after": evaluate.expert_load(self.pipeline(stage), pictures),
                },
            )
        return json.loads(path.read_text())


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def _write_json(path: Path, value: Any) -> None:
    aside = path.with_name(f".{path.name}.incomplete")
    aside.write_text(json.dumps(value, indent=2) + "\n")
    aside.replace(path)
