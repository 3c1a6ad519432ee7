"""A model's scores on held-out questions.

`questions` reads benchmark files; `answer` has the model answer them, by Ray Data; `score` turns answers and references
into figures and is pure.
"""
