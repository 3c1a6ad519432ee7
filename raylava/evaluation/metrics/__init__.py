"""Benchmark metrics: pure functions from answers and references to scores.

`score_table` holds per-unit counts, the metrics computed from them and their bootstrap intervals. Each family of
metrics has one module: `exact_match` (GQA and custom questions), `yes_no` (POPE), `vqa_accuracy` (VQAv2), `mme`,
`multiple_choice` (ScienceQA, MMVP) and `mm_vet` (grades of a judge). `registry` maps metric names to functions.
"""
