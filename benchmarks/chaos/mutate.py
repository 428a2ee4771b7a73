"""Damage to bytes, drawn by seed: what disks, transfers and editors do to a file.

In: a random generator, bytes. Out: other bytes. Cost: none.
"""

import random

INTERESTING = (
    b"\x00", b"\xff", b"\xef\xbb\xbf", b"{", b"}", b"[", b"]", b'"', b"\\", b",", b":", b"\n", b"\r\n", b"null",
    b"NaN", b"-1", b"1e999", b"99999999999999999999", b"\\ud800", b"\xed\xa0\x80", b"</s>", b"<|im_end|>", b"[" * 2000,
    b'{"a":' * 1500, b"&a [*a]", b"? {1: 2}\n: 3\n", b"!!python/object/apply:os.getcwd []", b"${oc.env:HOME}",
    b"{}", b"[]", b"true",
)  # fmt: skip


def damaged(draw: random.Random, data: bytes) -> bytes:
    """As it is found after one accident: a bit, a hole, a cut."""
    kind = draw.choice(("flip", "cut", "zeros", "longer", "empty"))
    if kind == "flip" and data:
        return flipped(draw, data)
    if kind == "cut" and data:
        return data[: draw.randrange(len(data))]
    if kind == "zeros" and data:
        start = draw.randrange(len(data))
        length = min(draw.choice((1, 16, 4096)), len(data) - start)
        return data[:start] + bytes(length) + data[start + length :]
    if kind == "longer":
        return data + draw.randbytes(draw.randrange(1, 64))
    return b""


def flipped(draw: random.Random, data: bytes) -> bytes:
    """One bit is another."""
    place = draw.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :]


def mutated(draw: random.Random, data: bytes) -> bytes:
    """As a stranger might have written it: some of it twice, elsewhere, or replaced by what parsers stumble over."""
    for _ in range(draw.randrange(1, 5)):
        start = draw.randrange(len(data) + 1)
        stop = min(len(data), start + draw.choice((0, 1, 2, 8, 64)))
        piece = draw.choice((draw.choice(INTERESTING), data[start:stop] * 2, b"", draw.randbytes(draw.randrange(4))))
        data = data[:start] + piece + data[stop:]
        if draw.random() < 0.2:
            data = damaged(draw, data)
    return data
