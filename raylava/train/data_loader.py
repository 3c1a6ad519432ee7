"""Load the plan's packs as tensors ahead of the training step: read, decode and collate in background threads.

batch_plan.py decides which samples form a pack; engine.py consumes the tensors. Independent of Ray and DeepSpeed.

    BatchPlan ─Step─▶ pack_batch ─packs of this rank─▶ Blocks ─samples─▶ PackCollator ─HostPack─▶ StepBatch
"""

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from raylava.corpus.blocks import Blocks, Sample
from raylava.corpus.images import Pixels, blank_pixels, decode_block_image
from raylava.models.packs import HostPack, LoadedPack
from raylava.models.registry import VisionSpec
from raylava.train.batch_plan import BatchPlan, Pack, Step, pack_batch

_PREFETCH_STEPS = 32  # steps whose blocks are fetched ahead
_FETCH_THREADS = 4


@dataclass(frozen=True)
class StepBatch:
    """The packs that one rank computes in a step. `loss_tokens` and `tokens` count over all ranks."""

    step: Step
    packs: list[LoadedPack]
    loss_tokens: int
    tokens: int


class PackedDataLoader:
    """Iterates over one rank's step batches from `first_step` on, up to `prefetch` steps ahead of the consumer.

    `threads` threads decode and collate packs, and call `prepare` on each.
    """

    def __init__(
        self,
        blocks: Blocks,
        plan: BatchPlan,
        collator: "PackCollator",
        rank: int,
        world_size: int,
        max_tokens_per_pack: int,
        first_step: int = 0,
        prefetch: int = 2,
        prepare: Callable[[HostPack], LoadedPack] = lambda pack: pack,
        threads: int = 1,
    ) -> None:
        self._blocks, self._plan, self._collator = blocks, plan, collator
        self._rank, self._world_size, self._max_tokens_per_pack = rank, world_size, max_tokens_per_pack
        self._first_step, self._prefetch, self._prepare, self._threads = first_step, prefetch, prepare, threads

    def __iter__(self) -> Iterator[StepBatch]:
        batches: queue.Queue[StepBatch | BaseException | None] = queue.Queue(self._prefetch)
        stop = threading.Event()
        thread = threading.Thread(target=self._produce, args=(batches, stop), name="data-loader", daemon=True)
        thread.start()
        try:
            while (batch := batches.get()) is not None:
                if isinstance(batch, BaseException):
                    raise batch
                yield batch
        finally:
            stop.set()
            while thread.is_alive():  # the producer may be blocked on a full queue
                _drain(batches)
                thread.join(timeout=0.05)

    def _produce(self, batches: "queue.Queue[StepBatch | BaseException | None]", stop: threading.Event) -> None:
        try:
            for batch in self._loaded_batches():
                batches.put(batch)
                if stop.is_set():
                    return
            batches.put(None)
        except BaseException as error:  # passed to the consumer, which raises it
            batches.put(error)

    def _loaded_batches(self) -> Iterator[StepBatch]:
        """Yield the batches in order, while the threads load those of the next steps."""
        with ThreadPoolExecutor(max_workers=self._threads, thread_name_prefix="decode") as pool:
            pending: deque[Future[StepBatch]] = deque()
            try:
                for step in itertools.chain(self._prefetched_steps(), [None]):
                    if step is not None:
                        pending.append(pool.submit(self.load, step))
                    while pending and (step is None or len(pending) >= self._threads):
                        yield pending.popleft().result()
            finally:
                for load in pending:
                    load.cancel()

    def _prefetched_steps(self) -> Iterator[Step]:
        """Yield the plan's steps once their blocks are on this node, while those of the next steps are fetched."""
        with ThreadPoolExecutor(max_workers=_FETCH_THREADS, thread_name_prefix="fetch") as pool:
            pending: deque[tuple[Step, Future[None]]] = deque()
            steps = self._plan.from_step(self._first_step)
            try:
                for step in itertools.chain(steps, [None]):
                    if step is not None:
                        pending.append((step, pool.submit(self._blocks.fetch, step.samples)))
                    while pending and (step is None or len(pending) > _PREFETCH_STEPS):
                        next_step, fetch = pending.popleft()
                        fetch.result()
                        yield next_step
            finally:
                for _, fetch in pending:
                    fetch.cancel()

    def packing(self) -> str:
        """Describe the packs of the next step: their size, how full they are, and how evenly ranks are loaded."""
        lengths = self._blocks.lengths.length
        step = next(self._plan.from_step(self._first_step))
        ranks = pack_batch(step.samples, lengths, self._world_size, self._max_tokens_per_pack)
        tokens = [sum(int(lengths[list(pack)].sum()) for pack in packs) for packs in ranks]
        capacity = self._max_tokens_per_pack * sum(len(packs) for packs in ranks)
        share = max(tokens) * len(tokens) / sum(tokens) - 1
        return (
            f"{len(ranks[0])} packs of up to {self._max_tokens_per_pack} tokens a step and rank, "
            f"{sum(tokens) / capacity:.0%} full, largest rank {share:.0%} above the mean"
        )

    def threads(self) -> str:
        """Describe the threads that load a rank's packs ahead of training."""
        decoding = f"{self._threads} that decode{'' if self._threads > 1 else 's'}"
        steps = self._prefetch + self._threads - 1
        return f"{decoding}, up to {steps} steps ahead; {_FETCH_THREADS} that fetch blocks"

    def load(self, step: Step) -> StepBatch:
        """Return this rank's packs of one step, as tensors on the host."""
        lengths = self._blocks.lengths
        packs = pack_batch(step.samples, lengths.length, self._world_size, self._max_tokens_per_pack)[self._rank]
        weights = dict(zip(step.samples.tolist(), self._plan.loss_weights(step, lengths.loss_tokens), strict=True))
        return StepBatch(
            step,
            [self._load_pack(pack, weights) for pack in packs],
            loss_tokens=int(lengths.loss_tokens[step.samples].sum()),
            tokens=int(lengths.length[step.samples].sum()),
        )

    def _load_pack(self, pack: Pack, weights: Mapping[int, float]) -> LoadedPack:
        samples = [self._blocks[number] for number in pack]
        return self._prepare(self._collator.collate(samples, [weights[number] for number in pack]))


