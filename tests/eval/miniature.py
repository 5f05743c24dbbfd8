# SPDX-License-Identifier: Apache-2.0
"""Every benchmark with a few rows of our own, in its own format, with generated pictures.

`build` writes the folders. `ANSWERS` says what the scripted model of `tests/eval/scripted.py` replies, right on known
rows and wrong on others; `EXPECTED` is what must come out, worked out by hand.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cumo.eval.scorers import mme, mmmu

SHORT = "Answer the question using a single word or phrase."
MMMU_RIGHT = 20
"""Subjects, from the first, whose question the scripted model answers rightly."""

EXPECTED: dict[str, float | None] = {
    "scienceqa": 50.0,  # one of two with a picture
    "textvqa": 80.0,  # 1 and 0.6
    "gqa": 75.0,
    "pope": 500 / 9,  # F1 of 1, 2/3 and 0
    "mme": 1650.0,  # eight subtasks of 200, one of 50, one of 0
    "mmbench": 50.0,  # one rotation of one of two questions is wrong
    "mmbench_cn": 100.0,
    "mmvet": 75.0,  # grades 0.5 and 1
    "vqav2": None,
    "llava_wild": 100 * 19 / 28,  # 4 + 5 + 10 to 8 + 10 + 10
    "seed": 200 / 3,
    "mmmu": 200 / 3,
    "mathvista": 75.0,
    "vqav2_val": 65.0,  # 1 and 0.3
}
ANSWERS: dict[str, str] = {}
"""By id of a question, which is unique among all benchmarks here."""
JUDGEMENTS = {
    "the sign says stop maybe": "0.5",
    "a cat under a table": "1.0",
    "wild answer one": "8 4\nThe first is better.",
    "wild answer two": "10, 5\nThe first is better.",
    "wild answer three": "10 10\nAs good.",
    "Answer: dog or cat": "Z",
    "I believe that it is the second shape": "(B)",
    "It grew between the years 1998 and 2001": "[1998, 2001]",
}
"""The judge's reply to a prompt that holds the key."""


def picture(seed: int, size: tuple[int, int] = (24, 18)) -> Image.Image:
    """A picture of noise, another one for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save_picture(path: Path, seed: int) -> None:
    """Write a picture, in the format of the path's ending or as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path, None if path.suffix else "PNG")


def write(path: Path, content: Any) -> None:
    """Write JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def llava_rows(folder: Path, rows: Iterable[tuple[Any, str, str]], category: str = "default") -> list[dict[str, Any]]:
    """Rows of (id, image, text) in LLaVA's format, and their pictures."""
    result = []
    for number, (key, image, text) in enumerate(rows):
        save_picture(folder / image, number)
        result.append({"question_id": key, "image": image, "text": text, "category": category})
    return result


