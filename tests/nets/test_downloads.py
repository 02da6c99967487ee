"""src.nets.downloads: weights by address, from a server on this machine."""

import hashlib
import http.server
import io
import logging
import threading
import urllib.request

import pytest
import torch

from src.errors import CheckpointError
from src.nets import downloads
from src.nets.weights import read_weights


def contents_of(value):
    memory = io.BytesIO()
    torch.save({"state_dict": {"a": torch.full((3000,), value)}}, memory)
    return memory.getvalue()


class Server(http.server.BaseHTTPRequestHandler):
    """Files by path; of paths below /short/ all bytes but the last ten come."""

    files, asked = {}, []

    def do_GET(self):
        self.asked.append(self.path)
        content = self.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:-10] if self.path.startswith("/short/") else content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """(address of a server, its files by path, paths that were asked for); TORCH_HOME is empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(Server, "files", {})
    monkeypatch.setattr(Server, "asked", [])
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", Server.files, Server.asked
        httpd.shutdown()
        thread.join()


def with_checksum(address, content):
    return f"{address}#sha256={hashlib.sha256(content).hexdigest()}"


def copies(tmp_path):
    return sorted(path.name for path in (tmp_path / "home").rglob("*") if path.is_file())


def test_addresses_that_end_alike_have_a_copy_each_which_the_log_names(server, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    address, files, asked = server
    for i, folder in enumerate("abab"):
        files[f"/{folder}/checkpoint.pth"] = contents_of("ab".index(folder) + 1.0)
        url = f"{address}/{folder}/checkpoint.pth"
        weights = read_weights(with_checksum(url, files[f"/{folder}/checkpoint.pth"]))
        assert weights["a"][0] == "ab".index(folder) + 1
        kept = next((tmp_path / "home").rglob(f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-*"))
        assert kept.name.endswith("-checkpoint.pth") and str(kept) in caplog.messages[-1]
        assert url in caplog.messages[-1] and ("before" in caplog.messages[-1]) == (i > 1)
    assert asked == ["/a/checkpoint.pth", "/b/checkpoint.pth"]
    assert len(copies(tmp_path)) == 2


def test_what_is_not_encrypted_needs_a_checksum(server, tmp_path):
    address, files, asked = server
    files["/a.pth"] = contents_of(1.0)
    with pytest.raises(ValueError, match="not encrypted.*https.*#sha256="):
        read_weights(f"{address}/a.pth")
    with pytest.raises(ValueError, match="can only be a checksum"):
        read_weights(f"{address}/a.pth#md5=00")
    assert asked == []
    with pytest.raises(CheckpointError, match="another checksum"):
        read_weights(with_checksum(f"{address}/a.pth", b"else"))
    assert copies(tmp_path) == []


def test_encryption_is_not_given_up_on_the_way(server, tmp_path, monkeypatch):
    address, files, _ = server
    files["/a.pth"] = contents_of(1.0)
    open_url = urllib.request.urlopen
    monkeypatch.setattr(
        urllib.request, "urlopen", lambda url, timeout: open_url(f"{address}/a.pth", None, timeout)
    )
    with pytest.raises(CheckpointError, match="leads to http://.*not encrypted"):
        read_weights("https://example.org/a.pth")
    assert copies(tmp_path) == []


def test_damaged_downloads_are_refused_and_not_kept(server, tmp_path):
    address, files, _ = server
    good = contents_of(1.0)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    files["/flipped.pth"], files["/half.pth"] = bytes(flipped), good[: len(good) // 2]
    files["/page.pth"], files["/short/a.pth"] = b"<html>sign in</html>", good
    for name, words in (
        ("flipped.pth", "is damaged"),
        ("half.pth", "is damaged"),
        ("page.pth", "is a web page"),
        ("short/a.pth", "came with .* of its"),
        ("none.pth", "cannot be downloaded .*404"),
    ):
        url = with_checksum(f"{address}/{name}", files.get(f"/{name}", b""))
        with pytest.raises(CheckpointError, match=words) as error:
            read_weights(url)
        assert "\n" not in str(error.value)
    assert copies(tmp_path) == []


def test_a_damaged_copy_is_fetched_again(server, tmp_path, caplog):
    address, files, asked = server
    files["/a.pth"] = contents_of(1.0)
    url = with_checksum(f"{address}/a.pth", files["/a.pth"])
    copy = downloads.fetch(url)
    copy.write_bytes(copy.read_bytes()[:100])
    assert read_weights(url)["a"][0] == 1 and len(asked) == 2
    assert "downloading it again" in caplog.text


def test_a_server_that_is_not_there_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match="cannot be downloaded"):
        read_weights("http://127.0.0.1:1/a.pth#sha256=" + "0" * 64)
