"""Reading a batch: every source, every rule, and one sentence for every failure."""

import io
import json
import os
import pickle
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from normwise.explain.formats import READERS
from normwise.explain.load import as_batch, load_batch

WORKED = torch.tensor([[2, 4, 6], [3, 5, 7], [1, 3, 5], [4, 6, 8]], dtype=torch.float64)
TWO = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.float64)
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def refused(*words, call=load_batch, **arguments):
    """The message of the refusal: one line, one sentence, with these words in it."""
    source = arguments.pop("source", None)
    with pytest.raises(ValueError, match=r"\A[^\n]+\.\Z") as caught:
        call(str(source) if isinstance(source, Path) else source, **arguments)
    message = str(caught.value)
    assert type(caught.value) is ValueError
    assert message.isprintable()
    assert not [word for word in words if word not in message], message
    return message


def batch_or_sentence(call):
    """A finite batch comes, or one sentence; nothing else."""
    try:
        values, error = call().values, None
    except ValueError as caught:
        values, error = None, caught
    if values is None:
        assert type(error) is ValueError
        assert str(error).isprintable()
    else:
        assert values.dim() >= 2
        assert values.numel() > 0
        assert values.isfinite().all()


def same(values, expected):
    assert values.dtype == expected.dtype
    assert values.shape == expected.shape
    assert torch.equal(values.nan_to_num(12.5), expected.nan_to_num(12.5))


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read_text(text, **arguments):
    return load_batch("-", stdin=io.StringIO(text), **arguments)


def save(path, values):
    """Write a tensor to a file in the way of its suffix."""
    match path.suffix:
        case ".pt" | ".pth":
            torch.save(values, path)
        case ".safetensors":
            safetensors.torch.save_file({"x": values.contiguous()}, path)
        case ".npy":
            np.save(path, values.numpy())
        case ".npz":
            np.savez(path, x=values.numpy())
        case ".json":
            path.write_text(json.dumps(values.tolist()))
        case _:
            path.write_text("\n".join(",".join(map(repr, row)) for row in values.tolist()) + "\n")
    return path


@pytest.mark.parametrize("preset", [None, "worked"])
def test_worked_batch(preset):
    batch = load_batch(preset=preset)
    same(batch.values, WORKED)
    assert (batch.name, batch.notes, batch.feature_names) == ("worked batch", (), ())


def test_broken_symmetry_differs_in_the_last_value():
    batch = load_batch(preset="broken-symmetry")
    assert batch.name == "broken-symmetry"
    assert batch.values[3, 2] == 14
    assert (batch.values != WORKED).sum() == 1


def test_presets_are_fresh_each_time():
    load_batch().values.zero_()
    same(load_batch().values, WORKED)


def test_wrong_preset():
    refused("worked, broken-symmetry", "'nope'", preset="nope")


def test_source_and_preset():
    refused("'[[1]]'", "'worked'", "drop one", source="[[1]]", preset="worked")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_dtype_must_be_floating(dtype):
    refused("float64, float32, bfloat16, float16", str(dtype).removeprefix("torch."), dtype=dtype)


def test_key_needs_names(tmp_path):
    refused("worked batch", "--key 'x'", key="x")
    refused("--key", source="[[1]]", key="x")
    refused("--key", source=save(tmp_path / "a.npy", TWO), key="x")
    refused("--key", source=save(tmp_path / "a.csv", TWO), key="x")


def test_batch_is_frozen():
    with pytest.raises(AttributeError):
        load_batch().name = "other"


@pytest.mark.parametrize("source", [3, b"[1]", [[1, 2]], WORKED])
def test_a_source_of_a_wrong_type_is_a_value_error(source):
    with pytest.raises(ValueError, match="batch"):
        load_batch(source)


def test_literal():
    batch = load_batch("  [[2, 4.5], [-3e2, 5]] ")
    same(batch.values, torch.tensor([[2, 4.5], [-300, 5]], dtype=torch.float64))
    assert (batch.name, batch.notes) == ("literal", ())


