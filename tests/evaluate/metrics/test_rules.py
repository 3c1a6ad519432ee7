"""Each benchmark's rule, and each quirk of it, once: small cases by hand from the official evaluations."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylava.errors import UserError
from raylava.evaluate.metrics import exact_match, mme, multiple_choice, vqa_accuracy, yes_no
from raylava.evaluate.metrics.registry import judged, score
from raylava.evaluate.metrics.score_table import Result
from raylava.evaluate.questions import Question


def asked(number: object, reference: str | tuple[str, ...], category: str = "all", unit: str = "") -> Question:
    references = (reference,) if isinstance(reference, str) else reference
    return Question(str(number), "image.jpg", "text", category, references, unit=unit)


def values(result: Result) -> dict[str, float]:
    return {name: figure.value for name, figure in result.figures.items()}


# exact match (GQA)


@pytest.mark.parametrize(
    ("said", "normal"),
    [("Yes.", "yes"), (" two ", "two"), ("A cat..", "a cat"), ("", ""), ("3.5", "3.5"), ("No .", "no")],
)
def test_gqa_compares_without_case_and_final_stops(said: str, normal: str) -> None:
    assert exact_match.normalise(said) == normal


def test_a_missing_answer_is_wrong_and_named() -> None:
    questions = [
        asked(1, "two", "count"),
        asked(2, "two", "count"),
        asked(3, "one", "count"),
        asked(4, "red", "colour"),
    ]
    found = score("custom", "exact_match", questions, {"1": "Two.", "2": "one", "4": "red", "3": None})
    assert values(found) == {"exact_match": 0.5}
    assert found.missing == ("3",)
    assert found.by_category["count"] == {"units": 3.0, "exact_match": pytest.approx(1 / 3)}
    assert found.credit == {"1": 1.0, "2": 0.0, "3": 0.0, "4": 1.0}


def test_the_best_constant_answer_is_told_by_category() -> None:
    questions = [
        asked(1, "two", "count"),
        asked(2, "Two.", "count"),
        asked(3, "one", "count"),
        asked(4, "red", "colour"),
    ]
    assert exact_match.majority(questions) == {"count": pytest.approx(2 / 3), "colour": 1.0, "all": 0.75}


# POPE


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("No", "no"),
        ("no, there is none", "no"),
        ("There is not a dog", "no"),
        ("Yes, there is no doubt", "no"),
        ("Yes. There is no cat", "yes"),
        ("NO", "yes"),
        ("nothing", "yes"),
        ("maybe", "yes"),
        ("", "yes"),
        ("No,", "no"),
    ],
)
def test_pope_by_llava_is_no_where_a_word_of_the_first_sentence_says_so(said: str, read: str) -> None:
    assert yes_no.llava(said) == read


def test_pope_by_lmms_eval_wants_the_very_word() -> None:
    questions = [asked(1, "yes"), asked(2, "no"), asked(3, "yes")]
    answers = {"1": "maybe", "2": "No there is none", "3": " YES "}
    assert values(score("pope", "yes_no", questions, answers, "llava"))["accuracy"] == 1.0
    found = score("pope", "yes_no", questions, answers, "lmms-eval")
    assert (found.protocol, values(found)["accuracy"]) == ("lmms-eval", pytest.approx(1 / 3))


def test_pope_by_lmms_eval_counts_what_is_neither_as_wrong_but_no_false_yes() -> None:
    questions = [asked(1, "yes"), asked(2, "no", "b"), asked(3, "yes", "b"), asked(4, "no")]
    said = {"1": "Yes", "2": "unclear", "3": "unclear", "4": "unclear"}
    found = values(score("pope", "yes_no", questions, said, "lmms-eval"))
    assert found == {"accuracy": 0.25, "f1": 1.0, "precision": 1.0, "recall": 1.0, "yes_ratio": 0.25}


def test_pope_takes_the_mean_of_categories_of_any_size() -> None:
    questions = [asked(1, "yes", "a"), asked(2, "no", "a"), asked(3, "yes", "a"), asked(4, "no", "b")]
    found = score("pope", "yes_no", questions, {"1": "yes", "2": "yes", "3": "no", "4": "no"})
    own = found.by_category["a"]
    assert (own["accuracy"], own["precision"], own["recall"], own["f1"]) == pytest.approx((1 / 3, 0.5, 0.5, 0.5))
    assert own["yes_ratio"] == pytest.approx(2 / 3)
    assert values(found)["accuracy"] == pytest.approx((1 / 3 + 1) / 2)


# VQAv2


@pytest.mark.parametrize(
    ("said", "normal"),
    [
        ("The dog", "dog"),
        ("an apple", "apple"),
        ("two", "2"),
        ("None", "0"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("yes, sir", "yes sir"),
        ("red/blue", "red blue"),
        ("red /blue", "red blue"),
        ("1,000", "1000"),
        ("1,000 a-b", "1000 ab"),
        ("St. Louis", "st louis"),
        ("3.5", "3.5"),
        ("5.", "5"),
        ("what?!", "what"),
        ("Im", "im"),
        ("somebody'd", "somebodyd"),
    ],
)
def test_vqa_normalises_as_officially(said: str, normal: str) -> None:
    assert vqa_accuracy.normalise(said) == normal


def test_vqa_leaves_each_reference_out_in_turn() -> None:
    references = ["cat"] * 3 + ["dog"] * 7
    assert vqa_accuracy.accuracy("Cat", references) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert vqa_accuracy.accuracy("the dog", references) == 1.0
    assert vqa_accuracy.accuracy("bird", references) == 0.0
    assert vqa_accuracy.accuracy("one cat", ["1 cat", *["x"] * 9]) == pytest.approx(0.9 / 3)


def test_vqa_normalises_nothing_where_all_references_agree() -> None:
    assert vqa_accuracy.accuracy("the cat", ["cat"] * 10) == 0.0
    assert vqa_accuracy.accuracy("cat ", ["cat"] * 10) == 1.0


WORDS = st.text(alphabet=string.ascii_letters + string.digits + " ,.'-/!?", max_size=20)


@given(WORDS, st.lists(WORDS, min_size=10, max_size=10))
def test_vqa_credit_is_a_share_and_grows_with_agreement(said: str, references: list[str]) -> None:
    credit = vqa_accuracy.accuracy(said, references)
    assert 0.0 <= credit <= 1.0
    assert vqa_accuracy.accuracy(said, [*references, said]) >= credit - 1e-9 or len(set(references)) == 1


# MME


@pytest.mark.parametrize(
    ("said", "read"),
    [("Yes", "yes"), ("No.", "no"), ("  no", "no"), ("I say yes", "other"), ("Not", "no"), ("", "other")],
)
def test_mme_reads_the_first_four_characters(said: str, read: str) -> None:
    assert mme.read(said) == read


def test_mme_adds_accuracy_and_images_of_which_both_are_right() -> None:
    questions = [
        asked(1, "yes", "count", "count/1.jpg"),
        asked(2, "no", "count", "count/1.jpg"),
        asked(3, "yes", "count", "count/2.jpg"),
        asked(4, "no", "count", "count/2.jpg"),
        asked(5, "yes", "code_reasoning", "code_reasoning/1.png"),
        asked(6, "no", "code_reasoning", "code_reasoning/1.png"),
    ]
    answers = {"1": "Yes", "2": "No", "3": "Yes", "4": "Yes", "5": "perhaps", "6": "no"}
    found = score("mme", "mme", questions, answers)
    assert values(found) == {"perception": 75.0 + 50.0, "cognition": 50.0}
    assert found.by_category["count"]["units"] == 2.0


# ScienceQA


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("B", "B"),
        ("B. the cat", "B"),
        ("The answer is C.", "C"),
        ("I think. The answer is A.", "A"),
        ("The answer is A. The answer is B.", None),
        ("b", None),
        ("B.", None),
        ("(B)", None),
        ("", None),
    ],
)
def test_science_qa_takes_a_letter_in_three_forms_only(said: str, read: str | None) -> None:
    assert multiple_choice.letter(said) == read


def test_science_qa_tells_images_apart() -> None:
    shown, text = asked(1, "A"), Question("2", None, "text", "text", ("B",))
    assert values(score("scienceqa", "science_qa", [shown, text], {"1": "A", "2": "C"})) == {
        "image_accuracy": 1.0,
        "accuracy": 0.5,
    }


# MMVP


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("(a)", "(a)"),
        ("A", "(a)"),
        ("b.", "(b)"),
        ("(b) Closed", "(b)"),
        ("Open", "(a)"),
        ("another", None),
        ("", None),
    ],
)
def test_mmvp_takes_the_letter_or_the_very_words(said: str, read: str | None) -> None:
    assert multiple_choice.option(said, ["Open", "Closed"]) == read


def test_mmvp_takes_an_options_words_before_a_letter() -> None:
    assert multiple_choice.option("A square", ["a circle", "A square"]) == "(b)"


def test_mmvp_counts_pairs_of_which_both_are_right() -> None:
    questions = [asked(n, ("(a)" if n % 2 else "(b)", "x", "y"), unit=str((n + 1) // 2)) for n in (1, 2, 3, 4)]
    found = score("mmvp", "mmvp", questions, {"1": "(a)", "2": "(b)", "3": "(a)", "4": "(a)"})
    assert values(found) == {"pair_accuracy": 0.5, "accuracy": 0.75}


# MM-Vet


def test_mm_vet_takes_the_judges_grades_by_capability() -> None:
    questions = [asked("v1_0", "x", "ocr,math"), asked("v1_1", "x", "rec"), asked("v1_2", "x", "rec")]
    found = judged("mm-vet", questions, {"v1_0": 1.0, "v1_1": 0.5})
    assert values(found)["total"] == pytest.approx(50.0)
    assert (values(found)["ocr"], values(found)["rec"], values(found)["math"]) == pytest.approx((100.0, 25.0, 100.0))
    assert found.missing == ("v1_2",)
    with pytest.raises(UserError, match="v1_1: the judge gave 7"):
        judged("mm-vet", questions, {"v1_1": 7.0})


# intervals


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_an_interval_holds_its_figure(right: list[bool]) -> None:
    questions = [asked(number, "yes") for number in range(len(right))]
    answers = {str(number): "yes" if own else "no" for number, own in enumerate(right)}
    figure = score("custom", "exact_match", questions, answers).figures["exact_match"]
    assert figure.low <= figure.value <= figure.high
    assert figure.value == pytest.approx(sum(right) / len(right))


def test_an_interval_narrows_with_the_number_of_questions() -> None:
    def width(count: int) -> float:
        questions = [asked(number, "yes") for number in range(count)]
        answers = {str(number): "yes" if number % 2 else "no" for number in range(count)}
        figure = score("custom", "exact_match", questions, answers).figures["exact_match"]
        return figure.high - figure.low

    assert width(400) == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1), "the normal approximation"
    assert width(400) < width(40)
