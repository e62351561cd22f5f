"""What all commands share: every end is a line and an exit code, and options are checked in words."""

import argparse
import gc
import signal
import threading

import pytest

from convert.cli import Parser, fail_in_words, heavy_imports, main_of, number_of_tokens, real_number, whole_number
from convert.core.errors import UserError, disk_reason, files_in_words


@pytest.mark.parametrize("error, code, words", [
    (UserError("a\nb \x1b[31m \ud800"), 2, r"error: a\nb \x1b[31m \ud800"),
    (OSError(28, "No space left on device"), 2, "A file cannot be read or written"),
    (FileNotFoundError(2, "gone", "x"), 2, "A file cannot be read or written"),
    (ValueError("ours"), 1, "defect of ours: ValueError: ours"),
    (RuntimeError("A clean process failed:\nOSError: [Errno 28] No space left on device"), 2, "[Errno 28]"),
    (RuntimeError("see [Errno 28] above\nKeyError: 'x'"), 1, "defect"),
    (OSError("no more processes"), 1, "defect"),
])  # fmt: skip
def test_every_end_is_a_line_and_an_exit_code(error, code, words, capsys):
    def work():
        raise error

    assert fail_in_words(work, debug=False) == code
    said = capsys.readouterr().err
    assert words in said and (code == 1 or said.count("\n") == 1)
    if code == 2:
        with pytest.raises(UserError), files_in_words():
            work()
    assert (disk_reason(error) is not None) == (code == 2 and not isinstance(error, UserError))


@pytest.mark.parametrize(
    "argv, words",
    [
        (["x", "--size", "9"], "--size must be a whole number within 1 .. 8; got '9'. See prog --help."),
        (["x", "--sise", "2"], "Unrecognized arguments: --sise 2. See prog --help."),
        ([], "The following arguments are required: name. See prog --help."),
        (["x", "--kind", "c"], "--kind invalid choice: 'c' (choose from"),
    ],
)
def test_a_wrong_option_is_one_sentence(argv, words, capsys):
    parser = Parser(prog="prog")
    parser.add_argument("name")
    parser.add_argument("--size", type=whole_number(1, 8))
    parser.add_argument("--kind", choices=("a", "b"))
    assert main_of(parser, lambda args: None, argv) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {words}") and said.count("\n") == 1


def test_debug_shows_where_an_error_was_raised(capsys):
    def work(args):
        raise UserError("wrong.")

    assert main_of(Parser(), work, []) == 2
    assert capsys.readouterr().err == "error: wrong.\n"
    assert main_of(Parser(), work, ["--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_imports_leave_everything_as_it_was():
    def of_a_program(number, frame):
        raise KeyboardInterrupt

    for handler in (signal.default_int_handler, of_a_program, signal.SIG_IGN):
        before = signal.signal(signal.SIGINT, handler)
        try:
            with heavy_imports():
                assert not gc.isenabled()
                assert (signal.getsignal(signal.SIGINT) is handler) == (handler is not signal.default_int_handler)
            assert gc.isenabled() and signal.getsignal(signal.SIGINT) is handler
        finally:
            signal.signal(signal.SIGINT, before)
    gc.unfreeze()


def test_imports_in_another_thread_are_left_alone():
    failures = []

    def work():
        try:
            with heavy_imports():
                pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
    gc.unfreeze()


@pytest.mark.parametrize("text", ["0", "65", "-1", "1.5", "x", "", "nan", "٣", "9" * 5000, "1e3"])
def test_whole_numbers_of_commands(text):
    assert whole_number(1, 64)(" 7") == 7
    with pytest.raises(argparse.ArgumentTypeError, match="whole number within 1 .. 64"):
        whole_number(1, 64)(text)


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "1e400", "x", ""])
def test_numbers_of_commands(text):
    assert real_number(0, 2)("1e-1") == 0.1
    with pytest.raises(argparse.ArgumentTypeError, match="number within 0 .. 2"):
        real_number(0, 2)(text)


@pytest.mark.parametrize("text", ["", "0", "1e3", "-1", "9" * 400, "1K", "nan", "٣", "1 k", "0.0001k"])
def test_numbers_of_tokens(text):
    assert [number_of_tokens(each) for each in ("20000", "500k", "1.5M", "1B")] == [20_000, 500_000, 1_500_000, 10**9]
    with pytest.raises(UserError, match="written 20000, 500k, 12M or 1B"):
        number_of_tokens(text)
