"""Damages rows of the alignment corpus, one or more for each reason for which rows are quarantined."""

import json
from pathlib import Path
from typing import Any

from PIL import Image


def damage_rows(folder: Path) -> dict[str, str]:
    """Damage 14 of the 40 rows in a copy of the alignment corpus; return the expected reason by sample id."""
    file = folder / "alignment.json"
    rows = json.loads(file.read_text())
    images = folder / "images"
    expected: dict[str, str] = {}

    def damage(number: int, reason: str, **changes: Any) -> Path:
        rows[number].update(changes)
        expected[f"{rows[number]['id']}#0.0.{number}"] = reason
        return images / rows[number]["image"]

    damage(0, "image missing").unlink()
    damage(1, "image unreadable").write_bytes(b"no image at all")
    image = damage(2, "image truncated")
    image.write_bytes(image.read_bytes()[:-40])
    Image.new("1", (9000, 9000)).save(damage(3, "image too large"))
    damage(4, "image path escapes the root", image="../alignment.json")
    damage(5, "no turns", conversations=[])
    damage(6, "turns do not alternate", conversations=rows[6]["conversations"][::-1])
    without_token = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "a"}]
    damage(7, "image without image token", conversations=without_token)
    two_tokens = [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "a"}]
    damage(8, "image token without image", conversations=two_tokens)
    damage(9, "nothing supervised", conversations=[rows[9]["conversations"][0], {"from": "gpt", "value": " "}])
    damage(10, "too long", conversations=[rows[10]["conversations"][0], {"from": "gpt", "value": "word " * 500}])
    (images / "caption" / "link.png").symlink_to(file)
    damage(11, "image path escapes the root", image="caption/link.png")
    damage(12, "image missing", image="caption")
    Image.open(images / rows[13]["image"]).save(images / rows[13]["image"], "GIF")  # a GIF named .png is accepted
    rows[14] = "not a row"
    expected["#0.0.14"] = "not a row"
    file.write_text(json.dumps(rows))
    return expected
