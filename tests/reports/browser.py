"""A page in a headless browser, where there is one."""

import re
import shutil
import subprocess
from pathlib import Path

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
PROBE = """<script>
window.onerror = (message) => { document.title = "ERROR " + message; };
window.onload = () => {
  document.title += " WIDTH " + document.documentElement.scrollWidth + " OF " + window.innerWidth;
};
</script>"""


def opened(text: str, folder: Path, width: int, scheme: str) -> tuple[str, str, str]:
    """The title that a page has once it is shown, with its width; its document; and what the browser logs."""
    file = folder / "page.html"
    file.write_text(text.replace("</head>", PROBE + "</head>"), errors="backslashreplace")
    more = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    done = subprocess.run(
        [
            str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
            "--enable-logging=stderr", "--dump-dom", *more, f"--user-data-dir={folder / 'profile'}", f"file://{file}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None, done.stderr
    return title[1], done.stdout, done.stderr
