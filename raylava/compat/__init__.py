"""Every use of a private API of DeepSpeed, so that an upgrade of the library fails in one place.

`environment` sets the variables that libraries read once.
"""
