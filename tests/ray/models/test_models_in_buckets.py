"""A plain Hugging Face folder in a bucket can be named wherever a model, backbone or tokenizer can."""

from pathlib import Path

import pytest
import torch

from raylava.config.recipe import InitialWeights, Language, Model, Vision
from raylava.evaluation.engines import TransformersEngine
from raylava.models.checkpoint import find_checkpoint
from raylava.models.llava import build_llava
from raylava.models.registry import load_tokenizer, resolve_model, tokenizer_sha256
from raylava.pipeline.evaluation import model_ref
from raylava.storage import storage_path


@pytest.fixture
def bucket_model(toy_model: Model, s3: str) -> Model:
    """The toy model with both backbones as flat folders of a bucket."""
    for name, folder in (("language", toy_model.language.name), ("vision", toy_model.vision.name)):
        storage_path(f"{s3}/flat/{name}").upload_folder(Path(folder))
    return Model(language=Language(name=f"{s3}/flat/language"), vision=Vision(name=f"{s3}/flat/vision/"))


def test_backbones_in_a_bucket_build_the_same_model(bucket_model: Model, toy_model: Model) -> None:
    remote, local = (build_llava(resolve_model(model), 0, torch.float32) for model in (bucket_model, toy_model))
    torch.testing.assert_close(remote.state_dict(), local.state_dict(), rtol=0, atol=0)


def test_tokenizer_in_a_bucket_is_the_same(bucket_model: Model, toy_model: Model) -> None:
    tokenizers = [load_tokenizer(model.language) for model in (bucket_model, toy_model)]
    assert tokenizer_sha256(tokenizers[0]) == tokenizer_sha256(tokenizers[1])


def test_llava_folder_in_a_bucket_answers_and_initializes_as_a_local_one(
    exported: Path, toy_model: Model, s3: str
) -> None:
    uri = f"{s3}/flat-llava"
    storage_path(uri).upload_folder(exported)
    assert model_ref(uri).identity == model_ref(str(exported)).identity
    engines = [TransformersEngine(find_checkpoint(name), torch.device("cpu")) for name in (uri, str(exported))]
    answers = [engine.answer(["What is it?"], [None], 5) for engine in engines]
    assert answers[0] == answers[1]
    initial = toy_model.model_copy(update={"initial_weights": InitialWeights(name=uri)})
    build_llava(resolve_model(initial), 0, torch.float32)
