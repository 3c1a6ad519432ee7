"""Configuration: `recipe` defines the typed recipe, `load` reads it from YAML with parents and overrides,
`shipped` finds the shipped recipes by name.

Validation happens here, once, before any worker starts; later code may rely on it.
"""
