"""A toy assets in miniature, so that the whole road runs on a laptop in minutes with nothing downloaded.

`scenes` says what is drawn and what is true of it; `corpus` writes images, captions and questions as LLaVA JSON;
`language` and `vision` train small backbones of transformers' own classes; `toy_assets` makes all of it one artifact.
"""
