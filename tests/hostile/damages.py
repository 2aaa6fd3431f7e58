"""Damages files: by chance, as disks and networks do, and on purpose, as an attacker would.

Every damage follows from a random generator, so a seed and a number give it again.
"""

import json
import os
import random
import struct

HUGE = (2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**40)

NAMES = (
    "../outside",
    "../../outside/secret",
    "/etc/passwd",
    "a\0b",
    "a\nb",
    "\x1b[31mred",
    "",
    ".",
    "..",
    "a/../b",
    "ｗeight",
    "weіght",  # with a Cyrillic i
    "w\u202eeight",
    "\ud800",
    "x" * 5000,
    "__class__",
    "__metadata__",
    "C:\\windows",
    "con",
    "a.b.c",
)


def value(rng):
    """A value of JSON that nobody expects, as text."""
    kind = rng.randrange(12)
    if kind == 0:
        return str(rng.choice(HUGE))
    if kind == 1:
        return str(-rng.choice((1, *HUGE)))
    if kind == 2:
        return rng.choice(("1e999", "-1e999", "NaN", "Infinity", "-Infinity", "1e-400", "1.5"))
    if kind == 3:
        return json.dumps(rng.choice(NAMES))
    if kind == 4:
        return rng.choice(("null", "true", "false", "0", "-0", "{}", "[]", '""'))
    if kind == 5:
        depth = rng.choice((50, 2_000, 100_000))
        return "[" * depth + "]" * depth
    if kind == 6:
        depth = rng.choice((50, 2_000, 50_000))
        return '{"a":' * depth + "1" + "}" * depth
    if kind == 7:
        return "[" + ",".join(["0"] * rng.choice((3, 1000, 200_000))) + "]"
    if kind == 8:
        return "9" * rng.choice((30, 5000, 100_000))
    if kind == 9:
        return rng.choice(('{"a":1,"a":2}', "[1,]", "{", "]", '"', "[[],[],[]]", "[null]", "tru"))
    if kind == 10:
        return "0." + "0" * 400 + "1"
    return rng.choice(('"\\ud800"', '"\\u0000"', '"1"', '"8"', '"torch.float64"', '"slices"'))


class Raw(str):
    """Text that stands in JSON as it is, valid or not."""


def dumped(tree):
    """JSON in which `Raw` texts stand as they are; pairs are objects, whose keys may repeat."""
    if isinstance(tree, Raw):
        return str(tree)
    if isinstance(tree, Pairs):
        return "{" + ",".join(f"{json.dumps(k)}:{dumped(v)}" for k, v in tree) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(map(dumped, tree)) + "]"
    return json.dumps(tree)


class Pairs(list):
    """An object of JSON as its pairs."""


def parsed(text):
    return json.loads(text, object_pairs_hook=Pairs)


def _containers(tree, found):
    if isinstance(tree, list) and len(tree):
        found.append(tree)
        for item in tree:
            _containers(item[1] if isinstance(tree, Pairs) else item, found)
    return found


def edited(text, rng):
    """JSON with one thing in it changed; returns what was done, and the text."""
    tree = parsed(text)
    place = rng.choice(_containers(tree, []))
    index = rng.randrange(len(place))
    what = rng.choice(("value", "value", "value", "drop", "twice", "key", "swap", "append"))
    is_object = isinstance(place, Pairs)
    if what == "value":
        fresh = Raw(value(rng))
        place[index] = (place[index][0], fresh) if is_object else fresh
    elif what == "drop":
        del place[index]
    elif what == "twice":
        place.insert(rng.randrange(len(place) + 1), place[index])
    elif what == "append":
        fresh = Raw(value(rng))
        place.append((rng.choice(NAMES), fresh) if is_object else fresh)
    elif what == "key" and is_object:
        key, own = place[index]
        place[index] = (rng.choice((*NAMES, key + "x", key.upper(), key[:-1])), own)
    else:
        other = rng.randrange(len(place))
        if is_object:
            (a, x), (b, y) = place[index], place[other]
            place[index], place[other] = (a, y), (b, x)
        else:
            place[index], place[other] = place[other], place[index]
    return f"json {what}", dumped(tree)


