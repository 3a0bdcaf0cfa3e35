"""How a program ends: its exit code, and one message instead of a traceback."""

import errno
import pickle
import subprocess
import sys

import pytest
from conftest import ROOT

from common.errors import InputError, run_main


def exit_with(error: BaseException | None, capsys, show=None) -> tuple[int, str]:
    """Exit code and stderr of a program whose main function raises the error."""

    def main():
        if error:
            raise error

    with pytest.raises(SystemExit) as caught:
        run_main(main, show)
    return caught.value.code, capsys.readouterr().err


def test_bad_input_prints_its_four_parts_and_exits_with_2(capsys):
    code, text = exit_with(InputError("a.h5", "nothing", "a file", "fetch it"), capsys)
    assert code == 2
    assert " ".join(text.split()) == ("error: a.h5 found: nothing expected: a file next: fetch it")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_forbidden_or_full_place_is_one_message(number, capsys):
    code, text = exit_with(OSError(number, "reason", "/some/where"), capsys)
    assert code == 2 and "/some/where" in text and "reason" in text and "next:" in text


def test_ctrl_c_prints_a_sentence_and_exits_with_130(capsys):
    code, text = exit_with(KeyboardInterrupt(), capsys)
    assert code == 130 and text.strip() == "Interrupted; complete files are kept."


@pytest.mark.parametrize("error", [ZeroDivisionError(), OSError(errno.EIO, "odd")])
def test_other_errors_keep_their_traceback(error, capsys):
    with pytest.raises(type(error)):
        exit_with(error, capsys)


def test_an_error_crosses_a_process_boundary_unchanged():
    error = InputError("a", "b", "c", "d")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_the_message_is_printed_only_by_the_process_that_shall_show_it(capsys):
    asked: list[str] = []
    error = InputError("a", "b", "c", "d")
    assert exit_with(error, capsys, lambda text: bool(asked.append(text))) == (2, "")
    assert asked == [str(error)]


def test_a_closed_pipe_is_silent():
    code = (
        "from common.errors import run_main\n"
        "def main():\n"
        "    while True:\n"
        "        print('line')\n"
        "run_main(main)"
    )
    words = f'{sys.executable} -c "{code}" | head -n 1'
    done = subprocess.run(["bash", "-c", words], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("line\n", "")
