"""Conversations and images → Arrow blocks, by Ray Data.

`sources` reads what people have into one row type; `conversation` turns text into ids and supervised spans; `images`
turns bytes into the pixels the backbone takes; `quarantine` names why a row can't be used; `blocks` is the format on
disk; `prepare` joins them into the pipeline. All but `prepare` are functions from values to values and know no Ray.
"""
