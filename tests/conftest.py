"""What all tests share: one Ray for the session, and a laboratory so small that it is made in seconds."""

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from raylava.artifacts import Artifact
from raylava.console import Console, Silent
from raylava.corpus.blocks import Blocks
from raylava.corpus.prepare import Job, prepare
from raylava.micro.laboratory import LaboratorySize, laboratory
from raylava.micro.language import LanguageSize
from raylava.micro.vision import VisionSize
from raylava.model.backbones import LanguageSpec, VisionSpec, load_tokenizer, resolve_language, resolve_vision
from raylava.model.templates import IMAGE_TOKEN
from raylava.recipe import Corpus, Language, Model, Resources, Source, Storing, Vision
from raylava.session import ray_session
from raylava.stage import make
from raylava.storage import place
from raylava.train.feed import Layout
from tests.flaky import FlakyProxy

SECRET = "planted-secret-that-must-stay-out-of-artifacts"

TINY = LaboratorySize(
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
def lab(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Corpus and hardly trained backbones of transformers' own classes."""
    root = tmp_path_factory.mktemp("laboratory")
    with (root / "console.txt").open("w") as stream:
        return make(laboratory(place(root), TINY, seed=0), Console(stream))


@pytest.fixture(scope="session")
def micro_model(lab: Artifact) -> Model:
    backbones = lab.place / "backbones"
    return Model(language=Language(name=str(backbones / "gemma")), vision=Vision(name=str(backbones / "clip")))


@pytest.fixture(scope="session")
def vision(micro_model: Model) -> VisionSpec:
    return resolve_vision(micro_model.vision)


@pytest.fixture(scope="session")
def language(micro_model: Model) -> LanguageSpec:
    return resolve_language(micro_model.language)


@pytest.fixture
def corpus_copy(lab: Artifact, tmp_path: Path) -> Path:
    """The laboratory's corpus in a folder that a test may damage."""
    return Path(shutil.copytree((lab.place / "corpus").path, tmp_path / "corpus"))


@pytest.fixture(scope="session")
def prepared_blocks(
    lab: Artifact,
    micro_model: Model,
    vision: VisionSpec,
    language: LanguageSpec,
    tmp_path_factory: pytest.TempPathFactory,
) -> Blocks:
    folder = lab.place / "corpus"
    output = tmp_path_factory.mktemp("blocks")
    source = Source(annotations="instruction.json", images="pictures")
    job = Job(
        "instruction",
        Corpus(sources=(source,), max_length=256, store=Storing(format="png")),
        ((str(folder / "instruction.json"), str(folder / "pictures")),),
        micro_model.language,
        language.template,
        vision,
        str(output),
    )
    prepare(job, "tokenizer", Silent())
    return Blocks(output)


@pytest.fixture(scope="session")
def blocks_layout(micro_model: Model, vision: VisionSpec) -> Layout:
    tokenizer = load_tokenizer(micro_model.language)
    return Layout(vision, *tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, "<bos>"]))
