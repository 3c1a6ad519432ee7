"""Throughput of corpus preparation: raylava beside a bare loop, a torch DataLoader and datasets.map, in one run.

    python jobs/bench/prepare.py [--images N] [--cluster]
    python jobs/bench/prepare.py --scale [--rows N …]      how resolving and staging grow, see scale.py

All process the same JPEGs (640×480, generated here): decode, pad to a square, resize to the input of CLIP-L/336, and
tokenize the caption. raylava and the bare loop also encode the stored image; the DataLoader and datasets.map use the
Hugging Face image processor. With --cluster, raylava joins the Ray cluster of RAY_ADDRESS.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import scale
from PIL import Image
from rich.console import Console
from rich.table import Table

from raylava.cluster.session import ray_session
from raylava.config.recipe import Corpus, ImageEncoding, Language, Resources, Source, Vision
from raylava.corpus.conversation import ChatTokenizer, Turn
from raylava.corpus.images import decode_block_image, decode_image, normalize_pixels, prepare_image, resize_exact
from raylava.corpus.prepare import prepare
from raylava.corpus.shards import PrepareSpec
from raylava.models.families import clip, gemma
from raylava.models.registry import PixelRule, load_tokenizer, resolve_language, vision_spec
from raylava.progress import NullProgressBar
from raylava.toy.language import train_tokenizer

WORKERS = 2
UNIQUE_IMAGES = 500  # rows cycle through them
VOCABULARY = 640
RULE = PixelRule(336, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
CLIP = "openai/clip-vit-large-patch14-336"
VISION = vision_spec(Vision(name=CLIP), clip.FAMILY, clip.FAMILY.published[CLIP].config, RULE)
CONVERSATION = (
    "Describe the picture briefly.",
    "left red circle, right blue square, and other things besides, as captions go.",
)


@dataclass(frozen=True)
class Result:
    """Measurements of one method: images/s overall and in steady state, stored bytes per image, peak memory in MB.

    `cpu_ms` are the CPU milliseconds per image in steady state by kind of process; empty where none is measured.
    """

    name: str
    overall: float
    steady: float
    bytes_per_image: float
    peak_mb: float
    cpu_ms: dict[str, float]


def make_corpus(folder: Path, images: int) -> None:
    """Write JPEGs with the spectrum of photographs, and LLaVA JSON that refers to them."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(min(UNIQUE_IMAGES, images)):
        _draw_photo(rng).save(folder / "images" / f"{number}.jpg", quality=90)
    turns = [
        {"from": "human", "value": f"<image>\n{CONVERSATION[0]}"},
        {"from": "gpt", "value": CONVERSATION[1]},
    ]
    rows = [{"id": str(n), "image": f"{n % UNIQUE_IMAGES}.jpg", "conversations": turns} for n in range(images)]
    (folder / "rows.json").write_text(json.dumps(rows))
    train_tokenizer(VOCABULARY, seed=0).save_pretrained(folder / "tokenizer")
    (folder / "tokenizer" / "config.json").write_text(json.dumps({"model_type": gemma.FAMILY.name}))


