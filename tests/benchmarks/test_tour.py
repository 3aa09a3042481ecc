"""The notebook goes from a folder of images to a report and an exported model, with every cell as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

TOUR = Path(__file__).parents[2] / "benchmarks" / "tour.ipynb"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_cell_runs_and_shows_its_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With little training; the folder and the number of images are the notebook's own settings."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("TOUR_FOLDER", str(tmp_path / "tour"))
    monkeypatch.setenv("TOUR_IMAGES", "640")
    monkeypatch.setenv("PYTHONPATH", str(TOUR.parents[1]))
    notebook = nbformat.read(TOUR, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 4, "the images, the samples of two runs, the plot"
    assert (tmp_path / "tour" / "report" / "index.html").exists()
    assert (tmp_path / "tour" / "model" / "model.safetensors").exists()


def test_the_notebook_is_committed_without_outputs() -> None:
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")
