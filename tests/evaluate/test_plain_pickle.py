"""Pickles of plain values are read; those that ask for anything else are refused, nothing executed."""

import os
import pickle
import pickletools

import numpy as np
import pytest

from src.evaluate.plain_pickle import read_plain_pickle

GROUND_TRUTH = {
    "imlist": ["a_1", "b_2"],
    "gnd": [
        {
            "easy": np.array([1, 2], np.int64),
            "hard": np.array([], np.int64),
            "junk": [3],
            "bbx": np.array([[1.5, 2.0], [3.0, 4.0]], ">f4"),
            "box": np.asfortranarray(np.arange(6, dtype=np.uint16).reshape(2, 3)),
            "count": np.int32(7),
            "share": np.float64(0.25),
            "rest": (None, True, 2**70, "text", b"bytes"),
        }
    ],
}


class Calls:
    """An object whose pickle is a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def write(path, value, protocol=2):
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_and_arrays_of_any_protocol_are_read(tmp_path, protocol):
    found = read_plain_pickle(write(tmp_path / "a.pkl", GROUND_TRUTH, protocol), "--data_path")
    truth, made = GROUND_TRUTH["gnd"][0], found["gnd"][0]
    assert found["imlist"] == ["a_1", "b_2"]
    for name in ("easy", "hard", "bbx", "box"):
        assert made[name].dtype == truth[name].dtype
        np.testing.assert_array_equal(made[name], truth[name])
    assert [made[name] for name in ("junk", "count", "share", "rest")] == [
        *([3], 7, 0.25),
        truth["rest"],
    ]


def test_arrays_that_python_2_wrote_are_read(tmp_path):
    """Its strings are the bytes of arrays, of numpy.core as it was called then."""
    program = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        b"(I1\n(I2\ntcnumpy\ndtype\n(S'i8'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
        b"I00\nS'\\x05\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\xe9\\x00\\x00\\x00\\x00\\x00\\x00\\x00'\ntb."
    )
    (tmp_path / "old.pkl").write_bytes(program)
    assert read_plain_pickle(tmp_path / "old.pkl", "--data_path").tolist() == [5, 233]


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_malicious_pickle_is_refused_in_one_sentence_and_nothing_is_executed(tmp_path, protocol):
    trace = tmp_path / "trace"
    bad = {**GROUND_TRUTH, "extra": Calls(os.mkdir, str(trace))}
    path = write(tmp_path / "bad.pkl", bad, protocol)
    with pytest.raises(ValueError, match=r"bad.pkl asks for \w+.mkdir.*nothing of it was executed"):
        read_plain_pickle(path, "--data_path")
    assert not trace.exists()
    pickle.loads(path.read_bytes())  # noqa: S301
    assert trace.exists()  # it was malicious


@pytest.mark.parametrize(
    "program",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cbuiltins\ngetattr\n.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\nfromfile\n.",
        b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
        b"c_codecs\nencode\n.",  # a function on its own
        b"c_codecs\nencode\n}S'__code__'\nS'x'\nsb.",  # a change of it
        b"c_codecs\nencode\nN}S'function'\nS'x'\ns\x86b.",
        b"cnumpy\ndtype\n(S'O'\ntR.",
        b"S'id'\nQ.",  # a persistent object
        b"\x82\x01.",  # an extension
    ],
)
def test_what_no_array_needs_is_refused(tmp_path, program):
    pickletools.genops(program)
    (tmp_path / "bad.pkl").write_bytes(program)
    with pytest.raises(ValueError, match="bad.pkl"):
        read_plain_pickle(tmp_path / "bad.pkl", "--data_path")


@pytest.mark.parametrize("array", [np.array([{}, None]), np.array(["text"]), np.zeros(2, "i4,f4")])
def test_arrays_of_anything_but_numbers_are_refused(tmp_path, array):
    path = write(tmp_path / "bad.pkl", [array])
    with pytest.raises(ValueError, match="bad.pkl asks for an array of"):
        read_plain_pickle(path, "--data_path")


def test_an_array_that_claims_more_than_is_there_is_refused(tmp_path):
    program = pickle.dumps(np.zeros(3, np.int64), protocol=0).replace(
        b"(I3\ntp", b"(I9999999999\ntp"
    )
    (tmp_path / "bad.pkl").write_bytes(program)
    with pytest.raises(ValueError, match=r"shape \(9999999999,\) has 24 bytes"):
        read_plain_pickle(tmp_path / "bad.pkl", "--data_path")


def test_damaged_bytes_and_other_files_are_one_sentence(tmp_path):
    whole = pickle.dumps(GROUND_TRUTH)
    for number, data in enumerate([b"", b"not a pickle", whole[: len(whole) // 2], b"]K\x01a"]):
        path = tmp_path / f"{number}.pkl"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"{number}.pkl is no pickle of plain values"):
            read_plain_pickle(path, "--data_path")
    with pytest.raises(FileNotFoundError, match="there is no .*gone.pkl"):
        read_plain_pickle(tmp_path / "gone.pkl", "--data_path")


def test_values_within_themselves_and_shared_ones_are_read_once(tmp_path):
    value = [1]
    value.append(value)
    found = read_plain_pickle(write(tmp_path / "circle.pkl", value), "--data_path")
    assert found[0] == 1 and found[1] is found
    bomb = ["x"]
    for _ in range(60):  # of 2^60 texts, were shared lists made anew
        bomb = [bomb, bomb]
    found = read_plain_pickle(write(tmp_path / "bomb.pkl", bomb), "--data_path")
    assert found[0] is found[1]
