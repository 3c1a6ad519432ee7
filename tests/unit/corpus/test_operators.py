"""Operators of a corpus: filters, changes, splits and de-duplicates rows; every row is accounted for."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from raylava.config.recipe import Corpus, OperatorConfig, Source
from raylava.corpus.blocks import Blocks, Manifest, decode_quarantine
from raylava.corpus.conversation import Turn
from raylava.corpus.operator_library import (
    answer_words,
    first_exchanges,
    load_operators,
    without_pattern,
    without_repetition,
)
from raylava.corpus.prepare import ImageFolder
from raylava.corpus.rows import SourceRow
from raylava.corpus.shards import PrepareSpec
from raylava.errors import UserError
from tests.support.corpora import prepare_serially, read_rows, read_samples, with_settings

USER = "tests.support.user_operators"


def corpus(*operators: Any) -> Corpus:
    return Corpus.model_validate({"sources": [Source(annotations="a")], "operators": list(operators)})


def row(*answers: str) -> SourceRow:
    turns = [turn for answer in answers for turn in (Turn("human", "question?"), Turn("gpt", answer))]
    return SourceRow("id", (), tuple(turns))


def held_out_images(spec: PrepareSpec) -> list[str]:
    """Return two images of the corpus, which a benchmark in these tests has as well."""
    return [raw["image"] for raw in read_rows(spec)[0][3:5]]


def prepared(spec: PrepareSpec, output: Path, *operators: Any, **settings: Any) -> tuple[Manifest, list[str]]:
    """Prepare with operators; return the manifest and the sample ids."""
    spec = with_settings(spec, output, operators=corpus(*operators).operators, **settings)
    benchmarks = {"held_out": ImageFolder(spec.source_paths[0][1], held_out_images(spec))}
    manifest = prepare_serially(spec, benchmarks)
    return manifest, [sample.sample_id for sample in read_samples(Blocks(output))]


def test_text_filters_judge_the_answers() -> None:
    assert answer_words(row("three whole words"), minimum=3)
    assert answer_words(row("three whole words"), minimum=4) is None
    assert answer_words(row("three whole", "words"), minimum=1, maximum=2) is None
    assert without_pattern(row("an answer"), pattern="(?i)ANSWER$") is None
    assert without_pattern(row("an answer"), pattern="^answer")
    assert without_repetition(row("a cat and a dog sit on a mat in the sun"), words=2)
    assert without_repetition(row("no no no no no no no no"), words=2, max_fraction=0.5) is None
    assert len(first_exchanges(row("one", "two", "three"), count=2).turns) == 4


def test_filtered_rows_are_counted_apart_from_quarantined_ones_and_listed_with_the_operator(
    prepare_spec: PrepareSpec, tmp_path: Path
) -> None:
    everything, all_ids = prepared(prepare_spec, tmp_path / "all")
    word = json.loads(Path(prepare_spec.source_paths[0][0]).read_text())[0]["conversations"][1]["value"].split()[1]
    manifest, ids = prepared(prepare_spec, tmp_path / "some", {"without_pattern": {"pattern": rf"\b{word}\b"}})
    assert 0 < manifest.filtered < everything.rows
    assert manifest.quarantined == 0, "filtering is no fault of a row, and must not count towards quarantine_limit"
    assert manifest.rows == everything.rows - manifest.filtered
    assert manifest.quarantine == {"filtered by without_pattern": manifest.filtered}
    listed = decode_quarantine((tmp_path / "some" / "quarantine.csv").read_bytes())
    assert sorted([entry.sample_id for entry in listed] + ids) == sorted(all_ids)


def test_one_row_may_become_several_with_ids_of_their_own(prepare_spec: PrepareSpec, tmp_path: Path) -> None:
    everything, all_ids = prepared(prepare_spec, tmp_path / "all")
    manifest, ids = prepared(prepare_spec, tmp_path / "twice", f"{USER}:twice")
    assert ids == [f"{name}/{number}" for name in all_ids for number in (0, 1)]
    assert (manifest.rows_in, manifest.added, manifest.rows) == (everything.rows, everything.rows, 2 * everything.rows)


def test_operators_apply_in_their_order(prepare_spec: PrepareSpec, tmp_path: Path) -> None:
    _, doubled = prepared(prepare_spec, tmp_path / "a", "exact_duplicates", f"{USER}:twice")
    _, single = prepared(prepare_spec, tmp_path / "b", f"{USER}:twice", "exact_duplicates")
    assert len(doubled) == 2 * len(single)
    assert all(name.endswith("/0") for name in single), "the first in source order stays"


@pytest.mark.parametrize("samples_per_block", [3, 16])
def test_of_duplicates_the_first_in_source_order_stays_whatever_the_shards(
    prepare_spec: PrepareSpec, tmp_path: Path, samples_per_block: int
) -> None:
    raw_rows, _ = read_rows(prepare_spec)
    firsts: dict[str, int] = {}
    for number, raw in enumerate(raw_rows):
        firsts.setdefault(raw["conversations"][1]["value"].split()[1], number)
    manifest, ids = prepared(prepare_spec, tmp_path, f"{USER}:one_per_second_word", samples_per_block=samples_per_block)
    assert [int(name.rpartition(".")[2]) for name in ids] == sorted(firsts.values())
    assert manifest.filtered == len(raw_rows) - len(firsts)


def test_similar_images_with_the_same_text_are_duplicates(
    prepare_spec: PrepareSpec, corpus_copy: Path, tmp_path: Path
) -> None:
    from PIL import Image

    rows = json.loads((corpus_copy / "alignment.json").read_text())[:4]
    image = Image.open(corpus_copy / "images" / rows[0]["image"]).convert("RGB").resize((200, 200))
    image.save(corpus_copy / "images" / "copy.jpg", quality=80)
    same_text = {**rows[0], "id": "copy", "image": "copy.jpg"}
    other_text = {**same_text, "conversations": [rows[0]["conversations"][0], {"from": "gpt", "value": "other"}]}
    (corpus_copy / "alignment.json").write_text(json.dumps([*rows, same_text, other_text]))
    spec = with_settings(prepare_spec, tmp_path, corpus_copy)
    _, exact = prepared(spec, tmp_path / "exact", "exact_duplicates")
    _, by_row = prepared(spec, tmp_path / "row", "similar_duplicates")
    _, by_image = prepared(spec, tmp_path / "image", {"similar_duplicates": {"compare": "image"}})
    assert len(exact) == 6
    assert [name.rpartition(".")[2] for name in by_row] == ["0", "1", "2", "3", "5"]
    assert len(by_image) < len(by_row)


def test_images_of_a_benchmark_are_taken_out(prepare_spec: PrepareSpec, tmp_path: Path) -> None:
    raw_rows, _ = read_rows(prepare_spec)
    manifest, ids = prepared(prepare_spec, tmp_path, {"decontaminate": {"benchmarks": ["held_out"], "distance": 0}})
    kept = {raw_rows[int(name.rpartition(".")[2])]["image"] for name in ids}
    assert not set(held_out_images(prepare_spec)) & kept
    assert kept
    assert manifest.quarantine == {"filtered by decontaminate": manifest.filtered}


def test_operator_reads_the_images_of_the_row(prepare_spec: PrepareSpec, tmp_path: Path) -> None:
    manifest, ids = prepared(prepare_spec, tmp_path / "none", {f"{USER}:larger_than": {"size": 10}})
    assert len(ids) == manifest.rows_in
    with pytest.raises(UserError, match="every row was quarantined or filtered out"):
        prepared(prepare_spec, tmp_path / "all", {f"{USER}:larger_than": {"size": 1_000_000}})


def test_failing_operator_quarantines_the_row_with_its_name(prepare_spec: PrepareSpec, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="every row was quarantined"):
        prepared(prepare_spec, tmp_path, f"{USER}:failing")
    file = next((tmp_path / "rows").glob("quarantine-*.csv"))
    first = decode_quarantine(file.read_bytes())[0]
    assert (first.reason, first.detail) == (
        "row failed",
        f"operator {USER}:failing: ZeroDivisionError: a mistake at 0x… in 2",
    )


@pytest.mark.parametrize(
    ("name", "detail"),
    [
        ("wrong_type", "returned a bool, not a SourceRow"),
        ("failing_generator", "operator tests.support.user_operators:failing_generator: ZeroDivisionError"),
        ("wrong_key", "not a DuplicateKey"),
    ],
)
def test_operator_with_a_mistake_quarantines_the_row_with_its_name(
    name: str, detail: str, prepare_spec: PrepareSpec, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="every row was quarantined"):
        prepared(prepare_spec, tmp_path, f"{USER}:{name}")
    first = decode_quarantine(next((tmp_path / "rows").glob("quarantine-*.csv")).read_bytes())[0]
    assert first.reason == "row failed"
    assert detail in first.detail


def test_row_that_could_not_be_compared_is_quarantined(prepare_spec: PrepareSpec, tmp_path: Path) -> None:
    manifest, ids = prepared(prepare_spec, tmp_path, f"{USER}:failing_key", quarantine_limit=1.0)
    assert manifest.quarantined == manifest.rows_in / 2
    assert manifest.quarantine == {"row failed": manifest.quarantined}
    assert all(int(name.rpartition(".")[2]) % 2 == 0 for name in ids)


def test_copies_of_a_row_are_no_duplicates_of_each_other(prepare_spec: PrepareSpec, tmp_path: Path) -> None:
    (source,) = prepare_spec.corpus.sources
    weighted = (source.model_copy(update={"sampling_weight": 3.0}),)
    once, _ = prepared(prepare_spec, tmp_path / "once", "exact_duplicates")
    thrice, _ = prepared(prepare_spec, tmp_path / "thrice", "exact_duplicates", sources=weighted)
    assert thrice.rows == 3 * once.rows


def test_first_exchanges_keep_their_images_only() -> None:
    turns = (Turn("human", "<image>\nWhat?"), Turn("gpt", "A"), Turn("human", "<image>\nAnd?"), Turn("gpt", "B"))
    assert first_exchanges(SourceRow("id", ("a.png", "b.png"), turns), count=1).images == ("a.png",)


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        ("no_such", "unknown operator 'no_such'; choose one of: answer_words, "),
        ("no_such_module:run", "no_such_module:run cannot be imported (ModuleNotFoundError"),
        ("json:no_such", "json:no_such cannot be imported (AttributeError"),
        ("json:__name__", "json:__name__ is a str; name a function"),
        ("math:sqrt", "math:sqrt cannot be imported ("),
        ({"answer_words": {"least": 3}}, "answer_words does not take these arguments: got an unexpected keyword"),
        ({"without_pattern": {"pattern": "("}}, "pattern='(' is not a regular expression"),
        ("without_pattern", "missing a required argument: 'pattern'"),
        ({"exact_duplicates": {"compare": "id"}}, "compare='id'; choose one of: row, text, image"),
        ({"similar_duplicates": {"distance": 20}}, "distance=20 must be 0 to 7 bits"),
        ({"decontaminate": {"benchmarks": "pope"}}, "benchmarks='pope' must be a list of names"),
    ],
)
def test_operator_that_cannot_be_called_is_refused_before_any_row_is_read(operator: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_operators(corpus(operator).operators, "corpora.instruction.operators")
    assert str(error.value).startswith("corpora.instruction.operators: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [3, {"a": {}, "b": {}}, ["answer_words"]])
def test_operator_of_another_shape_is_refused(value: Any) -> None:
    with pytest.raises(ValidationError, match="an operator is its name, or one name with its arguments"):
        corpus(value)


def test_operators_enter_the_fingerprint_only_where_there_are_any() -> None:
    assert "operators" not in corpus().fingerprint_fields()
    three = corpus({"answer_words": {"minimum": 3}}).fingerprint_fields()["operators"]
    assert three != corpus({"answer_words": {"minimum": 4}}).fingerprint_fields()["operators"]
    assert three == json.loads(json.dumps(three))


def test_source_of_a_users_function_identifies_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_filters_a.py").write_text("WORDS = 3\ndef keep(row):\n    return row\n")
    (tmp_path / "my_filters_b.py").write_text("WORDS = 4\ndef keep(row):\n    return row\n")
    first, second = (
        load_operators(corpus(f"my_filters_{name}:keep").operators, "operators")[0].source_sha256 for name in "ab"
    )
    assert len(first) == 64
    assert first != second, "the helpers and constants of the module count"
    assert load_operators(corpus("answer_words").operators, "operators")[0].source_sha256 == ""


def test_recipe_round_trips_with_operators() -> None:
    original = corpus("answer_words", {f"{USER}:larger_than": {"size": 10}})
    assert Corpus.model_validate_json(original.model_dump_json()) == original
    assert dataclasses.is_dataclass(PrepareSpec)


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        (f"{USER}:aborting_key", {"numbers": [3]}, None),
        ("answer_words", {"minimum": 1, "maximum": None}, None),
        ("without_repetition", {"max_fraction": 1}, None),
        ("answer_words", {"minimum": "x"}, "minimum='x' is a str, not int"),
        ("answer_words", {"maximum": 2.5}, "maximum=2.5 is a float, not int"),
        (f"{USER}:larger_than", {"size": True}, "size=True is a bool, not int"),
    ],
)
def test_argument_of_a_plain_type_is_checked_before_any_row(
    name: str, arguments: dict[str, Any], problem: str | None
) -> None:
    config = OperatorConfig(name=name, arguments=arguments)
    if problem is None:
        load_operators([config], "operators")
        return
    with pytest.raises(UserError, match=re.escape(problem)):
        load_operators([config], "operators")
