"""Renders the templates of pages: everything that a page shows is escaped, and its policy forbids every request."""

import base64
import functools
import hashlib
import json
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

_PLOTLY_POLICY = "img-src data: blob:; script-src 'unsafe-inline' 'unsafe-eval'"  # as plotly's own script needs it
_MINUTE, _HOUR = 60, 3600


def render(template: str, script: str = "", **values: Any) -> str:
    """Return the page of a template. Texts in `values` are escaped, except those of type `Markup`.

    `script` names an inline script of the templates folder: the policy allows this one, by its hash, and no other.
    """
    content = _read(script) if script else ""
    policy = f"img-src data:; script-src '{_sha256(content)}'" if script else "img-src data:"
    return _environment().get_template(template).render(policy=policy, script=Markup(content), **values)


def render_with_plots(template: str, **values: Any) -> str:
    """Return the page of a template that embeds plotly's script and plots."""
    return _environment().get_template(template).render(policy=_PLOTLY_POLICY, script=Markup(), **values)


def trusted(html: str) -> Markup:
    """Mark HTML that a renderer has already escaped (plotly's, markdown-it's), so that it is not escaped again."""
    return Markup(html)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("raylava.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["style"] = Markup(_read("style.css", environment))
    filters = (figure, score, count, duration, signed, percent)
    environment.filters |= {function.__name__: function for function in filters}
    return environment


def _read(name: str, environment: Environment | None = None) -> str:
    loader = (environment or _environment()).loader
    assert loader is not None
    return loader.get_source(environment or _environment(), name)[0]


def _sha256(script: str) -> str:
    """Return the hash of an inline script as a content security policy names it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _tag(value: float, text: str) -> Markup:
    """Return a number as text, with its exact value for programs that read the page."""
    return Markup('<data value="{}">{}</data>').format(json.dumps(value), text)


def figure(value: float | None) -> Markup:
    """Return a measured number with four significant digits; a dash for None."""
    if value is None:
        return Markup("–")
    text = f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"
    return _tag(value, text)


def score(value: float | None) -> Markup:
    """Return a fraction with two decimals, or points with four significant digits; a dash for None."""
    if value is None or abs(value) > 1:
        return figure(value)
    return _tag(value, f"{value:.2f}")


def count(value: float | None) -> Markup:
    """Return a count with separators of thousands; a dash for None."""
    return Markup("–") if value is None else _tag(value, f"{value:,.0f}")


def signed(value: float) -> Markup:
    """Return a difference with its sign and three decimals."""
    return _tag(value, f"{value:+.3f}")


def percent(value: float) -> Markup:
    """Return a fraction as a percentage."""
    return _tag(value, f"{value:.1%}")


def duration(seconds: float | None) -> Markup:
    """Return seconds as `12 s`, `3 min 20 s` or `5 h 07 min`; a dash for None."""
    if seconds is None:
        return Markup("–")
    whole = round(seconds)
    if whole < _MINUTE:
        text = f"{seconds:.3g} s"
    elif whole < _HOUR:
        text = f"{whole // _MINUTE} min {whole % _MINUTE:02d} s"
    else:
        text = f"{whole // _HOUR} h {whole % _HOUR // _MINUTE:02d} min"
    return _tag(seconds, text)
