"""Answers and references → figures: pure functions, apart from answering.

`tally` is what all scores are made of (counts, figures, bootstrap intervals). A room a family of rules: `exact` (GQA
and one's own questions), `yesno` (POPE), `vqav2`, `mme`, `letters` (ScienceQA, MMVP), `judged` (MM-Vet). `rules` names
them.
"""
