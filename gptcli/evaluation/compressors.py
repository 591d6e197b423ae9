"""What general compressors need for a text: yardsticks for a network's bits per byte.

All three in bits per byte of the validation text: gzip and xz on it alone, and xz after it has
read the training text, which is the fair one.
"""

import lzma
import zlib
from concurrent.futures import ThreadPoolExecutor

_XZ = lzma.PRESET_EXTREME | 9


def measure(train: bytes, val: bytes) -> dict[str, float]:
    """Compress `val` by `gzip -9`, by `xz -9e`, and by `xz -9e` behind `train`."""

    def xz(text: bytes) -> int:
        return len(lzma.compress(text, preset=_XZ))

    with ThreadPoolExecutor() as pool:  # the compressors run outside the interpreter's lock
        both, first, alone = pool.map(xz, (train + val, train, val))
    gzipped = len(zlib.compress(val, 9, wbits=31))
    sizes = {"gzip": gzipped, "xz": alone, "xz_after_training_text": both - first}
    return {name: 8 * size / max(1, len(val)) for name, size in sizes.items()}