def _draw_photo(rng: np.random.Generator, width: int = 640, height: int = 480) -> Image.Image:
    """Return noise whose amplitude falls over octaves as in photographs (1/f)."""
    total = np.zeros((height, width, 3))
    for octave in (4, 8, 16, 32, 64, 128, 256, 640):
        noise = rng.integers(0, 256, (height * octave // 640 + 2, width * octave // 640 + 2, 3), dtype=np.uint8)
        layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(layer, dtype=float) / octave**0.7
    low, high = total.min(), total.max()
    return Image.fromarray(((total - low) / (high - low) * 255).astype(np.uint8))


def prepare_spec(folder: Path, samples_per_block: int = 1024) -> PrepareSpec:
    """Return raylava's preparation of the corpus, with the default image encoding."""
    corpus = Corpus(sources=(Source(annotations="rows.json", images="images"),), samples_per_block=samples_per_block)
    source_paths = ((str(folder / "rows.json"), str(folder / "images")),)
    language = resolve_language(Language(name=str(folder / "tokenizer")))
    return PrepareSpec("bench", corpus, source_paths, language, VISION, str(folder / "blocks"))


class ThroughputRecorder(NullProgressBar):
    """A progress bar that records when images were done; the steady rate excludes the first and last tenth."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._updates: list[tuple[float, float]] = []  # (time, images done)

    def update(self, done: float, total: float, **metrics: float) -> None:
        """Record the number of images done; raylava's progress bars have this interface."""
        self._updates.append((time.monotonic(), done))

    def overall(self) -> float:
        """Return the images/s of the whole run."""
        return self._updates[-1][1] / (self._updates[-1][0] - self._start)

    def steady(self) -> float:
        """Return the images/s between the first and the last tenth of the images."""
        (first_time, first_done), (last_time, last_done) = self.steady_span()
        return (last_done - first_done) / (last_time - first_time)

    def steady_span(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return the (time, images done) at the first and at the last tenth."""
        total = self._updates[-1][1]
        middle = [update for update in self._updates if 0.1 * total <= update[1] <= 0.9 * total]
        if len(middle) < 2:
            raise ValueError(f"{total:.0f} images are too few to measure a steady rate; raise --images")
        return middle[0], middle[-1]


Method = Callable[[Path, int, ThroughputRecorder], float]  # (folder, images, recorder) → stored bytes per image


def raylava_prepare(folder: Path, images: int, recorder: ThroughputRecorder) -> float:
    with ray_session(Resources(workers=WORKERS)):
        manifest = prepare(prepare_spec(folder), "bench", recorder)
    assert manifest.rows == images
    return sum(block.bytes for block in manifest.blocks) / images


def bare_loop(folder: Path, images: int, recorder: ThroughputRecorder) -> float:
    """Run one process per core without any framework: the ceiling."""
    names = [f"{number % UNIQUE_IMAGES}.jpg" for number in range(images)]
    total = 0
    with multiprocessing.get_context("spawn").Pool(WORKERS, _init_bare_worker, (str(folder),)) as pool:
        for done, size in enumerate(pool.imap_unordered(_prepare_bare, names, chunksize=64), 1):
            total += size
            if done % 64 == 0 or done == images:
                recorder.update(done, images)
    return total / images


_BARE_WORKER: dict[str, Any] = {}


def _init_bare_worker(folder: str) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _BARE_WORKER["folder"] = Path(folder)
    _BARE_WORKER["tokenizer"] = ChatTokenizer(load_tokenizer(Language(name=f"{folder}/tokenizer")), gemma.TEMPLATE)


def _prepare_bare(name: str) -> int:
    content = (_BARE_WORKER["folder"] / "images" / name).read_bytes()
    stored = prepare_image(content, RULE, "pad", ImageEncoding(), 10**8)
    turns = [Turn("human", f"<image>\n{CONVERSATION[0]}"), Turn("gpt", CONVERSATION[1])]
    _BARE_WORKER["tokenizer"].encode(turns, image_count=1)
    return len(stored)


class _HuggingFaceRows:
    """Rows as LLaVA's data loading computes them: Pillow, the Hugging Face image processor, the tokenizer."""

    def __init__(self, folder: Path, images: int) -> None:
        from transformers import LlavaImageProcessorPil

        self._folder, self._images = folder, images
        size = {"height": RULE.size, "width": RULE.size}
        self._processor = LlavaImageProcessorPil(
            do_pad=True, size=size, do_center_crop=False, image_mean=list(RULE.mean), image_std=list(RULE.std)
        )
        self._tokenizer = load_tokenizer(Language(name=str(folder / "tokenizer")))

    def __len__(self) -> int:
        return self._images

    def __getitem__(self, number: int) -> dict[str, Any]:
        image = Image.open(self._folder / "images" / f"{number % UNIQUE_IMAGES}.jpg").convert("RGB")
        pixels = self._processor(images=image, return_tensors="pt")["pixel_values"][0]
        question, answer = CONVERSATION
        text = f"<start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n{answer}<end_of_turn>\n"
        return {"pixel_values": pixels, "input_ids": self._tokenizer(text, return_tensors="pt")["input_ids"][0]}


def data_loader(folder: Path, images: int, recorder: ThroughputRecorder) -> float:
    from torch.utils.data import DataLoader

    loader = DataLoader(_HuggingFaceRows(folder, images), batch_size=32, num_workers=WORKERS)  # type: ignore[arg-type]
    done = 0
    for batch in loader:
        done += len(batch["pixel_values"])
        recorder.update(done, images)
    return 3 * RULE.size**2 * 4.0


def datasets_map(folder: Path, images: int, recorder: ThroughputRecorder) -> float:
    import datasets

    datasets.disable_progress_bars()
    rows = _HuggingFaceRows(folder, images)
    table = datasets.Dataset.from_dict({"number": list(range(images))})

    def prepare_row(row: dict[str, Any]) -> dict[str, Any]:
        tensors = rows[row["number"]]
        return {"pixel_values": tensors["pixel_values"].numpy(), "input_ids": tensors["input_ids"].numpy()}

    table.map(prepare_row, num_proc=WORKERS, writer_batch_size=64, cache_file_name=str(folder / "map.arrow"))
    recorder.update(images, images)
    return 3 * RULE.size**2 * 4.0


def measure(name: str, method: Method, folder: Path, images: int) -> Result:
    """Run one method in a separate process and measure the memory of its whole process tree."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe()
    process = context.Process(target=_run_method, args=(method, folder, images, sender))
    watcher, stop = ProcessWatcher(), threading.Event()
    process.start()
    sender.close()  # only the child's end remains open, so that `recv` ends with the child
    thread = threading.Thread(target=watcher.watch, args=(process.pid, stop))
    thread.start()
    try:
        overall, steady, size, span = receiver.recv()
    except EOFError:
        raise SystemExit(f"{name} failed; its error is printed above") from None
    finally:
        stop.set()
        thread.join()
        process.join()
    cpu = watcher.cpu_ms(*span) if span else {}
    return Result(name, overall, steady, size, watcher.peak_bytes / 2**20, cpu)


def _run_method(method: Method, folder: Path, images: int, sender: Any) -> None:
    recorder = ThroughputRecorder()
    size = method(folder, images, recorder)
    if method is datasets_map:  # reports no progress
        sender.send((recorder.overall(), recorder.overall(), size, None))
    else:
        sender.send((recorder.overall(), recorder.steady(), size, recorder.steady_span()))


class ProcessWatcher:
    """Samples a process tree: the largest sum of unshared memory in bytes, and the CPU seconds of each process."""

    def __init__(self) -> None:
        self.peak_bytes = 0.0
        self._kinds: dict[int, str] = {}
        self._samples: list[tuple[float, dict[int, float]]] = []  # time, and CPU seconds by process id

    def watch(self, pid: int | None, stop: threading.Event) -> None:
        """Sample twice a second until `stop` is set."""
        while not stop.wait(0.5):
            processes = list(_process_tree(pid))
            self.peak_bytes = max(self.peak_bytes, sum(_unshared_bytes(process) for process in processes))
            seconds: dict[int, float] = {}
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    seconds[process.pid] = times.user + times.system
                    self._kinds[process.pid] = _kind(process, pid)
            self._samples.append((time.monotonic(), seconds))

    def cpu_ms(self, first: tuple[float, float], last: tuple[float, float]) -> dict[str, float]:
        """Return the CPU milliseconds per image between two (time, images done), by kind of process, the most first."""
        (start, done), (stop, total) = first, last
        inside = [sample for sample in self._samples if start <= sample[0] <= stop]
        if len(inside) < 2:
            return {}
        (begin, before), (end, after) = inside[0], inside[-1]
        images = (total - done) * (end - begin) / (stop - start)
        totals: Counter[str] = Counter()
        for process, seconds in after.items():
            totals[self._kinds[process]] += int(1e6 * (seconds - before.get(process, 0.0)) / images)  # ns
        return {kind: nanoseconds / 1000 for kind, nanoseconds in totals.most_common()}


def _kind(process: psutil.Process, driver: int | None) -> str:
    """Return what a process is: the driver, a worker, or one of Ray's own by its name."""
    command = " ".join(process.cmdline())
    if process.pid == driver:
        return "driver"
    if "ray::" in command or "spawn_main" in command:
        return "idle worker of Ray" if "ray::IDLE" in command else "worker"
    for name in (
        "gcs_server",
        "raylet",
        "dashboard_agent",
        "runtime_env/agent",
        "dashboard",
        "monitor.py",
        "log_monitor",
    ):
        if name in command:
            return f"Ray: {name}"
    return "other"


def _process_tree(pid: int | None) -> Iterator[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        yield parent
        yield from parent.children(recursive=True)
    except psutil.NoSuchProcess:
        return


def _unshared_bytes(process: psutil.Process) -> float:
    try:
        return process.memory_info().rss - process.memory_info().shared
    except psutil.NoSuchProcess:
        return 0.0


def fidelity(folder: Path) -> dict[str, float]:
    """Compare stored pixels with those of the published processor, and their features in a random CLIP-L/14."""
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
    """Measure all methods and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument(
        "--cluster", action="store_true", help="only the bare loop, and raylava on the cluster of RAY_ADDRESS"
    )
    parser.add_argument("--scale", action="store_true", help="requests and seconds of resolving and staging by rows")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="with --scale")
    arguments = parser.parse_args()
    if arguments.scale:
        with tempfile.TemporaryDirectory() as name:
            make_corpus(Path(name), 1)
            scale.run(prepare_spec(Path(name)), arguments.rows)
        return
    methods: dict[str, Method] = {"bare loop (ceiling)": bare_loop, "raylava": raylava_prepare}
    if not arguments.cluster:
        methods |= {"DataLoader + HF processor": data_loader, "datasets.map + HF processor": datasets_map}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_corpus(folder, arguments.images)
        results = [measure(title, method, folder, arguments.images) for title, method in methods.items()]
        _print_results(results, fidelity(folder), arguments.images)


def _cpu_table(results: list[Result]) -> Table:
    """Return the CPU milliseconds per image of each kind of process, of the bare loop and of raylava."""
    table = Table(title="CPU time per image in steady state, ms", title_justify="left")
    table.add_column("process")
    for result in results[:2]:
        table.add_column(result.name, justify="right")
    for kind in dict.fromkeys(kind for result in results[:2] for kind in result.cpu_ms):
        table.add_row(kind, *(f"{result.cpu_ms.get(kind, 0.0):.3f}" for result in results[:2]))
    table.add_section()
    table.add_row("all", *(f"{sum(result.cpu_ms.values()):.3f}" for result in results[:2]))
    table.add_row("available", *(f"{1000 * WORKERS / result.steady:.3f}" for result in results[:2]))
    return table


def _print_results(results: list[Result], fidelity: dict[str, float], images: int) -> None:
    ceiling = results[0]
    table = Table(title=f"{images} JPEGs of 640×480, {WORKERS} workers", title_justify="left")
    for heading in ("method", "images/s", "of ceiling", "steady images/s", "of ceiling", "bytes/image", "peak MB"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for result in results:
        table.add_row(
            result.name,
            f"{result.overall:.0f}",
            f"{result.overall / ceiling.overall:.2f}",
            f"{result.steady:.0f}",
            f"{result.steady / ceiling.steady:.2f}",
            f"{result.bytes_per_image:,.0f}",
            f"{result.peak_mb:.0f}",
        )
    console = Console(file=sys.stdout, width=120)
    console.print(table)
    console.print(_cpu_table(results))
    for name, value in fidelity.items():
        console.print(f"default storage, {name}: {value:.4f}")


if __name__ == "__main__":
    main()
