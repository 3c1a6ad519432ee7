"""The order in which an epoch visits the samples of a corpus, the same on every machine for the same seed and epoch.

The order of a large corpus is a memory-mapped file in the node's cache, which the first process computes: no rank holds
the epoch in its own memory.
"""

import fcntl
import hashlib
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from raylava.storage import cache_folder

_SHARED_SAMPLES = 1_000_000  # orders of more samples are shared between the processes of a node
_KEEP_SECONDS = 7 * 86_400.0  # unused order files are removed after that
_ORDERS = "orders"
_VERSION = 1  # increase it when the same settings give another order

Samples = npt.NDArray[np.signedinteger]


@dataclass(frozen=True)
class ShuffleWindows:
    """The rows and bytes of each block, and the size of the window in which samples are shuffled.

    Windows allow shuffling a corpus that is larger than a node's disk.
    """

    rows: tuple[int, ...]
    bytes: tuple[int, ...]
    window_bytes: float

    def fit_one_window(self) -> bool:
        """Return whether the whole corpus fits one window, so that it is shuffled as a whole."""
        return sum(self.bytes) <= self.window_bytes


@dataclass(frozen=True)
class EpochOrder:
    """The sample numbers of an epoch in plan order; from position `remainder` on, they are in ascending order."""

    samples: Samples
    remainder: int


@dataclass(frozen=True)
class Shuffle:
    """What determines the order of `samples` samples.

    With `images`, the number of images of each sample, samples with images and samples without form separate batches of
    `global_batch_size` (see `modality_order`).
    """

    samples: int
    seed: int
    global_batch_size: int
    windows: ShuffleWindows | None = None
    images: npt.NDArray[np.int32] | None = None

    def order(self, epoch: int) -> EpochOrder:
        """Return the order of an epoch; that of a large corpus is a memory-mapped file of the node's cache."""
        return self._compute(epoch) if self.samples <= _SHARED_SAMPLES else self._shared(epoch)

    def _compute(self, epoch: int) -> EpochOrder:
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
        if self.windows is None or self.windows.fit_one_window():
            order = np.arange(self.samples, dtype=_dtype(self.samples))
            generator.shuffle(order)
            windows = [order]
        else:
            windows = list(shuffled_windows(self.windows, generator))
        if self.images is not None:
            has_image = self.images > 0
            if has_image.any() and not has_image.all():
                return modality_order(windows, has_image, self.global_batch_size, generator)
        return EpochOrder(windows[0] if len(windows) == 1 else np.concatenate(windows), remainder=self.samples)

    def _shared(self, epoch: int) -> EpochOrder:
        folder = cache_folder() / _ORDERS
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{self._digest()}-{epoch}.npy"
        with (folder / f"{file.stem}.lock").open("w") as lock:  # the other processes of the node wait for the first
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                _remove_old_files(folder)
                _save(self._compute(epoch), file)
        content = np.load(file, mmap_mode="r")
        return EpochOrder(content[:-1], int(content[-1]))

    def _digest(self) -> str:
        windows = self.windows and [self.windows.rows, self.windows.bytes, self.windows.window_bytes]
        fields = [_VERSION, self.samples, self.seed, self.global_batch_size, windows]
        digest = hashlib.sha256(json.dumps(fields).encode())
        if self.images is not None:
            digest.update((self.images > 0).tobytes())
        return digest.hexdigest()[:24]


def _dtype(samples: int) -> npt.DTypeLike:
    return np.int32 if samples < 2**31 else np.int64


def _save(order: EpochOrder, file: Path) -> None:
    """Write the order and, as the last element, where its remainder starts; readers see a complete file or none."""
    part = file.with_name(f"{uuid.uuid4().hex}.part")
    samples = order.samples
    content = np.lib.format.open_memmap(part, mode="w+", dtype=samples.dtype, shape=(len(samples) + 1,))
    content[:-1], content[-1] = samples, order.remainder
    content.flush()
    part.rename(file)


def _remove_old_files(folder: Path) -> None:
    for file in folder.glob("*.npy"):
        with suppress(FileNotFoundError):  # another run removes it, too
            if time.time() - file.stat().st_atime > _KEEP_SECONDS:
                file.unlink()


def shuffled_windows(windows: ShuffleWindows, generator: np.random.Generator) -> Iterator[Samples]:
    """Yield an epoch's samples so that few blocks are read at a time: windows of random blocks, shuffled within.

    A sample's position is uniform within its window, and windows are new random sets of blocks each epoch. Unlike in a
    full shuffle, two samples of one block are never further apart than one window.
    """
    first = np.concatenate([[0], np.cumsum(windows.rows)])
    dtype = _dtype(int(first[-1]))
    for window in _windows(generator.permutation(len(windows.rows)), windows):
        samples = np.concatenate([np.arange(first[block], first[block + 1], dtype=dtype) for block in window])
        generator.shuffle(samples)
        yield samples


def _windows(blocks: npt.NDArray[np.int64], windows: ShuffleWindows) -> Iterator[list[int]]:
    window: list[int] = []
    size = 0
    for block in blocks:
        if window and size + windows.bytes[block] > windows.window_bytes:
            yield window
            window, size = [], 0
        window.append(int(block))
        size += windows.bytes[block]
    yield window


def modality_order(
    windows: Sequence[Samples],
    has_image: npt.NDArray[np.bool_],
    global_batch_size: int,
    generator: np.random.Generator,
) -> EpochOrder:
    """Return an order in which each batch has samples with images or samples without, up to a remainder.

    The samples of each window, already shuffled, are divided by kind into batches, and the batches are shuffled. The
    last batch of each kind, full or not, moves on to the next window; those of the last window form the end of the
    epoch together, in the order of their numbers. This is LLaVA's `get_modality_length_grouped_indices`
    (haotian-liu/LLaVA, llava/train/llava_trainer.py), in which the whole epoch is one window.
    """
    order = np.empty(sum(len(window) for window in windows), dtype=windows[0].dtype)
    rest = dict.fromkeys((True, False), windows[0][:0])
    filled = 0
    for window in windows:
        batches: list[Samples] = []
        with_image = has_image[window]
        for kind in rest:
            samples = np.concatenate([rest[kind], window[with_image == kind]])
            count = max(0, -(-len(samples) // global_batch_size) - 1)
            batches += [samples[n * global_batch_size : (n + 1) * global_batch_size] for n in range(count)]
            rest[kind] = samples[count * global_batch_size :]
        for number in generator.permutation(len(batches)):
            order[filled : filled + global_batch_size] = batches[number]
            filled += global_batch_size
    order[filled:] = np.sort(np.concatenate(list(rest.values())))
    return EpochOrder(order, filled)
