"""The LLaVA model: `registry` resolves backbones from their configuration files, `llava` builds the model and computes
the loss of a pack, `attention` is the variable-length attention over packs, `templates` holds chat templates as data,
`export` writes Hugging Face folders, `shapes` gives the dimensions of known backbones to the cost model.
"""
