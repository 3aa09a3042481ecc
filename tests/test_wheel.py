"""What the wheel holds is enough: presets, sweeps and images load from it, outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = """
import diffscale, sys
from pathlib import Path
from diffscale.config.load import load_experiment, preset_names
from diffscale.config.factory import open_training_data
assert Path(diffscale.__file__).is_relative_to(sys.argv[1]), diffscale.__file__
assert preset_names() and preset_names("sweeps")
data = open_training_data(load_experiment("quickstart-unet", ["storage=" + sys.argv[2], "data.resolution=16"]))
print(data.n, data.resolution)
"""


def test_presets_and_images_load_from_an_installed_wheel(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    assert not [n for n in names if not n.startswith(("diffscale/", "diffscale-"))]
    environment = os.environ | {"PYTHONPATH": str(site)}
    arguments = [sys.executable, "-c", PROGRAM, str(site), str(tmp_path / "storage")]
    run = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["1692", "16"]
