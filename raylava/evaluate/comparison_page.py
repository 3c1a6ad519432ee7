"""Renders comparisons as one self-contained HTML page: score differences, and questions on which models differ."""

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

from raylava.corpus.images import decode_image
from raylava.corpus.quarantine import BadRow
from raylava.corpus.row_images import read_image_file
from raylava.evaluate.compare import ComparedQuestion, Comparison, Difference
from raylava.storage import StoragePath, storage_path

_MAX_QUESTIONS = 48  # per benchmark
_MAX_SIDE = 320  # pixels of an image's longer side
_MAX_PIXELS = 64_000_000
_MAX_IMAGE_BYTES = 64_000_000


def page(comparisons: Sequence[Comparison]) -> str:
    """Return the HTML of the page; all text from files is escaped."""
    return _PAGE.format(body="".join(_section(comparison) for comparison in comparisons))


def _section(comparison: Comparison) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{mean:.3f}</td></tr>" for name, mean in comparison.mean_scores.items()
    )
    names = list(comparison.mean_scores)
    differences = "".join(f"<p>{_sentence(difference, names[0])}</p>" for difference in comparison.differences)
    differing = [question for question in comparison.questions if question.differs]
    cards = "".join(_card(question, names, storage_path(comparison.images)) for question in differing[:_MAX_QUESTIONS])
    note = f"The scores differ on {len(differing)} of {len(comparison.questions)} questions"
    note += f"; the first {_MAX_QUESTIONS} are shown." if len(differing) > _MAX_QUESTIONS else "."
    return (
        f"<h2>{html.escape(comparison.benchmark)}</h2><table><tr><th>model</th><th>mean score</th></tr>{rows}</table>"
        f"{differences}<p>{note}</p><main>{cards}</main>"
    )


def _sentence(difference: Difference, baseline: str) -> str:
    interval = f"{difference.low:+.3f} to {difference.high:+.3f}"
    verdict = " The interval spans zero: these questions do not separate the models." if difference.spans_zero else ""
    return (
        f"<b>{html.escape(difference.name)}</b> against {html.escape(baseline)}: <b>{difference.difference:+.3f}</b> "
        f"(95 % interval {interval}, paired bootstrap over questions).{verdict}"
    )


def _card(question: ComparedQuestion, names: Sequence[str], images: StoragePath) -> str:
    rows = "".join(
        f'<p class="{"right" if score == max(question.scores) else "wrong"}"><small>{html.escape(name[0])}</small> '
        f"{html.escape(answer) or '(no answer)'}</p>"
        for name, answer, score in zip(names, question.answers, question.scores, strict=True)
    )
    references = html.escape(", ".join(dict.fromkeys(question.references)))
    return (
        f"<figure>{_image(question, images)}<figcaption><p>{html.escape(question.text)}</p>{rows}"
        f"<small>{html.escape(question.question_id)}: {references}</small></figcaption></figure>"
    )


def _image(question: ComparedQuestion, images: StoragePath) -> str:
    """Return the question's image, downscaled and inlined, or the reason why it cannot be shown."""
    if question.image is None:
        return ""
    try:
        content = read_image_file(images, question.image, _MAX_IMAGE_BYTES)
        image = Image.fromarray(decode_image(content, _MAX_PIXELS))
    except (OSError, BadRow) as problem:
        return f"<em>{html.escape(question.image)}: {html.escape(str(problem))}</em>"
    image.thumbnail((_MAX_SIDE, _MAX_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if max(image.size) < _MAX_SIDE else "JPEG", quality=85)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(question.image)}" src="data:image;base64,{encoded}">'


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
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
