"""Reading a pickle of plain values: dicts, lists, texts, numbers, and numpy's arrays of numbers.

A pickle may name any function of Python, to be called when it is read. Here it may name only those by
which numpy writes arrays, and these names lead to the classes below, which keep what they are given:
nothing of numpy or of anything else is called, and arrays are made afterwards, from bytes that fit.
"""

import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import cause

MAX_BYTES = 2**28  # of a file; a ground truth has some hundred thousand
NUMBERS = re.compile(r"[iuf][248]|[iu]1|b1")  # types of arrays: integers, floats, truth values


class RefusedName(ValueError):
    """A pickle names something that plain values have no need of."""


def read_plain_pickle(path: str | Path, flag: str) -> Any:
    """The plain values in a pickle of any protocol, written by Python 2 or 3.

    flag: for messages. Raises FileNotFoundError where there is no such file, and ValueError for one that
    names anything but numpy's arrays, of which nothing is executed, or that cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{flag}: there is no {path}")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{flag}: {path} has more than {MAX_BYTES:,} bytes: it is no ground truth")
    try:
        with open(path, "rb") as file:
            return _finished(_PlainUnpickler(file, encoding="latin1").load(), {})
    except RefusedName as error:
        raise ValueError(
            f"{flag}: {path} asks for {error}, which plain values have no need of, and nothing of it was "
            "executed: take the file that the authors of the data distribute"
        ) from None
    except Exception as error:  # damaged bytes raise nearly every type
        raise ValueError(f"{flag}: {path} is no pickle of plain values ({cause(error)})") from None


class _Named:
    """What a name in a pickle stands for: it can be called, and nothing can be set on it."""

    __slots__ = ("function",)

    def __init__(self, function: Callable):
        object.__setattr__(self, "function", function)

    def __call__(self, *arguments):
        return self.function(*arguments)

    def __setattr__(self, name, value):
        raise RefusedName(f"a change of {name}")


class _Type:
    """numpy.dtype(text, ...), with the order of bytes that its state says."""

    def __init__(self, text, *copying):
        self.text, self.order = text, "="

    def __setstate__(self, state):
        self.order = state[1]

    def finished(self):
        """The type of numpy; RefusedName for another than of numbers."""
        text = str(self.text)
        if not NUMBERS.fullmatch(text) or self.order not in ("<", ">", "=", "|"):
            raise RefusedName(f"an array of the type {text[:20]!r}")
        return np.dtype(("" if self.order == "|" else self.order) + text)


class _Array:
    """An array that is yet to be made: of its shape, type and bytes."""

    def __init__(self, *subclass_shape_and_type):
        self.state = None

    def __setstate__(self, state):
        self.state = state

    def finished(self):
        """The array; ValueError where its bytes are not as many as its shape says."""
        _, shape, kind, in_columns, data = self.state
        if not isinstance(kind, _Type) or not isinstance(data, bytes | bytearray | str):
            raise RefusedName("an array of objects")
        kind, shape = kind.finished(), tuple(int(side) for side in shape)
        data = data.encode("latin1") if isinstance(data, str) else bytes(data)  # str: of Python 2
        if min(shape, default=0) < 0 or math.prod(shape) * kind.itemsize != len(data):
            raise ValueError(f"an array of shape {shape} has {len(data):,} bytes")
        return np.frombuffer(data, kind).reshape(shape, order="F" if in_columns else "C").copy()


class _Scalar(_Array):
    """A number of numpy, in its bytes."""

    def __init__(self, kind, data):
        self.state = (1, (), kind, False, data)

    def finished(self):
        """The number, of Python."""
        return super().finished().item()


def _array_of_buffer(data, kind, shape, order):
    array = _Array()
    array.state = (1, shape, kind, order == "F", data)
    return array


def _encoded(text, encoding):
    """Bytes, which protocols below 3 write as a text."""
    if encoding != "latin1":
        raise RefusedName(f"the encoding {encoding!r}")
    return text.encode("latin1")


def _no_bytes():
    """The empty bytes, which protocols below 3 write as a call."""
    return b""


_NUMPY = {
    ("core.multiarray", "_reconstruct"): _Array,
    ("core.multiarray", "scalar"): _Scalar,
    ("core.numeric", "_frombuffer"): _array_of_buffer,
}
_KNOWN = {
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encoded,
    ("__builtin__", "bytes"): _no_bytes,
}
for (_module, _name), _function in _NUMPY.items():
    _KNOWN[f"numpy.{_module}", _name] = _KNOWN[f"numpy._{_module}", _name] = _function


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler to which nothing is known but _KNOWN."""

    def find_class(self, module, name):
        if (module, name) == ("numpy", "ndarray"):  # what _reconstruct is told to make
            return "ndarray"
        if (module, name) not in _KNOWN:
            raise RefusedName(f"{module}.{name}")
        return _Named(_KNOWN[module, name])

    def persistent_load(self, pid):
        raise RefusedName("an object of elsewhere")


def _finished(value, done):
    """The value with its arrays made; `done` has what was made, by the identity of what it was made of."""
    if isinstance(value, _Named | _Type):
        raise RefusedName("a name without a use")
    if isinstance(value, _Array):
        if id(value) not in done:
            done[id(value)] = value.finished()
        return done[id(value)]
    if not isinstance(value, dict | list | tuple):
        return value
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, tuple):
        done[id(value)] = tuple(_finished(part, done) for part in value)
    elif isinstance(value, list):
        made = done[id(value)] = []
        made.extend(_finished(part, done) for part in value)
    else:
        made = done[id(value)] = {}
        made.update((name, _finished(part, done)) for name, part in value.items())
    return done[id(value)]
