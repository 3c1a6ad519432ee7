"""What all tests share: one Ray for the session, and a toy assets so small that it is made in seconds."""

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from raylava.artifacts import Artifact
from raylava.cluster.session import ray_session
from raylava.config.recipe import Corpus, ImageEncoding, Language, Model, Resources, Source, Vision
from raylava.console import Console, NullProgressBar
from raylava.corpus.blocks import Blocks
from raylava.corpus.prepare import PrepareSpec, prepare
from raylava.models.registry import LanguageSpec, VisionSpec, load_tokenizer, resolve_language, resolve_vision
from raylava.models.templates import IMAGE_TOKEN
from raylava.pipeline.stage import run_stage
from raylava.storage import storage_path
from raylava.toy.assets import ToySize, toy_assets_stage
from raylava.toy.language import LanguageSize
from raylava.toy.vision import VisionSize
from raylava.train.data_loader import PackCollator
from tests.flaky import FlakyProxy

SECRET = "planted-secret-that-must-stay-out-of-artifacts"

TINY = ToySize(
    alignment=40,
    instruction=48,
    heldout=20,
    language=LanguageSize(width=32, layers=2, heads=2, key_value_heads=1, steps=2, batch=4),
    small=LanguageSize(width=16, layers=1, heads=2, key_value_heads=1, steps=2, batch=4),
    vision=VisionSize(width=16, layers=2, heads=2, steps=2, batch=4),
)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


LOOKS = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"


@pytest.fixture(scope="session", autouse=True)
def _ray_looks_often() -> Iterator[None]:
    """Stages of tests last seconds: Ray Train's look at its workers every two would be a fifth of all tests' time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(LOOKS, "0.3")
        yield


@pytest.fixture(scope="module")
def ray_looks_as_always() -> Iterator[None]:
    """For runs that something is to befall on their way: a checkpoint waits for the look at the one before it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(LOOKS)
        yield


@pytest.fixture(scope="session")
def ray_cluster(s3: str) -> Iterator[None]:
    """One Ray on this machine for all tests that need it; it ends with the session."""
    with ray_session(Resources(workers=2)):
        yield


@pytest.fixture(scope="session", autouse=True)
def s3() -> Iterator[str]:
    """A bucket on moto's server over HTTP; credentials and endpoint come by boto3's ordinary chain.

    For every session from its start: Ray's workers inherit the environment when Ray starts.
    """
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture
def proxy() -> Iterator[FlakyProxy]:
    """A proxy between what this test opens and the bucket's server, to make storage fail."""
    proxy = FlakyProxy(os.environ["AWS_ENDPOINT_URL"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy
    proxy.close()


@pytest.fixture
def console(tmp_path: Path) -> Iterator[Console]:
    with (tmp_path / "console.txt").open("w") as stream:
        yield Console(stream)


@pytest.fixture(scope="session")
def toy_assets(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Corpus and hardly trained backbones of transformers' own classes."""
    root = tmp_path_factory.mktemp("toy-assets")
    with (root / "console.txt").open("w") as stream:
        return run_stage(toy_assets_stage(storage_path(root), TINY, seed=0), Console(stream))


@pytest.fixture(scope="session")
def toy_model(toy_assets: Artifact) -> Model:
    backbones = toy_assets.path / "backbones"
    return Model(language=Language(name=str(backbones / "gemma")), vision=Vision(name=str(backbones / "clip")))


@pytest.fixture(scope="session")
def vision(toy_model: Model) -> VisionSpec:
    return resolve_vision(toy_model.vision)


@pytest.fixture(scope="session")
def language(toy_model: Model) -> LanguageSpec:
    return resolve_language(toy_model.language)


@pytest.fixture
def corpus_copy(toy_assets: Artifact, tmp_path: Path) -> Path:
    """The toy assets's corpus in a folder that a test may damage."""
    return Path(shutil.copytree((toy_assets.path / "corpus").path, tmp_path / "corpus"))


@pytest.fixture(scope="session")
def prepared_blocks(
    toy_assets: Artifact,
    toy_model: Model,
    vision: VisionSpec,
    language: LanguageSpec,
    tmp_path_factory: pytest.TempPathFactory,
) -> Blocks:
    folder = toy_assets.path / "corpus"
    output = tmp_path_factory.mktemp("blocks")
    source = Source(annotations="instruction.json", images="images")
    spec = PrepareSpec(
        "instruction",
        Corpus(sources=(source,), max_length=256, image_encoding=ImageEncoding(format="png")),
        ((str(folder / "instruction.json"), str(folder / "images")),),
        toy_model.language,
        language.template,
        vision,
        str(output),
    )
    prepare(spec, "tokenizer", NullProgressBar())
    return Blocks(output)


@pytest.fixture(scope="session")
def blocks_layout(toy_model: Model, vision: VisionSpec) -> PackCollator:
    tokenizer = load_tokenizer(toy_model.language)
    return PackCollator(vision, *tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, "<bos>"]))
