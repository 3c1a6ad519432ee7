"""A folder of files as users have them when something went wrong: damaged, cut off, of wrong types, missing."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from raylava.artifacts import Artifact, ArtifactSpec
from raylava.storage import storage_path
from raylava.toy.demo import recipes_folder
from tests.support.official_files import write_gqa, write_mm_vet, write_pope

SWEEP: dict[str, Any] = {"name": "s", "recipe": "recipe.yaml", "axes": {"lr": {"a": {"finetune.lr": 1e-4}}}}
SEARCH: dict[str, Any] = {"space": {"finetune.lr": {"choice": [1e-4]}}, "objective": {"loss": "min"}, "trials": 1}
DEEP = "[" * 5000


def write_damaged_files(folder: Path, toy_assets: Artifact) -> None:
    """Write everything; `recipe.yaml`, `model`, `artifacts` and the folders of benchmarks are intact."""
    _write_recipes(folder, toy_assets)
    _write_sweeps(folder)
    _write_corpora(folder, toy_assets)
    _write_models(folder, toy_assets)
    _write_questions_and_answers(folder)
    _write_artifacts(folder)


def _write_recipes(folder: Path, toy_assets: Artifact) -> None:
    backbones = toy_assets.path / "backbones"
    recipe = {
        "extends": str(recipes_folder() / "toy.yaml"),
        "data": str(toy_assets.path / "corpus"),
        "model": {"language": {"name": str(backbones / "gemma")}, "vision": {"name": str(backbones / "clip")}},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "folder.yaml").mkdir()
    texts = {
        "empty": "",
        "list": "- 1",
        "text": "only text",
        "tabs": "finetune:\n\tlr: 1",
        "twice": "name: a\nname: b\n",
        "nested-twice": "extends: recipe.yaml\nfinetune:\n  lr: 1.0e-4\n  lr: 1.0e-3\n",
        "alias": "a: &a [*a]",
        "bomb": "a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]\nextends: recipe.yaml\n",
        "tag": "name: !!python/object/apply:os.system ['true']",
        "digits": f"seed: {'9' * 5000}",
        "deep": f"a: {DEEP}",
        "self": "extends: self.yaml",
        "parent-number": "extends: 3",
        "parent-list": "extends: [a, b]",
        "parent-missing": "extends: nowhere.yaml",
        "parent-name": "extends: nowhere",
        "number-key": "extends: recipe.yaml\n1: 2\n",
        "null-key": "extends: recipe.yaml\nnull: 2\n",
        "section-number": "extends: recipe.yaml\nfinetune: 3\n",
        "section-list": "extends: recipe.yaml\nmodel: [1]\n",
        "date": "extends: recipe.yaml\nname: 2026-01-01\n",
    }
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    (folder / "binary.yaml").write_bytes(bytes(range(256)))
    (folder / "utf16.yaml").write_text("name: a", encoding="utf-16")


def _write_sweeps(folder: Path) -> None:
    changes: dict[str, dict[str, Any]] = {
        "": {},
        "-name": {"name": ".."},
        "-dot": {"name": "."},
        "-slash": {"name": "a/b"},
        "-recipe": {"recipe": "nowhere.yaml"},
        "-recipe-number": {"recipe": 3},
        "-recipe-list": {"recipe": "list.yaml"},
        "-axis": {"axes": {"loss": {"a": {"seed": 1}}}},
        "-axis-list": {"axes": ["lr"]},
        "-axis-number": {"axes": {"lr": 3}},
        "-level": {"axes": {"lr": {"a": 3}}},
        "-level-key": {"axes": {"lr": {"a": {"finetune.lrr": 1}}}},
        "-level-empty": {"axes": {"lr": {"a": {}}}},
        "-level-number-key": {"axes": {"lr": {"a": {1: 2}}}},
        "-exclude": {"exclude": [{"lrr": "a"}]},
        "-exclude-all": {"exclude": [{"lr": "a"}]},
        "-seeds": {"seeds": [1, 1]},
        "-seeds-negative": {"seeds": [-1]},
        "-seeds-text": {"seeds": "many"},
        "-set": {"set": {"finetune": {"lrr": 1}}},
        "-concurrent": {"max_concurrent_trials": 0},
        "-unknown": {"axis": {}},
        "-search": {"search": {}},
        "-range": {"search": SEARCH | {"space": {"finetune.lr": {"uniform": [2, 1]}}}},
        "-log": {"search": SEARCH | {"space": {"finetune.lr": {"loguniform": [0, 1]}}}},
        "-range-out": {"search": SEARCH | {"space": {"finetune.lr": {"uniform": [1, 9]}}}},
        "-range-key": {"search": SEARCH | {"space": {"finetune.lrr": {"uniform": [1, 9]}}}},
        "-objective": {"search": SEARCH | {"objective": {"gqa": "max"}}},
        "-direction": {"search": SEARCH | {"objective": {"loss": "down"}}},
        "-trials": {"search": SEARCH | {"trials": -1}},
        "-budget": {"search": {key: SEARCH[key] for key in ("space", "objective")}},
        "-study": {"search": SEARCH | {"study": "a b"}},
        "-database": {"search": SEARCH | {"study_storage": "nonsense://user:hunter2@host/db"}},
        "-database-file": {"search": SEARCH | {"study_storage": "sqlite:////nowhere/at/all.db"}},
        "-variable": {"search": SEARCH | {"study_storage": "$RAYLAVA_UNSET_VARIABLE"}},
        "-nan": {"search": SEARCH | {"space": {"finetune.lr": {"uniform": [float("nan"), 1]}}}},
        "-infinite": {"search": SEARCH | {"space": {"finetune.lr": {"uniform": [0, float("inf")]}}}},
    }
    for name, change in changes.items():
        (folder / f"sweep{name}.yaml").write_text(yaml.safe_dump(SWEEP | change))


def _write_corpora(folder: Path, toy_assets: Artifact) -> None:
    data = folder / "data"
    shutil.copytree((toy_assets.path / "corpus").path, data, symlinks=True)
    good = (data / "alignment.json").read_bytes()
    contents = {
        "cut.json": good[: len(good) // 2],
        "comma.json": good.replace(b",", b",,", 1),
        "latin.json": '[{"conversations": "é"}]'.encode("latin-1"),
        "empty.json": b"",
        "no-rows.json": b"[]",
        "object.json": b"{}",
        "no-talk.json": b'[{"text": 1}]',
        "html.json": b"<!doctype html>",
        "packed.json": gzip.compress(good),
        "utf16.json": good.decode().encode("utf-16"),
        "empty.jsonl": b"",
        "empty.parquet": b"",
        "text.parquet": b"text",
        "empty.tar": b"",
        "text.tar": b"text" * 1000,
        "data.csv": b"a,b",
    }
    for name, content in contents.items():
        (data / name).write_bytes(content)
    (data / "nothing").mkdir()


def _write_models(folder: Path, toy_assets: Artifact) -> None:
    for part in ("clip", "gemma"):
        source = Path((toy_assets.path / "backbones" / part).path)
        damages: dict[str, dict[str, bytes | None]] = {
            "no-config": {"config.json": None},
            "config-cut": {"config.json": b'{"model_type": '},
            "config-list": {"config.json": b"[]"},
            "config-type": {"config.json": b'{"model_type": "bert"}'},
            "config-types": {"config.json": b'{"model_type": "%s", "hidden_size": "wide"}' % {
                "clip": b"clip_vision_model", "gemma": b"gemma"}[part]},
            "no-weights": {"model.safetensors": None},
            "weights-cut": {"model.safetensors": (source / "model.safetensors").read_bytes()[:-100]},
            "weights-html": {"model.safetensors": b"<html>"},
            "pickle": {"model.safetensors": None, "pytorch_model.bin": b"cposix\nsystem\n(S'true'\ntR."},
        }  # fmt: skip
        if part == "clip":
            damages["no-processor"] = {"preprocessor_config.json": None}
            damages["processor-cut"] = {"preprocessor_config.json": b"{"}
            damages["processor-types"] = {"preprocessor_config.json": b'{"size": 8, "image_mean": "x"}'}
        else:
            damages["no-tokenizer"] = {"tokenizer.json": None}
            damages["tokenizer-cut"] = {"tokenizer.json": b"{"}
            damages["tokenizer-list"] = {"tokenizer.json": b"[]"}
        for damage, files in damages.items():
            copy = folder / part / damage
            shutil.copytree(source, copy)
            for name, content in files.items():
                (copy / name).unlink(missing_ok=True)
                if content is not None:
                    (copy / name).write_bytes(content)


def _write_questions_and_answers(folder: Path) -> None:
    for name, write in (("gqa", write_gqa), ("pope", write_pope), ("mm-vet", write_mm_vet)):
        (folder / name).mkdir()
        write(folder / name)
    (folder / "answers.jsonl").write_text('{"question_id": 201, "text": "no"}\n')
    good = {"question_id": 1, "text": "?", "answer": "a"}
    lines = {
        "cut": '{"question_id": ',
        "list": "[]",
        "number": "3",
        "no-id": json.dumps({"text": "?", "answer": "a"}),
        "no-answer": json.dumps({"question_id": 1, "text": "?"}),
        "image": json.dumps(good | {"image": 3}),
        "answers": json.dumps(good | {"answers": 3}),
        "answers-empty": json.dumps(good | {"answers": []}),
        "twice": json.dumps(good) + "\n" + json.dumps(good),
        "empty": "",
        "deep": DEEP,
    }
    (folder / "questions").mkdir()
    for name, line in lines.items():
        (folder / "questions" / f"{name}.jsonl").write_text(line)
        (folder / "questions" / f"given-{name}.jsonl").write_text(line)
    (folder / "questions" / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    (folder / "questions" / "good.jsonl").write_text(json.dumps(good))
    (folder / "questions" / "grade-2.json").write_text('{"v1_0": 2}')
    (folder / "questions" / "grade-text.json").write_text('{"v1_0": "good"}')
    (folder / "questions" / "grade-unknown.json").write_text('{"v9_9": 1}')
    for name, content in (("cut", b"["), ("list", b"[1, 2]"), ("number", b"3"), ("types", b'{"1": {"imageId": []}}')):
        broken = folder / f"gqa-{name}"
        broken.mkdir()
        (broken / "testdev_balanced_questions.json").write_bytes(content)


def _write_artifacts(folder: Path) -> None:
    storage = storage_path(folder / "artifacts")
    for stage in ("prepare", "pretrain", "finetune", "evaluate", "untrained"):
        artifact = ArtifactSpec(stage, {}, storage).commit({}, {}, 1.0)
        Path(artifact.path.path).rename(folder / stage)
        Path(artifact.path.path).parent.rmdir()
        (folder / stage).rename(folder / "artifacts" / stage)
    damaged = {"empty": b"", "cut": b'{"stage": "prep', "list": b"[]", "types": b'{"stage": 3}', "binary": b"\xff\x00"}
    for name, content in damaged.items():
        (folder / "damaged" / name).mkdir(parents=True)
        (folder / "damaged" / name / "artifact.json").write_bytes(content)
    (folder / "prices.yaml").write_text("h100x8: -1")
    (folder / "prices-text.yaml").write_text("h100x8: cheap")
    (folder / "prices-name.yaml").write_text("toaster: 1.0")
    (folder / "cluster.yaml").write_text("cluster_name: [")
    (folder / "cluster-types.yaml").write_text("available_node_types: 3")
    (folder / "replay").mkdir()
    (folder / "replay" / "replay.json").write_text("{")
    (folder / "file").write_text("")
    (folder / "image.png").write_bytes(b"no image")
