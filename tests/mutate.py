"""What the fuzzers change in a valid file: bytes, values of a JSON tree, the header of a safetensors file."""

import copy
import json
import struct

from hypothesis import strategies as st

DEEP = "@deep@"  # stands for a list so deeply nested that a recursive parser runs out of stack
NESTED = "[" * 60_000 + "]" * 60_000
ODD_NUMBERS = (
    True, -1, 0, 1, 2, 2**31, 2**63, 10**8, 10**12, 10**30, -(10**12), 0.5, float("nan"), float("inf"), -float("inf"), 1e308,
)  # fmt: skip
ODD_VALUES = (
    None, *ODD_NUMBERS, "", "x", "24", "9" * 5000, [], [1], ["a", "a"], {}, {"a": 1}, {"0": "a"}, [[]], DEEP, "\ud800", "a\nb",
    "\x1b[31mred", "\0", "../../x", "F16", "F32", "I64", "BOOL", [10**12, 10**12], [0], [-1, 4],
)  # fmt: skip
KINDS = ("flip", "cut", "insert", "remove", "overwrite", "repeat")

# one change of a file's bytes: what, where (a share of the length), how much, and with what
byte_edits = st.lists(
    st.tuples(st.sampled_from(KINDS), st.floats(0, 1), st.integers(1, 64), st.binary(min_size=1, max_size=16)),
    min_size=1, max_size=3,
)  # fmt: skip
# one change of a JSON tree: the number of the node, and what is to become of it
tree_edits = st.lists(
    st.tuples(st.integers(0, 10_000), st.sampled_from(("set", "set", "set", "drop", "add")), st.sampled_from(ODD_VALUES)),
    min_size=1, max_size=3,
)  # fmt: skip
json_values = st.recursive(
    st.sampled_from(ODD_VALUES) | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def edited(content: bytes, edits: list[tuple]) -> bytes:
    """Return a file's bytes after some changes."""
    for kind, place, count, new in edits:
        at = round(place * max(len(content) - 1, 0))
        if kind == "flip" and content:
            content = content[:at] + bytes([content[at] ^ 1 << count % 8]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "insert":
            content = content[:at] + new + content[at:]
        elif kind == "remove":
            content = content[:at] + content[at + count :]
        elif kind == "overwrite":
            content = content[:at] + new + content[at + len(new) :]
        elif kind == "repeat":
            content = content[: at + count] + content[at:]
    return content


def grown(tree: object, edits: list[tuple]) -> object:
    """Return a JSON tree after some changes of its nodes; the tree itself stays as it is."""
    tree = copy.deepcopy(tree)
    for number, action, value in edits:
        places = list(_places(tree))
        if not places:
            break
        container, key = places[number % len(places)]
        if action == "drop":
            del container[key]
        elif action == "add" and isinstance(container, dict):
            container[f"{key}x"] = copy.deepcopy(value)
        else:
            container[key] = copy.deepcopy(value)
    return tree


def _places(tree: object):
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(inner):
        yield tree, key
        yield from _places(value)


def dumped(tree: object) -> bytes:
    """Return JSON as bytes, NaN, lone surrogates, endless numbers and bottomless lists included."""
    return json.dumps(tree).replace(f'"{DEEP}"', NESTED).encode()


def header_of(content: bytes) -> dict:
    """Return the header of a safetensors file: names, types, shapes and places of its tensors."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])


def with_header(content: bytes, header: bytes) -> bytes:
    """Return a safetensors file with another header before the same data."""
    (length,) = struct.unpack("<Q", content[:8])
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def with_edits(content: bytes, edits: list[tuple]) -> bytes:
    """Return a safetensors file whose header says something else."""
    return with_header(content, dumped(grown(header_of(content), edits)))
