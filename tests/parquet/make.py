"""Rebuild the parquet files of this folder: `python tests/parquet/make.py`. Needs pyarrow; the versions are in texts.json.

Every file holds the same texts (texts.json; null is a null) in the column `text`, in three row groups of several small
pages each, between columns of other kinds. What differs is how the column is stored: its encoding, the version of its
pages, its compression, its type in Arrow. The names say it. `required_*` leave the nulls out. `brotli` is compressed in
a way that gradlens does not read, and `latin` holds bytes that are not UTF-8.
"""

import json
import platform
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent
GROUP_ROWS = 12

TEXTS = [
    "The first text is an ordinary sentence.", "", None, "Ein zweiter mit Umlauten: äöüß, und ein – Strich.",
    "日本語の文章もあります。", "emoji 🙂🙃, combining e\u0301, zero\u200bwidth, nul \u0000 inside", "  white space around it \t",
    "line one\nline two\r\nline three", "the same text", "the same text", "the same text, with more", None,
    # The second row group.
    "prefix shared by all of these: alpha", "prefix shared by all of these: alphabet", "prefix shared by all of these: beta",
    "", "", None, None, "long: " + "all work and no play makes a dull corpus; " * 30, "the same text",
    "{\"json\": \"inside\"}", "Привет, мир", "x",
    # The third, of fewer rows.
    None, "long and varied: " + " ".join(str(n * n % 9973) for n in range(300)), "", "the end", None,
]


def table(texts, text_type):
    rows = len(texts)
    text = pa.array(texts, pa.string())
    if pa.types.is_dictionary(text_type):
        text = text.dictionary_encode()
    elif text_type != pa.string():
        text = pa.array([None if t is None else t.encode() for t in texts], text_type) if text_type == pa.binary() \
            else pa.array(texts, text_type)
    columns = {
        "id": pa.array(range(rows), pa.int64()),
        "meta": pa.array([{"text": "no", "n": n} for n in range(rows)], pa.struct({"text": pa.string(), "n": pa.int32()})),
        "text": text,
        "tags": pa.array([["a"] * (n % 3) for n in range(rows)], pa.list_(pa.string())),
        "hash": pa.array([b"%04d" % n for n in range(rows)], pa.binary(4)),
    }
    fields = [pa.field(n, c.type, nullable=n != "text" or None in texts) for n, c in columns.items()]
    return pa.table(list(columns.values()), schema=pa.schema(fields))


def write(name, texts=TEXTS, *, text_type=pa.string(), page="1.0", encoding="PLAIN", compression="none", version="2.6"):
    dictionary = encoding == "DICTIONARY"
    pq.write_table(
        table(texts, text_type), HERE / f"{name}.parquet", row_group_size=GROUP_ROWS, version=version,
        data_page_version=page, compression=compression, data_page_size=200, write_batch_size=3,
        use_dictionary=["text"] if dictionary else False,
        column_encoding=None if dictionary else {"text": encoding},
        write_statistics=name != "plain_v2")


def main():
    for old in HERE.glob("*.parquet"):
        old.unlink()
    filled = [text for text in TEXTS if text is not None]
    for page in ("1.0", "2.0"):
        v = f"v{page[0]}"
        for encoding in ("PLAIN", "DICTIONARY", "DELTA_LENGTH_BYTE_ARRAY", "DELTA_BYTE_ARRAY"):
            short = encoding.lower().removesuffix("_byte_array")
            write(f"{short}_{v}", page=page, encoding=encoding)
            write(f"required_{short}_{v}", filled, page=page, encoding=encoding)
        for compression in ("snappy", "zstd", "gzip", "lz4"):
            write(f"{compression}_{v}", page=page, encoding="DICTIONARY", compression=compression)
    write("plain_dictionary", encoding="DICTIONARY", version="1.0")
    write("large_string", text_type=pa.large_string(), compression="snappy")
    write("string_view", text_type=pa.string_view(), compression="snappy")
    write("categories", text_type=pa.dictionary(pa.int32(), pa.string()), encoding="DICTIONARY", compression="zstd")
    write("binary", text_type=pa.binary(), encoding="DELTA_BYTE_ARRAY", compression="zstd")
    write("brotli", compression="brotli")
    latin = pa.table({"text": pa.array([b"good", b"also good", b"caf\xe9"], pa.binary())})
    pq.write_table(latin, HERE / "latin.parquet", row_group_size=2, compression="none")
    about = {"pyarrow": pa.__version__, "python": platform.python_version(), "group_rows": GROUP_ROWS, "texts": TEXTS}
    (HERE / "texts.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
