"""How values are written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.common.errors import ConfigError
from kvferry.common.values import counted, distance, nearest_of, parse_count, parse_number, parse_size, size_text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("4GiB", 4 * 2**30),
        ("512MiB", 512 * 2**20),
        (" 1.5 G ", 1_500_000_000),
        ("2k", 2000),
        ("3ki", 3072),
        ("1TiB", 2**40),
        ("7B", 7),
        ("0", 0),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e3", "4 gigs", "4GiBB", "1,5G", "inf", "0x10", "1..5G"])
def test_what_is_not_a_size(text):
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)


@given(st.integers(0, 2**60))
def test_sizes_read_back(size):
    assert parse_size(size_text(size)) == size


@pytest.mark.parametrize(("size", "text"), [(0, "0"), (1023, "1023"), (2**30, "1GiB"), (3 * 2**29, "1536MiB")])
def test_how_sizes_are_shown(size, text):
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("-3", -3),
        (" 512 ", 512),
        ("32K", 32768),
        ("32k", 32000),
        ("1.5K", 1536),
        ("2M", 2**21),
        ("1g", 10**9),
    ],
)
def test_counts(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "K", "1.5", "1e3", "32 K", "32KiB", "0x10", "1_000", "true", "nan"])
def test_what_is_not_a_count(text):
    with pytest.raises(ConfigError, match="is not a whole number"):
        parse_count(text)


@pytest.mark.parametrize(("text", "number"), [("2", 2.0), ("0.5", 0.5), ("1e-3", 0.001), ("-1", -1.0)])
def test_numbers(text, number):
    assert parse_number(text) == number


@pytest.mark.parametrize("text", ["", "soon", "5s", "inf", "nan", "1e999", "1,5"])
def test_what_is_not_a_number(text):
    with pytest.raises(ConfigError, match="is not a number"):
        parse_number(text)


def test_counted():
    assert [counted(number, "block") for number in (0, 1, 2)] == ["0 blocks", "1 block", "2 blocks"]


@pytest.mark.parametrize(
    ("one", "other", "far"),
    [("", "", 0), ("", "abc", 3), ("abc", "abc", 0), ("prot", "port", 1), ("kitten", "sitting", 3), ("ca", "abc", 3),
     ("abcd", "acbd", 1), ("abc", "ab", 1)],
)  # fmt: skip
def test_distance(one, other, far):
    assert distance(one, other) == distance(other, one) == far


FLAGS = ("--max-model-len", "--max-num-seqs", "--max-n", "--host", "--port", "--dtype", "--device", "--decode")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("--max-model-length", "--max-model-len"),
        ("--max_model_len", "--max-model-len"),
        ("--max-num-seq", "--max-num-seqs"),
        ("--prot", "--port"),
        ("--ports", "--port"),
        ("--DTYPE", "--dtype"),
        ("--devices", "--device"),
        ("--max-m", "--max-n"),
        ("--most", "--host"),
        ("--mast", None),
        ("--model", None),
        ("--max-log-len", None),
        ("--zzz", None),
        ("--p", None),
        ("--", None),
    ],
)
def test_the_name_that_was_meant(written, meant):
    assert nearest_of(written, FLAGS) == meant


def test_what_all_names_begin_with_brings_nobody_near():
    known = [f"KVFERRY_ROUTER_{name}" for name in ("HOST", "PORT", "ADMIN_PORT")]
    assert nearest_of("KVFERRY_ROUTER_PROT", known) == "KVFERRY_ROUTER_PORT"
    assert nearest_of("KVFERRY_ROUTER_NAME", known) is None
    assert nearest_of("anything", []) is None