def test_flat_literal_is_one_sample():
    batch = load_batch("[2,4,6]")
    same(batch.values, torch.tensor([[2.0, 4, 6]], dtype=torch.float64))
    assert batch.notes == ("read as one sample of 3 features",)
    assert load_batch("[2]").notes == ("read as one sample of 1 feature",)


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 1, 3, 2)])
def test_deeper_literal(shape):
    expected = torch.arange(float(np.prod(shape)), dtype=torch.float64).reshape(shape)
    same(load_batch(json.dumps(expected.tolist())).values, expected)


@pytest.mark.parametrize(
    ("literal", "words"),
    [
        ("[[1,2,3],[4,5]]", "row 2 has 2 values, row 1 has 3 values"),
        ("[[1],[2],[3,4]]", "row 3 has 2 values, row 1 has 1 value;"),
        ("[[[1],[2]],[[3],[4,5]]]", "row 2.2 has 2 values, row 1.1 has 1 value"),
        ("[[[1],[2]],[[3]]]", "row 2 has 1 value, row 1 has 2 values"),
        ("[[1,2],3]", "row 2 is no list, row 1 has 2 values"),
        ("[1,[2]]", "row 2 has 1 value, row 1 is no list"),
        ("[[1],[]]", "row 2 has 0 values"),
    ],
)
def test_ragged_literal(literal, words):
    refused("literal: ", words, source=literal)


@pytest.mark.parametrize(
    ("literal", "words"),
    [
        ('[[1,2],[3,"x\\ny"]]', "row 2, value 2 is 'x\\ny'"),
        ("[[1,2],[null,3]]", "row 2, value 1 is None"),
        ("[[1,true]]", "row 1, value 2 is True"),
        ("[false]", "value 1 is False"),
        ('[{"a": 1}]', "value 1 is {'a': 1.0}"),
        ('[[[1,2],[3,"4"]]]', "row 1.2, value 2 is '4'"),
    ],
)
def test_literal_holds_numbers_only(literal, words):
    refused("every entry must be a number", words, source=literal)


@pytest.mark.parametrize("literal", ["[]", "[[]]", "[[],[]]", "[[[]]]"])
def test_empty_literal(literal):
    refused("at least one sample and one feature", source=literal)


@pytest.mark.parametrize(
    ("literal", "column"), [("[[1,2", 6), ("[1,2]]", 6), ("[1 2]", 4), ("[__import__('os')]", 2), ("[1,]", 4), ("[", 2)]
)
def test_malformed_literal(literal, column):
    message = refused("literal: ", "line 1", source=literal)
    assert abs(int(re.search(r"column (\d+)", message)[1]) - column) <= 1  # Python versions place a comma differently


@pytest.mark.parametrize("depth", [70, 100_000])
def test_absurd_nesting(depth):
    refused(source="[" * depth + "1" + "]" * depth)


@pytest.mark.parametrize("number", ["1e400", "-1e400", "1" + "0" * 400, "1" * 5000])
def test_a_number_beyond_float64(number):
    refused("must fit float64", number[:8], source=f"[[1, {number}]]", allow_nonfinite=True)


def test_literal_of_lone_surrogates():
    refused("UTF-8", source='["\udce9"]')


def test_nonfinite_is_refused_with_its_place():
    refused("2 of 4 are NaN or inf", "nan at s0, f1", "--allow-nonfinite", source="[[1, NaN], [Infinity, 2]]")
    refused("1 of 2 is NaN or inf", "-inf at s0, f1", source="[[1, -Infinity]]")
    refused("nan at (1, 0, 1)", "counted from 0", source="[[[1, 2]], [[3, NaN]]]")


def test_nonfinite_is_allowed_on_request():
    values = load_batch("[[1, NaN], [-Infinity, 2]]", allow_nonfinite=True).values
    assert values[0, 1].isnan()
    assert values[1, 0] == -torch.inf
    values = read_text("1,nan\n-inf,2\n", allow_nonfinite=True).values
    assert values[0, 1].isnan()
    assert values[1, 0] == -torch.inf


@pytest.mark.parametrize("dtype", FLOATS)
def test_nonfinite_in_every_type(tmp_path, dtype):
    path = save(tmp_path / "a.pt", torch.tensor([[1, torch.nan]], dtype=dtype))
    refused("a.pt: ", "s0, f1", source=path)
    assert load_batch(str(path), allow_nonfinite=True).values.dtype == dtype


