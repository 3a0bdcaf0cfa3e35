"""How a program ends: its exit code, and one message instead of a traceback."""

import errno

import pytest

from common.errors import InputError, run_main


def ending(error: BaseException | None, capsys) -> tuple[int, str]:
    def main():
        if error:
            raise error

    with pytest.raises(SystemExit) as left:
        run_main(main)
    return left.value.code, capsys.readouterr().err


def test_bad_input_prints_its_four_parts_and_leaves_with_2(capsys):
    code, text = ending(InputError("a.h5", "nothing", "a file", "fetch it"), capsys)
    assert code == 2
    assert " ".join(text.split()) == ("error: a.h5 found: nothing expected: a file next: fetch it")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_forbidden_or_full_place_is_one_message(number, capsys):
    code, text = ending(OSError(number, "reason", "/some/where"), capsys)
    assert code == 2 and "/some/where" in text and "reason" in text and "next:" in text


def test_control_c_leaves_a_sentence_and_130(capsys):
    code, text = ending(KeyboardInterrupt(), capsys)
    assert code == 130 and text.strip() == "Interrupted; files that were complete are kept."


def test_success_leaves_with_0_and_silence(capsys):
    assert ending(None, capsys) == (0, "")


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 // 0)
    with pytest.raises(OSError, match="odd"):
        run_main(lambda: (_ for _ in ()).throw(OSError(errno.EIO, "odd")))


def test_an_error_survives_a_process_boundary():
    import pickle

    error = InputError("a", "b", "c", "d")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
