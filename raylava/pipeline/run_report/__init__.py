"""The report of a run as one HTML page.

`stages` finds the artifacts that belong to a run; `training`, `corpora`, `scores`, `gallery` and `failures` read them;
`data` joins what they return to one JSON-serializable dict, `page` renders it and writes the file.
"""
