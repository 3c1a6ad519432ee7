"""Every use of a private API of DeepSpeed is in this package, so that an upgrade of the library fails in one place."""
