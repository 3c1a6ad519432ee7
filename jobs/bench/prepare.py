"""How fast corpora are prepared: raylava beside the bare loop, a torch DataLoader and datasets.map, in one run.

    python jobs/bench/prepare.py [--images N] [--cluster]

Each does the same work on the same JPEGs (640×480, made here): decode, pad to square, resize to CLIP-L/336's input,
tokenize the caption. raylava and the bare loop also encode what they store. The usual ways use the Hugging Face image
processor. With --cluster, raylava joins the Ray cluster that RAY_ADDRESS names.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image
from rich.console import Console
from rich.table import Table

from raylava.cluster.session import ray_session
from raylava.config.recipe import Corpus, ImageEncoding, Language, Resources, Source
from raylava.corpus.conversation import ChatTokenizer, Turn
from raylava.corpus.images import decode_image, decode_block_image, normalize_pixels, prepare_image, resize_exact
from raylava.corpus.prepare import PrepareSpec, prepare
from raylava.models.registry import PixelRule, VisionSpec, load_tokenizer
from raylava.models.templates import GEMMA
from raylava.toy.language import train_tokenizer

WORKERS = 2
UNIQUE = 500  # different images; rows cycle through them
RULE = PixelRule(336, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
VISION = VisionSpec("clip-l-336", "clip", RULE, patch_size=14, width=1024)
TALK = [
    "Describe the picture briefly.",
    "left red circle, right blue square, and other things besides, as captions go.",
]


@dataclass(frozen=True)
class Result:
    """One way's figures: images a second in all and in steady state, bytes kept a image, peak memory in MB."""

    name: str
    overall: float
    steady: float
    bytes_per_image: float
    peak_mb: float


def make_corpus(folder: Path, images: int) -> None:
    """JPEGs with the spectrum of photographs, and LLaVA JSON over them."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(min(UNIQUE, images)):
        _photo(rng).save(folder / "images" / f"{number}.jpg", quality=90)
    turns = [{"from": "human", "value": f"<image>\n{TALK[0]}"}, {"from": "gpt", "value": TALK[1]}]
    rows = [{"id": str(n), "image": f"{n % UNIQUE}.jpg", "conversations": turns} for n in range(images)]
    (folder / "rows.json").write_text(json.dumps(rows))
    train_tokenizer(640, seed=0).save_pretrained(folder / "tokenizer")


def _photo(rng: np.random.Generator, width: int = 640, height: int = 480) -> Image.Image:
    """Noise of falling amplitude over octaves, as in photographs (1/f)."""
    total = np.zeros((height, width, 3))
    for octave in (4, 8, 16, 32, 64, 128, 256, 640):
        noise = rng.integers(0, 256, (height * octave // 640 + 2, width * octave // 640 + 2, 3), dtype=np.uint8)
        layer = Image.fromarray(synthetic_pack).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(layer, dtype=float) / octave**0.7
    low, high = total.min(), total.max()
    return Image.fromarray(((total - low) / (high - low) * 255).astype(np.uint8))


def job_for(folder: Path) -> PrepareSpec:
    """raylava's own job over the corpus, with the default storage."""
    corpus = Corpus(sources=(Source(annotations="rows.json", images="images"),), samples_per_block=256)
    places = ((str(folder / "rows.json"), str(folder / "images")),)
    language = Language(name=str(folder / "tokenizer"))
    return PrepareSpec("bench", corpus, places, language, GEMMA, VISION, str(folder / "blocks"))


