"""LLaVA checkpoints of transformers before 5.4 are converted when they are loaded, to answer as they were trained."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionModel, LlavaForConditionalGeneration

from raylava.config.recipe import InitialWeights, Language, Model, Vision
from raylava.corpus.blocks import Blocks
from raylava.errors import UserError
from raylava.evaluation.engines import TransformersEngine
from raylava.models.checkpoint import find_checkpoint, legacy_scale, load_converted, validate_checkpoint
from raylava.models.export import export_model
from raylava.models.llava import build_llava, load_vision_tower
from raylava.models.registry import LlavaCheckpoint, ResolvedModel, resolve_model, resolve_vision
from raylava.train.data_loader import PackCollator
from tests.support.packs import on_cpu

CONNECTOR_BIAS = "multi_modal_projector.linear_1.bias"
IDS = torch.arange(5)[None]


@pytest.fixture(scope="module")
def legacy_checkpoint(resolved_model: ResolvedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as transformers 4.39 wrote it: its connector's output awaits the embedding scale."""
    folder = tmp_path_factory.mktemp("legacy")
    model = dataclasses.replace(resolved_model, feature_scale="none")
    export_model(build_llava(model, 3, torch.float32), None, model, "pad", folder)
    write_version(folder, "4.39.0.dev0")
    return folder


def write_version(folder: Path, version: str | None) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("transformers_version", None)
    (folder / "config.json").write_text(json.dumps(config | ({"transformers_version": version} if version else {})))


def legacy_logits(folder: Path, pack: Any) -> torch.Tensor:
    """Compute the logits by the rule of transformers 4.39: embeddings and image features are scaled together."""
    llava = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    language = llava.model.language_model
    with torch.inference_mode():
        rows = torch.nn.functional.embedding(pack.input_ids, language.embed_tokens.weight)
        features = llava.model.multi_modal_projector(
            llava.model.vision_tower(pack.pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
        )
        rows[0, pack.input_ids[0] == llava.config.image_token_id] = features.flatten(0, 1)
        scaled = rows * llava.config.text_config.hidden_size**0.5
        return llava.lm_head(language(inputs_embeds=scaled).last_hidden_state)


def logits(llava: LlavaForConditionalGeneration, pack: Any) -> torch.Tensor:
    with torch.inference_mode():
        return llava.eval()(input_ids=pack.input_ids, pixel_values=pack.pixel_values).logits


def test_legacy_checkpoint_computes_what_it_was_trained_to(
    legacy_checkpoint: Path, prepared_blocks: Blocks, pack_collator: PackCollator
) -> None:
    pack = on_cpu(pack_collator.collate([prepared_blocks[0]]))
    expected = legacy_logits(legacy_checkpoint, pack)
    converted = load_converted(find_checkpoint(str(legacy_checkpoint)), torch.float32)
    torch.testing.assert_close(logits(converted, pack), expected, rtol=1e-4, atol=1e-5)
    unconverted = LlavaForConditionalGeneration.from_pretrained(legacy_checkpoint)
    assert not torch.allclose(logits(unconverted, pack), expected, atol=1e-2), "the fixture must need the conversion"


def test_version_that_the_user_states_overrides_that_of_the_config(
    legacy_checkpoint: Path, prepared_blocks: Blocks, pack_collator: PackCollator
) -> None:
    pack = on_cpu(pack_collator.collate([prepared_blocks[0]]))
    as_it_is = load_converted(find_checkpoint(str(legacy_checkpoint), "5.4"), torch.float32)
    unconverted = LlavaForConditionalGeneration.from_pretrained(legacy_checkpoint)
    torch.testing.assert_close(logits(as_it_is, pack), logits(unconverted, pack))


def test_training_starts_from_a_legacy_checkpoint_as_it_was_trained(
    legacy_checkpoint: Path, toy_model: Model, prepared_blocks: Blocks, pack_collator: PackCollator
) -> None:
    pack = on_cpu(pack_collator.collate([prepared_blocks[0]]))
    recipe = toy_model.model_copy(update={"initial_weights": InitialWeights(name=str(legacy_checkpoint))})
    model = resolve_model(recipe)
    validate_checkpoint(model)
    llava = build_llava(model, seed=0, dtype=torch.float32)
    weight = llava.model.multi_modal_projector.linear_2.weight
    unfolded = load_file(legacy_checkpoint / "model.safetensors")["multi_modal_projector.linear_2.weight"]
    torch.testing.assert_close(weight, unfolded)  # training applies the scale
    torch.testing.assert_close(logits(llava, pack), legacy_logits(legacy_checkpoint, pack), rtol=1e-4, atol=1e-5)


def test_processor_of_an_old_checkpoint_is_completed(legacy_checkpoint: Path, tmp_path: Path) -> None:
    """Before 4.46, processors had neither a patch size nor a chat template with images."""
    for file in legacy_checkpoint.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    processor = json.loads((tmp_path / "processor_config.json").read_text())
    for name in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens", "chat_template"):
        processor.pop(name, None)
    (tmp_path / "processor_config.json").write_text(json.dumps(processor))
    image = Image.new("RGB", (40, 30), "red")
    answers = [
        TransformersEngine(LlavaCheckpoint(str(folder)), torch.device("cpu"), "fp32").answer(
            ["What is it?"], [image], 5
        )
        for folder in (legacy_checkpoint, tmp_path)
    ]
    assert answers[0] == answers[1]


def test_version_that_is_none_is_refused_by_name(legacy_checkpoint: Path) -> None:
    with pytest.raises(UserError, match="transformers_version=abc: not a version"):
        legacy_scale(find_checkpoint(str(legacy_checkpoint), "abc"))


def test_checkpoint_without_a_version_is_refused_with_the_remedy(legacy_checkpoint: Path, tmp_path: Path) -> None:
    for file in legacy_checkpoint.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text((legacy_checkpoint / "config.json").read_text())
    write_version(tmp_path, None)
    with pytest.raises(UserError, match="give the version as transformers_version"):
        load_converted(LlavaCheckpoint(str(tmp_path)), torch.float32)


def test_checkpoint_that_lacks_weights_is_refused(legacy_checkpoint: Path, tmp_path: Path) -> None:
    """transformers initializes them randomly, and says so in a warning only."""
    for file in legacy_checkpoint.glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    weights = load_file(legacy_checkpoint / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("vision_tower.")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks .* weights of a LlavaForConditionalGeneration"):
        load_converted(LlavaCheckpoint(str(tmp_path)), torch.float32)


def copy_with_weights(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> LlavaCheckpoint:
    """Copy a checkpoint whose weights are changed in place."""
    shutil.copytree(source, folder)
    weights = load_file(source / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return LlavaCheckpoint(str(folder))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda weights: weights.pop(CONNECTOR_BIAS), "lacks 1 weights of a Llava.*linear_1.bias"),
        (lambda weights: weights.update({CONNECTOR_BIAS: torch.zeros(3)}), "has 1 weights of other shapes"),
        (
            lambda weights: weights.update({"lora.weight": torch.zeros(3)}),
            "has 1 weights that a .* has not, lora.weight",
        ),
    ],
    ids=["missing", "mismatched", "unexpected"],
)
def test_checkpoint_whose_weights_are_not_those_of_its_config_is_refused(
    change: Callable[[dict[str, torch.Tensor]], None], problem: str, legacy_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = copy_with_weights(legacy_checkpoint, tmp_path / "changed", change)
    with pytest.raises(UserError, match=problem):
        load_converted(checkpoint, torch.float32)


def test_buffers_that_old_versions_saved_are_left_out(legacy_checkpoint: Path, tmp_path: Path) -> None:
    name = "vision_tower.vision_model.embeddings.position_ids"
    checkpoint = copy_with_weights(legacy_checkpoint, tmp_path / "old", lambda weights: weights.update({name: IDS}))
    load_converted(checkpoint, torch.float32)


def test_vision_tower_is_loaded_from_a_checkpoint_that_has_a_text_tower_too(clip: Path, tmp_path: Path) -> None:
    tower = CLIPVisionModel.from_pretrained(clip)
    text = CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    both = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=tower.config.to_dict(), projection_dim=8))
    both.vision_model.load_state_dict(tower.state_dict())
    both.save_pretrained(tmp_path)
    shutil.copy(clip / "preprocessor_config.json", tmp_path)
    loaded = load_vision_tower(resolve_vision(Vision(name=str(tmp_path))), torch.float32)
    torch.testing.assert_close(loaded.state_dict(), tower.state_dict())


