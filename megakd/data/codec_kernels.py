"""The codec's inner loops, compiled by numba without the GIL: rows of (id, value) ↔ gaps, values and raw bits.

T rows of at most K entries. Every read is bounded: damaged input ends in DAMAGED, never beyond an array.
tests/data/reference_codec.py is the slow obvious form. Indices are unsigned on purpose: for signed ones numba also asks
whether they count from the end, which took 40 % of the time.
"""

import math

import numpy as np
from numba import njit

DAMAGED = -1
U = np.uint64


@njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True)
def unpack_rows(counts_T, order_T, gaps, values, ids, starts, widths, words, position, bit_end, out_TK, values_TK):
    """The inverse of pack_rows into ids out_TK and values_TK (0: no entry; its id repeats the row's first).

    words: 64 bits from every byte on; MAX_WIDTH bits an entry of a row may be read beyond `bit_end`. ids: -1 beyond the
    vocabulary. Returns the position after the last row, or DAMAGED.
    """
    at, bits, most = U(0), U(position), out_TK.shape[1]
    for row in order_T:
        count = np.int64(counts_T[row])
        if count > most or np.int64(at) + count > len(gaps) or np.int64(bits) > bit_end:
            return DAMAGED
        bucket = U(0)
        for i in range(count):
            bucket += U(gaps[at + U(i)])
        if bucket > U(255):
            return DAMAGED
        out, kept, bucket, seen = out_TK[row], values_TK[row], U(0), np.int32(0)
        for i in range(count):
            bucket += U(gaps[at + U(i)])
            token = ids[U(starts[bucket]) + _read(words, bits, widths[bucket])]
            bits += U(widths[bucket])
            seen |= token
            out[U(i)] = token
        for i in range(count):
            kept[U(i)] = values[at + U(i)]
        if seen < 0:
            return DAMAGED
        at += U(count)
        for i in range(count, most):
            out[U(i)] = out[0]
            kept[U(i)] = 0
    return np.int64(bits) if np.int64(at) == len(gaps) and np.int64(bits) <= bit_end else DAMAGED


@njit(nogil=True, cache=True)
def find_labels(keys_TK, counts_T, places_T, out_T):
    """Where each row's label stands among its ascending keys; 255 when it does not, or only further on."""
    for row in range(len(counts_T)):
        keys, place = keys_TK[row], U(places_T[row])
        out_T[row] = 255
        for i in range(min(counts_T[row], 255)):
            if U(keys[U(i)]) >> U(8) == place:
                out_T[row] = i
                break


@njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True)
def head_values(values_TK, counts_T, tails_MT, log_q, inverse_M, log_share, log_rest, logprobs_TK, log_tails_TM):
    """Value bytes q → log p = 2 log q + c, so that a row and its tail sum to 1; log tails at each temperature.

    inverse_M = 1/T_m, T_0 = 1; log_q[q] = 2 log q; log_share, log_rest: log of s and 1 - s of a tail byte.
    """
    for row in range(values_TK.shape[0]):
        values, out, tails = values_TK[row], logprobs_TK[row], tails_MT[:, row]
        squares, plain, count = 0, 0, counts_T[row]  # the sums of p and of p^(1/2) are sums of whole numbers
        for i in range(count):
            value = np.int32(values[U(i)])
            squares += value * value
            plain += value
        shift = log_rest[tails[0]] - math.log(squares)
        for i in range(count):
            out[U(i)] = log_q[U(values[U(i)])] + np.float32(shift)
        out[count:] = -np.inf
        log_tails_TM[row, 0] = log_share[tails[0]]
        for m in range(1, len(inverse_M)):
            head = math.log(plain)
            if inverse_M[m] != 0.5:
                total = 0.0
                for value in values[:count]:
                    total += math.exp(log_q[value] * inverse_M[m])
                head = math.log(total)
            log_tails_TM[row, m] = log_share[tails[m]] - log_rest[tails[m]] + head + shift * inverse_M[m]


@njit(nogil=True, cache=True, inline="always")
def _read(words, position, width):
    """`width` bits at `position`, lowest first."""
    return (words[position >> U(3)] >> (position & U(7))) & ((U(1) << U(width)) - U(1))