class SearchBudget:
    """When how many images were done; the steady rate leaves out the first and last tenth."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._marks: list[tuple[float, float]] = []

    def update(self, done: float, total: float, **figures: float) -> None:
        """A raylava bar."""
        self._marks.append((time.monotonic(), done))

    def overall(self) -> float:
        return self._marks[-1][1] / (self._marks[-1][0] - self._started)

    def steady(self) -> float:
        total = self._marks[-1][1]
        kept = [mark for mark in self._marks if 0.1 * total <= mark[1] <= 0.9 * total]
        (t0, n0), (t1, n1) = kept[0], kept[-1]
        return (n1 - n0) / (t1 - t0)


def raylava_way(folder: Path, images: int, clock: SearchBudget) -> float:
    with ray_session(Resources(workers=WORKERS)):
        manifest = prepare(job_for(folder), "bench", clock)
    assert manifest.rows == images
    return sum(block.bytes for block in manifest.blocks) / images


def bare_loop(folder: Path, images: int, clock: SearchBudget) -> float:
    """One process a core, no framework: the ceiling."""
    names = [f"{number % UNIQUE}.jpg" for number in range(images)]
    total = 0
    with multiprocessing.get_context("spawn").Pool(WORKERS, _bare_setup, (str(folder),)) as pool:
        for done, size in enumerate(pool.imap_unordered(_bare_one, names, chunksize=64), 1):
            total += size
            if done % 64 == 0 or done == images:
                clock.update(done, images)
    return total / images


_BARE: dict[str, Any] = {}


def _bare_setup(folder: str) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _BARE["folder"] = Path(folder)
    _BARE["encoder"] = ChatTokenizer(load_tokenizer(Language(name=f"{folder}/tokenizer")), GEMMA)


def _bare_one(name: str) -> int:
    content = (_BARE["folder"] / "images" / name).read_bytes()
    stored = prepare_image(content, RULE, "pad", ImageEncoding(), 10**8)
    _BARE["encoder"].encode([Turn("human", f"<image>\n{TALK[0]}"), Turn("gpt", TALK[1])], image_count=1)
    return len(stored)


class _Usual:
    """What LLaVA's data loading does for one row: pillow, the Hugging Face processor, the tokenizer."""

    def __init__(self, folder: Path, images: int) -> None:
        from transformers import LlavaImageProcessorPil

        self._folder, self._images = folder, images
        whole = {"height": RULE.size, "width": RULE.size}
        self._processor = LlavaImageProcessorPil(
            do_pad=True, size=whole, do_center_crop=False, image_mean=list(RULE.mean), image_std=list(RULE.std)
        )
        self._tokenizer = load_tokenizer(Language(name=str(folder / "tokenizer")))

    def __len__(self) -> int:
        return self._images

    def __getitem__(self, number: int) -> dict[str, Any]:
        image = Image.open(self._folder / "images" / f"{number % UNIQUE}.jpg").convert("RGB")
        pixels = self._processor(images=image, return_tensors="pt")["pixel_values"][0]
        text = f"<start_of_turn>user\n{TALK[0]}<end_of_turn>\n<start_of_turn>model\n{TALK[1]}<end_of_turn>\n"
        return {"pixel_values": pixels, "input_ids": self._tokenizer(text, return_tensors="pt")["input_ids"][0]}


def data_loader(folder: Path, images: int, clock: SearchBudget) -> float:
    from torch.utils.data import DataLoader

    loader = DataLoader(_Usual(folder, images), batch_size=32, num_workers=WORKERS)  # type: ignore[arg-type]
    done = 0
    for batch in loader:
        done += len(batch["pixel_values"])
        clock.update(done, images)
    return 3 * RULE.size**2 * 4.0


def datasets_map(folder: Path, images: int, clock: SearchBudget) -> float:
    import datasets

    datasets.disable_progress_bars()
    usual = _Usual(folder, images)
    table = datasets.Dataset.from_dict({"number": list(range(images))})

    def one(row: dict[str, Any]) -> dict[str, Any]:
        made = usual[row["number"]]
        return {"pixel_values": made["pixel_values"].numpy(), "input_ids": made["input_ids"].numpy()}

    table.map(one, num_proc=WORKERS, writer_batch_size=64, cache_file_name=str(folder / "map.arrow"))
    clock.update(images, images)
    return 3 * RULE.size**2 * 4.0


