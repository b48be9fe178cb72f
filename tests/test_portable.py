"""What is installed, and what installs it, uses nothing that one operating system alone has."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import metabroyden
import setup_env

PACKAGE = Path(metabroyden.__file__).parent
ROOT = PACKAGE.parent
SOURCES = [*sorted(PACKAGE.rglob("*.py")), ROOT / "setup_env.py"]
MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty", "msvcrt", "winreg", "_winapi"}
OS_NAMES = {
    *("chown", "fork", "forkpty", "getegid", "geteuid", "getgid", "getloadavg", "getpgid", "getuid", "initgroups"),
    *("killpg", "lchown", "mkfifo", "mknod", "nice", "openpty", "rename", "sched_getaffinity", "sched_setaffinity"),
    *("setsid", "setuid", "startfile", "statvfs", "sync", "uname", "wait3", "wait4"),
}
"""Of `os`: what Windows has not, and `rename`, which fails there where the target exists (`os.replace` does not)."""
PORTABLE_FLAGS = {"O_RDONLY", "O_WRONLY", "O_RDWR", "O_APPEND", "O_CREAT", "O_EXCL", "O_TRUNC"}
PORTABLE_SIGNALS = {"SIGINT", "SIGTERM", "SIGABRT", "SIGFPE", "SIGILL", "SIGSEGV"}
PLACES = ("/tmp", "/dev/", "/proc/", "/var/", "/etc/", "~/", "C:\\")
TEXT = {"open", "read_text", "write_text", "fdopen"}


def is_guarded(node: ast.Try) -> bool:
    """Whether a missing module is met: `try: import … except ImportError`."""
    return any(handler.type is not None and "ImportError" in ast.unparse(handler.type) for handler in node.handlers)


def faults(tree: ast.AST, guarded: bool = False) -> list[str]:
    """What in a piece of code runs on some systems only."""
    found = []
    for child in ast.iter_child_nodes(tree):
        found += [] if guarded else imports(child)
        found += named(child) + texts(child) + places(child)
        found += faults(child, guarded or (isinstance(child, ast.Try) and is_guarded(child)))
    return found


def imports(node: ast.AST) -> list[str]:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    return [f"line {node.lineno} imports {name}" for name in names if name.split(".")[0] in MODULES]  # type: ignore[attr-defined]


def named(node: ast.AST) -> list[str]:
    """Members of `os` and of `signal`, and the ways to start processes, that are not everywhere."""
    if not isinstance(node, ast.Attribute):
        return []
    owner, name = ast.unparse(node.value), node.attr
    flag = name.startswith("O_") and name not in PORTABLE_FLAGS
    sign = name.startswith("SIG") and name not in PORTABLE_SIGNALS
    wrong = (owner == "os" and (name in OS_NAMES or flag)) or (owner == "signal" and sign)
    return [f"line {node.lineno} has {owner}.{name}"] if wrong else []


def texts(node: ast.AST) -> list[str]:
    """Calls that read or write text in whatever encoding the system has."""
    if not isinstance(node, ast.Call):
        return []
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    words = {keyword.arg for keyword in node.keywords}
    modes = [value.value for value in node.args if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    binary = any("b" in mode for mode in modes) or ast.unparse(node.func) in ("os.open", "Image.open", "tarfile.open")
    texted = name in TEXT and not binary and "encoding" not in words
    return [f"line {node.lineno} calls {name} without encoding="] if texted else []


def places(node: ast.AST) -> list[str]:
    if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
        return []
    return [f"line {node.lineno} names {node.value!r}"] if node.value.startswith(PLACES) else []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_runs_on_every_operating_system_as_far_as_its_text_tells(path):
    assert faults(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("import fcntl", 1),
        ("try:\n import fcntl\nexcept ImportError:\n fcntl = None", 0),
        ("def f():\n from resource import getrusage", 1),
        ("os.fork(); os.rename(a, b); os.replace(a, b); os.O_NOFOLLOW; signal.SIGKILL; signal.SIGTERM", 4),
        ("open(p); open(p, 'rb'); open(p, encoding='utf-8'); p.read_text(); p.open('w'); p.write_text(t, 'x')", 4),
        ("x = '/tmp/a'", 1),
    ],
)
def test_what_is_not_everywhere_is_found(code, count):
    assert len(faults(ast.parse(code))) == count


AS_ELSEWHERE = """
import os, sys, tempfile, warnings
import torch, numpy, safetensors.torch, torch.utils._pytree  # theirs is theirs
missing, names = sys.argv[1].split(), sys.argv[2].split()
sys.modules.update(dict.fromkeys(missing))
for name in names:
    if hasattr(os, name):
        delattr(os, name)