@pytest.mark.parametrize("dtype", FLOATS)
def test_conversion(dtype):
    batch = load_batch(dtype=dtype)
    same(batch.values, WORKED.to(dtype))
    name = str(dtype).removeprefix("torch.")
    assert batch.notes == (() if dtype == torch.float64 else (f"float64 converted to {name}",))


def test_conversion_that_overflows():
    refused("must fit float16", "70000.0", source="[[1, 70000]]", dtype=torch.float16)
    refused("must fit float32", "1e+300", source="[[1, 1e300]]", dtype=torch.float32)
    refused("must fit bfloat16", "3.4028234", source="[[3.4028234663852886e38]]", dtype=torch.bfloat16)
    values = load_batch("[[Infinity, 7]]", dtype=torch.float16, allow_nonfinite=True).values
    assert values.tolist() == [[torch.inf, 7]]


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_torch_files_keep_their_type(tmp_path, suffix, dtype):
    same(load_batch(str(save(tmp_path / f"a{suffix}", TWO.to(dtype)))).values, TWO.to(dtype))


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_numpy_files_keep_their_type(tmp_path, suffix, dtype):
    same(load_batch(str(save(tmp_path / f"a{suffix}", TWO.to(dtype)))).values, TWO.to(dtype))


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">i4"])
def test_integers_become_float64(tmp_path, dtype):
    np.save(tmp_path / "a.npy", TWO.numpy().astype(dtype))
    batch = load_batch(str(tmp_path / "a.npy"))
    same(batch.values, TWO)
    assert batch.notes == ("integers read as float64",)


def test_integer_tensors_become_float64(tmp_path):
    torch.save(TWO.to(torch.int32), tmp_path / "a.pt")
    batch = load_batch(str(tmp_path / "a.pt"), dtype=torch.float32)
    same(batch.values, TWO.float())
    assert batch.notes == ("integers read as float64", "float64 converted to float32")


def test_longdouble(tmp_path):
    np.save(tmp_path / "a.npy", TWO.numpy().astype(np.longdouble))
    batch = load_batch(str(tmp_path / "a.npy"))
    same(batch.values, TWO)
    wide = np.dtype(np.longdouble).itemsize > 8
    assert batch.notes == (("longdouble read as float64",) if wide else ())


@pytest.mark.skipif(np.finfo(np.longdouble).maxexp <= 1024, reason="longdouble is no wider than float64 here")
def test_longdouble_that_overflows(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[1, np.longdouble("1e4000")]]))
    refused("must fit float64", "1e+4000", source=tmp_path / "a.npy")


@pytest.mark.parametrize("dtype", ["?", "c8", "c16", "S3", "U3", "M8[s]", "m8[s]", "V4", [("a", "f4"), ("b", "f4")]])
def test_numpy_types_that_are_no_real_numbers(tmp_path, dtype):
    np.save(tmp_path / "a.npy", np.zeros((2, 3), dtype=dtype))
    refused("a.npy: must hold real numbers", source=tmp_path / "a.npy")


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_torch_types_that_are_no_supported_numbers(tmp_path, dtype):
    torch.save(torch.zeros(2, 3).to(dtype), tmp_path / "a.pt")
    refused("a.pt: must hold real numbers", str(dtype).removeprefix("torch."), source=tmp_path / "a.pt")


