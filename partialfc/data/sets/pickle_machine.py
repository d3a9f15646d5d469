"""A machine for the few pickle opcodes that a verification set needs; it is not an unpickler.

A pickle is a program for a stack machine whose GLOBAL and REDUCE import and call anything. This
machine knows a fixed list of opcodes and the inert stubs of pickle_stubs.py; nothing is imported
and nothing that the file names is called. Its values are None, bool, int, str, bytes, list,
tuple, stubs and :class:`~partialfc.data.sets.pickle_stubs.Array`. The str of Python 2 is bytes.

Every length is checked against the bytes left before anything is allocated, and whatever the
program makes is charged against a budget proportional to the file, so that a short program
cannot make a large value by copying, nesting or repeating. Nothing here recurses.

The opcodes are those of protocols 0 to 5 (https://docs.python.org/3/library/pickletools.html).
"""

import re
import sys
from collections.abc import Callable
from typing import BinaryIO

from partialfc.data.sets.pickle_stubs import Refused, call, find, set_state

_BUDGET_PER_BYTE = 16
_BUDGET_FREE = 1 << 20
_SLOT = 8
_RESULT = 256
_MEMO_ENTRY = 128
_REMEDY = (
    "Only a pickle of (bins, issame) is read, with JPEG bytes or uint8 arrays in bins; "
    "fetch the file again, or write it anew with partialfc.data.sets.pairs.write_pairs."
)


class PairsError(ValueError):
    """A file that is not a verification set; the message has file, place, rule and remedy."""


def run(stream: BinaryIO, size: int, name: str) -> object:
    """Return the value of the pickle in ``stream``.

    Args:
        stream: At the first byte of the pickle.
        size: Bytes in the stream, in [0, 2^63); the pickle must end there.
        name: The file, for errors.

    Raises:
        PairsError: If the pickle is damaged, or does anything outside the list above.
    """
    machine = _Machine(stream, size)
    opcode, start = "none", 0
    try:
        while opcode != "STOP":
            opcode, start = "none", machine.position
            code = machine.take(1)[0]
            opcode = f"0x{code:02x}"
            opcode, operation = _OPCODES.get(code, (_REFUSED.get(code, opcode), _Machine.refuse))
            operation(machine)
        return machine.result()
    except Refused as rule:
        raise PairsError(f"{name}: offset {start}, opcode {opcode}: {rule}. {_REMEDY}") from None


