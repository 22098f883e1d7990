"""Tars in a bucket: s3fs and gcsfs against small servers on loopback that speak enough to be read."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from tests import bucket
from vlm_jax.data import sources
from vlm_jax.errors import ConfigError


@pytest.fixture(params=bucket.PACKAGES)
def server(request):
    with bucket.serving(request.param) as found:
        found.address = f"{request.param}://data"
        yield found


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


def test_tars_are_read_from_a_bucket(server):
    server.objects.update({"set/0.tar": tar(3, 0), "set/1.tar": tar(2, 3)})
    for spec in (f"tars:{server.address}/set/{{0..1}}.tar", f"tars:{server.address}/set/*.tar"):
        source = sources.open_source(spec)
        assert len(source) == 5 and [source[i]["text"] for i in (4, 0)] == [["caption 4"], ["caption 0"]]
    assert "set/1.tar" in server.ranges
    with pytest.raises(FileNotFoundError):
        sources.open_source(f"tars:{server.address}/none*.tar")


def test_a_protocol_without_its_package_is_named():
    with pytest.raises(ConfigError, match=r"oss://.*\.\[bucket\]|oss://.*ossfs"):
        sources.open_source("tars:oss://data/x.tar")