@pytest.mark.parametrize("file", ["tokenizer_config.json", "processor_config.json", "config.json"])
def test_code_of_a_model_folder_never_runs_even_if_standard_input_agrees(
    file: str, legacy_checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(legacy_checkpoint, tmp_path / "model"))
    evil = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\nclass Evil:\n    pass\n"
    (folder / "evil.py").write_text(evil)
    auto_map = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor"), "evil.Evil")
    auto_map["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
    content = json.loads((folder / file).read_text()) | {"auto_map": auto_map}
    for key in ("tokenizer_class", "processor_class"):
        content |= {key: "Evil"} if key in content else {}
    (folder / file).write_text(json.dumps(content))
    command = [sys.executable, "-m", "raylava.cli", "chat", str(folder), "What is it?", "--max-new-tokens", "2"]
    process = subprocess.run(command, input="y\n" * 9, capture_output=True, text=True, check=False, timeout=120)
    assert not (tmp_path / "ran").exists()
    assert process.returncode in (0, 2), process.stderr
    assert "Traceback" not in process.stderr


def test_checkpoint_of_other_dimensions_is_refused_before_training(
    legacy_checkpoint: Path, toy_model: Model, siglip: Path
) -> None:
    recipe = Model(
        language=Language(name=toy_model.language.name),
        vision=Vision(name=str(siglip)),
        initial_weights=InitialWeights(name=str(legacy_checkpoint)),
    )
    with pytest.raises(UserError, match=r"has other dimensions than model\.vision\.name"):
        validate_checkpoint(resolve_model(recipe))
