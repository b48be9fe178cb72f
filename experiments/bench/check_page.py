"""Whether a real browser can sort the tables and enlarge the figures of a page: `python -m …check_page report.html`."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def checked(page: Path, browser: str) -> str:
    """What the page says of itself in a headless browser; RuntimeError where it says nothing."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
    made = subprocess.run(
        [browser, *options, f"file://{page.resolve()}#check"], capture_output=True, text=True, timeout=120, check=False
    )
    found = re.search(r'<pre id="checked">([^<]*)', made.stdout)
    if found is None:
        raise RuntimeError(f"{browser} did not get to the end of {page}: {made.stderr[-500:]}")
    return found[1]


def main() -> int:
    """Check the page named on the command line; 0 if all of it works."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"no browser found: wanted one of {', '.join(BROWSERS)} (apt-get install chromium)", file=sys.stderr)
        return 2
    words = checked(Path(sys.argv[1]), browser)
    print(words)
    return 0 if words.startswith("checked") else 1


if __name__ == "__main__":
    sys.exit(main())
