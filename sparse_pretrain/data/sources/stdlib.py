"""The text of the running interpreter's own library, with domains by path."""

from __future__ import annotations

import ast
import platform
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sparse_pretrain.data.sources import base

SUFFIXES = (".py", ".pyw", ".txt", ".rst", ".md")

# Characters kept of whole areas that are tables more than text, in path order.
CAPS = {"encodings": 200_000, "pydoc_data": 420_000, "html/entities.py": 16_000}

_SKIP = frozenset(
    "test tests idle_test site-packages dist-packages __pycache__ lib-dynload _bundled".split()
)
# Made at build or by the administrator of one machine, so not the library's own text.
_LOCAL = re.compile(r"^(_sysconfigdata.*|sitecustomize|usercustomize)\.py$|^config-")

# The first part of a path, `.py` left out, names the domain; `language` has what is not listed and
# `docs` every file that is not Python.
_AREAS = {
    "concurrency": """
        asyncio concurrent multiprocessing threading _threading_local queue sched selectors
        subprocess signal contextvars asyncore asynchat pty tempfile shutil os posixpath ntpath
        genericpath pathlib glob fnmatch filecmp fileinput stat""",
    "data": """
        json xml csv pickle pickletools shelve dbm sqlite3 zipfile tarfile gzip bz2 lzma zipapp
        compression configparser tomllib plistlib encodings codecs datetime _pydatetime _strptime
        calendar zoneinfo decimal _pydecimal fractions numbers statistics random heapq bisect
        hashlib hmac secrets string stringprep textwrap difflib wave aifc sunau sndhdr chunk imghdr
        colorsys xdrlib locale gettext _compression copy copyreg _compat_pickle base64 binascii
        quopri uu struct _pyio io""",
    "gui": "tkinter idlelib turtle turtledemo curses rlcompleter cmd",
    "net": """
        email http urllib xmlrpc html smtplib smtpd ftplib imaplib nntplib poplib telnetlib socket
        socketserver ssl wsgiref cgi cgitb ipaddress mailbox mailcap mimetypes netrc nturl2path uuid
        webbrowser _markupbase""",
    "tools": """
        unittest doctest pdb bdb trace traceback tracemalloc profile profiling cProfile pstats
        timeit pydoc argparse optparse getopt logging lib2to3 venv ensurepip distutils modulefinder
        compileall py_compile pyclbr tabnanny platform sysconfig code codeop _pyrepl getpass
        ctypes _aix_support _osx_support _android_support _ios_support""",
    "docs": "pydoc_data LICENSE",
}
_DOMAIN = {area: domain for domain, areas in _AREAS.items() for area in areas.split()}


def domain(name: str) -> str:
    """The domain of a library file by its path relative to the library."""
    if not name.endswith((".py", ".pyw")):
        return "docs"
    return _DOMAIN.get(name.partition("/")[0].removesuffix(".py"), "language")


class Stdlib(base.Source):
    """Python files and prose of the standard library; tests and installed packages left out.

    `pydoc_data` holds the language's manual as one dictionary literal; each of its topics becomes a
    document of plain prose.
    """

    fold = ("language", 0.03)

    def __init__(self, spec: str = "python_stdlib") -> None:
        super().__init__(spec, "python_stdlib")
        self.root = Path(sysconfig.get_paths()["stdlib"])

    def _files(self) -> Iterator[tuple[str, Path, tuple[int, int]]]:
        for entry in base.walk(self.root, SUFFIXES, _SKIP):
            path = Path(entry.path)
            name = path.relative_to(self.root).as_posix()
            if not _LOCAL.match(name) and not base.is_test((*Path(name).parent.parts, "")):
                stat = entry.stat()
                yield name, path, (stat.st_size, stat.st_mtime_ns)

    def fingerprint(self) -> str:
        files = [(name, stat) for name, _, stat in self._files()]
        return base.digest([platform.python_version(), CAPS, files])

    def read(self) -> Iterator[base.Raw]:
        dropped: Counter[str] = Counter()
        left = dict(CAPS)
        for name, path, _ in self._files():
            text = base.read_python(path)
            if text is None:
                dropped["undecodable files"] += 1
                continue
            texts = _topics(text) if name == "pydoc_data/topics.py" else {name: text}
            area = name if name in CAPS else name.partition("/")[0]
            for name, text in texts.items():
                if area in left:
                    kept = base.head(text, left[area])
                    left[area] -= len(kept)
                    dropped[f"{area}, characters over the cap"] += len(text) - len(kept)
                    text = kept
                yield base.Raw(text, domain(name), name)
        self.notes = {
            "rule": "path below the library; files that are not Python, and pydoc topics, are docs",
            "caps": {f"{area}, characters": cap for area, cap in CAPS.items()},
            "dropped": dict(sorted(dropped.items())),
        }


def _topics(text: str) -> dict[str, str]:
    """Topic name to text, from the assignment of a literal dictionary in `text`."""
    for node in ast.parse(text).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            return {f"pydoc_data/topics/{key}.txt": topics[key] for key in sorted(topics)}
    return {"pydoc_data/topics.py": text}
