"""Writes small PDF files by hand, to give the reader what files in the wild hold."""

import hashlib
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

_PADDING = bytes.fromhex("28BF4E5E4E758A4164004E56FFFA01082E2E00B6D0683E802F0CA9FE6453697A")
_FILE_ID = b"0123456789abcdef"
_PERMISSIONS = -4


@dataclass(frozen=True)
class PageSpec:
    """A page: its content stream, and its entries in the language of PDF.

    Attributes:
        content: Operators that draw the page; the font is /F1.
        box: Left, bottom, right, top in points, as PDF code.
        entries: Further entries of the page's dictionary, such as "/Rotate 90".
        field: Value of a text field over the lower left 200 x 50 points, drawn only with its form.
        broken: The page's entry in the page tree points to a number in place of a dictionary.
    """

    content: str = ""
    box: str = "0 0 612 792"
    entries: str = ""
    field: str = ""
    broken: bool = False


def text(words: str, left: int = 72, bottom: int = 700, size: int = 24) -> str:
    """Operators that write a line of ASCII text."""
    return f"BT /F1 {size} Tf {left} {bottom} Td ({words}) Tj ET"


def rectangle(left: float, bottom: float, right: float, top: float, color: str = "1 0 0") -> str:
    """Operators that fill a rectangle, in points from the lower left."""
    return f"{color} rg {left} {bottom} {right - left} {top - bottom} re f"


def write_pdf(
    path: Path,
    pages: list[PageSpec],
    *,
    catalog: str = "",
    count: int | None = None,
    password: str | None = None,
) -> Path:
    """Write a file with these pages.

    Args:
        path: Where to.
        pages: At least one.
        catalog: Further entries of the catalogue, such as "/PageLabels << ... >>".
        count: What the page tree gives as the number of pages; by default the right number.
        password: What a reader must know (40-bit RC4); None does not encrypt.
    """
    first = 4  # After the catalogue, the page tree and the font, four objects per page.
    kids = " ".join(f"{first + 4 * number} 0 R" for number in range(len(pages)))
    fields = " ".join(f"{first + 4 * n + 2} 0 R" for n, page in enumerate(pages) if page.field)
    form = f"/AcroForm << /Fields [{fields}] /DR << /Font << /F1 3 0 R >> >> >>" if fields else ""
    count = len(pages) if count is None else count
    objects: list[tuple[str, bytes | None]] = [
        (f"<< /Type /Catalog /Pages 2 0 R {form} {catalog} >>", None),
        (f"<< /Type /Pages /Kids [{kids}] /Count {count} >>", None),
        ("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>", None),
    ]
    for number, page in enumerate(pages):
        this = first + 4 * number
        widgets = f"/Annots [{this + 2} 0 R]" if page.field else ""
        objects.append(
            (
                f"<< /Type /Page /Parent 2 0 R /MediaBox [{page.box}] /Contents {this + 1} 0 R "
                f"/Resources << /Font << /F1 3 0 R >> >> {widgets} {page.entries} >>"
                if not page.broken
                else "7",
                None,
            )
        )
        objects.append(("<<", page.content.encode()))
        objects.append(
            (
                "<< /Type /Annot /Subtype /Widget /FT /Tx /F 4 /T (field) /Rect [0 0 200 50] "
                f"/DA (/F1 24 Tf 0 g) /V ({page.field}) /AP << /N {this + 3} 0 R >> >>"
                if password is None and page.field
                else "null",
                None,
            )
        )
        drawn = f"/Tx BMC {text(page.field, 5, 15)} EMC".encode()
        resources = "/Resources << /Font << /F1 3 0 R >> >>"
        objects.append((f"<< /Subtype /Form /BBox [0 0 200 50] {resources}", drawn))
    path.write_bytes(_file(objects, password))
    return path


def _file(objects: list[tuple[str, bytes | None]], password: str | None) -> bytes:
    """The bytes of a file; an object is its dictionary, open if a stream follows."""
    trailer = f"/Size {len(objects) + 1} /Root 1 0 R"
    key = None
    if password is not None:
        key, owner, user = _encryption(password.encode("latin-1"))
        trailer += (
            f" /ID [<{_FILE_ID.hex()}> <{_FILE_ID.hex()}>] /Encrypt << /Filter /Standard /V 1 /R 2 "
            f"/O <{owner.hex()}> /U <{user.hex()}> /P {_PERMISSIONS} >>"
        )
    chunks = [b"%PDF-1.7\n"]
    for number, (dictionary, stream) in enumerate(objects, 1):
        body = dictionary.encode("latin-1")
        if stream is not None:
            if key is not None:
                stream = _rc4(_object_key(key, number), stream)
            body += b" /Length %d >>\nstream\n%b\nendstream" % (len(stream), stream)
        chunks.append(b"%d 0 obj\n%b\nendobj\n" % (number, body))
    *starts, end = accumulate(map(len, chunks))
    table = "".join(f"{start:010d} 00000 n \n" for start in starts)
    head = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    chunks.append(f"{head}trailer\n<< {trailer} >>\nstartxref\n{end}\n%%EOF\n".encode())
    return b"".join(chunks)


def _encryption(password: bytes) -> tuple[bytes, bytes, bytes]:
    """Key, /O and /U of the standard security handler, revision 2, without an owner password."""
    padded = (password + _PADDING)[:32]
    owner = _rc4(hashlib.md5(padded).digest()[:5], padded)
    permissions = _PERMISSIONS.to_bytes(4, "little", signed=True)
    key = hashlib.md5(padded + owner + permissions + _FILE_ID).digest()[:5]
    return key, owner, _rc4(key, _PADDING)


def _object_key(key: bytes, number: int) -> bytes:
    return hashlib.md5(key + number.to_bytes(3, "little") + b"\0\0").digest()[: len(key) + 5]


def _rc4(key: bytes, data: bytes) -> bytes:
    state, j = list(range(256)), 0
    for i in range(256):
        j = (j + state[i] + key[i % len(key)]) % 256
        state[i], state[j] = state[j], state[i]
    out, i, j = bytearray(), 0, 0
    for byte in data:
        i = (i + 1) % 256
        j = (j + state[i]) % 256
        state[i], state[j] = state[j], state[i]
        out.append(byte ^ state[(state[i] + state[j]) % 256])
    return bytes(out)
