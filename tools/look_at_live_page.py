"""Look at the page of ``ser-edge listen --web`` in headless Chromium: pictures of it, light, dark and on a phone.

    python tools/look_at_live_page.py model.onnx clip.wav pictures       # after 20 s of listening; --after 60

The clip is played again and again. Needs Chromium (Debian: apt install chromium).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
import wave
from pathlib import Path

from browser import Browser

VIEWS = {"light": (900, 1150, "light"), "dark": (900, 1150, "dark"), "phone": (390, 1500, "light")}
"""By picture: width and height of the window, and the colour scheme."""

DRAWN_S = 1.2
"""The page draws its timeline once a second."""


def repeated(clip: Path, target: Path, seconds: float) -> Path:
    """Write a clip again and again until it lasts so long."""
    with wave.open(str(clip)) as file:
        form, content, length = file.getparams(), file.readframes(file.getnframes()), file.getnframes()
    with wave.open(str(target), "wb") as file:
        file.setparams(form)
        file.writeframes(content * (1 + int(seconds * form.framerate / length)))
    return target


def main() -> None:
    """Listen to the clip and take the pictures."""
    parser = argparse.ArgumentParser(description="Take pictures of the live page in headless Chromium.")
    parser.add_argument("model", type=Path)
    parser.add_argument("clip", type=Path, help="WAV file")
    parser.add_argument("pictures", type=Path, help="folder to write them to")
    parser.add_argument("--after", metavar="S", type=float, default=20.0, help="seconds of listening (default 20)")
    arguments = parser.parse_args()
    arguments.pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        talk = repeated(arguments.clip, Path(folder) / "talk.wav", arguments.after + 60)
        command = [sys.executable, "-m", "edge_runtime", "listen", arguments.model, talk, "--web", "0"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as listening:
            try:
                assert listening.stderr is not None
                said = listening.stderr.readline()
                address = re.search(r"http://\S+", said)
                if address is None:
                    sys.exit(f"look_at_live_page: {said.strip()}")
                with Browser() as browser:
                    browser.open(address[0])
                    time.sleep(arguments.after)
                    for name, look in VIEWS.items():
                        browser.look(*look)
                        time.sleep(DRAWN_S)
                        (arguments.pictures / f"{name}.png").write_bytes(browser.picture())
                        print(arguments.pictures / f"{name}.png")
            finally:
                listening.terminate()


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        sys.exit(f"look_at_live_page: {error}")