@pytest.mark.parametrize("layout", ["fortran", "big endian", "strided"])
def test_memory_layout_does_not_matter(tmp_path, layout):
    array = TWO.numpy()
    array = {"fortran": np.asfortranarray(array), "big endian": array.astype(">f8"), "strided": array[::-1, ::2]}[
        layout
    ]
    np.save(tmp_path / "a.npy", array)
    values = load_batch(str(tmp_path / "a.npy")).values
    same(values, torch.tensor(array.tolist(), dtype=torch.float64))
    assert values.is_contiguous()


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
def test_number_of_dimensions(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    refused("one number, 5.0", source=save(path, torch.tensor(5.0)))
    batch = load_batch(str(save(path, torch.ones(3))))
    assert batch.values.shape == (1, 3)
    assert batch.notes[-1] == "read as one sample of 3 features"
    for shape in [(0,), (0, 3), (3, 0), (2, 0, 2)]:
        refused("at least one sample and one feature", str(shape), source=save(path, torch.ones(shape)))
    assert load_batch(str(save(path, torch.ones(2, 3, 4, 5)))).values.shape == (2, 3, 4, 5)


@pytest.mark.parametrize(
    "text",
    [
        "1,2,3\n4,5,6\n",
        "1,2,3\n4,5,6",
        "1;2;3\n4;5;6\n",
        "1\t2\t3\n4\t5\t6\n",
        "1 2   3\n 4 5 6 \n",
        " 1, 2, 3 \n4 ,5 ,6\n",
        "1,2,3\r\n4,5,6\r\n",
        "1,2,3\r4,5,6\r",
        "\ufeff1,2,3\n4,5,6\n",
        "# a comment\n\n1,2,3  # here too\n   \n4,5,6\n#\n",
        "+1.0,2e0,.3e1\n4.,5,6\n",
        '"1","2","3"\n4,"5",6\n',
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".TSV", ".Txt"])
def test_csv(tmp_path, text, suffix):
    batch = load_batch(str(write(tmp_path / f"a{suffix}", text)))
    same(batch.values, TWO)
    assert (batch.name, batch.notes, batch.feature_names) == (f"a{suffix}", (), ())


@pytest.mark.parametrize(
    ("header", "names"),
    [
        ("a,b,c", ("a", "b", "c")),
        ('"a, x", b ,c', ("a, x", "b", "c")),
        (",b,c", ("", "b", "c")),
        ("\ufeffa,b,c", ("a", "b", "c")),
    ],
)
def test_csv_header(header, names):
    batch = read_text(f"{header}\n# here\n1,2,3\n4,5,6\n")
    same(batch.values, TWO)
    assert batch.feature_names == names
    assert len(batch.notes) == 1
    assert batch.notes[0].startswith("header line '")
    assert batch.notes[0].endswith("' skipped")


def test_csv_header_note_quotes_the_line():
    assert read_text("a,b,c\n1,2,3\n").notes == ("header line 'a,b,c' skipped",)


def test_csv_single_column_and_single_line():
    assert read_text("1\n2\n3\n").values.shape == (3, 1)
    assert read_text("h\n1\n2\n").feature_names == ("h",)
    batch = read_text("1,2,3\n")
    assert batch.values.shape == (1, 3)
    assert batch.notes == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1,2\n3,x\n", "line 2, column 2 is 'x'"),
        ("# c\n\na,b\n1,2\n3,oops # no\n", "line 5, column 2 is 'oops'"),
        ("a,b\nc,d\n1,2\n", "line 2, column 1 is 'c'"),
        ("1,x\n3,4\n", "line 1, column 2 is 'x'"),
        ("1,2\n3,\n", "line 2, column 2 is empty"),
        ("1,2,\n3,4,\n", "line 1, column 3 is empty"),
        ("1,2\n3,1_0\n", "'1_0'"),
        ("1,2\n3,4+5j\n", "'4+5j'"),
        ("1,2\n3,0x10\n", "'0x10'"),
        ("1,2\n3,NA\n", "write nan"),
        ("1,2\n3,True\n", "'True'"),
        ("1,2\n3,\x00\n", "line 2, column 2"),
    ],
)
def test_csv_text_where_a_number_should_be(text, words):
    refused("stdin: every value must be a number", words, source="-", stdin=io.StringIO(text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1,2,3\n4,5\n", "line 2 has 2, line 1 has 3"),
        ("1,2\n\n# c\n3\n", "line 4 has 1, line 1 has 2"),
        ("1\n2,3\n", "line 2, column 1 is '2,3'"),
        ("a,b\n1,2,3\n4,5,6\n", "line 2 has 3, line 1 has 2"),
        ("1 2\n3 4 5\n", "line 2 has 3, line 1 has 2"),
    ],
)
def test_csv_ragged(text, words):
    refused(words, source="-", stdin=io.StringIO(text))


