"""One rank of tests/ray/perf/test_memory.py: trains a small model and measures what that allocates and sends.

The only argument is JSON: rank, world_size, rendezvous, `model` (sizes), `samples` (tokens, images, loss tokens), and
`runs`, which maps names to stage and training settings. Rank 0 prints one JSON line per run: bytes at rest, peak bytes,
and bytes by collective for a step of one and of two packs.
"""

import gc
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVE_BYTES: Counter[str] = Counter()


def count_bytes(collective: str, argument: str, position: int) -> None:
    """Count the bytes that a collective operates on. Must run before DeepSpeed is imported, which binds functions."""
    original = getattr(dist, collective)

    def counting(*args: Any, **kwargs: Any) -> Any:
        tensor = kwargs[argument] if argument in kwargs else args[position]
        COLLECTIVE_BYTES[collective] += tensor.numel() * tensor.element_size()
        return original(*args, **kwargs)

    setattr(dist, collective, counting)


count_bytes("all_reduce", "tensor", 0)
count_bytes("all_gather_into_tensor", "output_tensor", 0)
count_bytes("reduce_scatter_tensor", "input", 1)

from torch.profiler import ProfilerActivity, profile  # noqa: E402
from transformers import CLIPVisionConfig, GemmaConfig, LlavaConfig, LlavaForConditionalGeneration  # noqa: E402

from raylava.config.recipe import Training  # noqa: E402
from raylava.estimate.synthetic import synthetic_pack  # noqa: E402
from raylava.models.families import clip, gemma  # noqa: E402
from raylava.models.llava import DTYPES, set_attn_implementation  # noqa: E402
from raylava.perf.shapes import LlavaShape  # noqa: E402
from raylava.train.engine import Engine  # noqa: E402


def main(spec: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(spec["rank"])
    rendezvous = f"file://{spec['rendezvous']}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=spec["rank"], world_size=spec["world_size"])
    for name, run in spec["runs"].items():
        measurement = {"run": name, **measure(spec, run)}
        if spec["rank"] == 0:
            sys.stdout.write(json.dumps(measurement) + "\n")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def measure(spec: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """Return the bytes at rest, the peak bytes of a step of two packs, and the bytes of collectives."""
    training = Training.model_validate(run["training"])
    llava = build_model(spec["model"], DTYPES[training.precision])
    set_attn_implementation(llava, training.attn_implementation)
    shape, before = llava_shape(spec["model"]), live_bytes()
    before -= sum(weight.numel() * weight.element_size() for weight in llava.parameters())
    engine = Engine(llava, run["stage"], training, 10, torch.device("cpu"))
    packs = [synthetic_pack(spec["samples"], shape, llava.config.image_token_index) for _ in range(2)]
    engine.step(0, packs)
    gc.collect()
    at_rest = live_bytes() - before
    peak = min(peak_bytes(lambda: engine.step(1, packs)) for _ in range(2))  # garbage of earlier runs may be freed late
    collective_bytes = []
    for pack_count in (1, 2):
        COLLECTIVE_BYTES.clear()
        engine.step(1 + pack_count, packs[:pack_count])
        collective_bytes.append(dict(COLLECTIVE_BYTES))
    inputs = sum(tensor.numel() * tensor.element_size() for pack in packs for tensor in vars(pack).values())
    return {"at_rest": at_rest - inputs, "peak": at_rest - inputs + peak, "collective_bytes": collective_bytes}


def llava_shape(sizes: dict[str, Any]) -> LlavaShape:
    vision = clip.FAMILY.complete(sizes["vision"])
    return LlavaShape(gemma.FAMILY.shape(sizes["language"]), clip.FAMILY.shape(vision, vision["image_size"]))


def build_model(sizes: dict[str, Any], dtype: torch.dtype) -> LlavaForConditionalGeneration:
    text, vision = GemmaConfig(**sizes["language"]), CLIPVisionConfig(**sizes["vision"])
    patches = (vision.image_size // vision.patch_size) ** 2
    token = text.vocab_size - 1
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=token, image_seq_length=patches)
    torch.set_default_dtype(dtype)
    llava = LlavaForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    return llava


def live_bytes() -> int:
    """Return the bytes of all tensors that Python references, counting each storage once."""
    gc.collect()
    bytes_by_storage = {}
    for candidate in gc.get_objects():
        if isinstance(candidate, torch.Tensor) and not candidate.is_meta:
            storage = candidate.untyped_storage()
            bytes_by_storage[storage.data_ptr()] = storage.nbytes()
    return sum(bytes_by_storage.values())


def peak_bytes(run: Callable[[], Any]) -> int:
    """Return the peak of the bytes that torch's allocator holds during `run` in addition to those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
