"""An arithmetic coder (Martin 1979's range coder): symbols of known frequencies to bytes and back.

A symbol that takes `frequency` of `total` costs log2(total / frequency) bits, to within a
millionth. Knows nothing of where the frequencies come from.
"""

TOP = 1 << 64
_LOW = 1 << 56  # the range is kept at least this wide, so totals may have up to 40 bits
_MASK = TOP - 1


class Encoder:
    """Narrows a range of numbers symbol by symbol, and writes the bytes that are certain."""

    def __init__(self) -> None:
        self._out = bytearray()
        self._low, self._range = 0, _MASK

    def encode(self, start: int, frequency: int, total: int) -> None:
        """Add a symbol whose share of `total` is [start, start + frequency)."""
        unit = self._range // total
        self._low += unit * start
        self._range = unit * frequency
        if self._low >= TOP:
            self._carry()
        while self._range < _LOW:
            self._out.append(self._low >> 56)
            self._low = self._low << 8 & _MASK
            self._range <<= 8

    def finish(self) -> bytes:
        """Return all bytes: as few as say which range it is, read with zeros after them."""
        for n_bits in range(64, -1, -8):
            low = -(-self._low >> n_bits) << n_bits  # rounded up
            if low < self._low + self._range:
                break
        self._low = low
        if self._low >= TOP:
            self._carry()
        return bytes(self._out + self._low.to_bytes(8, "big")).rstrip(b"\0")

    def _carry(self) -> None:
        self._low &= _MASK
        place = len(self._out) - 1
        while self._out[place] == 255:
            self._out[place] = 0
            place -= 1
        self._out[place] += 1


class Decoder:
    """Reads what `Encoder` wrote."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 8
        self._code, self._range = int.from_bytes(data[:8].ljust(8, b"\0"), "big"), _MASK

    def target(self, total: int) -> int:
        """Return a number within the next symbol's share of `total`."""
        self._unit = self._range // total
        return min(self._code // self._unit, total - 1)

    def decode(self, start: int, frequency: int) -> None:
        """Remove the symbol that has this share of the `total` of the last `target`."""
        self._code -= self._unit * start
        self._range = self._unit * frequency
        while self._range < _LOW:
            byte = self._data[self._place] if self._place < len(self._data) else 0
            self._code = (self._code << 8 | byte) & _MASK
            self._range <<= 8
            self._place += 1
