"""The plan's packs → tensors, ahead of need: a background thread reads, decodes and lays out while the model computes.

Which samples go where is plan.py's business; what is done with the tensors is engine.py's. No Ray, no DeepSpeed.
"""

import itertools
import queue
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from raylava.corpus.blocks import Blocks, Sample
from raylava.corpus.images import Pixels, blank_pixels, decode_stored, normalise
from raylava.models.llava import PackTensors
from raylava.models.registry import VisionSpec
from raylava.train.batch_plan import BatchPlan, Pack, Step, pack_batch

_FETCH_AHEAD = 32  # steps whose blocks are fetched before they are needed


@dataclass(frozen=True)
class StepBatch:
    """What one rank does in one step. `supervised` and `tokens` count over all ranks."""

    step: Step
    packs: list[PackTensors]
    loss_tokens: int
    tokens: int


class PackedDataLoader:
    """Iterates over one rank's work from step `first` on, `ahead` steps in front of the consumer."""

    def __init__(
        self,
        blocks: Blocks,
        plan: BatchPlan,
        layout: "PackCollator",
        rank: int,
        world_size: int,
        max_tokens_per_pack: int,
        first: int = 0,
        ahead: int = 2,
    ) -> None:
        self._blocks, self._plan, self._layout = blocks, plan, layout
        self._rank, self._world_size, self._pack_tokens = rank, world_size, max_tokens_per_pack
        self._first, self._ahead = first, ahead

    def __iter__(self) -> Iterator[StepBatch]:
        ready: queue.Queue[StepBatch | BaseException | None] = queue.Queue(self._ahead)
        stopping = threading.Event()
        thread = threading.Thread(target=self._produce, args=(ready, stopping), name="feed", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopping.set()
            while thread.is_alive():  # the producer may be waiting for room
                _drain(ready)
                thread.join(timeout=0.05)

    def _produce(self, ready: "queue.Queue[StepBatch | BaseException | None]", stopping: threading.Event) -> None:
        try:
            for step in self._fetched():
                if stopping.is_set():
                    return
                ready.put(self.work(step))
            ready.put(None)
        except BaseException as error:  # handed to the consumer, who raises it
            ready.put(error)

    def _fetched(self) -> Iterator[Step]:
        """The plan's steps, each with its blocks on this node; those of the next steps are under way meanwhile."""
        with ThreadPoolExecutor(max_workers=4, thread_name_prefix="fetch") as pool:
            coming: deque[tuple[Step, Future[None]]] = deque()
            steps = self._plan.from_step(self._first)
            try:
                for step in itertools.chain(steps, [None]):
                    if step is not None:
                        coming.append((step, pool.submit(self._blocks.fetch, step.samples)))
                    while coming and (step is None or len(coming) > _FETCH_AHEAD):
                        following, fetching = coming.popleft()
                        fetching.result()
                        yield following
            finally:
                for _, fetching in coming:
                    fetching.cancel()

    def work(self, step: Step) -> StepBatch:
        """This rank's packs of one step, as tensors on the host."""
        lengths = self._blocks.lengths
        packs = pack_batch(step.samples, lengths.length, self._world_size, self._pack_tokens)[self._rank]
        return StepBatch(
            step,
            [self._tensors(pack) for pack in packs],
            loss_tokens=int(lengths.loss_tokens[step.samples].sum()),
            tokens=int(lengths.length[step.samples].sum()),
        )

    def _tensors(self, pack: Pack) -> PackTensors:
        return self._layout.tensors([self._blocks[number] for number in pack])


def _drain(ready: "queue.Queue[StepBatch | BaseException | None]") -> None:
    while True:
        try:
            ready.get_nowait()
        except queue.Empty:
            return


@dataclass(frozen=True)
class PackCollator:
    """How samples lie in a pack's row, for one tokenizer and vision backbone."""

    vision: VisionSpec
    image_token_id: int
    begin_token_id: int

    def tensors(self, samples: list[Sample]) -> PackTensors:
        """Several samples in one row, positions restarting with each; with a blank image when none has one.

        The blank image is a sample of its own that nothing supervises, so every pack passes the vision tower and no
        gradient comes of it.
        """
        images: list[Pixels] = [decode_stored(image) for sample in samples for image in sample.images]
        rows = [self._expand(sample) for sample in samples]
        if not images:
            images = [blank_pixels(self.vision.pixels)]
            rows.append(_ExpandedSample(self._blank_ids(), np.empty(0, dtype=np.int64)))
        starts = np.cumsum([0, *(len(row.ids) for row in rows)])
        ids = np.concatenate([row.ids for row in rows])
        targets = np.concatenate([row.targets + start for row, start in zip(rows, starts, strict=False)])
        return PackTensors(
            input_ids=torch.from_numpy(ids)[None],
            position_ids=torch.from_numpy(np.concatenate([np.arange(len(row.ids)) for row in rows]))[None],
            pixel_values=torch.from_numpy(normalise(np.stack(images), self.vision.pixels)),
            target_positions=torch.from_numpy(targets - 1),
            labels=torch.from_numpy(ids[targets]),
            cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        )

    def _expand(self, sample: Sample) -> "_ExpandedSample":
        ids = np.asarray(sample.input_ids, dtype=np.int64)
        repeats = np.where(ids == self.image_token_id, self.vision.image_tokens, 1)
        new_place = np.concatenate([[0], np.cumsum(repeats)])
        targets = [np.arange(new_place[start], new_place[stop]) for start, stop in sample.loss_spans]
        expanded = np.repeat(ids, repeats)
        assert len(expanded) == sample.length, (
            f"{sample.sample_id}: {len(expanded)} tokens, the block says {sample.length}"
        )
        return _ExpandedSample(expanded, np.concatenate(targets))

    def _blank_ids(self) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        return np.array([self.begin_token_id] + [self.image_token_id] * self.vision.image_tokens, dtype=np.int64)


@dataclass(frozen=True)
class _ExpandedSample:
    """`ids` with image tokens repeated; `targets` are the positions of supervised tokens in it (never 0: <bos> is
    first).
    """

    ids: "np.ndarray[tuple[int], np.dtype[np.int64]]"
    targets: "np.ndarray[tuple[int], np.dtype[np.int64]]"
