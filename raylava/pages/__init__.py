"""HTML pages: one base template and one stylesheet, inline charts, and no request to anything outside the page.

`render` fills a template of `templates/` with plain data, escaped by jinja2; `charts` computes the geometry of line
charts, histograms and the stage graph. The package knows nothing of artifacts: other packages give it their values.
"""
