"""Tables of letters as SentencePiece compiles them, honest and forged."""

import base64
import struct

BLOCK = 256
LEAF = 1 << 31


def table_step(entries):
    """A `Precompiled` step that writes for each key what `entries` say."""
    texts, places = b"", {}
    for written in sorted(set(entries.values())):
        places[written] = len(texts)
        texts += written.encode() + b"\0"
    units = double_array({key.encode(): places[written] for key, written in entries.items()})
    return compiled(units, texts)


def compiled(units, texts, size=None):
    """The step from the units of its trie and its texts; another size of the trie is a lie."""
    head = struct.pack("<I", 4 * len(units) if size is None else size)
    table = head + struct.pack(f"<{len(units)}I", *units) + texts
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


def double_array(values):
    """A trie of {key: value}: each state in a place of its own where its children fit."""
    tree = {}
    for key, value in values.items():
        node = tree
        for byte in key:
            node = node.setdefault(byte, {})
        node[0] = value  # no key has a zero byte
    units, taken, places = [0] * BLOCK, {0}, {0}
    start = {True: 1, False: 1}  # of states without and with children

    def lay(node, parent):
        place = start[len(node) == 1]
        while place in places or taken.intersection(place ^ byte for byte in node):
            place += 1
        start[len(node) == 1] = place
        places.add(place)
        taken.update(place ^ byte for byte in node)
        units.extend([0] * ((place // BLOCK + 1) * BLOCK - len(units)))
        assert parent ^ place < 1 << 21
        units[parent] |= (parent ^ place) << 10 | (1 << 8 if 0 in node else 0)
        for byte, child in node.items():
            if byte:
                units[place ^ byte] = byte
                lay(child, place ^ byte)
            else:
                units[place] = LEAF | child

    lay(tree, 0)
    return units