class _Machine:
    """Tape, stack, marks and memo; every method raises Refused where a rule is broken."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream = stream
        self.size = size
        self.position = 0
        self.budget = _BUDGET_FREE + _BUDGET_PER_BYTE * size
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}

    # The tape

    def take(self, count: int) -> bytes:
        left = self.size - self.position
        if not 0 <= count <= left:
            raise Refused(f"needs {count} bytes where {left} are left")
        data = self.stream.read(count)
        if len(data) != count:
            raise Refused("the file became shorter while it was read")
        self.position += count
        return data

    def integer(self, width: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(width), "little", signed=signed)

    def counted(self, width: int, signed: bool = False) -> bytes:
        return self.take(self.integer(width, signed))

    def line(self, longest: int) -> bytes:
        longest = min(longest, self.size - self.position)
        line = self.stream.readline(longest)
        if not line.endswith(b"\n"):
            raise Refused(f"no end of line within {longest} bytes")
        self.position += len(line)
        return line[:-1]

    def decimal(self) -> int:
        """INT, LONG, PUT and GET; protocols 0 and 1 write False and True as 00 and 01."""
        line = self.line(24)
        if line in (b"00", b"01"):
            return line == b"01"
        if not re.fullmatch(rb"-?[0-9]{1,19}L?", line):
            raise Refused(f"{line!r} is not a 64-bit integer")
        return int(line.rstrip(b"L"))

    # Stack and memo

    def charge(self, size: int) -> None:
        self.budget -= size
        if self.budget < 0:
            raise Refused(f"the program makes more than {_BUDGET_PER_BYTE} times the file's bytes")

    def push(self, value: object) -> None:
        """Push a new value, charged in full; one from the memo is only a slot of the stack."""
        self.charge(_SLOT + sys.getsizeof(value))
        self.stack.append(value)

    def pop(self, count: int) -> list[object]:
        start = len(self.stack) - count
        if start < (self.marks[-1] if self.marks else 0):
            raise Refused(f"needs {count} values on the stack")
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def pop_to_mark(self) -> list[object]:
        if not self.marks:
            raise Refused("no MARK on the stack")
        values = self.pop(len(self.stack) - self.marks[-1])
        self.marks.pop()
        return values

    def mark(self) -> None:
        self.charge(_SLOT + sys.getsizeof(len(self.stack)))
        self.marks.append(len(self.stack))

    def put(self, index: int) -> None:
        if not self.stack:
            raise Refused("the stack is empty")
        if not 0 <= index < 1 << 32:
            raise Refused(f"memo index {index} is outside [0, 2^32)")
        self.charge(_MEMO_ENTRY)
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise Refused(f"memo index {index} was never put")
        self.charge(_SLOT)
        self.stack.append(self.memo[index])

    # Operations

    def proto(self) -> None:
        if (version := self.integer(1)) > 5:
            raise Refused(f"protocol {version} is above 5")

    def frame(self) -> None:
        """A hint for buffering; nothing is allocated for it."""
        length, left = self.integer(8), self.size - self.position
        if length > left:
            raise Refused(f"a frame of {length} bytes where {left} are left")

    def quoted(self) -> None:
        """STRING: a str as Python 2 prints it."""
        line = self.line(self.size)
        if len(line) < 2 or line[:1] not in (b"'", b'"') or line[-1:] != line[:1]:
            raise Refused("the string is not between quotes")
        try:
            self.push(_ESCAPE.sub(lambda escape: _ESCAPED[escape[0]], line[1:-1]))
        except KeyError as escape:
            raise Refused(f"{escape.args[0]!r} is no escape") from None

    def text(self, data: bytes, encoding: str = "utf-8") -> None:
        try:
            self.push(data.decode(encoding))
        except UnicodeError as error:
            raise Refused(f"the text is not {encoding}") from error

    def append(self, values: list[object]) -> None:
        (target,) = self.pop(1)
        if not isinstance(target, list):
            raise Refused(f"appends to a {type(target).__name__}, not to a list")
        self.charge(_SLOT * len(values))
        target.extend(values)
        self.stack.append(target)

    def global_line(self) -> None:
        module, name = self.line(64), self.line(64)
        self.push_stub(module.decode("latin1"), name.decode("latin1"))

    def push_stub(self, module: object, name: object) -> None:
        self.charge(_SLOT)
        self.stack.append(find(module, name))

    def reduce(self) -> None:
        function, arguments = self.pop(2)
        self.charge(_RESULT)
        self.push(call(function, arguments))

    def build(self) -> None:
        target, state = self.pop(2)
        set_state(target, state)
        self.stack.append(target)

    def refuse(self) -> None:
        raise Refused("this opcode is not on the list")

    def result(self) -> object:
        (value,) = self.pop(1)
        if self.stack or self.marks:
            raise Refused(f"{len(self.stack)} values and {len(self.marks)} marks are left over")
        if self.position != self.size:
            raise Refused(f"{self.size - self.position} bytes follow the end")
        return value


_ESCAPE = re.compile(rb"\\(?:x..|.)?", re.DOTALL)
_ESCAPED = {rb"\\": b"\\", rb"\'": b"'", rb"\"": b'"', rb"\n": b"\n", rb"\r": b"\r", rb"\t": b"\t"}
_ESCAPED |= {b"\\x%02x" % value: bytes([value]) for value in range(256)}

_OPCODES: dict[int, tuple[str, Callable[[_Machine], object]]] = {
    0x80: ("PROTO", _Machine.proto),
    0x95: ("FRAME", _Machine.frame),
    ord("."): ("STOP", lambda m: None),
    ord("("): ("MARK", _Machine.mark),
    # Constants and numbers
    ord("N"): ("NONE", lambda m: m.push(None)),
    0x88: ("NEWTRUE", lambda m: m.push(True)),
    0x89: ("NEWFALSE", lambda m: m.push(False)),
    ord("I"): ("INT", lambda m: m.push(m.decimal())),
    ord("L"): ("LONG", lambda m: m.push(m.decimal())),
    ord("J"): ("BININT", lambda m: m.push(m.integer(4, signed=True))),
    ord("K"): ("BININT1", lambda m: m.push(m.integer(1))),
    ord("M"): ("BININT2", lambda m: m.push(m.integer(2))),
    0x8A: ("LONG1", lambda m: m.push(int.from_bytes(m.counted(1), "little", signed=True))),
    # Bytes; the str of Python 2
    ord("S"): ("STRING", _Machine.quoted),
    ord("T"): ("BINSTRING", lambda m: m.push(m.counted(4, signed=True))),
    ord("U"): ("SHORT_BINSTRING", lambda m: m.push(m.counted(1))),
    ord("B"): ("BINBYTES", lambda m: m.push(m.counted(4))),
    ord("C"): ("SHORT_BINBYTES", lambda m: m.push(m.counted(1))),
    0x8E: ("BINBYTES8", lambda m: m.push(m.counted(8))),
    0x96: ("BYTEARRAY8", lambda m: m.push(m.counted(8))),
    # Text
    ord("V"): ("UNICODE", lambda m: m.text(m.line(m.size), "raw-unicode-escape")),
    ord("X"): ("BINUNICODE", lambda m: m.text(m.counted(4))),
    0x8C: ("SHORT_BINUNICODE", lambda m: m.text(m.counted(1))),
    0x8D: ("BINUNICODE8", lambda m: m.text(m.counted(8))),
    # Lists and tuples
    ord("]"): ("EMPTY_LIST", lambda m: m.push([])),
    ord("l"): ("LIST", lambda m: m.push(m.pop_to_mark())),
    ord("a"): ("APPEND", lambda m: m.append(m.pop(1))),
    ord("e"): ("APPENDS", lambda m: m.append(m.pop_to_mark())),
    ord(")"): ("EMPTY_TUPLE", lambda m: m.push(())),
    ord("t"): ("TUPLE", lambda m: m.push(tuple(m.pop_to_mark()))),
    0x85: ("TUPLE1", lambda m: m.push(tuple(m.pop(1)))),
    0x86: ("TUPLE2", lambda m: m.push(tuple(m.pop(2)))),
    0x87: ("TUPLE3", lambda m: m.push(tuple(m.pop(3)))),
    # The memo
    ord("p"): ("PUT", lambda m: m.put(m.decimal())),
    ord("q"): ("BINPUT", lambda m: m.put(m.integer(1))),
    ord("r"): ("LONG_BINPUT", lambda m: m.put(m.integer(4))),
    0x94: ("MEMOIZE", lambda m: m.put(len(m.memo))),
    ord("g"): ("GET", lambda m: m.get(m.decimal())),
    ord("h"): ("BINGET", lambda m: m.get(m.integer(1))),
    ord("j"): ("LONG_BINGET", lambda m: m.get(m.integer(4))),
    # Stubs
    ord("c"): ("GLOBAL", _Machine.global_line),
    0x93: ("STACK_GLOBAL", lambda m: m.push_stub(*m.pop(2))),
    ord("R"): ("REDUCE", _Machine.reduce),
    ord("b"): ("BUILD", _Machine.build),
}

_REFUSED = {
    ord("P"): "PERSID",
    ord("Q"): "BINPERSID",
    ord("i"): "INST",
    ord("o"): "OBJ",
    0x81: "NEWOBJ",
    0x92: "NEWOBJ_EX",
    0x82: "EXT1",
    0x83: "EXT2",
    0x84: "EXT4",
    0x97: "NEXT_BUFFER",
    0x98: "READONLY_BUFFER",
    ord("0"): "POP",
    ord("1"): "POP_MARK",
    ord("2"): "DUP",
    ord("d"): "DICT",
    ord("}"): "EMPTY_DICT",
    ord("s"): "SETITEM",
    ord("u"): "SETITEMS",
    0x8F: "EMPTY_SET",
    0x90: "ADDITEMS",
    0x91: "FROZENSET",
    ord("F"): "FLOAT",
    ord("G"): "BINFLOAT",
    0x8B: "LONG4",
}
"""Names of the other opcodes, for errors."""
