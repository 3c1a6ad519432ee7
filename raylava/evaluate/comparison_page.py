"""A comparison as one self-contained HTML page: the differences, and the questions where models part, with images."""

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

from raylava.corpus.images import decode
from raylava.corpus.quarantine import BadRow
from raylava.evaluate.compare import Asked, Comparison, Difference
from raylava.storage import StoragePath, storage_path

SHOWN = 48  # questions of each benchmark
_SIDE = 320  # pixels of a image's longer side
_MAX_PIXELS = 64_000_000


def page(comparisons: Sequence[Comparison]) -> str:
    """The whole page; what files say is escaped."""
    return _PAGE.format(body="".join(_section(one) for one in comparisons))


def _section(one: Comparison) -> str:
    means = "".join(f"<tr><td>{html.escape(name)}</td><td>{mean:.3f}</td></tr>" for name, mean in one.credit.items())
    first = next(iter(one.credit))
    told = "".join(f"<p>{_told(difference, first)}</p>" for difference in one.differences)
    apart = [asked for asked in one.asked if asked.parts]
    cards = "".join(_card(asked, list(one.credit), storage_path(one.images)) for asked in apart[:SHOWN])
    note = f"{len(apart)} of {len(one.asked)} questions are answered better by one than by another"
    note += f"; the first {SHOWN} are shown." if len(apart) > SHOWN else "."
    return (
        f"<h2>{html.escape(one.benchmark)}</h2><table><tr><th>model</th><th>mean credit</th></tr>{means}</table>"
        f"{told}<p>{note}</p><main>{cards}</main>"
    )


def _told(one: Difference, first: str) -> str:
    interval = f"{one.low:+.3f} to {one.high:+.3f}"
    verdict = " The interval spans zero: these questions don't tell." if one.spans_zero else ""
    return (
        f"<b>{html.escape(one.name)}</b> against {html.escape(first)}: <b>{one.difference:+.3f}</b> "
        f"(95 % interval {interval}, paired bootstrap over questions).{verdict}"
    )


def _card(asked: Asked, names: Sequence[str], images: StoragePath) -> str:
    rows = "".join(
        f'<p class="{"right" if credit == max(asked.credit) else "wrong"}"><small>{html.escape(name[0])}</small> '
        f"{html.escape(said) or '(nothing)'}</p>"
        for name, said, credit in zip(names, asked.said, asked.credit, strict=True)
    )
    references = html.escape(", ".join(dict.fromkeys(asked.references)))
    return (
        f"<figure>{_image(asked, images)}<figcaption><p>{html.escape(asked.text)}</p>{rows}"
        f"<small>{html.escape(asked.question_id)}: {references}</small></figcaption></figure>"
    )


def _image(asked: Asked, images: StoragePath) -> str:
    if asked.image is None:
        return ""
    try:
        image = Image.fromarray(decode((images / asked.image).read_bytes(), _MAX_PIXELS))
    except (OSError, BadRow) as problem:
        return f"<em>{html.escape(asked.image)}: {html.escape(str(problem))}</em>"
    image.thumbnail((_SIDE, _SIDE))
    content = io.BytesIO()
    image.save(content, "PNG" if max(image.size) < _SIDE else "JPEG", quality=85)
    encoded = base64.b64encode(content.getvalue()).decode()
    return f'<img alt="{html.escape(asked.image)}" src="data:image;base64,{encoded}">'


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>raylava compare</title>
<style>
  body {{ font: 16px/1.45 system-ui, sans-serif; margin: 3rem auto; max-width: 72rem; padding: 0 1rem; color: #1d1d22 }}
  table {{ border-collapse: collapse }} th, td {{ text-align: left; padding: .25rem 1.5rem .25rem 0 }}
  main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1.25rem }}
  figure {{ margin: 0; border: 1px solid #dcdce4; border-radius: .6rem; overflow: hidden }}
  img {{ width: 100%; display: block; image-rendering: pixelated }} figcaption {{ padding: .7rem .9rem }}
  figcaption p {{ margin: 0 0 .3rem; white-space: pre-line }} small {{ color: #6b6b76 }}
  .right {{ color: #17743a; font-weight: 600 }} .wrong {{ color: #b3261e; font-weight: 600 }}
</style>
<h1>Where models differ</h1>
{body}</html>
"""
