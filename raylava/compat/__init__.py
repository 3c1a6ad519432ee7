"""Every use of private APIs, one module per library, so that an upgrade of a library fails in one place.

`tests/unit/compat` has a test for each symbol, named after the feature that needs it. `environment` sets the variables
that libraries read once.
"""
