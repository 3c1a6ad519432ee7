"""Image-text corpora as Arrow blocks, prepared with Ray Data.

- formats.py: locates rows in LLaVA JSON, JSON Lines, Parquet and WebDataset files
- sources.py: selects the rows of a source and parses them into one row type
- conversation.py: tokenizes conversations and marks the spans that the loss covers
- images.py: decodes, resizes and encodes images
- quarantine.py: the reasons for which a row cannot become a sample
- samples.py: turns one source row into one sample
- blocks.py: the on-disk format; block_cache.py: a bounded local cache of remote blocks
- prepare.py: the pipeline over all rows, the only module here that uses Ray
- inspect.py: statistics and an HTML page of a prepared corpus
"""
