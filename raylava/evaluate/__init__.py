"""A model's scores on held-out questions.

`questions` reads one's own question files, `official` those of the paper's seven benchmarks. `answer` has a model
answer them, by Ray Data; `kept` keeps what it said on the way. `answers` reads anybody's answer files. `score` turns
answers and references into figures and is pure; `scoring` joins files to rules; `judge` asks a program where no rule
can tell. `compare` sets evaluations side by side, `compare_page` shows it.
"""
