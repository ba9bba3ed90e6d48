"""Fuzz every reader for a bounded time: ``python -m tests.hostile.fuzz [SECONDS] [READER ...]``.

Seeds are the good file and the hostile cases of each reader; bytes of them are changed, removed,
repeated and exchanged with those of another seed.  Anything but success or a ``JaxquantError`` is a
bug: the folder is kept, and the command fails.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

from jaxquant.errors import JaxquantError
from tests.hostile.harness import Case, write
from tests.hostile.test_hostile import READERS, TABLES

MAX_SEED = 1 << 20
SLOW = 10.0


def mutated(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """A few edits at random places."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, size = rng.randrange(len(data) + 1), rng.choice((0, 1, 2, 4, 8, 16))
        edit = rng.randrange(5)
        if edit == 0:
            data[at : at + size] = rng.randbytes(size)
        elif edit == 1:
            del data[at : at + size]
        elif edit == 2:
            data[at:at] = data[at : at + size] * rng.randint(1, 20)
        elif edit == 3 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif other:
            start = rng.randrange(len(other))
            data[at : at + size] = other[start : start + size + rng.randrange(40)]
    return bytes(data)


def fuzz(reader: str, seconds: float, kept: Path, rng: random.Random) -> tuple[int, int]:
    """Returns how many files were tried and how many bugs they found."""
    table = TABLES[reader]
    cases = [table.GOOD] * 40 + list(table.CASES.values())
    tried = bugs = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        case, other = rng.choice(cases), rng.choice(cases)
        files = dict(case.files)
        small = [n for n, c in files.items() if isinstance(c, bytes) and len(c) < MAX_SEED]
        if not small:
            continue
        name = rng.choice(small)
        donor = other.files.get(name, b"")
        files[name] = mutated(files[name], donor if isinstance(donor, bytes) else b"", rng)
        with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            folder = write(Case(files, name), Path(place) / "model")
            start = time.process_time()
            try:
                table.read(folder)
                found = ""
            except JaxquantError:
                found = ""
            # A bug is anything else, whatever it derives from.
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt | SystemExit):
                    raise
                found = traceback.format_exc()
            if not found and time.process_time() - start > SLOW:
                found = f"{time.process_time() - start:.1f} s"
        tried += 1
        if found:
            bugs += 1
            write(Case(files, name), kept / f"{reader}-{bugs}" / "model")
            print(f"{reader}: {kept / f'{reader}-{bugs}'}\n{found}")
    return tried, bugs


def main() -> int:
    """Returns the number of bugs, as an exit code."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    seed = random.randrange(1 << 32)
    rng, total = random.Random(seed), 0
    for reader in sys.argv[2:] or READERS:
        tried, bugs = fuzz(reader, seconds, Path("fuzz_output"), rng)
        print(f"{reader}: {tried} files, {seconds:.0f} s, {bugs} bugs (seed {seed})", flush=True)
        total += bugs
    return min(total, 100)


if __name__ == "__main__":
    sys.exit(main())
