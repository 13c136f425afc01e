"""An ARM board without hardware: Debian's Python for ARM under qemu's user emulation, with ``ser-edge`` from pip.

    python tools/arm_root.py                                       # build it: 1 to 2 minutes, then kept
    python tools/arm_root.py ser-edge info model.onnx
    python tools/arm_root.py --cpu cortex-a72 ser-edge file model.onnx clip.wav
    python tools/arm_root.py --release trixie python -c "import sys; print(sys.version)"

Debian's packages are downloaded by apt with a state of its own and unpacked; nothing is installed on this machine but
qemu. ``ser-edge`` and what it needs are then installed by the pip of that Debian, running under the emulation, so that
its metadata, the tags of the wheels and the index are all put to the test. Both ask the servers that this machine is
set up for.

What this cannot tell is how long anything takes on a board: see ``tools/count_instructions.py`` for its cost.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

REPOSITORY = Path(__file__).parents[1]

EXTRAS = "onnx,tflite,mic"

PACKAGES = ("python3", "python3-pip-whl", "libstdc++6", "libportaudio2", "libpulse0")
LONE_PACKAGES = ("libasound2-plugins",)
"""Unpacked without what they depend on: of these plugins the one for PulseAudio alone is used, and the others would
bring ffmpeg."""

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


@dataclass(frozen=True)
class Processor:
    """What an emulated processor says of itself.

    Attributes:
        name: qemu's name for it.
        part: its number in ``/proc/cpuinfo``.
        features: its line there. Inference libraries choose their kernels by it; if it promised more than qemu's
            model can do, they would die of an illegal instruction.
    """

    name: str
    part: int
    features: str


PROCESSORS = {
    processor.name: processor
    for processor in (
        # Raspberry Pi 4
        Processor("cortex-a72", 0xD08, "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"),
        # Raspberry Pi 5: the first with 8-bit dot products (asimddp)
        Processor(
            "cortex-a76",
            0xD0B,
            "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
        ),
    )
}
DEFAULT_PROCESSOR = "cortex-a76"


class ArmRoot:
    """Programs for aarch64 that this machine can run; use it as a context manager, one process at a time.

    Args:
        release: of Debian; ``bookworm`` has Python 3.11 and ``trixie`` 3.13, as Raspberry Pi OS does.
        folder: where roots are kept; in the user's cache folder when None.

    Attributes:
        folder: of this root.
        programs: its ``bin``, with ``python`` and ``ser-edge``.

    Raises:
        RuntimeError: on entering: qemu is missing, or a package or a wheel cannot be had.
    """

    def __init__(self, release: str = "bookworm", folder: Path | None = None) -> None:
        self._release = release
        self.folder = (folder or cache_folder()) / f"{release}-{_digest(*PACKAGES, *LONE_PACKAGES)}"
        self.programs = self.folder / "ser-edge" / "bin"

    def __enter__(self) -> ArmRoot:
        """Build what is missing, and keep every other process from changing it until the end."""
        if not shutil.which("qemu-aarch64"):
            raise RuntimeError("qemu-aarch64 is missing; on Debian run: apt-get install qemu-user")
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._lock = self.folder.with_suffix(".lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        if not self.folder.exists():
            self._build()
        self._install_ser_edge()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let others in."""
        self._lock.close()

    def command(self, *words: str | Path, cpu: str = DEFAULT_PROCESSOR, qemu: Sequence[str | Path] = ()) -> list[str]:
        """Return the command line that runs a program of the root.

        Args:
            *words: ``python`` or another program of the root's, and its arguments.
            cpu: one of :data:`PROCESSORS`.
            qemu: further options of qemu's.
        """
        program, *arguments = words
        # A script's first line names its interpreter, but the machine's kernel would not know how to run that.
        script = [] if program == "python" else [self.programs / program]
        return [str(word) for word in (*self._emulator(cpu, qemu), self.programs / "python", *script, *arguments)]

    def run(
        self, *words: str | Path, cpu: str = DEFAULT_PROCESSOR, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a program of the root and return what it printed; see :meth:`command`.

        Raises:
            RuntimeError: it failed, and ``check`` is set; with what it said.
        """
        return _run(self.command(*words, cpu=cpu), check=check)

    def _emulator(self, cpu: str, options: Sequence[str | Path] = ()) -> list[str | Path]:
        return ["qemu-aarch64", *options, "-cpu", cpu, "-L", self.folder / cpu]

    def _build(self) -> None:
        """Build the root beside its place, so that an interrupted build leaves none."""
        with tempfile.TemporaryDirectory(dir=self.folder.parent) as name:
            apt, debian = Path(name) / "apt", Path(name) / "root" / "debian"
            _unpack(_download(apt, self._release), debian)
            for processor in PROCESSORS.values():
                _imitate(processor, debian, debian.parent / processor.name)
            debian.parent.rename(self.folder)

    def _install_ser_edge(self) -> None:
        """Install the working tree's ``ser-edge`` unless that very one is there."""
        source = REPOSITORY / "edge_runtime"
        files = sorted(path for path in source.rglob("*") if path.suffix in {".py", ".toml", ".typed"})
        digest = _digest(*(f"{path.relative_to(source)} {path.read_text(encoding='utf-8')}" for path in files))
        installed = self.folder / "installed"
        if installed.exists() and installed.read_text() == digest:
            return
        installed.unlink(missing_ok=True)
        debian = self.folder / "debian/usr"
        # --copies: this machine would follow a link to /usr/bin/python3 to its own.
        environment: list[str | Path] = ["-m", "venv", "--without-pip", "--copies", self.programs.parent]
        _run([*self._emulator(DEFAULT_PROCESSOR), debian / "bin/python3", *environment])
        pip = next((debian / "share/python-wheels").glob("pip-*.whl")) / "pip"
        with tempfile.TemporaryDirectory() as name:
            wheel = build_wheel(Path(name))
            # Compiling everything takes the emulator longer than unpacking it; what is imported is compiled then.
            install: list[str | Path] = [pip, "install", "-qq", "--no-compile", "--only-binary=:all:"]
            self.run("python", *install, f"{wheel}[{EXTRAS}]")
            self.run("python", *install, "--no-deps", "--force-reinstall", wheel)
        installed.write_text(digest)


def cache_folder() -> Path:
    """Return where roots are kept: under SERTOOL_CACHE, else in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sertool"
    return Path(os.environ.get("SERTOOL_CACHE") or default).absolute() / "arm"


def build_wheel(folder: Path) -> Path:
    """Build the wheel of ``ser-edge`` into a folder and return it."""
    # From a copy, because building leaves files behind that a later build would pick up.
    ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    source = shutil.copytree(REPOSITORY / "edge_runtime", folder / "source", ignore=ignored)
    _run([sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--wheel-dir", str(folder), str(source)])
    return next(folder.glob("*.whl"))


def _download(folder: Path, release: str) -> list[Path]:
    """Download the packages and what they need, with none of this machine's counted as installed."""
    for name in ("lists/partial", "archives/partial", "sources"):
        (folder / name).mkdir(parents=True)
    (folder / "status").touch()
    (folder / "sources" / "debian.list").write_text(f"deb [arch=arm64{_key()}] {_mirror()} {release} main\n")
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Install-Recommends": "0",
        "APT::Sandbox::User": "",
        "Dir::State::lists": folder / "lists",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder,
        "Dir::Cache::archives": folder / "archives",
        "Dir::Etc::sourcelist": "/dev/null",
        "Dir::Etc::sourceparts": folder / "sources",
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items())]
    _run([*apt, "update"])
    _run([*apt, "install", "--yes", "--download-only", *PACKAGES])
    _run([*apt, "download", *LONE_PACKAGES], folder / "archives")
    return sorted((folder / "archives").glob("*.deb"))


