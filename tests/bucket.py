"""A bucket on loopback: as much of S3 as s3fs asks for to read, write, list and delete, conditional writes among it."""

import contextlib
import hashlib
import http.server
import os
import re
import threading
import urllib.parse

import pytest

KEYS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}


def tag(data):
    return f'"{hashlib.md5(data).hexdigest()}"'


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "ETag": tag(body), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def target(self):
        path, _, query = self.path.partition("?")
        bucket, _, key = urllib.parse.unquote(path).lstrip("/").partition("/")
        return bucket, key, dict(urllib.parse.parse_qsl(query, keep_blank_values=True))

    def do_GET(self):
        bucket, key, asked = self.target()
        objects = self.server.objects
        if not key:
            prefix, cut = asked.get("prefix", ""), asked.get("delimiter")
            names = sorted(k for k in list(objects) if k.startswith(prefix))
            below = sorted({prefix + k[len(prefix):].split(cut)[0] + cut for k in names if cut and cut in k[len(prefix):]})
            rows = "".join(f"<Contents><Key>{k}</Key><Size>{len(objects[k])}</Size><ETag>{tag(objects[k])}</ETag><LastModified>2024-01-01T00:00:00.000Z</LastModified>"
                           "</Contents>" for k in names if not (cut and cut in k[len(prefix):]) and k in objects)
            rows += "".join(f"<CommonPrefixes><Prefix>{k}</Prefix></CommonPrefixes>" for k in below)
            self.answer(200, f"<ListBucketResult><Name>{bucket}</Name><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>".encode())
            return
        data = objects.get(key)
        if data is None:
            self.answer(404, b"" if self.command == "HEAD" else b"<Error><Code>NoSuchKey</Code></Error>")
        elif match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2]), len(data) - 1)
            self.server.ranges.append(key)
            self.answer(206, data[first:last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}", ETag=tag(data))
        else:
            self.answer(200, data, Last_Modified="Mon, 01 Jan 2024 00:00:00 GMT", Accept_Ranges="bytes")

    do_HEAD = do_GET

    def do_PUT(self):
        _, key, _ = self.target()
        data = self.body()
        if self.server.hold and re.search(self.server.hold, key):
            self.server.held.set()
            self.server.released.wait()
            self.close_connection = True
            return
        if self.server.refuse:
            self.answer(403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
            return
        with self.server.lock:
            if self.headers.get("If-None-Match") == "*" and key in self.server.objects:
                self.answer(412, b"<Error><Code>PreconditionFailed</Code><Message>At least one of the pre-conditions did not hold</Message></Error>")
                return
            self.server.objects[key] = data
            self.server.writes.append(key)
        self.answer(200)

    def body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", "") and "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return self.rfile.read(int(self.headers["Content-Length"]))
        out = b""       # chunks of HTTP, or of S3 (whose sizes carry signatures), with trailers
        while size := int(self.rfile.readline().split(b";")[0], 16):
            out += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return out

    def do_DELETE(self):
        _, key, _ = self.target()
        self.server.objects.pop(key, None)
        self.answer(204)


@contextlib.contextmanager
def serving():
    """The server, with ``objects`` (key -> bytes), and ``writes`` and ``ranges`` as they came; the environment names it. Where ``hold`` (a regex)
    finds a key that is being written, ``held`` is set, and nobody is answered until ``released``, nor anything written; ``refuse``: no write is allowed."""
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed (pip install -e '.[test]')")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.objects, server.writes, server.ranges, server.lock = {}, [], [], threading.Lock()
    server.refuse, server.hold, server.held, server.released = False, "", threading.Event(), threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    s3fs.S3FileSystem.clear_instance_cache()      # they know the server of another test
    try:
        yield server
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        server.shutdown()
        server.server_close()
