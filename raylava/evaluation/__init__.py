"""Evaluation of a model on held-out questions.

`questions` reads custom question files, `benchmarks` has a module for each official benchmark; `loading`
loads either by name and scores files of answers. `generation` answers questions with Ray Data actors that run a model
with `engines`, `endpoint_generation` with OpenAI-compatible servers, whose client is in `endpoints`: servers that run
already, or those of `vllm_server`, as `endpoint_options` say. `prediction_store` keeps the answers for resuming.
`answer_files` reads files of answers in LLaVA's and the official formats. `metrics` computes scores and is pure;
`judge` asks an external program where no metric applies. `compare` compares evaluations, and `comparison_page` renders
the comparison as HTML with the `question_images`. `published_scores` holds the paper's results.
"""
