"""Tars in a bucket: s3fs against a small server on loopback that speaks enough of S3 to be read."""

import http.server
import io
import re
import tarfile
import threading
import urllib.parse

import numpy as np
import pytest
from PIL import Image

from vlm_jax.data import sources
from vlm_jax.errors import ConfigError

OBJECTS: dict[str, bytes] = {}


class Bucket(http.server.BaseHTTPRequestHandler):
    """GET and HEAD of objects, with ranges, and lists of what a prefix holds."""

    protocol_version = "HTTP/1.1"
    ranges: list[str] = []

    def log_message(self, *_):
        pass

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "ETag": '"0"', **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path, _, query = self.path.partition("?")
        bucket, _, key = urllib.parse.unquote(path).lstrip("/").partition("/")
        asked = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        if not key:
            rows = "".join(f"<Contents><Key>{k}</Key><Size>{len(v)}</Size><ETag>0</ETag><LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"
                           for k, v in sorted(OBJECTS.items()) if k.startswith(asked.get("prefix", "")))
            self.answer(200, f"<ListBucketResult><Name>{bucket}</Name><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>".encode())
        elif key not in OBJECTS:
            self.answer(404, b"" if self.command == "HEAD" else b"<Error><Code>NoSuchKey</Code></Error>")
        elif match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            self.ranges.append(key)
            first, last, whole = int(match[1]), min(int(match[2]), len(OBJECTS[key]) - 1), len(OBJECTS[key])
            self.answer(206, OBJECTS[key][first:last + 1], Content_Range=f"bytes {first}-{last}/{whole}")
        else:
            self.answer(200, OBJECTS[key], Last_Modified="Mon, 01 Jan 2024 00:00:00 GMT", Accept_Ranges="bytes")

    do_HEAD = do_GET


@pytest.fixture
def bucket(monkeypatch):
    pytest.importorskip("s3fs", reason="s3fs is not installed (pip install -e '.[test]')")
    OBJECTS.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
                        "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    yield OBJECTS
    server.shutdown()
    server.server_close()


def tar(count, start):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for i in range(start, start + count):
            picture = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(picture, "PNG")
            for name, data in ((f"{i:03}.png", picture.getvalue()), (f"{i:03}.txt", f"caption {i}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def test_tars_are_read_from_a_bucket(bucket):
    bucket.update({"set/0.tar": tar(3, 0), "set/1.tar": tar(2, 3)})
    for spec in ("tars:s3://data/set/{0..1}.tar", "tars:s3://data/set/*.tar"):
        source = sources.open_source(spec)
        assert len(source) == 5 and [source[i]["text"] for i in (4, 0)] == [["caption 4"], ["caption 0"]]
    assert "set/1.tar" in Bucket.ranges
    with pytest.raises(FileNotFoundError):
        sources.open_source("tars:s3://data/none*.tar")


def test_a_protocol_without_its_package_is_named():
    with pytest.raises(ConfigError, match=r"oss://.*\.\[bucket\]|oss://.*ossfs"):
        sources.open_source("tars:oss://data/x.tar")
