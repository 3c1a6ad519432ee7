"""Fixtures of all tiers. Those that start Ray or an S3 server must be requested; nothing is started otherwise."""

import logging
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from raylava.artifacts import Artifact
from raylava.config.recipe import Corpus, ImageEncoding, Language, Model, Resources, Source, Vision
from raylava.console import Console
from raylava.corpus.block_writer import make_block
from raylava.corpus.blocks import Blocks
from raylava.corpus.prepare import publish_corpus
from raylava.corpus.shards import PrepareSpec, stage_rows
from raylava.models.registry import LanguageSpec, ResolvedModel, VisionSpec, load_tokenizer, resolve_model
from raylava.models.templates import IMAGE_TOKEN
from raylava.storage import storage_path
from raylava.toy.assets import ToyAssetsStage, ToySize, build_toy_assets
from raylava.toy.language import LanguageSize
from raylava.toy.vision import VisionSize
from raylava.train.data_loader import PackCollator
from tests.support.flaky_proxy import FlakyProxy
from tests.support.metadata_server import MetadataServer

# A deadline would make a property test fail on a busy machine.
hypothesis.settings.register_profile("raylava", deadline=None)
hypothesis.settings.load_profile("raylava")

SECRET = "planted-secret-that-must-stay-out-of-artifacts"

TINY = ToySize(
    alignment=40,
    instruction=48,
    heldout=20,
    language=LanguageSize(width=32, layers=2, heads=2, key_value_heads=1, steps=2, batch=4),
    small=LanguageSize(width=16, layers=1, heads=2, key_value_heads=1, steps=2, batch=4),
    vision=VisionSize(width=16, layers=2, heads=2, steps=2, batch=4),
)

# Ray Train polls its workers every 2 s by default, which would be a fifth of the time of short stages, and starts a
# process that waits for preemption notices.
FAST_RAY_TRAIN = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _fast_ray_train() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FAST_RAY_TRAIN.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def default_ray_train_settings() -> Iterator[None]:
    """For runs in which a failure is injected: a checkpoint counts only after the poll that follows it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in FAST_RAY_TRAIN:
            patch.delenv(name)
        yield


@pytest.fixture(scope="session")
def ray_cluster(s3: str) -> Iterator[None]:
    """One local Ray cluster for the session. It starts after the S3 server, whose environment its workers inherit."""
    from raylava.cluster.session import ray_session

    with ray_session(Resources(workers=2)):
        yield


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """A bucket on moto's server over HTTP; credentials and endpoint come from boto3's default chain."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # it logs a line per request
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
def proxy(s3: str) -> Iterator[FlakyProxy]:
    """A proxy in front of the S3 server that can be made to fail."""
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
def toy_assets(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A tiny corpus and barely trained backbones of transformers' own classes, built once per session without Ray."""
    spec = ToyAssetsStage(storage_path(tmp_path_factory.mktemp("toy-assets")), TINY, seed=0).spec()
    build_toy_assets(spec.path, TINY, seed=0)
    return spec.commit({}, {}, seconds=0.0)


@pytest.fixture(scope="session")
def toy_model(toy_assets: Artifact) -> Model:
    backbones = toy_assets.path / "backbones"
    return Model(language=Language(name=str(backbones / "gemma")), vision=Vision(name=str(backbones / "clip")))


@pytest.fixture(scope="session")
def resolved_model(toy_model: Model) -> ResolvedModel:
    return resolve_model(toy_model)


@pytest.fixture(scope="session")
def vision(resolved_model: ResolvedModel) -> VisionSpec:
    return resolved_model.vision


@pytest.fixture(scope="session")
def language(resolved_model: ResolvedModel) -> LanguageSpec:
    return resolved_model.language


@pytest.fixture
def corpus_copy(toy_assets: Artifact, tmp_path: Path) -> Path:
    """A copy of the toy corpus that a test may damage."""
    return Path(shutil.copytree((toy_assets.path / "corpus").path, tmp_path / "corpus"))


@pytest.fixture(scope="session")
def prepared_blocks(
    toy_assets: Artifact,
    vision: VisionSpec,
    language: LanguageSpec,
    tmp_path_factory: pytest.TempPathFactory,
) -> Blocks:
    """The toy instruction corpus as blocks, prepared without Ray by the functions that Ray Data's workers call."""
    folder = toy_assets.path / "corpus"
    output = tmp_path_factory.mktemp("blocks")
    source = Source(annotations="instruction.json", images="images")
    spec = PrepareSpec(
        "instruction",
        Corpus(sources=(source,), max_length=256, image_encoding=ImageEncoding(format="png")),
        ((str(folder / "instruction.json"), str(folder / "images")),),
        language,
        vision,
        str(output),
    )
    rows, shards = stage_rows(spec, storage_path(output))
    for shard in range(shards):
        make_block(spec, shard)
    publish_corpus(spec, storage_path(output), shards, rows, "tokenizer")
    return Blocks(output)


@pytest.fixture(scope="session")
def pack_collator(vision: VisionSpec, language: LanguageSpec) -> PackCollator:
    tokenizer = load_tokenizer(language)
    return PackCollator(vision, *tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, "<bos>"]))


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[MetadataServer]:
    """A stand-in for a cloud's metadata service, which the preemption watcher queries."""
    server = MetadataServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("RAYLAVA_METADATA", server.url)
    yield server
    server.shutdown()
    server.server_close()
