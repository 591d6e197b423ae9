"""Every random draw of the program is a function of a key, so no generator state is ever saved.

Knows nothing of what is drawn: callers put the seed, the purpose and the position in the key.
"""

from hashlib import blake2b

_BITS = 63  # fits a signed 64-bit integer, which is what torch.manual_seed takes


def derive_seed(*key: int | str) -> int:
    """Return a uniform integer in [0, 2**63) that depends on `key` alone.

    The same on every machine, Python version and process (unlike `hash`).
    """
    digest = blake2b(repr(key).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - _BITS)


def derive_uniform(*key: int | str) -> float:
    """Return a uniform float in [0, 1) that depends on `key` alone."""
    return (derive_seed(*key) >> (_BITS - 53)) * 2.0**-53