warnings.filterwarnings("error", category=EncodingWarning, module="metabroyden")
import metabroyden as mb
from metabroyden.zoo.models import load_pretrained
with tempfile.TemporaryDirectory() as folder:
    for name in mb.list_pretrained():
        solver = mb.load_solver(mb.load_solver(name).save_pretrained(f"{folder}/{name}"))
        mb.load_solver(mb.save_solver(solver, f"{folder}/one"))
    mb.load_solver(mb.save_pretrained(mb.Anderson(), f"{folder}/classical"))
model, image = load_pretrained("dense-digits"), torch.zeros(1, 1, 8, 8)
image[..., 1:7, 3:5] = 1
model(image).sum().backward()
"""


def test_the_package_works_where_there_are_no_posix_modules_and_no_default_encoding():
    options = ["-X", "warn_default_encoding"]
    names = " ".join([*OS_NAMES - {"rename"}, "O_NOFOLLOW", "O_CLOEXEC", "O_DIRECTORY", "O_NONBLOCK"])
    command = [sys.executable, *options, "-c", AS_ELSEWHERE, " ".join(MODULES - {"posix", "msvcrt", "winreg"}), names]
    subprocess.run(command, check=True, cwd=ROOT, timeout=120)


# --- setting up


def test_what_is_set_up_is_the_same_with_and_without_a_compiler_but_for_learn2learn():
    folder = Path("v")
    whole, less = (setup_env.installs(folder, compiler) for compiler in (True, False))
    assert [call for call in whole if call not in less] == [["--no-deps", "-r", str(folder / "learn2learn.txt")]]
    plain, compiled = setup_env.parts((ROOT / "requirements.txt").read_text(encoding="utf-8"))
    assert compiled.splitlines() == ['learn2learn==0.2.0 --config-settings="--build-option=build_ext"']
    assert "torch==" in plain
    assert not [line for line in plain.splitlines() if line.startswith("learn2learn")]


def test_the_interpreter_is_where_each_system_puts_it():
    assert setup_env.python_of(Path("v"), "nt") == Path("v", "Scripts", "python.exe")
    assert setup_env.python_of(Path("v"), "posix") == Path("v", "bin", "python")


@pytest.mark.parametrize(
    ("named", "there", "found"), [("ccache gcc", {"ccache"}, True), ("", {"gcc"}, True), ("", set(), False)]
)
def test_a_compiler_is_looked_for_under_its_usual_names(monkeypatch, named, there, found):
    monkeypatch.setenv("CC", named)
    monkeypatch.setattr(setup_env.shutil, "which", lambda name: name if name in there else None)
    assert setup_env.has_compiler() is found


def test_a_set_up_makes_the_environment_and_runs_pip_in_it(tmp_path, monkeypatch, capsys):
    ran = []

    def run(command, **options):
        ran.append([*map(str, command)])
        assert options["check"]
        if "venv" in command:
            setup_env.VENV.mkdir()

    monkeypatch.setattr(setup_env, "VENV", tmp_path / "v")
    monkeypatch.setattr(setup_env, "has_compiler", lambda: False)
    monkeypatch.setattr(setup_env.subprocess, "run", run)
    setup_env.main()
    python = str(setup_env.python_of(tmp_path / "v"))
    assert ran[0] == [sys.executable, "-m", "venv", str(tmp_path / "v")]
    assert [command[:4] for command in ran[1:]] == [[python, "-m", "pip", "install"]] * 2
    assert (tmp_path / "v" / "ready").exists()
    assert "learn2learn is left out" in capsys.readouterr().err


def test_another_python_is_refused_with_a_sentence(monkeypatch):
    monkeypatch.setattr(setup_env.sys, "version_info", (3, 13, 1))
    with pytest.raises(SystemExit, match=r"need Python 3.11 or 3.12, and .* is 3\.13\.1: run this script with"):
        setup_env.main()