def _mirror() -> str:
    """Return the address that this machine has Debian's packages from."""
    fields = ["apt-get", "indextargets", "--format", "$(REPO_URI)"]
    found = _run([*fields, "Created-By: Packages", "Origin: Debian", "Label: Debian"]).stdout.split()
    if not found:
        raise RuntimeError("apt knows no Debian archive here; this tool needs Debian, and apt-get update run once")
    return found[0]


def _key() -> str:
    return f" signed-by={KEYRING}" if KEYRING.exists() else ""


def _unpack(packages: Sequence[Path], folder: Path) -> None:
    for name in ("bin", "sbin", "lib"):
        (folder / "usr" / name).mkdir(parents=True)
        (folder / name).symlink_to(f"usr/{name}")
    for package in packages:
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as archive:
            unpack: list[str | Path] = [
                "tar",
                "--extract",
                "--keep-directory-symlink",
                "--no-same-owner",
                "--directory",
                folder,
            ]
            subprocess.run(unpack, stdin=archive.stdout, check=True)


def _imitate(processor: Processor, debian: Path, folder: Path) -> None:
    """Make a folder that shows the root's files and what the kernel would say of the processor.

    qemu looks for every file in this folder first, and only then on this machine: without these, the programs would
    read that they run on x86.
    """
    cores = folder / "sys/devices/system/cpu"
    cores.mkdir(parents=True)
    for name in ("possible", "present", "online"):
        (cores / name).write_text("0-3\n")
    (folder / "proc").mkdir()
    (folder / "proc/cpuinfo").write_text("".join(_cpuinfo(processor, core) for core in range(4)))
    for entry in debian.iterdir():
        if entry.name not in {"proc", "sys"}:
            (folder / entry.name).symlink_to(f"../{debian.name}/{entry.name}")