def _drain(batches: "queue.Queue[StepBatch | BaseException | None]") -> None:
    while True:
        try:
            batches.get_nowait()
        except queue.Empty:
            return


@dataclass(frozen=True)
class PackCollator:
    """Collates samples into the row of a pack, for one tokenizer and vision backbone."""

    vision: VisionSpec
    image_token_id: int
    begin_token_id: int

    def collate(self, samples: list[Sample], loss_weights: Sequence[float] | None = None) -> HostPack:
        """Concatenate samples into one row, with positions that restart at each sample.

        `loss_weights` holds the weight of each loss token by sample; without it every weight is 1.

        A pack without images gets a blank one, as an additional sample without loss tokens: every pack passes the
        vision tower, so that collectives match on all ranks, and the blank image contributes no gradient.
        """
        images: list[Pixels] = [decode_block_image(image) for sample in samples for image in sample.images]
        rows = [self._expand(sample) for sample in samples]
        counts = [len(row.targets) for row in rows]
        weights = np.repeat(np.asarray(loss_weights or [1.0] * len(samples), dtype=np.float32), counts)
        if not images:
            images = [blank_pixels(self.vision.pixels)]
            rows.append(_ExpandedSample(self._blank_ids(), np.empty(0, dtype=np.int64)))
        starts = np.cumsum([0, *(len(row.ids) for row in rows)])
        ids = np.concatenate([row.ids for row in rows])
        targets = np.concatenate([row.targets + start for row, start in zip(rows, starts, strict=False)])
        return HostPack(
            input_ids=torch.from_numpy(ids)[None],
            position_ids=torch.from_numpy(np.concatenate([np.arange(len(row.ids)) for row in rows]))[None],
            pixels=torch.from_numpy(np.stack(images)),
            rule=self.vision.pixels,
            image_positions=torch.from_numpy(np.flatnonzero(ids == self.image_token_id)),
            target_positions=torch.from_numpy(targets - 1),
            labels=torch.from_numpy(ids[targets]),
            loss_weights=torch.from_numpy(weights),
            cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        )

    def _expand(self, sample: Sample) -> "_ExpandedSample":
        ids = np.asarray(sample.input_ids, dtype=np.int64)
        repeats = np.where(ids == self.image_token_id, self.vision.image_tokens, 1)
        expanded_offsets = np.concatenate([[0], np.cumsum(repeats)])
        targets = [np.arange(expanded_offsets[start], expanded_offsets[stop]) for start, stop in sample.loss_spans]
        expanded = np.repeat(ids, repeats)
        assert len(expanded) == sample.length, (
            f"{sample.sample_id}: {len(expanded)} tokens after expansion, the block has {sample.length}"
        )
        return _ExpandedSample(expanded, np.concatenate(targets))

    def _blank_ids(self) -> npt.NDArray[np.int64]:
        return np.array([self.begin_token_id] + [self.image_token_id] * self.vision.image_tokens, dtype=np.int64)


@dataclass(frozen=True)
class _ExpandedSample:
    """Token ids with image tokens expanded, and the positions of its loss tokens (never 0, which is `<bos>`)."""

    ids: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
