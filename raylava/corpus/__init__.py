"""Conversations and images → Arrow blocks, by Ray Data.

`formats` says where rows lie in the files people have; `sources` makes one row type of them; `conversation` turns text
into ids and supervised spans; `images` turns bytes into the pixels the backbone takes; `quarantine` names why a row
can't be used; `blocks` is the format on disk, `cache` brings blocks from a bucket to a node; `prepare` joins them into
the pipeline, and it alone knows Ray; `inspect` shows what went in.
"""