def _cpuinfo(processor: Processor, core: int) -> str:
    fields = {
        "processor": core,
        "BogoMIPS": "108.00",
        "Features": processor.features,
        "CPU implementer": "0x41",
        "CPU architecture": 8,
        "CPU variant": "0x4",
        "CPU part": f"{processor.part:#x}",
        "CPU revision": 1,
    }
    return "".join(f"{name}\t: {value}\n" for name, value in fields.items()) + "\n"


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def _run(
    command: Sequence[str | Path], folder: Path | None = None, *, check: bool = True
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=folder, env=emulated_environment(), capture_output=True, text=True, check=False)
    if check and done.returncode:
        words = " ".join(str(word) for word in command)
        raise RuntimeError(f"{words}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def emulated_environment() -> dict[str, str]:
    """Return this process's environment without its own Python, and with what else would differ from run to run."""
    ours = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return {**kept, "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}


def install_qemu() -> None:
    """Install qemu where root may; elsewhere :class:`ArmRoot` says what to install."""
    if not shutil.which("qemu-aarch64") and os.geteuid() == 0:
        _run(["apt-get", "-qq", "update"])
        _run(["apt-get", "-qq", "install", "--yes", "--no-install-recommends", "qemu-user"])


def main() -> None:
    """Build the root and run a program in it."""
    parser = argparse.ArgumentParser(description="Run programs for ARM, among them ser-edge, under emulation.")
    parser.add_argument("--release", default="bookworm", help="of Debian: bookworm (Python 3.11) or trixie (3.13)")
    parser.add_argument("--cpu", choices=PROCESSORS, default=DEFAULT_PROCESSOR, help=f"default {DEFAULT_PROCESSOR}")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="python or ser-edge, and its arguments")
    arguments = parser.parse_args()
    try:
        install_qemu()
        with ArmRoot(arguments.release) as root:
            print(f"arm_root: {root.folder}", file=sys.stderr)
            command = arguments.command and root.command(*arguments.command, cpu=arguments.cpu)
            sys.exit(subprocess.run(command, env=emulated_environment(), check=False).returncode if command else 0)
    except RuntimeError as error:
        sys.exit(f"arm_root: {error}")


if __name__ == "__main__":
    main()
