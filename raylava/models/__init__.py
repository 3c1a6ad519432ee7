"""What a LLaVA is: which backbones there are, how one is assembled, and how it is published.

`templates` are chat templates as data; `backbones` is the registry of vision and language families; `llava` assembles
the model, says what trains in which stage and computes a pack's loss, with `attention` over packs; `publish` writes the
Hugging Face folder; `untrained` publishes the model as it was before training. None of it trains anything.
"""
