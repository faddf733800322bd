"""A hash of ids that never changes: not with the library's version, the process, the block size or the machine."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Hashes = npt.NDArray[np.uint64]
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash64(ids: pa.Array, key: int = 0) -> Hashes:
    """64-bit hashes of int64 or string `ids` (no nulls), shape (len(ids),); different for each `key`."""
    if pa.types.is_int64(ids.type):
        words = ids.to_numpy().view(np.uint64).copy()
    else:  # a log repeats its ids many times: each is hashed once
        encoded = ids.dictionary_encode()
        words = _fold(encoded.dictionary.cast(pa.large_binary()))[encoded.indices.to_numpy()]
    with np.errstate(over="ignore"):
        words += mix(np.array([key], np.uint64) + GOLDEN)
        return mix(words)


def _fold(texts: pa.LargeBinaryArray) -> Hashes:
    """Each text as one word: a polynomial in GOLDEN whose coefficients are its bytes, all texts in one pass."""
    _, offset_buffer, data_buffer = texts.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    if len(texts) == 0 or data_buffer is None:
        return np.zeros(len(texts), np.uint64)
    lengths = np.diff(offsets)
    data = np.frombuffer(data_buffer, np.uint8)[offsets[0] : offsets[-1]]
    place = np.arange(len(data)) - np.repeat(offsets[:-1] - offsets[0], lengths)
    powers = np.cumprod(np.full(int(lengths.max(initial=0)) + 1, GOLDEN))
    terms = (data.astype(np.uint64) + np.uint64(1)) * powers[place]
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])
    folded: Hashes = sums[offsets[1:] - offsets[0]] - sums[offsets[:-1] - offsets[0]]
    return folded


def mix(words: Hashes) -> Hashes:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014), in place: every input bit moves every output bit."""
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words
