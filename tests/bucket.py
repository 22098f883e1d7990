"""Buckets on loopback: as much of S3, and of Google's JSON API, as s3fs and gcsfs ask for to read, write, list and delete, conditional writes among it."""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import re
import threading
import urllib.parse

import pytest

S3_KEYS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}


def tag(data):
    return f'"{hashlib.md5(data).hexdigest()}"'


class Exists(Exception):
    """A conditional write came too late."""


class Answers(http.server.BaseHTTPRequestHandler):
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

    def store(self, key, data, fresh):
        """Writes an object, ``fresh``: that may not be there. Raises Exists, PermissionError, ConnectionError for one who has to wait in vain."""
        server = self.server
        if server.hold and re.search(server.hold, key):
            server.held.set()
            server.released.wait()
            self.close_connection = True
            raise ConnectionError
        if server.refuse:
            raise PermissionError
        with server.lock:
            if fresh and key in server.objects:
                raise Exists
            server.objects[key] = data
            server.writes.append(key)

    def send(self, key):
        """An object, or the part of it that was asked for."""
        data = self.server.objects.get(key)
        if data is None:
            self.answer(404, b"" if self.command == "HEAD" else b"<Error><Code>NoSuchKey</Code></Error>")
        elif match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2]), len(data) - 1)
            self.server.ranges.append(key)
            self.answer(206, data[first:last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}", ETag=tag(data))
        else:
            self.answer(200, data, Last_Modified="Mon, 01 Jan 2024 00:00:00 GMT", Accept_Ranges="bytes")

    def listed(self, prefix, cut):
        """Names of objects below ``prefix``, and of what is cut there: folders."""
        names = sorted(k for k in list(self.server.objects) if k.startswith(prefix))
        return ([k for k in names if not (cut and cut in k[len(prefix):])],
                sorted({prefix + k[len(prefix):].split(cut)[0] + cut for k in names if cut and cut in k[len(prefix):]}))

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


class S3(Answers):
    def target(self):
        path, _, query = self.path.partition("?")
        bucket, _, key = urllib.parse.unquote(path).lstrip("/").partition("/")
        return bucket, key, dict(urllib.parse.parse_qsl(query, keep_blank_values=True))

    def do_GET(self):
        bucket, key, asked = self.target()
        if key:
            self.send(key)
            return
        objects = self.server.objects
        names, below = self.listed(asked.get("prefix", ""), asked.get("delimiter"))
        rows = "".join(f"<Contents><Key>{k}</Key><Size>{len(data)}</Size><ETag>{tag(data)}</ETag><LastModified>2024-01-01T00:00:00.000Z</LastModified>"
                       "</Contents>" for k in names if (data := objects.get(k)) is not None)
        rows += "".join(f"<CommonPrefixes><Prefix>{k}</Prefix></CommonPrefixes>" for k in below)
        self.answer(200, f"<ListBucketResult><Name>{bucket}</Name><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>".encode())

    do_HEAD = do_GET

    def do_PUT(self):
        _, key, _ = self.target()
        try:
            self.store(key, self.body(), self.headers.get("If-None-Match") == "*")
        except Exists:
            self.answer(412, b"<Error><Code>PreconditionFailed</Code><Message>At least one of the pre-conditions did not hold</Message></Error>")
        except PermissionError:
            self.answer(403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
        except ConnectionError:
            pass
        else:
            self.answer(200)

    def do_DELETE(self):
        _, key, _ = self.target()
        self.server.objects.pop(key, None)
        self.answer(204)


class GCS(Answers):
    """Objects have no generations but 0: not there."""
    page = 5      # rows of a listing, so that there are several

    def target(self):
        path, _, query = self.path.partition("?")
        found = re.fullmatch(r"(?:/upload|/download)?/storage/v1/b/([^/]+)/o(?:/(.+))?", path)
        return found[1], urllib.parse.unquote(found[2] or ""), dict(urllib.parse.parse_qsl(query, keep_blank_values=True))

    def say(self, status, content, **headers):
        self.answer(status, json.dumps(content).encode(), Content_Type="application/json", **headers)

    def told(self, bucket, key, data):
        return {"kind": "storage#object", "name": key, "bucket": bucket, "size": str(len(data)), "etag": tag(data).strip('"'),
                "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode()}

    def do_GET(self):
        bucket, key, asked = self.target()
        objects = self.server.objects
        if key and asked.get("alt") == "media":
            self.send(key)
        elif key and key in objects:
            self.say(200, self.told(bucket, key, objects[key]))
        elif key:
            self.say(404, {"error": {"code": 404, "message": "No such object"}})
        else:
            names, below = self.listed(asked.get("prefix", ""), asked.get("delimiter"))
            rows, first = [*below, *names], int(asked.get("pageToken", 0))
            page = rows[first:first + self.page]
            items = [self.told(bucket, k, data) for k in page if k in names and (data := objects.get(k)) is not None]
            self.say(200, {"kind": "storage#objects", "items": items, "prefixes": [k for k in page if k in below],
                           **({"nextPageToken": str(first + self.page)} if len(rows) > first + self.page else {})})

    def do_POST(self):
        bucket, _, asked = self.target()
        uploads, data = self.server.uploads, self.body()
        if asked["uploadType"] == "multipart":
            edge = b"--" + re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            about, content = data.split(edge, 2)[1:]
            content = content[:content.rindex(b"\n" + edge)].split(b"\n\n", 1)[1]
            self.written(bucket, json.loads(about.split(b"\n\n", 1)[1])["name"], content, asked)
        elif "upload_id" not in asked:
            number = str(len(uploads))
            uploads[number] = [asked, b""]
            self.answer(200, Location=f"http://{self.headers['Host']}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}")
        else:
            first, last, size = map(int, re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", self.headers["Content-Range"]).groups())
            begun, before = uploads[asked["upload_id"]]
            assert first == len(before) and last + 1 == first + len(data)
            uploads[asked["upload_id"]][1] = before + data
            if last + 1 < size:
                self.answer(308, Range=f"bytes=0-{last}")
            else:
                self.written(bucket, begun["name"], before + data, begun)

    def written(self, bucket, key, data, asked):
        try:
            self.store(key, data, asked.get("ifGenerationMatch") == "0")
        except Exists:
            self.say(412, {"error": {"code": 412, "message": "At least one of the pre-conditions you specified did not hold."}})
        except PermissionError:
            self.say(403, {"error": {"code": 403, "message": "Access denied"}})
        except ConnectionError:
            pass
        else:
            self.say(200, self.told(bucket, key, data))

    def do_DELETE(self):
        _, key, _ = self.target()
        self.answer(204 if self.server.objects.pop(key, None) is not None else 404)


PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}


@contextlib.contextmanager
def serving(store="s3"):
    """The server of "s3" or "gs", with ``objects`` (key -> bytes), and ``writes`` and ``ranges`` as they came; ``environment`` names it, here and
    for processes. Where ``hold`` (a regex) finds a key that is being written, ``held`` is set, and nobody is answered until ``released``, nor
    anything written; ``refuse``: no write is allowed."""
    import fsspec

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), {"s3": S3, "gs": GCS}[store])
    server.objects, server.writes, server.ranges, server.lock, server.uploads = {}, [], [], threading.Lock(), {}
    server.refuse, server.hold, server.held, server.released = False, "", threading.Event(), threading.Event()
    address = f"http://127.0.0.1:{server.server_port}"
    names = {"s3": {**S3_KEYS, "AWS_ENDPOINT_URL": address},
             # its look at kinds of buckets speaks another protocol
             "gs": {"STORAGE_EMULATOR_HOST": address, "FSSPEC_GS_TOKEN": "anon", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}}[store]
    server.environment = names
    before, conf = {name: os.environ.get(name) for name in names}, dict(fsspec.config.conf)
    os.environ.update(names)
    fsspec.config.set_conf_env(fsspec.config.conf)
    pytest.importorskip(PACKAGES[store], reason=f"{PACKAGES[store]} is not installed (pip install -e '.[test]')")
    fsspec.get_filesystem_class(store).clear_instance_cache()      # they know the server of another test
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        fsspec.config.conf.clear()
        fsspec.config.conf.update(conf)
        server.shutdown()
        server.server_close()