@pytest.mark.parametrize("text", ['"1,5","2,5"\n"3,5","4"\n', "1,5;2,5\n3,5;4\n", "a;b\n1;2,5\n", "1;2\n3;4,5\n"])
def test_csv_decimal_comma(text):
    refused("decimal comma", "write 1.5, not 1,5", source="-", stdin=io.StringIO(text))


@pytest.mark.parametrize("number", ["1e999", "-1e999"])
def test_csv_number_beyond_float64(number):
    refused("must fit float64", number, source="-", stdin=io.StringIO(f"1,{number}\n"), allow_nonfinite=True)


@pytest.mark.parametrize("text", ["a,b\n", "# only a comment\n", "\ufeff", "a\n\n"])
def test_csv_without_numbers(tmp_path, text):
    refused("at least one sample and one feature", source=write(tmp_path / "a.csv", text))


@pytest.mark.parametrize("content", [b"\xff\xfe1\x00,\x002\x00", b"1,2\n3,\xe9\n", "[1]".encode("utf-16")])
@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_text_must_be_utf8(tmp_path, content, suffix):
    refused("UTF-8", "position", source=write(tmp_path / f"a{suffix}", content))


def test_json_file(tmp_path):
    batch = load_batch(str(write(tmp_path / "a.JSON", "\ufeff[[1,2,3],[4,5,6]]\n")))
    same(batch.values, TWO)
    assert (batch.name, batch.notes) == ("a.JSON", ())


def test_json_object(tmp_path):
    batch = load_batch(str(write(tmp_path / "a.json", '{"about": "x", "n": 2, "x": [[1,2,3],[4,5,6]]}')))
    same(batch.values, TWO)
    assert batch.notes == ("array 'x' of a.json",)
    path = write(tmp_path / "b.json", '{"x": [[1]], "y": [[2]]}')
    refused("it holds 2: 'x', 'y'", "--key", source=path)
    refused("none named 'z'", "'x', 'y'", source=path, key="z")
    assert load_batch(str(path), key="y").values.item() == 2
    refused("holds 0", source=write(tmp_path / "c.json", '{"x": 1}'))
    refused("row 1, value 2 is 'a'", source=write(tmp_path / "d.json", '{"x": [[1, "a"]]}'))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("5", "one number, 5.0"),
        ('"text"', "str"),
        ("null", "NoneType"),
        ("true", "bool"),
        ("[[1,\n2", "line 2"),
        ("hello", "line 1, column 1"),
    ],
)
def test_json_that_is_no_batch(tmp_path, text, words):
    refused("a.json: ", words, source=write(tmp_path / "a.json", text))


def test_stdin_of_text_and_bytes():
    for stream in (
        io.StringIO("1,2,3\n4,5,6"),
        io.BytesIO(b"1,2,3\n4,5,6"),
        io.BytesIO(b"\xef\xbb\xbf [[1,2,3],[4,5,6]]"),
    ):
        batch = load_batch("-", stdin=stream)
        same(batch.values, TWO)
        assert (batch.name, batch.notes) == ("stdin", ())
    assert read_text('{"x": [1, 2]}').notes == ("array 'x' of stdin", "read as one sample of 2 features")


def test_stdin_by_default(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"[[1,2,3],[4,5,6]]")))
    same(load_batch("-").values, TWO)
    monkeypatch.setattr(sys, "stdin", io.StringIO("1 2 3\n4 5 6"))
    same(load_batch("-").values, TWO)


@pytest.mark.parametrize("content", ["", "  \n\n"])
def test_stdin_empty(content):
    refused("stdin: ", "it is empty", source="-", stdin=io.StringIO(content))


def test_stdin_that_fails():
    class Broken(io.RawIOBase):
        def read(self, size=-1):
            raise OSError(5, "Input/output error")

    refused("stdin: ", "Input/output error", source="-", stdin=Broken())


