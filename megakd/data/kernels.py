"""The codec's inner loops, compiled by numba without the GIL: rows of (id, value) ↔ gaps, values and raw bits.

T rows of at most K entries. Every read is bounded: damaged input ends in DAMAGED, never beyond an array.
tests/data/reference_codec.py is the slow obvious form. Indices are unsigned on purpose: for signed ones numba also asks
whether they count from the end, which took 40 % of the time.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from numba import njit
from numba.core.caching import FunctionCache

DAMAGED = -1
U = np.uint64


class _Cache(FunctionCache):
    """Numba's cache of machine code on disk; a full disk or a damaged file means compiling again, not an error."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        with suppress(Exception):  # a file of it was cut short, or may not be read
            return super().load_overload(sig, target_context)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):
            super().save_overload(sig, data)


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`njit(nogil=True, cache=True)` that also works where no cache can be written (read-only images, no HOME).

    There every process compiles what it calls: some seconds at its start; NUMBA_CACHE_DIR names a place to keep it.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher: Any = njit(nogil=True, **options)(function)
        with suppress(RuntimeError):  # numba found no folder that it may write to
            dispatcher._cache = _Cache(function)
        return dispatcher

    return decorate


@compiled()
def round_roots(roots_TK, logprobs_TK, levels, out_TK):
    """rint(levels sqrt(p)), at least 1; 0 where there is no entry (log p = -inf)."""
    for row in range(roots_TK.shape[0]):
        roots, logprobs, out = roots_TK[row], logprobs_TK[row], out_TK[row]
        for i in range(len(out)):
            value = max(np.int32(np.rint(levels * roots[U(i)])), np.int32(1))
            out[U(i)] = value if logprobs[U(i)] > -np.inf else 0


@compiled()
def make_keys(ids_TK, values_TK, places, keys_TK, counts_T):
    """Keys (place << 8 | value) of the entries of each row whose value is not 0, the row filled up with 2^32 - 1."""
    for row in range(ids_TK.shape[0]):
        ids, values, keys, count = ids_TK[row], values_TK[row], keys_TK[row], 0
        for i in range(len(ids)):
            value = np.uint32(values[U(i)])
            key = np.uint32(places[U(ids[U(i)])] << 8) | value
            keys[U(i)] = key if value else np.uint32(0xFFFFFFFF)
            count += value != 0
        counts_T[row] = count


@compiled()
def pack_rows(keys_TK, counts_T, order_T, buckets, starts, widths, words, position):
    """Rows of ascending keys, taken in `order_T` → gaps, values; raw bits at `position` of the 64-bit `words`."""
    total = 0
    for row in range(len(counts_T)):
        total += counts_T[row]
    gaps, values, at = np.empty(total, np.uint8), np.empty(total, np.uint8), U(0)
    word, fill = U(position >> 6), U(position & 63)
    held = words[word]
    for row in order_T:
        keys, before = keys_TK[row], U(0)
        for i in range(counts_T[row]):
            key = U(keys[U(i)])
            place = key >> U(8)
            bucket = U(buckets[place])
            gaps[at] = bucket - before
            values[at] = key & U(255)
            at += U(1)
            before = bucket
            bits = place - U(starts[bucket])
            held |= bits << fill
            fill += U(widths[bucket])
            if fill >= U(64):
                words[word] = held
                word += U(1)
                fill -= U(64)
                held = bits >> (U(widths[bucket]) - fill)
    words[word] = held
    return gaps, values, np.int64(word << U(6) | fill)


@compiled()
def unpack_rows(
    counts_T, order_T, gaps, values, meaning, shifts_T, filler, ids, starts, widths, words, position, bit_end,
    out_TK, values_TK
):  # fmt: skip
    """The inverse of pack_rows: ids into out_TK, meaning[value] + shift of the row into values_TK.

    Behind its entries per row has its first id and `filler`. words: 64 bits from every byte on; MAX_WIDTH bits an entry
    of a row may be read beyond `bit_end`. ids: -1 beyond the vocabulary. Returns the position after the last row, or
    DAMAGED.
    """
    at, bits, most = U(0), U(position), out_TK.shape[1]
    for row in order_T:
        count = np.int64(counts_T[row])
        if count > most or np.int64(at) + count > len(gaps) or np.int64(bits) > bit_end:
            return DAMAGED
        out, means, shift, bucket, seen = out_TK[row], values_TK[row], shifts_T[row], U(0), np.int32(0)
        for i in range(count):
            bucket += U(gaps[at + U(i)])
            place = bucket & U(255)
            token = ids[U(starts[place]) + _read(words, bits, widths[place])]
            bits += U(widths[place])
            seen |= token
            out[U(i)] = token
            means[U(i)] = meaning[U(values[at + U(i)])] + shift
        if seen < 0 or bucket > U(255):
            return DAMAGED
        at += U(count)
        for i in range(count, most):
            out[U(i)] = out[0]
            means[U(i)] = filler
    return np.int64(bits) if np.int64(at) == len(gaps) and np.int64(bits) <= bit_end else DAMAGED


