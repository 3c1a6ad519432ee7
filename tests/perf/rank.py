"""One rank of test_memory.py: a model of given proportions trained for a few steps, and what that allocates and sends.

The one argument is JSON: rank, world_size, rendezvous, `model` (sizes), `samples` (tokens, images, loss_tokens), and
`runs`: stage and training settings by name. Rank 0 prints a JSON line for each: parameters, bytes at rest, at most, and
by collective for one and for two packs.
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

SENT: Counter[str] = Counter()


def count(name: str, argument: str, place: int) -> None:
    """Count the bytes that a collective works on. Before DeepSpeed is imported, which remembers functions."""
    plain = getattr(dist, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        tensor = kwargs[argument] if argument in kwargs else args[place]
        SENT[name] += tensor.numel() * tensor.element_size()
        return plain(*args, **kwargs)

    setattr(dist, name, counted)


for collective in (("all_reduce", "tensor", 0), ("all_gather_into_tensor", "output_tensor", 0)):
    count(*collective)
count("reduce_scatter_tensor", "input", 1)

from torch.profiler import ProfilerActivity, profile  # noqa: E402
from transformers import CLIPVisionConfig, GemmaConfig, LlavaConfig, LlavaForConditionalGeneration  # noqa: E402

from raylava.config.recipe import Training  # noqa: E402
from raylava.estimate.synthetic import noise  # noqa: E402
from raylava.models.attention import VARLEN, register  # noqa: E402
from raylava.perf.shapes import shape_of  # noqa: E402
from raylava.train.engine import DTYPES, Engine  # noqa: E402


def main(given: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    register()
    os.environ["LOCAL_RANK"] = str(given["rank"])
    rendezvous = f"file://{given['rendezvous']}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=given["rank"], world_size=given["world_size"])
    for name, run in given["runs"].items():
        line = {"run": name, **weighed(given, run)}
        if given["rank"] == 0:
            sys.stdout.write(json.dumps(line) + "\n")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def weighed(given: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    training = Training.model_validate(run["training"])
    llava = model(given["model"], DTYPES[training.precision])
    shape, before = shape_of(llava.config), live_nodes()
    before -= sum(weight.numel() * weight.element_size() for weight in llava.parameters())
    engine = Engine(llava, run["stage"], training, 10, torch.device("cpu"))
    packs = [noise(given["samples"], shape, llava.config.image_token_index) for _ in range(2)]
    loss_tokens = 2 * given["world_size"] * len(packs[0].labels)
    engine.step(0, packs, loss_tokens)
    gc.collect()
    rest = live_nodes() - before
    peak = most(lambda: engine.step(1, packs, loss_tokens))
    sent = []
    for number in (1, 2):
        SENT.clear()
        engine.step(1 + number, packs[:number], loss_tokens)
        sent.append(dict(SENT))
    inputs = sum(tensor.numel() * tensor.element_size() for pack in packs for tensor in vars(pack).values())
    return {"rest": rest - inputs, "peak": rest - inputs + peak, "sent": sent}


def model(sizes: dict[str, Any], dtype: torch.dtype) -> LlavaForConditionalGeneration:
    text, vision = GemmaConfig(**sizes["language"]), CLIPVisionConfig(**sizes["vision"])
    patches = (vision.image_size // vision.patch_size) ** 2
    token = text.vocab_size - 1
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=token, image_seq_length=patches)
    config.text_config._attn_implementation = VARLEN
    torch.set_default_dtype(dtype)
    llava = LlavaForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    return llava


def live_nodes() -> int:
    """Bytes of all tensors that Python knows, each storage once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and not thing.is_meta:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def most(run: Callable[[], Any]) -> int:
    """The most bytes that torch's allocator held at once, over what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [one for one in profiled.profiler.kineto_results.events() if one.name() == "[memory]"]
    held = peak = 0
    for one in sorted(events, key=lambda one: one.start_ns()):
        held += one.nbytes()
        peak = max(peak, held)
    return peak


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