def test_digits(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    write(tmp_path / "digits", "1,2,3")
    monkeypatch.chdir(tmp_path)
    batch = load_batch("digits")
    assert batch.values.shape == (8, 64)
    assert batch.values.dtype == torch.float64
    assert (batch.name, batch.notes) == ("digits", ())
    refused("no suffix", source="./digits")


def test_digits_without_sklearn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    message = refused(source="digits")
    assert message.startswith("digits: needs scikit-learn; install it with: pip install 'normwise[lab]'")


def save_several(path, **arrays):
    match path.suffix:
        case ".npz":
            np.savez(path, **{name: array.numpy() for name, array in arrays.items()})
        case ".safetensors":
            safetensors.torch.save_file(arrays, path)
        case _:
            torch.save(arrays, path)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt", ".pth"])
def test_choosing_an_array(tmp_path, suffix):
    one = load_batch(str(save_several(tmp_path / f"one{suffix}", x=TWO)))
    same(one.values, TWO)
    assert one.notes == (f"array 'x' of one{suffix}",)
    path = save_several(tmp_path / f"two{suffix}", x=TWO, y=WORKED)
    same(load_batch(str(path), key="y").values, WORKED)
    refused("it holds 2", "'x', 'y'", "choose one with --key NAME", source=path)
    refused("none named 'z'", source=path, key="z")
    refused("holds 0", source=save_several(tmp_path / f"none{suffix}"))
    many = save_several(tmp_path / f"many{suffix}", **{f"a{i}": TWO.clone() for i in range(300)})
    assert len(refused("it holds 300", "...", source=many)) < 300


def test_torch_dict_counts_its_tensors_only(tmp_path):
    torch.save({"epoch": 3, "acts": TWO, "args": {"lr": 0.1}}, tmp_path / "a.pt")
    same(load_batch(str(tmp_path / "a.pt")).values, TWO)
    torch.save({0: TWO, 1: WORKED}, tmp_path / "a.pt")
    same(load_batch(str(tmp_path / "a.pt"), key="1").values, WORKED)


def test_torch_parameter_is_detached(tmp_path):
    torch.save(torch.nn.Parameter(TWO.clone()), tmp_path / "a.pt")
    values = load_batch(str(tmp_path / "a.pt")).values
    same(values, TWO)
    assert not values.requires_grad


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        ([TWO, TWO], "tensor"),
        ("text", "str"),
        (torch.eye(3).to_sparse(), "dense"),
        (torch.ones(2, 3, device="meta"), "dense"),
    ],
)
def test_torch_things_that_are_no_dense_tensor(tmp_path, thing, words):
    torch.save(thing, tmp_path / "a.pt")
    refused("a.pt: ", words, source=tmp_path / "a.pt")


def test_torch_legacy_format(tmp_path):
    torch.save(TWO, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    same(load_batch(str(tmp_path / "a.pt")).values, TWO)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["torch", "torch legacy", "torch dict", "pickle"])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".npy", ".npz"])
def test_a_pickle_is_never_run(tmp_path, recwarn, monkeypatch, how, suffix):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    made, path = tmp_path / "made", tmp_path / f"a{suffix}"
    match how:
        case "pickle":
            path.write_bytes(pickle.dumps(Evil(made)))
        case "torch dict":
            torch.save({"x": TWO, "y": Evil(made)}, path)
        case _:
            torch.save(Evil(made), path, _use_new_zipfile_serialization=how == "torch")
    message = refused(f"a{suffix}: ", source=path)
    assert "nothing in it was run" in message or suffix == ".npz" or how.startswith("torch")
    refused(source=path, key="y")
    assert not made.exists()
    assert not recwarn.list
    pickle.loads(pickle.dumps(Evil(made)))
    assert made.exists(), "the pickle would have run"


