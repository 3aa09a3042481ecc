"""Makes the embedded images: `python -m diffscale.data.build.embed_emoji EMOJI.tgz GROUPS.tgz`.

EMOJI.tgz is `npm pack @lobehub/fluent-emoji-3d@1.1.0`, GROUPS.tgz is `npm pack unicode-emoji-json@0.9.0`.
Every emoji without a skin tone is centre-cropped to a square, put over white, resized to 64 x 64 (LANCZOS) and
stored as lossless WebP, with the Unicode emoji group as its class.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
from PIL import Image

RESOLUTION = 64
SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
UNSEEN = {"fe0f", "e007f"}  # variation selector, end of a flag's tag: absent from some file names
TARGET = Path(__file__).parents[1] / "assets" / "emoji.arrow"


def code_points(stem: str) -> tuple[str, ...]:
    """Return the code points in a file name such as `00a9-fe0f`; the package has some emoji under two names."""
    parts = stem.replace("_", "-").split("-")
    return tuple(part.zfill(4) for part in parts if part not in UNSEEN)


def read_groups(archive: Path) -> dict[tuple[str, ...], tuple[str, str]]:
    """Return {code points: (group, name)}."""
    with tarfile.open(archive) as tar:
        file = tar.extractfile("package/data-by-emoji.json")
        assert file is not None
        table = json.load(file)
    return {
        code_points("-".join(f"{ord(character):04x}" for character in emoji)): (entry["group"], entry["name"])
        for emoji, entry in table.items()
    }


def shrink(data: bytes) -> bytes:
    """Return an RGBA image file as a lossless 64 x 64 WebP over white."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    small = canvas.convert("RGB").resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "WEBP", lossless=True, quality=100, method=6)
    return out.getvalue()


def main(emoji_archive: Path, group_archive: Path) -> None:
    """Write assets/emoji.arrow."""
    groups = read_groups(group_archive)
    class_names = sorted({group for group, _ in groups.values()})
    rows = []
    with tarfile.open(emoji_archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            stem = Path(member.name).stem
            file = tar.extractfile(member)
            if file is None or not member.name.endswith(".webp") or SKIN_TONES & set(stem.split("-")):
                continue
            group, name = groups[code_points(stem)]
            rows.append((shrink(file.read()), class_names.index(group), name, "-".join(code_points(stem))))
    images, labels, names, codes = zip(*rows, strict=True)
    table = pa.table(
        {
            "image": pa.array(images, pa.binary()),
            "label": pa.array(labels, pa.int64()),
            "name": pa.array(names, pa.string()),
            "code_points": pa.array(codes, pa.string()),
        }
    )
    table = table.replace_schema_metadata({"class_names": json.dumps(class_names), "resolution": str(RESOLUTION)})
    TARGET.parent.mkdir(exist_ok=True)
    with pa.OSFile(str(TARGET), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    print(f"{TARGET}: {len(rows)} images, {len(class_names)} classes, {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
