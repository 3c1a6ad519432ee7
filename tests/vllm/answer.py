"""Answer questions with vLLM: reads a request from standard input, writes the answers as the last line of its output.

Runs in vLLM's own environment, where raylava is not installed.
"""

import json
import os
import sys

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

from PIL import Image
from transformers import AutoProcessor
from vllm import LLM, SamplingParams

request = json.load(sys.stdin)
processor = AutoProcessor.from_pretrained(request["model"], backend="pil")
llm = LLM(request["model"], dtype="float32", enforce_eager=True, limit_mm_per_prompt={"image": 1}, max_model_len=512)
prompts = []
for task in request["tasks"]:
    content = [{"type": "image"}, {"type": "text", "text": task["prompt"]}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    ids = processor.tokenizer.encode(prompt, add_special_tokens=False)
    image = Image.open(task["image"]).convert("RGB")
    prompts.append({"prompt_token_ids": ids, "multi_modal_data": {"image": image}})
outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=request["max_tokens"]), use_tqdm=False)
sys.stdout.write("\n" + json.dumps([output.outputs[0].text.strip() for output in outputs]) + "\n")
