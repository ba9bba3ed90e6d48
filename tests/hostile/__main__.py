"""Write the hostile corpus: ``python -m tests.hostile FOLDER`` makes READER/CASE/... in it."""

import argparse
import re
from pathlib import Path

from tests.hostile.harness import write
from tests.hostile.test_hostile import ALL, TABLES


def main() -> None:
    """Write every case into a folder of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for number, (reader, name) in enumerate(ALL.values()):
        place = re.sub(r"\W+", "-", f"{number:03d} {name}")
        write(TABLES[reader].CASES[name], folder / reader / place / "model")
    print(f"{len(ALL)} cases in {folder}")


if __name__ == "__main__":
    main()
