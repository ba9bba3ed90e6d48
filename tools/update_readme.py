"""Put the table of the last ``make demo`` into the README.

Usage: make demo && python tools/update_readme.py
"""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Replace what stands between the demo marks."""
    table = (ROOT / "demo_output" / "demo.md").read_text(encoding="utf-8")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    marked = f"<!-- demo -->\n{table}<!-- /demo -->"
    readme.write_text(re.sub(r"<!-- demo -->.*<!-- /demo -->", lambda _: marked, text, flags=re.S))


if __name__ == "__main__":
    main()
