"""For all tests: Ctrl-C reaches child processes even where the tests were started in the background, with it ignored; no team's database."""

import os
import signal
import sys

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.pop("TSUGIKI_STORAGE", None)  # else sweeps of tests were kept in it


@pytest.fixture
def console(monkeypatch, capsys, tmp_path):
    """Run the console script's function in a folder of its own; returns exit code, output and error output."""
    from tsugiki.recipes import cli

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tsugiki", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return run