def scienceqa(folder: Path) -> None:
    """Three questions, two with a picture."""
    save_picture(folder / "images/test/11/image.png", 1)
    save_picture(folder / "images/test/12/choice.png", 2)
    ANSWERS.update({"sqa11": "The answer is B.", "sqa12": "C", "sqa13": "A. because"})
    turns = {
        "sqa11": "<image>\nWhich is red?\nA. sky\nB. rose",
        "sqa12": "Which is round?\nA. ball\nB. box\nC. book\n<image>",
        "sqa13": "Which is wet?\nA. water\nB. sand",
    }
    images = {"sqa11": {"image": "11/image.png"}, "sqa12": {"image": "12/choice.png"}, "sqa13": {}}
    rows = [
        {"id": key, "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "?"}], **images[key]}
        for key, text in turns.items()
    ]
    write(folder / "llava_test_CQM-A.json", rows)
    problems = {"sqa11": (2, 1), "sqa12": (3, 0), "sqa13": (2, 0), "other": (2, 0)}
    write(
        folder / "problems.json",
        {key: {"choices": ["x"] * number, "answer": answer} for key, (number, answer) in problems.items()},
    )
    write(folder / "pid_splits.json", {"train": ["other"], "test": ["sqa11", "sqa12", "sqa13"]})


def textvqa(folder: Path) -> None:
    """Two questions on one picture, which share its id."""
    ocr = "\nReference OCR token: PARIS, 10\n" + SHORT
    rows = [("0a1b", "0a1b.jpg", f"What City is it?{ocr}"), ("0a1b", "0a1b.jpg", f"Which number?{ocr}")]
    write_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", llava_rows(folder / "train_images", rows))
    answers = {"What city is it?": ["paris"] * 10, "Which number?": ["ten"] * 2 + ["11"] * 8}
    data = [{"image_id": "0a1b", "question": question, "answers": people} for question, people in answers.items()]
    write(folder / "TextVQA_0.5.1_val.json", {"data": data})
    ANSWERS.update({"0a1b#1": "Paris.", "0a1b#2": "10"})


def gqa(folder: Path) -> None:
    """Four questions."""
    answers = {"2011": "left", "2012": "yes", "2013": "red", "2014": "dog"}
    rows = [(key, f"n{key}.jpg", f"Question {key}?\n{SHORT}") for key in answers]
    write_lines(folder / "llava_gqa_testdev_balanced.jsonl", llava_rows(folder / "data/images", rows))
    write(folder / "data/testdev_balanced_questions.json", {key: {"answer": text} for key, text in answers.items()})
    ANSWERS.update({"2011": "Left.", "2012": "Yes", "2013": "red", "2014": "a dog"})


def pope(folder: Path) -> None:
    """Two questions in each category; the labels stand in another order than the questions."""
    texts = {"random": ("Yes", "No"), "popular": ("Yes", "Yes."), "adversarial": ("No", "There is not a cat")}
    rows, number = [], 4000
    for category, said in texts.items():
        labels = []
        for index, (label, answer) in enumerate(zip(("yes", "no"), said, strict=True)):
            image, question = f"COCO_val2014_00000000000{index}.jpg", "Is there a cat in the image?"
            rows += llava_rows(folder / "val2014", [(number, image, f"{question}\n{SHORT}")], category)
            labels.insert(0, {"question_id": index + 1, "image": image, "text": question, "label": label})
            ANSWERS[str(number)] = answer
            number += 1
        write_lines(folder / f"coco/coco_pope_{category}.json", labels)
    write_lines(folder / "llava_pope_test.jsonl", rows)


def mme_(folder: Path) -> None:
    """One picture a subtask; some subtasks keep pictures and answers in folders of their own, as the release does."""
    release, rows = folder / "MME_Benchmark_release_version", []
    wrong = {"count": ("yes", "yes"), "OCR": ("no", "yes"), "code_reasoning": ("unclear", "no")}
    for subtask in (*mme.PERCEPTION, *mme.COGNITION):
        nested = subtask in ("artwork", "celebrity")
        image = f"{subtask}/images/1.jpg" if nested else f"{subtask}/1.jpg"
        text = release / subtask / ("questions_answers_YN/1.txt" if nested else "1.txt")
        text.parent.mkdir(parents=True, exist_ok=True)
        ask = [f"Is this the first {subtask}?  Please answer yes or no.", "Is it not? Please answer yes or no."]
        text.write_text(f"{ask[0]}\tYes\n{ask[1]}\tNo\n", encoding="utf-8")
        prompts = [f"{question.replace('  ', ' ')}\n{SHORT}" for question in ask]
        rows += llava_rows(release, [(f"{subtask}/1.jpg", image, prompt) for prompt in prompts], subtask)
        for number, answer in enumerate(wrong.get(subtask, ("Yes", "No.")), start=1):
            ANSWERS[f"{subtask}/1.jpg#{number}"] = answer
    write_lines(folder / "llava_mme.jsonl", rows)


def _table(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    columns = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category")
    quoted = [
        [f'"{row.get(name, "")}"' if "\n" in row.get(name, "") else row.get(name, "") for name in columns]
        for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join("\t".join(cells) for cells in [columns, *quoted]) + "\n", encoding="utf-8")


def _encoded(seed: int) -> str:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _rotations(index: int, options: list[str], right: str, **cells: str) -> list[dict[str, str]]:
    rows = []
    for turn in range(len(options)):
        letters = dict(zip("ABCD", options[turn:] + options[:turn], strict=False))
        answer = next(letter for letter, text in letters.items() if text == right)
        rows.append({"index": str(index + turn * 1_000_000), "answer": answer, **letters, **cells})
    return rows


def mmbench(folder: Path) -> None:
    """A question of four options and one of two with all their rotations, in English; one of two in Chinese."""
    first = _rotations(501, ["red", "blue", "green", "pink"], "blue", question="Which colour?", category="colour")
    first = [row | {"image": _encoded(3), "hint": "Two\nlines."} for row in first]
    second = _rotations(502, ["cat", "dog"], "dog", question="Which animal?", category="animal", hint="nan")
    second = [row | {"image": _encoded(4)} for row in second]
    _table(folder / "mmbench_dev_20230712.tsv", first + second)
    ANSWERS.update({row["index"]: row["answer"] for row in first})
    ANSWERS.update({"502": "The answer is B", "1000502": "dog or cat"})
    chinese = _rotations(503, ["猫", "狗"], "狗", question="这是什么？", category="动物", image=_encoded(5))
    _table(folder / "mmbench_dev_cn_20231003.tsv", chinese)
    ANSWERS.update({"503": "B", "1000503": "狗"})


def mmvet(folder: Path) -> None:
    """Two questions."""
    rows = [("vet0", "v1_0.png", "What does the sign say?"), ("vet1", "v1_1.png", "Where is\nthe cat?")]
    write_lines(folder / "llava-mm-vet.jsonl", llava_rows(folder / "mm-vet/images", rows))
    known = {"v1_vet0": ("stop <AND> go", ["ocr"]), "v1_vet1": ("under a table", ["rec", "spat"])}
    write(
        folder / "mm-vet/mm-vet.json",
        {key: {"answer": answer, "capability": capability} for key, (answer, capability) in known.items()},
    )
    ANSWERS.update({"vet0": "the sign says stop maybe", "vet1": "a cat under a table"})


def vqav2(folder: Path) -> None:
    """Two questions of three of test-dev, and two of the validation split."""
    rows = [(6001, "COCO_test2015_1.jpg", f"How many?\n{SHORT}"), (6002, "COCO_test2015_2.jpg", f"What?\n{SHORT}")]
    write_lines(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", llava_rows(folder / "test2015", rows))
    write_lines(folder / "llava_vqav2_mscoco_test2015.jsonl", [{"question_id": key} for key in (6001, 6000, 6002)])
    asked = [
        {"question_id": 6101, "image_id": 7, "question": "Who?"},
        {"question_id": 6102, "image_id": 7, "question": "Why?"},
    ]
    people = {6101: ["man"] * 10, 6102: ["fun"] + ["work"] * 9}
    write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
    annotations = [
        {"question_id": key, "answers": [{"answer": text, "answer_id": index} for index, text in enumerate(texts)]}
        for key, texts in people.items()
    ]
    write(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    save_picture(folder / "val2014/COCO_val2014_000000000007.jpg", 7)
    ANSWERS.update({"6001": "Two dogs.", "6002": "the cat", "6101": "A man", "6102": "fun"})


def llava_wild(folder: Path) -> None:
    """A question of each category."""
    kinds = ("conv", "detail", "complex")
    rows = []
    for number, kind in enumerate(kinds):
        rows += llava_rows(folder / "images", [(7000 + number, f"{number:03d}.jpg", f"Tell {kind}.")], kind)
    write_lines(folder / "questions.jsonl", rows)
    captions: list[Any] = ["A street.", ["A dog.", "A ball."], "A lake."]
    write_lines(
        folder / "context.jsonl",
        [
            {"id": row["image"], "image": row["image"], "caption": caption}
            for row, caption in zip(rows, captions, strict=True)
        ],
    )
    answers = [{"question_id": row["question_id"], "text": "Reference.", "answer_id": "x"} for row in reversed(rows)]
    write_lines(folder / "answers_gpt4.jsonl", answers)
    write(
        folder / "rule.json",
        {f"llava_bench_{kind}": {"role": "Assistant", "prompt": f"Rate {kind}."} for kind in kinds},
    )
    ANSWERS.update({"7000": "wild answer one", "7001": "wild answer two", "7002": "wild answer three"})


def seed(folder: Path) -> None:
    """Three questions on pictures, one on a video."""
    types = {"Scene Understanding": 1, "Action Recognition": 10}
    known = {
        "8001": ("A", "image", 1),
        "8002": ("B", "image", 1),
        "v1_3": ("C", "image", 1),
        "8004": ("D", "video", 10),
    }
    questions = [
        {"question_id": key, "answer": answer, "data_type": kind, "question_type_id": number}
        for key, (answer, kind, number) in known.items()
    ]
    write(folder / "SEED-Bench.json", {"question_type": types, "questions": questions})
    rows: list[tuple[Any, str, str]] = [
        (int(key) if key.isdecimal() else key, f"SEED-Bench-image/{key}", f"Question {key}?\nA. a\nB. b\nC. c\nD. d\n")
        for key in known
    ]
    write_lines(folder / "llava-seed-bench-new.jsonl", llava_rows(folder, rows))
    ANSWERS.update({"8001": "A", "8002": "B.", "v1_3": "C", "8004": "D"})


def mmmu_(folder: Path) -> None:
    """A question in each subject; the second on two pictures, the third open."""
    for number, subject in enumerate(mmmu.SUBJECTS):
        key = f"validation_{subject}_1"
        row: dict[str, Any] = {
            "id": key,
            "question": f"What does <image 1> show, {number}?",
            "options": "['a cat', 'it\\'s a dog']",
            "answer": "B",
            "question_type": "multiple-choice",
            "image_1": "1.png",
            "image_2": None,
        }
        ANSWERS[key] = "(B) it's a dog" if number < MMMU_RIGHT else "A"
        if number == 1:
            row |= {"question": "Is <image 1> like <image 2>? Look at <image 1>.", "image_2": "2.png"}
            save_picture(folder / subject / "2.png", number)
        if number == 2:
            row |= {"options": "[]", "answer": "['12.5', 'twelve']", "question_type": "open"}
            ANSWERS[key] = "So the answer is 12.5"
        save_picture(folder / subject / "1.png", number)
        write_lines(folder / subject / "validation.jsonl", [row])


def mathvista(folder: Path) -> None:
    """Two answers that rules extract, two that need a judge; one is wrong."""
    problems: dict[str, dict[str, Any]] = {
        "9001": {
            "question_type": "multi_choice",
            "answer_type": "text",
            "choices": ["round", "square"],
            "answer": "square",
        },
        "9002": {"question_type": "free_form", "answer_type": "integer", "answer": "14"},
        "9003": {"question_type": "free_form", "answer_type": "float", "precision": 2.0, "answer": "1.26"},
        "9004": {"question_type": "free_form", "answer_type": "list", "answer": "[1998, 2001]"},
    }
    for number, (key, problem) in enumerate(problems.items()):
        image = f"images/{number}.jpg"
        save_picture(folder / "data" / image, number)
        problem |= {"pid": key, "image": image, "question": f"Question {key}?", "query": f"Hint: do.\nQuestion: {key}?"}
        problem["metadata"] = {"task": "geometry" if number % 2 else "figure", "skills": ["arithmetic"]}
    write(folder / "data/testmini.json", problems)
    ANSWERS.update({"9001": "I believe that it is the second shape", "9002": "15", "9003": "1.256"})
    ANSWERS["9004"] = "It grew between the years 1998 and 2001"


def build(root: Path) -> Path:
    """Write all benchmarks below a folder, as the published scripts expect them, and fill `ANSWERS`."""
    builders = {
        "scienceqa": scienceqa,
        "textvqa": textvqa,
        "gqa": gqa,
        "pope": pope,
        "MME": mme_,
        "mmbench": mmbench,
        "mm-vet": mmvet,
        "vqav2": vqav2,
        "llava-bench-in-the-wild": llava_wild,
        "seed_bench": seed,
        "MMMU": mmmu_,
        "mathvista": mathvista,
    }
    for name, builder in builders.items():
        builder(root / name)
    return root
