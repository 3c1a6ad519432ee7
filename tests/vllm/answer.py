"""Answer questions with vLLM: reads a request from standard input, writes the answers to the file that is named.

Runs in vLLM's environment, where raylava is not installed.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def answer(request: dict[str, Any]) -> list[str]:
    """Return one greedily decoded answer per task."""
    from PIL import Image
    from transformers import AutoProcessor
    from vllm import LLM, SamplingParams

    processor = AutoProcessor.from_pretrained(request["model"], backend="pil")
    llm = LLM(
        request["model"], dtype="float32", enforce_eager=True, limit_mm_per_prompt={"image": 1}, max_model_len=512
    )
    prompts = []
    for task in request["tasks"]:
        content = [{"type": "image"}, {"type": "text", "text": task["prompt"]}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        ids = processor.tokenizer.encode(prompt, add_special_tokens=False)
        image = Image.open(task["image"]).convert("RGB")
        prompts.append({"prompt_token_ids": ids, "multi_modal_data": {"image": image}})
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=request["max_tokens"]), use_tqdm=False)
    return [output.outputs[0].text.strip() for output in outputs]


if __name__ == "__main__":  # vLLM starts processes that import this module
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    Path(sys.argv[1]).write_text(json.dumps(answer(json.load(sys.stdin))))