@compiled()
def find_labels(keys_TK, counts_T, places_T, out_T):
    """Where each row's label stands among its ascending keys; 255 when it does not, or only further on."""
    for row in range(len(counts_T)):
        keys, first, before = keys_TK[row], np.uint32(places_T[row] << 8), np.int32(0)
        for i in range(len(keys)):
            before += np.int32(keys[U(i)] < first)
        there = before < min(counts_T[row], 255) and keys[U(before)] >> 8 == places_T[row]
        out_T[row] = before if there else 255


@compiled()
def put_labels(found_T, counts_T, ids_TK, logprobs_TK, apart, told, tokens, nll_T):
    """The inverse of find_labels: tokens [T + 1] from the rows and those apart, the first of which is tokens[0].

    nll_T: that of the row's entry (when there are log-probabilities), of a label apart as told. DAMAGED when a label is
    not where it should be.
    """
    tokens[0], at = apart[0], 1
    for row in range(len(found_T)):
        index = found_T[row]
        if index == 255:
            if at == len(apart):
                return DAMAGED
            tokens[U(row + 1)] = apart[U(at)]
            if logprobs_TK.shape[1]:
                nll_T[U(row)] = told[U(at - 1)]
            at += 1
        else:
            if index >= counts_T[row]:
                return DAMAGED
            tokens[U(row + 1)] = ids_TK[U(row), U(index)]
            if logprobs_TK.shape[1]:
                nll_T[U(row)] = -logprobs_TK[U(row), U(index)]
    return 0 if at == len(apart) else DAMAGED


@compiled()
def pack_draws(values):
    """Draws an id, mostly 1 → two to a byte (n - 1, lower half first; 15: 16 or more), and those of 16 or more."""
    halves, large, count = np.zeros((len(values) + 1) // 2, np.uint8), np.empty(len(values), np.uint8), U(0)
    for i in range(len(values)):
        value = values[U(i)]
        if value > 15:
            large[count] = value
            count += U(1)
        halves[U(i >> 1)] |= (min(value, 16) - 1) << (4 * (i & 1))
    return halves, large[:count]


@compiled()
def unpack_draws(halves, large, draws, order_T, counts_T, values):
    """The inverse of pack_draws; a row ends where its draws are complete. DAMAGED when they do not come out even."""
    at, big, total = 0, 0, len(values)
    for row in order_T:
        begin, left = at, draws
        while left > 0 and at < total:
            value = np.int64((halves[U(at >> 1)] >> (4 * (at & 1))) & 15) + 1
            if value == 16:
                if big >= len(large) or large[U(big)] < 16:
                    return DAMAGED
                value = np.int64(large[U(big)])
                big += 1
            values[U(at)] = value
            left -= value
            at += 1
        if left != 0:
            return DAMAGED
        counts_T[U(row)] = at - begin
    return 0 if at == total and big == len(large) else DAMAGED


@compiled()
def pack_ids(places, buckets, starts, widths, words):
    """Single ids → their buckets [N], and raw bits from the beginning of the 64-bit `words`."""
    out = np.empty(len(places), np.uint8)
    position = 0
    for i in range(len(places)):
        bucket = buckets[places[i]]
        out[i] = bucket
        value = U(places[i] - starts[bucket])
        word, offset = position >> 6, U(position & 63)
        words[word] |= value << offset
        words[word + 1] |= (value >> U(1)) >> (U(63) - offset)
        position += widths[bucket]
    return out, position


@compiled()
def unpack_ids(chosen, ids, starts, widths, words, position, bit_end, out):
    """The inverse of pack_ids; the position after the last id, or DAMAGED."""
    for i in range(len(chosen)):
        bucket = chosen[i]
        token = ids[U(starts[bucket]) + _read(words, U(position), widths[bucket])]
        position += widths[bucket]
        if position > bit_end or token < 0:
            return DAMAGED
        out[i] = token
    return position


@compiled()
def head_sums(values, counts_T, order_T, powers_MN, sums_TM):
    """Sums over each row's entries, values q of all rows in `order_T`: of q^2, then of q^(2/T_m) = powers_MN[m, q].

    DAMAGED when an entry has no value, a row no entry, or the rows have not as many entries as there are values.
    """
    at, total = 0, np.int64(0)
    for row in order_T:
        total += counts_T[row]
    if total != len(values):
        return DAMAGED
    for row in order_T:
        count, squares, plain, least = np.int64(counts_T[row]), np.int32(0), np.int32(0), np.int32(255)
        for i in range(count):
            value = np.int32(values[U(at + i)])
            squares += value * value
            plain += value
            least = min(least, value)
        if count <= 0 or least == 0:
            return DAMAGED
        sums_TM[row, 0] = squares
        for m in range(1, len(powers_MN)):
            power = np.float64(plain)  # T = 2
            if powers_MN[m, 2] != 2:
                power = 0.0
                for i in range(count):
                    power += powers_MN[m, U(values[U(at + i)])]
            sums_TM[row, m] = power
        at += count
    return 0


@compiled(inline="always")
def _read(words, position, width):
    """`width` bits at `position`, lowest first."""
    return (words[position >> U(3)] >> (position & U(7))) & ((U(1) << U(width)) - U(1))
