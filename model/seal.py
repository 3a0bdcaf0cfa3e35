"""A checkpoint's checksum, kept in the file itself: the comment of the zip archive it is.

So a file can be copied about without losing it, torch.load reads it as ever, and `unzip -z` shows
it. It covers every byte before it, the archive's directory too.
"""

import hashlib
import os
import zipfile
from pathlib import Path
from typing import BinaryIO

_TAG = b"sha256:"
_LENGTH = len(_TAG) + 2 * hashlib.sha256().digest_size
_ZIP_START, _ZIP_END, _ZIP_END_LENGTH = b"PK\x03\x04", b"PK\x05\x06", 22
_CHUNK = 1 << 20


def seal(file: BinaryIO) -> None:
    """Append the checksum to what torch.save has written. file: open for reading and writing."""
    size = file.seek(-2, os.SEEK_END) + 2
    file.write(_LENGTH.to_bytes(2, "little"))  # of the comment: the last field of a zip archive
    digest = _sha256(file, size)
    file.seek(size)
    file.write(_TAG + digest)


def damage(path: Path) -> str:
    """What is wrong with a file's bytes; empty if they are whole, or nothing vouches for them.

    A file without a seal, of older code or somebody else's, is checked by the CRC-32 of each record
    if it is a zip archive, and not at all otherwise.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _LENGTH))
        last = file.read()
        if last.startswith(_TAG) and len(last) == _LENGTH:
            whole = _sha256(file, size - _LENGTH) == last[len(_TAG) :]
            return "" if whole else "its bytes are not those of its checksum"
        file.seek(0)
        if file.read(len(_ZIP_START)) != _ZIP_START:
            return ""
    end = last[-_ZIP_END_LENGTH:]
    if not (end.startswith(_ZIP_END) and end.endswith(b"\0\0")):
        return "it is cut off, or its end is damaged"
    return _damaged_record(path)


def bomb(path: Path) -> str:
    """What would make the memory run out when this archive is read; empty if nothing does.

    torch.save stores records as they are, one after another. Nothing is said of other files.
    """
    if not zipfile.is_zipfile(path):
        return ""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except Exception as error:  # zipfile raises a different type for each kind of damage
        return f"a damaged archive ({type(error).__name__}: {str(error)[:120]})"
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        return "compressed records"
    claimed = sum(record.file_size for record in records)
    return f"records of {claimed:,} bytes" if claimed > path.stat().st_size else ""


def _damaged_record(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
    except Exception as error:  # zipfile raises a different type for each kind of damage
        return f"a damaged archive ({type(error).__name__}: {str(error)[:120]})"
    return f"its record {record} is damaged" if record else ""


def _sha256(file: BinaryIO, size: int) -> bytes:
    """Hexadecimal SHA-256 of the first bytes of a file."""
    digest = hashlib.sha256()
    file.seek(0)
    while size:
        chunk = file.read(min(size, _CHUNK))
        if not chunk:
            break
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest().encode()