def test_a_pickled_module_says_that_nothing_was_run(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    refused("Python objects", "nothing in it was run", source=tmp_path / "a.pt")


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_object_arrays(tmp_path, suffix):
    made, array = tmp_path / "made", np.empty((1, 1), dtype=object)
    array[0, 0] = Evil(made)
    path = tmp_path / f"a{suffix}"
    np.save(path, array, allow_pickle=True) if suffix == ".npy" else np.savez(path, x=array)
    refused("Python objects", "nothing in it was run", source=path)
    assert not made.exists()


def test_torchscript_is_refused_quietly(tmp_path, recwarn):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/constants.pkl", b"")
        archive.writestr("a/version", b"3")
    refused("a.pt: ", source=tmp_path / "a.pt")
    assert not recwarn.list


def test_missing_file(tmp_path):
    write(tmp_path / "acts.npy", "")
    refused("acst.npy: ", "none of this name", "did you mean", "acts.npy'", source=tmp_path / "acst.npy")
    assert "did you mean" not in refused("other.csv: ", source=tmp_path / "other.csv")
    refused("none of this name", source=tmp_path / "nowhere" / "a.csv")
    refused("none of this name", "[[1, 2], [3, 4]]", source="2,4,6")


def test_directory(tmp_path):
    (tmp_path / "a.csv").mkdir()
    for source in (tmp_path, tmp_path / "a.csv", "/", ".", ".."):
        refused("is a directory", source=source)
    refused("it is empty; leave it out", source="")


def test_permission(tmp_path, monkeypatch):
    path = write(tmp_path / "a.csv", "1,2")

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", denied)
    refused("a.csv: ", "Permission denied", source=path)


@pytest.mark.parametrize("source", ["a\0.csv", "x" * 5000 + ".csv", "a\nb.csv", "\udce9.csv", "\x1b[31m.csv"])
def test_impossible_paths(source):
    refused(source=source)


@pytest.mark.parametrize("suffix", READERS)
@pytest.mark.parametrize("content", [b"", b"\n"])
def test_empty_file(tmp_path, suffix, content):
    refused(f"a{suffix}: ", "it is empty", source=write(tmp_path / f"a{suffix}", content))


@pytest.mark.parametrize("name", ["a.xlsx", "a", "a.csv.gz", "a.py", ".csv"])
def test_unknown_suffix(tmp_path, name):
    refused(*READERS, source=write(tmp_path / name, "1,2"))


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".pth", ".safetensors"])
def test_truncated_and_damaged_files(tmp_path, suffix):
    whole = save(tmp_path / f"whole{suffix}", torch.randn(30, 7, dtype=torch.float64)).read_bytes()
    path = tmp_path / f"a{suffix}"
    for length in [1, 2, 8, 9, 20, 64, 127, 128, 129, len(whole) // 2, len(whole) - 1]:
        refused(f"a{suffix}: must be ", source=write(path, whole[:length]))
    for content in (
        b"garbage",
        b"\x00" * 200,
        b"PK\x03\x04" + b"x" * 50,
        b"\x93NUMPY\x01\x00",
        b"\x80\x04.",
        os.urandom(500),
    ):
        refused(f"a{suffix}: ", source=write(path, content))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(suffix=st.sampled_from(list(READERS)), place=st.floats(0, 1), byte=st.binary(min_size=1, max_size=4))
def test_a_flipped_byte_never_leaks_another_exception(tmp_path, suffix, place, byte):
    content = bytearray(save(tmp_path / f"whole{suffix}", torch.ones(4, 3)).read_bytes())
    start = int(place * (len(content) - 1))
    content[start : start + len(byte)] = byte
    path = write(tmp_path / f"a{suffix}", bytes(content))
    batch_or_sentence(lambda: load_batch(str(path)))


@pytest.mark.parametrize("rows", [10**10, 10**17, 2**62, 2**70, -1])
def test_lying_numpy_header(tmp_path, rows):
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({rows}, 3), }}"
    header += " " * (117 - len(header)) + "\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + b"\x00" * 96
    refused("a.npy: must ", "damaged", source=write(tmp_path / "a.npy", content))


def test_lying_safetensors_header(tmp_path):
    for size in (2**62, 2**30, 5):
        refused(source=write(tmp_path / "a.safetensors", size.to_bytes(8, "little") + b'{"x":1}'))


