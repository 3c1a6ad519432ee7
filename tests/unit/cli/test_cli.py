"""Every mistake ends in one line and status 2 before any worker starts; --json prints one object on standard output."""

import json
from pathlib import Path

import pytest
import yaml

from raylava.artifacts import Artifact
from raylava.cli import main
from raylava.toy.demo import recipes_folder

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def recipe(toy_assets: Artifact, tmp_path: Path) -> Path:
    """toy.yaml on the tiny toy assets."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "extends": str(recipes_folder() / "toy.yaml"),
                "data": str(toy_assets.path / "corpus"),
                "model": {
                    "language": {"name": str(toy_assets.path / "backbones" / "gemma")},
                    "vision": {"name": str(toy_assets.path / "backbones" / "clip")},
                },
            }
        )
    )
    return path


def run(capfd: Captured, *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capfd.readouterr()
    return status, captured.out, captured.err


MISTAKES = {
    "a missing recipe": ([], "none.yaml", "cannot read the recipe"),
    "an unknown key": (["finetune.lrr=1"], None, "did you mean 'finetune.lr'?"),
    "a renamed key": (["finetune.global_batch=8"], None, "it was renamed to 'finetune.global_batch_size'"),
    "a value out of range": (["finetune.lr=2"], None, "finetune.lr=2"),
    "a missing corpus": (["corpora.alignment.sources.0.annotations=none.json"], None, "no such file"),
    "a corpus that is not LLaVA JSON": (
        ["corpora.alignment.sources.0.annotations=images/caption/caption-00000.png"],
        None,
        "format",
    ),
    "a missing image folder": (["corpora.alignment.sources.0.images=none"], None, "no such image folder"),
    "missing questions": (["evaluate.0.questions=none.jsonl"], None, "evaluate.heldout.questions"),
    "an unknown backbone": (["model.vision.name=someone/vit"], None, "neither a folder nor a known hub id"),
    "a folder that is no model": (["model.language.name=/"], None, "no config.json"),
    "a folder that is no connector": (
        ["model.connector.weights=/", "pretrain.enabled=false"],
        None,
        "no raylava connector there",
    ),
    "images longer than a sample": (["corpora.alignment.max_length=30"], None, "one image takes 36 tokens"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_reported_in_one_line_before_any_stage(
    mistake: str, recipe: Path, tmp_path: Path, capfd: Captured
) -> None:
    overrides, missing, message = MISTAKES[mistake]
    path = tmp_path / "none.yaml" if missing else recipe
    status, out, err = run(capfd, "run", path, *overrides, "--storage", tmp_path / "storage")
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1, err
    assert not [file for file in (tmp_path / "storage").glob("*/*") if file.parent.name != "sources"], (
        "no stage was started"
    )


def test_unwritable_storage_is_reported_in_one_line(recipe: Path, tmp_path: Path, capfd: Captured) -> None:
    (tmp_path / "file").write_text("")
    status, _, err = run(capfd, "run", recipe, "--storage", tmp_path / "file")
    assert (status, err.count("\n")) == (2, 1)
    assert "cannot write there" in err


@pytest.mark.parametrize(
    "arguments",
    [[], ["dance"], ["run"], ["chat"], ["show", "a", "--nonsense"], ["evaluate", "m", "--limit", "0"]],
)
def test_wrong_command_line_is_reported_in_one_line(arguments: list[str], capfd: Captured) -> None:
    status, out, err = run(capfd, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "--help" in err


def test_overrides_may_be_given_before_and_after_options(recipe: Path, capfd: Captured) -> None:
    status, out, _ = run(capfd, "check", recipe, "seed=3", "--json", "finetune.lr=1e-3")
    assert (status, json.loads(out)["seed"], json.loads(out)["finetune"]["lr"]) == (0, 3, 1e-3)


def test_check_needs_no_weights_and_prints_the_whole_recipe(capfd: Captured) -> None:
    status, out, _ = run(capfd, "check", recipes_folder() / "llava-gemma-2b.yaml", "--json")
    assert status == 0
    assert json.loads(out)["finetune"]["lr"] == 2e-5


def test_show_prints_what_determined_an_artifact(toy_assets: Artifact, capfd: Captured) -> None:
    status, out, _ = run(capfd, "show", toy_assets.path)
    assert status == 0
    assert json.loads(out)["fingerprint_fields"]["size"]["alignment"] == 40


def test_chat_without_a_model_or_image_is_reported_in_one_line(
    tmp_path: Path, toy_assets: Artifact, capfd: Captured
) -> None:
    status, _, err = run(capfd, "chat", tmp_path, "Hello?")
    assert (status, err.count("\n")) == (2, 1)
    gemma = toy_assets.path / "backbones" / "gemma"
    status, _, err = run(capfd, "chat", gemma, "--image", tmp_path / "none.png", "Hello?")
    assert (status, err.count("\n")) == (2, 1)
    assert "--image" in err


def test_failure_other_than_a_user_error_ends_with_status_1_and_names_the_log(
    recipe: Path, tmp_path: Path, capfd: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the disk caught fire\nand more")

    monkeypatch.setattr("raylava.pipeline.runner.build_stages", fail)
    status, out, err = run(capfd, "run", recipe, "--storage", tmp_path / "storage", "--json")
    assert (status, out) == (1, "")
    first, second = err.splitlines()
    assert first == "error: RuntimeError: the disk caught fire"
    log = Path(second.partition(": ")[2])
    assert "and more" in log.read_text()
