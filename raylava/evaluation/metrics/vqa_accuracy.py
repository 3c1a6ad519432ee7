"""VQA accuracy as the official evaluation computes it (Antol et al. 2015; GT-Vision-Lab/VQA), including its quirks.

The answer and the ten references are normalized. Each reference is left out in turn, which gives the answer a score of
min(1, matches among the other nine / 3); the accuracy is the mean of these ten scores.
"""

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# As in the official code, whose lookbehind is misspelled: it keeps full stops before digits only, not after them.
_FULL_STOP = re.compile(r"(?!<=\d)\.(?!\d)")
_MAX_FULL_STOPS = 32  # the official code passes re.UNICODE (32) as the replacement count
_NUMBERS = dict(
    zip(
        ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
        ["0", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"],
        strict=True,
    )
)
_ARTICLES = ("a", "an", "the")

_ONE_APOSTROPHE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm I've
isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_TWO_APOSTROPHES = """
couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
there'd've they'd've we'd've who'd've wouldn't've you'd've
"""
_IRREGULAR = {
    "let's": "let's",
    "she's": "she's",
    "somebody'd": "somebodyd",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "yall'll": "y'all'll",
    "y'allll": "y'all'll",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}


def _contractions() -> dict[str, str]:
    """Return the official table: it restores the apostrophe, or one of two, that a contraction lacks."""
    table = {word.replace("'", ""): word for word in _ONE_APOSTROPHE.split()}
    for word in _TWO_APOSTROPHES.split():
        stem, middle, end = word.split("'")
        table |= {f"{stem}{middle}'{end}": word, f"{stem}'{middle}{end}": word}
    return table | _IRREGULAR


_CONTRACTIONS = _contractions()


def normalize_answer(text: str) -> str:
    """Normalize punctuation, number words, articles and contractions, in the official order."""
    words = [_NUMBERS.get(word, word) for word in _strip_punctuation(text).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _strip_punctuation(text: str) -> str:
    """Remove punctuation next to a space and replace it with a space elsewhere.

    As officially, all punctuation is removed if the text contains a comma within a number.
    """
    stripped = text
    for mark in _PUNCTUATION:
        remove = f"{mark} " in text or f" {mark}" in text or _COMMA_IN_NUMBER.search(text)
        stripped = stripped.replace(mark, "" if remove else " ")
    return _FULL_STOP.sub("", stripped, count=_MAX_FULL_STOPS)


def accuracy(answer: str, references: Sequence[str]) -> float:
    """Return the VQA accuracy of an answer, from 0 to 1.

    As officially, nothing is normalized if all references are identical.
    """
    text, reference_texts = _to_one_line(answer), [_to_one_line(reference) for reference in references]
    if len(set(reference_texts)) > 1:
        text, reference_texts = normalize_answer(text), [normalize_answer(reference) for reference in reference_texts]
    matches = [reference == text for reference in reference_texts]
    return sum(min(1.0, (sum(matches) - left_out) / 3) for left_out in matches) / len(matches)


def _to_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
