"""Weights by address: fetched once, kept under a name of the address, refused when damaged."""

import hashlib
import http.client
import logging
import os
import re
import shutil
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

import torch

from ..errors import CheckpointError, cause

logger = logging.getLogger(__name__)

SECONDS = 60  # without a byte, after which a server is given up
CHECKSUM = re.compile(r"sha256=([0-9a-f]{8,64})")  # behind the # of an address
CHECKSUM_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.")  # of the files on PyTorch's own server
PYTORCH = "download.pytorch.org"


def fetch(address: str) -> Path:
    """The local copy of the file at an address, downloaded unless it is there already.

    address: https://..., or http://... with a checksum, which either may have: ...#sha256=<64 digits>,
    or the first 8 or more of them. Copies lie in hub/checkpoints of TORCH_HOME, as torch.hub's do, under
    a name with a hash of the address: two addresses that end alike have a copy each. Raises ValueError,
    and CheckpointError when the file cannot be had whole.
    """
    url, fragment = urllib.parse.urldefrag(address)
    parts = urllib.parse.urlsplit(url)
    checksum = CHECKSUM.fullmatch(fragment.lower())
    if fragment and checksum is None:
        raise ValueError(f"{address}: behind # can only be a checksum, #sha256=<64 digits>")
    if parts.scheme != "https" and checksum is None:
        raise ValueError(
            f"{address} is not encrypted, so that anybody on the way could change the weights: use https, "
            "or give the file's checksum as in http://...#sha256=<64 digits>"
        )
    name = Path(parts.path).name or "weights"
    if checksum is None and parts.hostname == PYTORCH:
        checksum = CHECKSUM_IN_NAME.search(name)
    digits = checksum[1] if checksum else ""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    if file.is_file():
        if (fault := _fault(file, digits)) is None:
            logger.info(f"{url} was downloaded before: using {file}")
            return file
        logger.warning(f"{file} {fault}: downloading it again")
    part = file.with_name(f"{file.name}.tmp-{os.getpid()}")
    try:
        _download(url, part, encrypted=parts.scheme == "https")
        if (fault := _fault(part, digits)) is not None:
            raise CheckpointError(f"{url} {fault}: nothing of it is kept")
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    logger.info(f"{url} is downloaded: using {file}")
    return file


def refuse_damaged(path: str | Path) -> None:
    """Raise CheckpointError if a file is an archive, as torch.save writes, whose checksums do not hold."""
    if (fault := archive_fault(path)) is not None:
        raise CheckpointError(f"{path} {fault}")


def _download(url, file, encrypted):
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=SECONDS) as response, open(file, "wb") as copy:
            if encrypted and urllib.parse.urlsplit(response.geturl()).scheme != "https":
                raise CheckpointError(f"{url} leads to {response.geturl()}, which is not encrypted")
            expected = response.headers.get("Content-Length")
            size = f"{int(expected) / 1e6:.0f} MB of " if expected else ""
            logger.info(f"downloading {size}{url}")
            shutil.copyfileobj(response, copy, 1 << 20)
    except CheckpointError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise CheckpointError(
            f"{url} cannot be downloaded to {file.parent} ({cause(error)})"
        ) from error
    got = os.path.getsize(file)
    if expected and got != int(expected):
        raise CheckpointError(
            f"{url} came with {got:,} of its {int(expected):,} bytes: nothing of it is kept"
        )


def _fault(path, digits):
    """archive_fault, of a file whose SHA-256 must begin with `digits`."""
    if digits:
        with open(path, "rb") as file:
            found = hashlib.sha256()
            while block := file.read(1 << 20):
                found.update(block)
        if not found.hexdigest().startswith(digits):
            return f"has another checksum, {found.hexdigest()}, than the expected {digits}"
    return archive_fault(path)


def archive_fault(path: str | Path) -> str | None:
    """What is wrong with a file of torch.save, in words after its name; None if nothing is, or is known.

    Every part of the archive has a checksum, which torch.load does not look at: a flipped bit would
    load as another weight. Reads the whole file; older formats have no checksums of their own.
    """
    with open(path, "rb") as file:
        start = file.read(4)
    if start.lstrip().startswith(b"<"):
        return "is a web page, not a file of weights"
    if start != b"PK\x03\x04":
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        return f"is damaged ({cause(error)})"
    return f"is damaged (in its part {damaged})" if damaged else None