def test_out_of_memory(tmp_path, monkeypatch):
    def exhausted(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(np, "load", exhausted)
    refused("must fit in memory", source=save(tmp_path / "a.npy", TWO))


def test_interrupt_passes(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "load", interrupted)
    path = str(save(tmp_path / "a.npy", TWO))
    with pytest.raises(KeyboardInterrupt):
        load_batch(path)


def test_names_on_the_screen_are_printable(tmp_path):
    path = write(tmp_path / "a\n\x1b[31m.csv", "x\x1b,y\n1,2\n")
    batch = load_batch(str(path))
    assert batch.name.isprintable()
    assert all(text.isprintable() for text in (*batch.notes, *batch.feature_names))


def test_damage_keeps_its_cause(tmp_path):
    with pytest.raises(ValueError, match="cut short") as caught:
        load_batch(str(write(tmp_path / "a.npy", b"\x93NUMPY\x01\x00")))
    assert caught.value.__cause__ is not None


FINITE = st.floats(allow_nan=False, allow_infinity=False)
SHAPES = hnp.array_shapes(min_dims=2, max_dims=4, max_side=4)


@pytest.mark.parametrize("suffix", [".json", ".npy", ".npz", ".safetensors", ".pt", ".pth"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(array=hnp.arrays(np.float64, SHAPES, elements=FINITE))
def test_round_trip(tmp_path, suffix, array):
    values = torch.from_numpy(array)
    same(load_batch(str(save(tmp_path / f"a{suffix}", values))).values, values)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", " "])
@pytest.mark.parametrize("quote", ["", '"'])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(array=hnp.arrays(np.float64, hnp.array_shapes(min_dims=2, max_dims=2), elements=st.floats()))
def test_csv_round_trip(delimiter, quote, array):
    if delimiter == " ":
        quote = ""
    text = "\n".join(delimiter.join(f"{quote}{value!r}{quote}" for value in row) for row in array.tolist())
    same(read_text(text, allow_nonfinite=True).values, torch.from_numpy(array))


@settings(max_examples=25, deadline=None)
@given(array=hnp.arrays(np.float64, SHAPES, elements=FINITE))
def test_literal_round_trip(array):
    same(load_batch(json.dumps(array.tolist())).values, torch.from_numpy(array))


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from('0123456789.,;-+e \t\n"#anif[]{}:x')))
def test_any_text_is_a_batch_or_a_sentence(text):
    batch_or_sentence(lambda: read_text(text))


@pytest.mark.parametrize(
    "x",
    [
        TWO,
        TWO.numpy(),
        TWO.tolist(),
        [[1, 2, 3], [4, 5, 6]],
        ((1, 2, 3), (4, 5, 6)),
        [np.array([1, 2, 3]), torch.tensor([4, 5, 6])],
        TWO.numpy()[::-1][::-1],
        TWO.T.contiguous().T,
        TWO.clone().requires_grad_(),
    ],
)
def test_as_batch(x):
    batch = as_batch(x, "mine", ["a note"], feature_names=["a", "b", "c"])
    same(batch.values, TWO)
    assert not batch.values.requires_grad
    assert (batch.name, batch.notes, batch.feature_names) == ("mine", ("a note",), ("a", "b", "c"))


def test_as_batch_of_a_read_only_array(recwarn):
    array = TWO.numpy().copy()
    array.flags.writeable = False
    same(as_batch(array, "mine").values, TWO)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("x", "words"),
    [
        ([[1, 2], [3]], "row 2 has 1 value, row 1 has 2 values"),
        ([[1, True]], "True"),
        ([[10**400]], "must fit float64"),
        ([[1 + 2j]], "(1+2j)"),
        (np.array([["a"]]), "<U1"),
        ({"a": 1}, "dict"),
        (None, "NoneType"),
        (5, "one number"),
        ([], "at least one"),
        (torch.eye(3).to_sparse(), "dense"),
        ([[1, float("nan")]], "s0, f1"),
    ],
)
def test_as_batch_refuses(x, words):
    refused("mine: ", words, call=lambda source: as_batch(x, "mine"))


def test_speed(tmp_path):
    """About ten times what it takes here, so that only a change of kind fails."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "a.npy", rng.standard_normal((10_000, 768), dtype=np.float32))
    np.savetxt(tmp_path / "a.csv", rng.standard_normal((10_000, 100)), delimiter=",")
    for name, limit in (("a.npy", 0.5), ("a.csv", 5.0)):
        start = time.perf_counter()
        load_batch(str(tmp_path / name))
        assert time.perf_counter() - start < limit


def test_sklearn_is_imported_only_where_it_is_used():
    code = "import sys, normwise.explain.load as m; m.load_batch(); print('sklearn' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
