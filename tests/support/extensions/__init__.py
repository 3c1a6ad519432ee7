"""A vision family, a language family and a benchmark outside raylava; docs/extend.md shows these modules."""
