"""A vision family, a language family and a benchmark from outside raylava are prepared for, trained and evaluated."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, IJepaConfig, IJepaModel, LlamaConfig, LlamaForCausalLM

from raylava.artifacts import Artifact
from raylava.console import Console
from raylava.evaluation import benchmarks
from raylava.local_copies import local_copy
from raylava.models import families
from raylava.pipeline.runner import run
from raylava.storage import storage_path
from raylava.toy.demo import toy_recipe
from raylava.toy.language import train_tokenizer
from raylava.toy.vision import IMAGE_SIZE, PATCH
from tests.support.extensions import counting, ijepa, llama


@pytest.fixture(scope="module")
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # other tests see the families and benchmarks of raylava only
        patch.setattr(families, "_FAMILIES", list(families._FAMILIES))
        patch.setattr(benchmarks, "_BENCHMARKS", dict(benchmarks._BENCHMARKS))
        families.register(ijepa.FAMILY)
        families.register(llama.FAMILY)
        benchmarks.register(counting.BENCHMARK)
        yield


@pytest.fixture(scope="module")
def folder(toy_assets: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random backbones of the new families, and the benchmark's files."""
    folder = tmp_path_factory.mktemp("extensions")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    IJepaModel(IJepaConfig(**size, image_size=IMAGE_SIZE, patch_size=PATCH)).save_pretrained(folder / "ijepa")
    preprocessor = (toy_assets.path / "backbones" / "clip" / "preprocessor_config.json").read_bytes()
    (folder / "ijepa" / "preprocessor_config.json").write_bytes(preprocessor)
    tokenizer = train_tokenizer(640, seed=0)
    template = llama.FAMILY.template
    tokenizer.add_special_tokens({"additional_special_tokens": [template.open, template.close]})
    LlamaForCausalLM(LlamaConfig(**size, vocab_size=len(tokenizer))).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    questions = json.loads((toy_assets.path / "corpus" / "alignment.json").read_bytes())[:6]
    counts = [{"id": row["id"], "image": row["image"], "question": "How many?", "count": 2} for row in questions]
    (folder / "counts.json").write_text(json.dumps(counts))
    return folder


@pytest.fixture(scope="module")
def artifacts(
    registered: None, folder: Path, toy_assets: Artifact, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Artifact]:
    storage = tmp_path_factory.mktemp("storage")
    images = (toy_assets.path / "corpus" / "images").path
    evaluation = {"name": "counts", "benchmark": "counting", "questions": str(folder), "images": images}
    recipe = toy_recipe(
        toy_assets.path,
        [
            f"model.language.name={folder / 'llama'}",
            f"model.vision.name={folder / 'ijepa'}",
            "pretrain.enabled=false",
            "finetune.global_batch_size=16",
            "finetune.epochs=1",
            "resources.workers=1",
            f"evaluate={json.dumps([evaluation])}",
        ],
    )
    with (storage / "console.txt").open("w") as stream:
        return run(recipe, storage_path(storage), Console(stream))


def test_exported_model_has_the_layer_and_class_token_rule_of_the_vision_family(artifacts: dict[str, Artifact]) -> None:
    config = json.loads((artifacts["finetune"].path / "config.json").read_bytes())
    assert (config["vision_feature_layer"], config["vision_feature_select_strategy"]) == (-1, "full")


def test_untied_output_layer_trains_and_is_exported(artifacts: dict[str, Artifact], folder: Path) -> None:
    exported = load_file(local_copy(artifacts["finetune"].path / "model.safetensors"))
    before = load_file(folder / "llama" / "model.safetensors")
    head, embedding = (exported[f"language_model.{name}.weight"] for name in ("lm_head", "model.embed_tokens"))
    rows = before["lm_head.weight"].shape[0]
    assert not torch.equal(head[:rows].float(), before["lm_head.weight"])
    assert not torch.equal(head, embedding)


def test_generation_follows_the_template_of_the_language_family(artifacts: dict[str, Artifact]) -> None:
    model = local_copy(artifacts["finetune"].path)
    processor = AutoProcessor.from_pretrained(model)
    prompt = processor.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert prompt == "<bos><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    stop_ids = json.loads((model / "generation_config.json").read_bytes())["eos_token_id"]
    assert processor.tokenizer.convert_tokens_to_ids("<|im_end|>") in stop_ids


def test_benchmark_is_scored_by_its_own_metric(artifacts: dict[str, Artifact]) -> None:
    metrics = artifacts["evaluate counts"].metrics
    assert (metrics["questions"], metrics["missing"], metrics["protocol"]) == (6, 0, "within-one")
    assert metrics["headline"] == "within_one"
