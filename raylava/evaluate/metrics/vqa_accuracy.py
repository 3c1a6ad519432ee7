"""VQA accuracy by the official evaluation (Antol et al. 2015; GT-Vision-Lab/VQA), its quirks included.

An answer and the ten references are normalised, then each reference is left out in turn: the answer counts as right to
min(1, matches among the other nine / 3), and the mean over the ten is its credit.
"""

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_STOP = re.compile(r"(?!<=\d)\.(?!\d)")  # officially so: meant to spare stops after digits, it spares those before
_MOST_STOPS = 32  # officially re.UNICODE stands where the count of replacements goes
_NUMBERS = dict(
    zip(
        ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
        ["0", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"],
        strict=True,
    )
)
_ARTICLES = ("a", "an", "the")

_WITH_APOSTROPHES = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm I've
isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_TWICE = """
couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
there'd've they'd've we'd've who'd've wouldn't've you'd've
"""
_ODD = {
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
    """The official table: what lacks its apostrophe, or one of two, gets it."""
    found = {word.replace("'", ""): word for word in _WITH_APOSTROPHES.split()}
    for word in _TWICE.split():
        stem, middle, end = word.split("'")
        found |= {f"{stem}{middle}'{end}": word, f"{stem}'{middle}{end}": word}
    return found | _ODD


_CONTRACTIONS = _contractions()


def normalise(text: str) -> str:
    """Punctuation, then numbers, articles and contractions, as officially."""
    words = [_NUMBERS.get(word, word) for word in _without_punctuation(text).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """A mark beside a space goes; one within a word leaves a space, unless there is a comma in a number anywhere."""
    found = text
    for mark in _PUNCTUATION:
        goes = f"{mark} " in text or f" {mark}" in text or _COMMA_IN_NUMBER.search(text)
        found = found.replace(mark, "" if goes else " ")
    return _STOP.sub("", found, count=_MOST_STOPS)


def accuracy(answer: str, references: Sequence[str]) -> float:
    """An answer's credit, 0 to 1. TrialStatus all references agree to the letter, officially nothing is normalised."""
    said, known = (_one_line(answer), [_one_line(reference) for reference in references])
    if len(set(known)) > 1:
        said, known = normalise(said), [normalise(reference) for reference in known]
    matches = [reference == said for reference in known]
    return sum(min(1.0, (sum(matches) - own) / 3) for own in matches) / len(matches)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
