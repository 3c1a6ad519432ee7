"""Image-text corpora as Arrow blocks, prepared with Ray Data.

Sources:
- formats.py: lists the formats; json_formats.py, binary_formats.py: locate and read their rows; row_format.py: shared
- row_index.py: indexes of annotation files, built once; source_cache.py: what identifies a source
- sources.py: selects the rows of a source; rows.py: parses them into one row type

From a row to a sample:
- operators.py, operator_library.py: filter, change and de-duplicate rows; deduplication.py, image_hash.py: duplicates
- conversation.py: tokenizes conversations and marks the spans that the loss covers
- row_images.py: reads a row's images; fetch.py: those named by URL; images.py: decodes, resizes and encodes
- samples.py: turns one row into one sample; quarantine.py: the reasons for which it cannot become one

The pipeline:
- prepare.py: all passes over a corpus; shards.py: its division into shards; block_writer.py: the block of one shard
- parallel.py: the mapping of shards with Ray Data; crashes.py: finds rows that end the process of their worker
- blocks.py: the on-disk format; block_cache.py: a bounded local cache of remote blocks; shuffle.py: the order of epochs
- inspect.py: statistics and an HTML page of a prepared corpus; source_check.py: checks sources before preparation
"""