def scrambled(data, rng, first=0, last=None):
    """Bytes changed by chance from ``first`` to ``last``; returns what was done, and the bytes."""
    last = len(data) if last is None else last
    out = bytearray(data)
    what = rng.choice(("bit", "bit", "bit", "bits", "byte", "cut", "longer", "zeros", "moved"))
    place = rng.randrange(first, last)
    if what == "bit":
        out[place] ^= 1 << rng.randrange(8)
    elif what == "bits":
        for _ in range(rng.randrange(2, 9)):
            out[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
    elif what == "byte":
        out[place] = rng.randrange(256)
    elif what == "cut":
        del out[place:]
    elif what == "longer":
        out += rng.randbytes(rng.choice((1, 7, 8, 64, 4096)))
    elif what == "zeros":
        end = min(last, place + rng.choice((4, 16, 512)))
        out[place:end] = bytes(end - place)
    else:
        size = rng.choice((1, 4, 8, 64))
        other = rng.randrange(first, last)
        part = out[other : other + size]
        out[place : place + len(part)] = part
    return what, bytes(out)


def split(data):
    """The header of a safetensors file as text, and its numbers."""
    (length,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + length].decode(), data[8 + length :]


def joined(header, numbers):
    raw = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw + numbers


def lying(data, rng):
    """A safetensors file whose sizes are not those that it has."""
    header, numbers = split(data)
    what = rng.choice(("length", "shape", "offset", "dtype", "names", "bomb", "metadata", "empty"))
    if what == "length":
        size = rng.choice((*(v for v in HUGE if v < 2**64), 0, 1, 7, len(data), len(data) - 8))
        return f"lie {what}", struct.pack("<Q", size) + data[8:]
    if what == "empty":
        return f"lie {what}", rng.choice((b"", b"\0", bytes(8), b"\x02" + bytes(7) + b"{}"))
    if what == "bomb":
        depth = rng.choice((100, 3_000, 300_000))
        bomb = rng.choice(
            (
                "[" * depth,
                "[" * depth + "]" * depth,
                '{"a":' * depth,
                "{" + '"a":[' * depth,
                '{"__metadata__":{"adapter":"' + "[" * depth + '"}}',
                '"' + '\\"' * depth,
                "{" + ",".join(f'"{i}":0' for i in range(depth)) + "}",
                "[" + ",".join(["{}"] * depth) + "]",
                " " * depth,
            )
        )
        return f"lie {what}", joined(bomb, numbers)
    tree = parsed(header)
    entries = [i for i, (name, _) in enumerate(tree) if name != "__metadata__"]
    index = rng.choice(entries)
    name, entry = tree[index]
    if what == "names":
        fresh = rng.choice((*NAMES, name + "x", tree[rng.choice(entries)][0]))
        tree[index] = (fresh, entry)
        return f"lie {what}", joined(dumped(tree), numbers)
    if what == "metadata":
        metadata = [i for i, (key, _) in enumerate(tree) if key == "__metadata__"]
        if metadata:
            fresh = rng.choice((Raw(value(rng)), Pairs([("format", Raw(value(rng)))]), [], 1))
            tree[metadata[0]] = ("__metadata__", fresh)
        return f"lie {what}", joined(dumped(tree), numbers)
    fields = dict(entry)
    if what == "shape":
        shape = fields["shape"]
        if shape and rng.random() < 0.7:
            shape[rng.randrange(len(shape))] = rng.choice((Raw(value(rng)), *HUGE, -1, 0))
        else:
            fields["shape"] = rng.choice((Raw(value(rng)), [2**32, 2**32], [0, 2**62], []))
    elif what == "offset":
        offsets = fields["data_offsets"]
        fresh = rng.choice((Raw(value(rng)), *HUGE, -1, 0, offsets[0] + 4, offsets[1] - 4))
        offsets[rng.randrange(2)] = fresh
    else:
        fields["dtype"] = rng.choice(
            ("F64", "F16", "I32", "U8", "BOOL", "F4", "X", Raw(value(rng)))
        )
    tree[index] = (name, Pairs(fields.items()))
    return f"lie {what}", joined(dumped(tree), numbers)


def metadata_edited(data, rng, key, seal=None):
    """A safetensors file in whose metadata the JSON of ``key`` was edited.

    With ``seal``, its digests are made anew, as somebody would who means harm.
    """
    header, numbers = split(data)
    tree = parsed(header)
    for index, (name, own) in enumerate(tree):
        if name == "__metadata__":
            fields = dict(own)
            what, fields[key] = edited(fields[key], rng)
            if seal is not None:
                what, fields = f"sealed {what}", seal(fields)
            tree[index] = (name, Pairs(fields.items()))
            return what, joined(dumped(tree), numbers)
    raise AssertionError("the file has no metadata")


def odd_file(path, rng, outside):
    """Something else than a file in its place; returns what."""
    what = rng.choice(("folder", "fifo", "gone", "dangling", "device", "loop"))
    os.unlink(path)
    if what == "folder":
        os.mkdir(path)
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "dangling":
        os.symlink(os.path.join(outside, "nothing"), path)
    elif what == "device":
        os.symlink("/dev/zero", path)
    elif what == "loop":
        os.symlink(os.path.basename(path), path)
    return f"odd {what}"


def generator(seed, index):
    return random.Random(f"{seed}/{index}")
