# SPDX-License-Identifier: Apache-2.0
"""Open answers against several people's: the EvalAI normalisation and the soft accuracy of VQA.

TextVQA and VQAv2 share both. The normalisation is the one of the M4C evaluator, its oddities included, as uploads to
the VQAv2 server and published TextVQA figures went through it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

NUM_ANSWERS = 10
"""People who answered each question of TextVQA and VQAv2."""

_NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER_OF = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"zero": "0"}
_ARTICLES = frozenset(("a", "an", "the"))

# Written without its apostrophe, a word gets it back; of two apostrophes, when either one is missing.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
    where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
    y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# The table that everyone uses adds and strips a few that do not follow.
_IRREGULAR = {
    "somebody'd": "somebodyd",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,+\d")
_PERIOD = re.compile(r"\.(?!\d)")
# The published call passes `re.UNICODE`, which is 32, where the number of substitutions goes.
_MAX_PERIODS = 32


def _without_one_apostrophe(word: str) -> list[str]:
    places = [index for index, letter in enumerate(word) if letter == "'"]
    return [word[:index] + word[index + 1 :] for index in places]


_CONTRACTION_OF = {short: word for word in _CONTRACTED.split() for short in _without_one_apostrophe(word)} | _IRREGULAR


def normalize_answer(text: str) -> str:
    """An answer as EvalAI compares it: lower case, digits for words, without articles and punctuation.

    Oddities kept: a punctuation mark that touches a blank anywhere in the answer, or a number with a comma anywhere,
    deletes the mark everywhere, otherwise it becomes a blank; "none" is 0; only 32 periods go; a period before a digit
    stays; an apostrophe and its s are parted from their word.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    stripped = text
    comma_in_number = _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        deleted = f"{mark} " in text or f" {mark}" in text or comma_in_number
        stripped = stripped.replace(mark, "" if deleted else " ")
    stripped = _PERIOD.sub("", stripped, count=_MAX_PERIODS)
    words = (_NUMBER_OF.get(word, word) for word in stripped.split())
    return " ".join(_CONTRACTION_OF.get(word, word) for word in words if word not in _ARTICLES)


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Agreement of a prediction with people: min(1, matches / 3), averaged over leaving out each of them once.

    Args:
        prediction: as the model said it.
        answers: what the people said; normalised as the prediction is.

    Raises:
        ValueError: there are not ten answers.
    """
    if len(answers) != NUM_ANSWERS:
        raise ValueError(f"answers: expected {NUM_ANSWERS}, got {len(answers)}")
    wanted = normalize_answer(prediction)
    matches = [normalize_answer(answer) == wanted for answer in answers]
    total = sum(matches)
    if not total:
        return 0.0
    return sum(min(1, (total - match) / 3) for match in matches) / len(matches)