def measure(name: str, way: Callable[[Path, int, SearchBudget], float], folder: Path, images: int) -> Result:
    """Run one way in a process of its own, watching the memory of all it starts."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measured, args=(way, folder, images, theirs))
    peak, stopping = [0.0], threading.Event()
    process.start()
    watcher = threading.Thread(target=_watch, args=(process.pid, peak, stopping))
    watcher.start()
    overall, steady, size = ours.recv()
    stopping.set()
    watcher.join()
    process.join()
    return Result(name, overall, steady, size, peak[0] / 2**20)


def _measured(way: Callable[[Path, int, SearchBudget], float], folder: Path, images: int, pipe: Any) -> None:
    clock = SearchBudget()
    size = way(folder, images, clock)
    steady = clock.steady() if way is not datasets_map else clock.overall()
    pipe.send((clock.overall(), steady, size))


def _watch(pid: int | None, peak: list[float], stopping: threading.Event) -> None:
    """The largest sum of memory not shared with others over the process and all below it, in bytes."""
    while not stopping.wait(0.5):
        peak[0] = max(peak[0], sum(_unshared(process) for process in _family(pid)))


def _family(pid: int | None) -> Iterator[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        yield parent
        yield from parent.children(recursive=True)
    except psutil.NoSuchProcess:
        return


def _unshared(process: psutil.Process) -> float:
    try:
        return process.memory_info().rss - process.memory_info().shared
    except psutil.NoSuchProcess:
        return 0.0


def fidelity(folder: Path) -> dict[str, float]:
    """How far the stored pixels are from the published processor's, and what a random CLIP-L/14 tower makes of it."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    contents = [(folder / "images" / f"{number}.jpg").read_bytes() for number in range(8)]
    stored = np.stack([decode_block_image(prepare_image(c, RULE, "pad", ImageEncoding(), 10**8)) for c in contents])
    exact = np.stack([resize_exact(decode_image(c, 10**8), RULE, "pad") for c in contents])
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    tower = CLIPVisionModel(config).eval()
    with torch.inference_mode():
        features = [
            tower(torch.from_numpy(normalize_pixels(pixels, RULE)), output_hidden_states=True).hidden_states[-2]
            for pixels in (stored, exact)
        ]
    change = (features[0] - features[1]).norm(dim=-1) / features[1].norm(dim=-1)
    return {
        "mean absolute difference (of 255)": float(np.abs(stored.astype(int) - exact.astype(int)).mean()),
        "mean relative change of a patch's features": float(change.mean()),
    }


def main() -> None:
    """Measure all ways and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--cluster", action="store_true", help="only raylava, on the cluster that RAY_ADDRESS names")
    arguments = parser.parse_args()
    ways = {"bare loop (ceiling)": bare_loop, "raylava": raylava_way}
    if not arguments.cluster:
        ways |= {"DataLoader + HF processor": data_loader, "datasets.map + HF processor": datasets_map}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_corpus(folder, arguments.images)
        results = [measure(title, way, folder, arguments.images) for title, way in ways.items()]
        _print(results, fidelity(folder), arguments.images)


def _print(results: list[Result], fidelity: dict[str, float], images: int) -> None:
    ceiling = results[0]
    table = Table(title=f"{images} JPEGs of 640×480, {WORKERS} workers", title_justify="left")
    for heading in ("way", "images/s", "of ceiling", "steady images/s", "of ceiling", "bytes/image", "peak MB"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for one in results:
        table.add_row(
            one.name,
            f"{one.overall:.0f}",
            f"{one.overall / ceiling.overall:.2f}",
            f"{one.steady:.0f}",
            f"{one.steady / ceiling.steady:.2f}",
            f"{one.bytes_per_image:,.0f}",
            f"{one.peak_mb:.0f}",
        )
    console = Console(file=sys.stdout, width=120)
    console.print(table)
    for name, value in fidelity.items():
        console.print(f"default storage, {name}: {value:.4f}")


if __name__ == "__main__":
    main()
